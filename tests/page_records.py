"""Records with all that a page can show: outlines, plans, searches, trainings, refusals; and names that would be markup."""

from pathlib import Path
from typing import Any

from rmprune.runs.records import write_record

METHODS = (
    "rm",
    "mixed-collapse",
    "residual",
    "coupled",
    "coupled-taylor",
    "inner",
    "uniform",
    "rm-collapse",
    "rm-slimming",
)
HOSTILE = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>"
PROFILE = [
    {"layer": "conv1", "operator": "Conv", "cin": 3, "cout": 8, "macs": 13824, "ms": 0.06, "share": 0.75},
    {
        "layer": f"/Flatten {HOSTILE}",
        "operator": "Flatten",
        "cin": None,
        "cout": None,
        "macs": None,
        "ms": 0.02,
        "share": 0.25,
    },
]
BLOCKS = ("layer1.0", "layer1.1", "layer2.0")


def write_runs(
    root: Path, seeds: int = 2, budgets: tuple[float, ...] = (0.5, 0.25), methods: tuple[str, ...] = METHODS
) -> Path:
    """A run of several seeds and budgets under `root`, and one of another network, from an older version, with a hostile name."""
    for seed in range(seeds):
        for budget in budgets:
            write_record(root / f"seed{seed}" / f"macs_ratio-{budget}" / "record.json", record(seed, budget, methods))
    older = record(0, 0.5, ("rm", HOSTILE)) | {"model": "older"}
    for name in ("original", "plain", "pruned", HOSTILE):
        del older[name]["layers"]
    del older["training"]
    older["refused"] = {HOSTILE: f"its limits forbid it {HOSTILE}"}
    write_record(root / "x-older" / "record.json", older)
    return root


def record(seed: int, budget: float, methods: tuple[str, ...]) -> dict[str, Any]:
    """A record of a network of three blocks, pruned by `methods` to `budget` of its MACs."""
    removal = {
        "removed": ["layer1.0", "layer1.1"],
        "kept": {"layer2.0": "its shortcut samples another grid"},
        "max_error": 1.2e-15,
    }
    made: dict[str, Any] = {
        "schema": 1,
        "command": f"python -m rmprune slim --macs-ratio {budget} --seed {seed}",
        "config": {"model": "resnet20", "data": {"dataset": "digits"}, "prune": {"macs_ratio": budget}},
        "seed": seed,
        "model": "resnet20",
        "dataset": "digits",
        "method": ",".join(methods),
        "budget": {"macs_ratio": budget},
        "environment": {"versions": {"torch": "2.14"}, "processor": "a processor", "cores": 2, "threads": 2},
        "removal": removal,
        "training": {
            name: [
                {"epoch": e + 1, "validation_accuracy": 0.5 + 0.1 * e, "train_loss": 1.0 / (e + 1)} for e in range(4)
            ]
            for name in ("dense", *methods[:3])
        },
        "original": network(0.97 + 0.002 * (seed % 2), 1_000_000, 2.0) | outline(16),
        "plain": network(0.97 + 0.002 * (seed % 2), 2_000_000, 3.6) | outline(24, left=("layer2.0",)),
    }
    for place, name in enumerate(methods):
        accuracy = 0.94 + 0.05 * budget - 0.003 * place + 0.004 * (seed % 2)
        entry = network(accuracy, int(1e6 * budget) - 1000 * place, 2 * budget + 0.05 * place) | {"method": name}
        made["pruned" if name == "rm" else name] = entry | plan(name, removal)
    return made


def plan(method: str, removal: dict[str, Any]) -> dict[str, Any]:
    """What the record says of a method's network besides its figures."""
    if method == "mixed-collapse":
        merged = {
            "removed": ["layer1_0"],
            "kept": {"layer1_1": "kept, as asked for", "layer2_0": "kept, as asked for"},
            "max_error": 3e-16,
        }
        return outline(8, left=("layer1.1", "layer2.0"), merged=("layer1.0",)) | {
            "removal": merged,
            "collapsed": {"layer1.0": 0.98},
        }
    if method == "coupled":
        return outline(8, left=("layer1.0", "layer1.1"), gone=("layer2.0",))
    if method == "inner":
        episodes = [{"reward": 0.5 + 0.01 * e, "source": "warm-up" if e < 5 else "agent"} for e in range(20)]
        widths = [{"group": "conv1", "kept": 8, "whole": 16}]
        return outline(8, left=BLOCKS) | {
            "search": {"method": "agent", "verified_ratio": 0.49, "episodes": episodes, "widths": widths}
        }
    if method.startswith("rm") or method == HOSTILE:
        return outline(8, left=("layer2.0",)) | {
            "removal": removal,
            "candidates": {"rm": {"loss": 0.5}},
            "chosen": "rm",
            "profile": {"backend": "onnxruntime", "threads": 1, "batch_size": 1, "layers": PROFILE},
        }
    return outline(8, left=BLOCKS)


def outline(
    width: int, left: tuple[str, ...] = BLOCKS, merged: tuple[str, ...] = (), gone: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Layers and residuals of the network of three blocks, where some are one convolution and some are gone."""
    layers, residuals = [layer("conv1", 1, width)], []
    for block in BLOCKS:
        if block in gone:
            continue
        start = len(layers) - 1
        names = [block.replace(".", "_") + "_conv"] if block in merged else [f"{block}.conv1", f"{block}.conv2"]
        layers += [layer(name, width, width) for name in names]
        if block in left:
            residuals.append({"from": start, "to": len(layers) - 1, "shortcut": []})
    return {"layers": [*layers, layer("fc", width, 10)], "residuals": residuals}


def layer(name: str, cin: int, cout: int) -> dict[str, Any]:
    return {
        "name": name,
        "type": "Conv2d",
        "size": [8, 8],
        "cin": cin,
        "cout": cout,
        "groups": 1,
        "kernel": [3, 3],
        "stride": [1, 1],
    }


def network(accuracy: float, macs: int, ms: float) -> dict[str, Any]:
    """A network's figures, measured with two backends on one and two threads, one image and 32 at a time."""
    latency = [
        {"backend": backend, "device": "cpu", "threads": threads, "batch_size": batch}
        | {"median_ms": time, "q1_ms": 0.95 * time, "q3_ms": 1.1 * time}
        for backend, speed in (("eager", 1.0), ("onnxruntime", 0.5))
        for threads in (1, 2)
        for batch in (1, 32)
        for time in [ms * speed * batch**0.9 / threads]
    ]
    return {
        "accuracy": accuracy,
        "macs": macs,
        "params": macs // 10,
        "activation_bytes": macs // 50,
        "latency": latency,
    }


def add_int8(*networks: dict[str, Any]) -> None:
    """The last place of measuring in int8 as well, where a quarter of the images goes wrong."""
    for one in networks:
        own = {"backend": "onnxruntime-int8", "number_format": "int8", "accuracy": one["accuracy"] - 0.25}
        one["latency"].append(one["latency"][-1] | own)
