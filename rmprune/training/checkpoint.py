"""Checkpoints of a running training: written atomically, read without pickle's code, refused where they are foreign."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rmprune.artifact.describe import describe
from rmprune.artifact.rebuild import build
from rmprune.config import TrainConfig
from rmprune.data.load import Dataset
from rmprune.errors import ArtifactError

_FORMAT = 1
_FREE_SETTINGS = ("checkpoint_seconds", "tensorboard")  # these do not change what is trained
_DATA_SETTINGS = ("batch_size", "validation", "split_seed", "train_images", "augment")


def save_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Write tensors and plain values, so that `path` always holds either the old checkpoint or the whole new one."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            torch.save({"format": _FORMAT, **content}, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        temporary.unlink(missing_ok=True)
        raise ArtifactError(
            f"{path}: the checkpoint cannot be written ({error}); free some space or pass another folder"
        ) from error


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint (on the CPU). Raises `ArtifactError` when it is damaged, or no checkpoint of this program."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ArtifactError(f"{path} is damaged or no checkpoint ({reason}); delete it to start again") from None
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise ArtifactError(f"{path} is no checkpoint of this version; delete it to start again")
    return content


def fingerprint(
    model: nn.Module, data: Dataset, config: TrainConfig, seed: int, label: str, *, distilled: bool
) -> dict[str, Any]:
    """What a checkpoint must agree on with the training that goes on from it; `model` is the one it started with."""
    training = {key: value for key, value in dataclasses.asdict(config).items() if key not in _FREE_SETTINGS}
    images = {key: getattr(data.config, key) for key in _DATA_SETTINGS}
    shape = "x".join(map(str, data.input_shape))
    identity = {
        "network": shapes_digest(model),
        "dataset": data.name,
        "input_shape": shape,
        "seed": seed,
        "stage": label,
    }
    return {**training, **images, **identity, "distilled": distilled}


def shapes_digest(model: nn.Module) -> str:
    """A digest of the names and shapes of all tensors of a model."""
    shapes = [(name, list(tensor.shape)) for name, tensor in sorted(model.state_dict().items())]
    return hashlib.sha256(json.dumps(shapes).encode()).hexdigest()


def architecture_of(model: nn.Module) -> str:
    """The architecture of a model that a hook made, for `rebuild`."""
    return json.dumps(describe(model))


def rebuild(architecture: str) -> nn.Module:
    """The model whose `architecture_of` this is; its weights are in the checkpoint."""
    return build(json.loads(architecture))


def check_fingerprint(path: Path, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of another run: raise `ArtifactError` that names the first thing that differs."""
    for key in sorted({*found, *expected}):
        if found.get(key) != expected.get(key):
            there, here = found.get(key), expected.get(key)
            detail = (
                f"{key} differs"
                if max(len(str(there)), len(str(here))) > 60
                else f"{key} is {there} there, {here} here"
            )
            raise ArtifactError(
                f"{path} belongs to another run ({detail}); run with those settings, or delete it to start again"
            )


def optimizer_state(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, dict[str, Any]]:
    """What the optimizer remembers of each parameter, by the parameter's name (its own numbering depends on order)."""
    return {
        name: dict(optimizer.state[parameter])
        for name, parameter in model.named_parameters()
        if parameter in optimizer.state
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, saved: Mapping[str, dict[str, Any]]) -> None:
    """Give a fresh optimizer of the same kind what `optimizer_state` returned."""
    for name, parameter in model.named_parameters():
        if name in saved:
            optimizer.state[parameter] = {
                key: value.to(parameter.device) if isinstance(value, torch.Tensor) else value
                for key, value in saved[name].items()
            }
