"""Records as runs write them, with figures made up."""

from typing import Any

from rmprune.measure.machine import environment


def network(accuracy: float, macs: int, ms: float) -> dict[str, Any]:
    latency = [
        {
            "backend": b,
            "device": "cpu",
            "threads": 2,
            "batch_size": n,
            "median_ms": ms * n,
            "q1_ms": ms * n * 0.9,
            "q3_ms": ms * n * 1.2,
        }
        for b in ("eager", "onnxruntime")
        for n in (1, 32)
    ]
    return {"accuracy": accuracy, "macs": macs, "params": macs // 100, "latency": latency}


def of_one_place(record: dict[str, Any]) -> dict[str, Any]:
    """The record with one time for each network: a figure of one panel."""
    for entry in record.values():
        if isinstance(entry, dict) and "latency" in entry:
            del entry["latency"][1:]
    return record


def example(**changes: Any) -> dict[str, Any]:
    return {
        "schema": 1,
        "command": "python -m rmprune slim",
        "config": {"model": "resnet20", "data": {"dataset": "digits"}, "macs_ratio": 0.5},
        "seed": 0,
        "method": "rm,coupled",
        "environment": environment(),
        "removal": {"removed": ["layer1.0"], "kept": {}, "max_error": 1e-15},
        "original": network(0.97, 1_000_000, 2.0),
        "plain": network(0.97, 2_000_000, 3.0),
        "pruned": network(0.968, 500_000, 1.0),
        "coupled": network(0.965, 500_000, 1.2),
    } | changes
