"""What `rmprune.slim` refuses of its call before anything is trained, in this order. What commands refuse stands with them."""

from __future__ import annotations

import inspect
import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rmprune import artifact
from rmprune.config import MeasureConfig, PruneConfig, TrainConfig
from rmprune.data.batches import Loss
from rmprune.data.given import GivenSplit
from rmprune.errors import ConfigError
from rmprune.graph.copied import copied
from rmprune.graph.foreign import plain_module
from rmprune.measure.backends import reduced
from rmprune.training.refuse import check_precision

_ALIKE = 1e-2  # relative, of one loss computed on two machines or in coarse formats
_KINDS: dict[str, Any] = {
    "finetune": TrainConfig,
    "prune": PruneConfig,
    "measure": MeasureConfig,
    "method": str,
    "out": str | Path,
    "device": str | torch.device,
}


def refuse_kinds(**arguments: object) -> None:
    """Raise ConfigError for the first of these arguments that is of another type than it should be; all but the device may be None."""
    for name, value in arguments.items():
        kind = _KINDS[name]
        if not isinstance(value, kind | None) or (name == "device" and value is None):
            raise ConfigError(f"{name} is of type {type(value).__name__}; give a {getattr(kind, '__name__', kind)}")


def refuse_loss_and_formats(loss: Loss | None, method: str | None, places: MeasureConfig) -> None:
    """Raise ConfigError for what a loss of one's own cannot judge, and for number formats that want images of our own."""
    if loss is not None and method in ("auto", "depth"):
        raise ConfigError(
            f"method {method!r} weighs blocks by class scores, and does not know a loss of one's own; take 'rm' or 'residual'"
        )
    if found := reduced(places.backends):
        raise ConfigError(
            f"{', '.join(found)} count accuracy on labelled images of our own; measure result.model there by measure_latencies"
        )


def trained_copy(model: nn.Module) -> nn.Module:
    """A copy of the network on the CPU. Raises ConfigError where it has no weights, too coarse ones, or is in training mode."""
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model is of type {type(model).__name__}; give the trained nn.Module")
    if not any(True for _ in model.parameters()):
        raise ConfigError(f"{type(model).__name__} has no weights; there is nothing to prune")
    takes = [
        name
        for name, each in inspect.signature(model.forward).parameters.items()
        if each.default is each.empty and each.kind.name[:3] != "VAR"
    ]
    if len(takes) > 1:
        raise ConfigError(
            f"forward of {type(model).__name__} takes {', '.join(takes)}; slim takes networks of one input, model(images): make one tensor "
            "of them (torch.cat), and take it apart in forward"
        )
    if model.training:
        raise ConfigError(f"{type(model).__name__} is in training mode; give a trained network, after model.eval()")
    check_precision(model.parameters())
    return copied(plain_module(model)).cpu()


def told_apart_by(dataset: str, train: GivenSplit, validation: GivenSplit) -> dict[str, Any]:
    """What tells this call's data and loss from another's, as far as they repeat."""
    return {
        "data": dataset,
        "own_loss": validation.loss is not None,
        "loss": validation.first_loss(),
        "batches": train.count,
        "first_batch": train.first_digest(),
    }


def refuse_another(folder: Path, network: nn.Module, given_with: dict[str, Any]) -> None:
    """Raise ConfigError where the run in this folder began with other weights, another loss or other training batches, as far as these
    can be told from one another."""
    if not artifact.is_artifact(folder / "dense"):
        return
    before, now = artifact.load(folder / "dense").state_dict(), network.state_dict()
    if any(name not in now or not torch.equal(tensor, now[name]) for name, tensor in before.items()):
        raise ConfigError(f"{folder}: holds the run of another network, or of other weights; choose another out=")
    begun = artifact.read_extra(folder / "dense").get("given_with", {})
    if not isinstance(begun, dict) or begun.get("data") != given_with["data"]:
        return  # of an earlier version, or refused for its data
    losses = [entry.get("loss") for entry in (begun, given_with)]
    same_loss = None in losses or math.isclose(*losses, rel_tol=_ALIKE, abs_tol=_ALIKE**2)  # type: ignore[arg-type]
    if begun["own_loss"] != given_with["own_loss"] or not same_loss:
        raise ConfigError(
            f"{folder}: holds the run of another loss= (of the first batch of validation it was {losses[0]}, and is {losses[1]} now); "
            "give that one to go on, or choose another out="
        )
    first = {entry["first_batch"] for entry in (begun, given_with)} - {""}
    if begun["batches"] != given_with["batches"] or len(first) > 1:
        raise ConfigError(
            f"{folder}: holds the run of other training batches ({begun['batches']}, now {given_with['batches']}; the first one "
            f"{'differs' if len(first) > 1 else 'agrees'}); give these again, or choose another out="
        )
