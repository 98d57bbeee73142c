"""Checkpoints of a running training: written atomically, read without pickle's code, refused where they are foreign."""

import contextlib
import dataclasses
import hashlib
import json
import math
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rmprune.artifact.describe import describe
from rmprune.artifact.rebuild import build, fill
from rmprune.artifact.tensors import is_plain, read_pickled
from rmprune.config import TrainConfig
from rmprune.data.given import GIVEN
from rmprune.data.load import Dataset
from rmprune.errors import ArtifactError, RmpruneError, first_line
from rmprune.runs.reading import parse_json
from rmprune.runs.writing import whole
from rmprune.training.optimizer import learning_rate
from rmprune.training.state import Hook, TrainState

_FORMAT = 1
_FREE_SETTINGS = ("checkpoint_seconds", "tensorboard", "mlflow", "cuda_graph")  # these do not change what is trained
# settings that earlier checkpoints do not know, and what was done without them
_LATER = {
    "sync_batch_norm": False, "head_rate": 1.0, "crop": 0.875, "normalization": "auto", "test": 0.2, "group_column": None, "balance": False,
}  # fmt: skip
_DATA_SETTINGS = (
    "batch_size", "validation", "split_seed", "train_images", "augment", "crop", "normalization", "test", "group_column",
    "balance",
)  # fmt: skip


def save_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Write tensors and plain values, so that `path` always holds either the old checkpoint or the whole new one."""
    with whole(path) as work, work.open("wb") as file:  # given a path, torch would hide what the disk said
        try:
            torch.save({"format": _FORMAT, **content}, file)
        except RuntimeError as error:  # torch noticed first; what the disk said stands behind it
            disk = error.__context__
            raise (disk if isinstance(disk, OSError) else OSError(first_line(error))) from None


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint (on the CPU). Raises `ArtifactError` when it is damaged, or no checkpoint of this program."""
    try:
        content = read_pickled(path)
    except (OSError, ValueError, pickle.UnpicklingError) as error:
        raise ArtifactError(
            f"{path} is damaged or no checkpoint ({first_line(error)}); delete it to start again"
        ) from None
    if not isinstance(content, dict) or type(content.get("format")) is not int or content["format"] != _FORMAT:
        raise ArtifactError(f"{path} is no checkpoint of this version; delete it to start again")
    return content


def fingerprint(
    model: nn.Module, data: Dataset, config: TrainConfig, seed: int, label: str, *, distilled: bool
) -> dict[str, Any]:
    """What a checkpoint must agree on with the training that goes on from it; `model` is the one it started with."""
    settings = {key: value for key, value in dataclasses.asdict(config).items() if key not in _FREE_SETTINGS}
    images = {key: getattr(data.config, key) for key in _DATA_SETTINGS}
    asked = {key: value for key, value in (settings | images).items() if _LATER.get(key, ...) != value}
    shape = "x".join(map(str, data.input_shape))
    identity = {
        "network": shapes_digest(model),
        "dataset": data.name,
        "input_shape": shape,
        "seed": seed,
        "stage": label,
    }
    return {**asked, **identity, "distilled": distilled}


def shapes_digest(model: nn.Module) -> str:
    """A digest of the names and shapes of all tensors of a model."""
    shapes = [(name, list(tensor.shape)) for name, tensor in sorted(model.state_dict().items())]
    return hashlib.sha256(json.dumps(shapes).encode()).hexdigest()


def architecture_of(model: nn.Module) -> str:
    """The architecture of a model that a hook made, for `rebuild`."""
    return json.dumps(describe(model))


def constants_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """The buffers of such a model that its state_dict leaves out."""
    kept = model.state_dict()
    return {name: buffer for name, buffer in model.named_buffers() if name not in kept}


def rebuild(architecture: str, tensors: Mapping[str, Any]) -> nn.Module:
    """The model whose `architecture_of` this is, with its weights and constants among `tensors`.

    Raises ValueError where the two do not belong together, before memory is taken.
    """
    description = parse_json(architecture)
    try:
        model = build(description, device="meta")
        fill(model, description, tensors)
    except ArtifactError as error:
        raise ValueError(str(error)) from error
    return model


