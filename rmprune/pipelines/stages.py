"""What the pipelines share: one stage and its artifact, networks measured for a record, the device. No order of stages."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rmprune import artifact
from rmprune.config import MeasureConfig
from rmprune.data.load import Dataset
from rmprune.errors import ConfigError
from rmprune.measure import calibration_images, count_macs, count_params, measure_latencies, needs_calibration
from rmprune.training import evaluate


def stage(
    directory: Path, make: Callable[[], tuple[nn.Module, dict[str, Any]]], onnx: torch.Tensor | None = None
) -> nn.Module:
    """The network of a finished stage from its artifact, or made now and saved with its facts. A damaged one is refused first."""
    if directory.exists():
        return artifact.load(directory)
    model, facts = make()
    if onnx is not None:
        facts = {"input_shape": list(onnx.shape[1:])} | facts
    artifact.save(model, directory, example_inputs=onnx, extra=facts)
    return artifact.load(directory)


def with_weights(network: nn.Module, trained: nn.Module) -> nn.Module:
    """`network`, whose modules name its blocks, with the weights of its trained artifact, which is one flat graph."""
    network.load_state_dict(trained.state_dict())
    return network.eval()


def measure_networks(
    networks: dict[str, nn.Module], data: Dataset, config: MeasureConfig, device: torch.device
) -> dict[str, dict[str, Any]]:
    """Test accuracy (read here only), MACs, parameters and times of each network, as record entries."""
    example = data.test.example(1)
    latencies = measure_latencies(
        networks,
        example,
        backends=config.backends,
        threads=config.threads,
        batch_sizes=config.batch_sizes,
        device=config.device,
        seconds=config.seconds,
        min_rounds=config.min_rounds,
        reference="original",
        calibration=calibration_images(data.train) if needs_calibration(config.backends) else None,
        split=data.test,
    )
    return {
        name: {
            "accuracy": evaluate(model.to(device), data.test, device=device).accuracy,
            "macs": count_macs(model.cpu(), example),
            "params": count_params(model),
            "latency": [latency.to_dict() for latency in latencies[name]],
        }
        for name, model in networks.items()
    }


def pick_device(name: str) -> torch.device:
    """The device of this name; auto takes the GPU where there is one. Raises ConfigError where it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"unknown device {name!r}; use cpu, cuda, cuda:N or auto") from None
    if device.type not in ("cpu", "cuda") or (
        device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()
    ):
        raise ConfigError(f"device {name!r} is not on this machine; use cpu or auto")
    return device