def check_fingerprint(path: Path, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of another run: raise `ArtifactError` that names the first thing that differs."""
    for key in sorted({*found, *expected}):
        if found.get(key) != expected.get(key):
            there, here = found.get(key), expected.get(key)
            name = str(key)[:80]
            detail = (
                f"{name} differs"
                if max(len(str(there)), len(str(here))) > 60
                else f"{name} is {there} there, {here} here"
            )
            cut_on_them = key == "network" and str(expected.get("dataset")).startswith(GIVEN)
            images = " on images that are the same each time (augmented by global generators, not by their own)"
            raise ArtifactError(
                f"{path} belongs to another run ({detail}); run with those settings{images * cut_on_them}, or delete it to start again"
            )


def snapshot(state: TrainState, hook: Hook | None, device: torch.device, *, changed: bool) -> dict[str, Any]:
    """What a training needs to go on as if it had never stopped, besides its identity and the sums of its epoch.

    `changed`: whether the model is not the one that it began with, so that its architecture is needed, too.
    """
    model, own = state.model, getattr(hook, "state_dict", None)
    return {
        "step": state.step,
        "architecture": architecture_of(model) if changed else None,
        "constants": constants_of(model) if changed else {},
        "model": model.state_dict(),
        "optimizer": optimizer_state(state.optimizer, model),
        "random": torch.get_rng_state(),
        "random_cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "hook": None if own is None else own(),
    }


def put_back(saved: Mapping[str, Any], state: TrainState, hook: Hook | None, device: torch.device) -> None:
    """Brings `state`, whose model has the right architecture by now, the hook and the generators to what `snapshot` saw."""
    state.model.load_state_dict(saved["model"])
    restore_optimizer(state.optimizer, state.model, saved["optimizer"])
    state.step = int(saved["step"])
    made = state.step - 1  # -1: it was stopped before the first
    state.learning_rate = learning_rate(state.config, made, state.steps_per_epoch) if made >= 0 else 0.0
    if saved["hook"] is not None and hook is not None:
        hook.load_state_dict(saved["hook"])  # type: ignore[attr-defined]
    torch.set_rng_state(saved["random"])
    if saved["random_cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(saved["random_cuda"], device)


@contextlib.contextmanager
def expected_to_fit(path: Path) -> Iterator[None]:
    """Raises ArtifactError for whatever the parts of a checkpoint, the hook's among them, make of damaged values."""
    try:
        yield
    except RmpruneError:
        raise
    except Exception as error:
        raise ArtifactError(
            f"{path} does not fit this training ({first_line(error)}); delete it to start again"
        ) from error


def optimizer_state(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, dict[str, Any]]:
    """What the optimizer remembers of each parameter, by the parameter's name (its own numbering depends on order)."""
    return {
        name: dict(optimizer.state[parameter])
        for name, parameter in model.named_parameters()
        if parameter in optimizer.state
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, saved: Mapping[str, dict[str, Any]]) -> None:
    """Give a fresh optimizer of the same kind what `optimizer_state` returned. Raises ValueError where it fits no such parameter."""
    for name, parameter in model.named_parameters():
        for key, value in saved.get(name, {}).items():
            if value is not None and not (is_plain(value) and value.shape in (parameter.shape, ())):
                raise ValueError(f"the optimizer's {key} of {name} has another shape")
            optimizer.state[parameter][key] = None if value is None else value.to(parameter.device)


def check_progress(saved: Mapping[str, Any], total_steps: int) -> None:
    """Raise ValueError unless step, sums and time of a checkpoint can be those of a training of this length."""
    step, seconds, totals = saved["step"], saved["seconds"], saved["totals"]
    if type(step) is not int or not 0 <= step <= total_steps:
        raise ValueError(f"step {str(step)[:80]} of {total_steps}")
    if not isinstance(seconds, int | float) or not 0 <= seconds < math.inf:
        raise ValueError(f"{str(seconds)[:80]} seconds")
    if not is_plain(totals) or totals.shape != (3,) or totals.dtype != torch.float64:
        raise ValueError("its sums of loss, hits and images are none")
    loss, hits, images = totals.tolist()  # a loss of one's own may be negative, and knows no hits: NaN
    if not math.isfinite(loss) or hits < 0 or not 0 <= images < math.inf:
        raise ValueError("its sums of loss, hits and images are none")
