"""Weights of others, from files, into a network: trained already (a checkpoint), or to start training from. Nothing is executed."""

import logging
import pickle
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from rmprune import artifact
from rmprune.artifact.files import ARCHITECTURE
from rmprune.artifact.tensors import is_plain, read_tensors
from rmprune.errors import ArtifactError, first_line
from rmprune.graph.finite import is_finite
from rmprune.models.families import auxiliary_tensors
from rmprune.models.head import head_parameters
from rmprune.models.pretrained import IMAGENET, imagenet_weights
from rmprune.runs.reading import not_data

logger = logging.getLogger("rmprune")
NESTED = ("state_dict", "model", "model_state_dict", "net", "network", "module", "model_ema", "state_dict_ema", "ema")
"""Under these names training frameworks keep the weights in a file; the first that is there is taken, and the log says so."""
_COUNTER = "num_batches_tracked"
_STATISTICS = (".running_mean", ".running_var")
_DEEPEST = 3  # such names within each other: a file may hold a dict that holds itself
_WEIGHTS = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")  # of files in a folder, the best first
_SHOWN = 4  # names of each kind in an error


def load_checkpoint_into(model: nn.Module, path: Path, name: str) -> nn.Module:
    """`model` with the weights of an artifact directory or of a file (.safetensors, or a .pt/.pth state dict read with weights_only).

    Names are understood as by `put_weights`, but the head must fit too. Raises ArtifactError where the file is missing or damaged or
    holds another network.
    """
    if said := put_weights(model, _read(path), str(path), name, same_classes=True):
        logger.info("%s: %s", path, said)
    return model


def start_from(model: nn.Module, weights: str, name: str, *, by_order: bool = False) -> str:
    """Put trained weights into `model`, to train on from there: "imagenet" (the library's own), a file or an artifact directory.

    Returns what there is to say, or "". Raises as `put_weights` and `imagenet_weights`.
    """
    state = imagenet_weights(name) if weights == IMAGENET else _read(Path(weights))
    return put_weights(model, state, weights, name, by_order=by_order)


def put_weights(
    model: nn.Module,
    state: dict[str, Tensor],
    source: str,
    name: str,
    *,
    by_order: bool = False,
    same_classes: bool = False,
) -> str:
    """Put `state` into `model`, which (but for `same_classes`) may be of others: then its head is made anew, in torch's own way, as some
    networks begin with outputs that are loud beside what the weights put out. Returns what there is to say, or "".

    Names may stand behind any one prefix (`model.`, `backbone.`); what lies outside it is left out, and said. `by_order`: the
    tensors belong to the model's in this order, whatever their names. Raises ArtifactError that lists what does not fit, before
    anything is changed.
    """
    own, head = model.state_dict(), set() if same_classes else set(head_parameters(model))
    if by_order:
        ordered = _ordered(own, state, head)
        if isinstance(ordered, str):
            raise ArtifactError(
                f"{source}: its tensors are not those of {name} in order ({ordered}); leave --weights-by-order out"
            )
        there, said = _without_auxiliary(own, ordered, name)
    else:
        prefix, inside = _inside(own, state, head, source)
        there, said = _without_auxiliary(own, inside, name)
        if outside := [key for key in state if not key.startswith(prefix)]:
            said.insert(0, f"{_listed(outside)} beside {prefix}* left out")
    new = [key for key in own if key in head and (key not in there or there[key].shape != own[key].shape)]
    kept = {key: value for key, value in there.items() if not new or key not in head}
    if problems := _misfits(own, kept, head, name):
        if not by_order and not same_classes and isinstance(_ordered(own, inside, head), dict):
            raise ArtifactError(
                f"{source}: has other names than {name} ({next(iter(inside))[:80]}; here {next(iter(own))}), but in its order all shapes "
                "fit: if it is the same network, add --weights-by-order"
            )
        raise ArtifactError(f"{source}: {problems}")
    kept = {key: value.to(own[key].dtype) if own[key].is_floating_point() else value for key, value in kept.items()}
    _refuse_damaged(own, kept, source)
    own.update(kept)  # its own notes of versions stay with it, which some modules ask for
    model.load_state_dict(own)
    if new:
        for layer in {key.rpartition(".")[0]: None for key in new}:
            model.get_submodule(layer).reset_parameters()  # type: ignore[operator]
        said.append(f"the head is new: {new[0]} is {_sizes(there.get(new[0]))} there, {_sizes(own[new[0]])} here")
    return "; ".join(said)


def _without_auxiliary(
    own: dict[str, Tensor], state: dict[str, Tensor], name: str
) -> tuple[dict[str, Tensor], list[str]]:
    """Less what no network here needs: auxiliary heads, counters; with the network's own counters, which files from before torch 0.4.1
    lack, and norms that are frozen. And what there is to say."""
    auxiliary = auxiliary_tensors(name) - own.keys()
    heads = dict.fromkeys(key.split(".")[0] for key in state if key in auxiliary)
    state = {key: value for key, value in state.items() if key not in auxiliary}
    counters = {key: value for key, value in own.items() if key.endswith(_COUNTER)}
    found = counters | {key: value for key, value in state.items() if key in own or not key.endswith(_COUNTER)}
    if not heads:
        return found, []
    return found, [f"{_listed(f'{each}.*' for each in heads)} left out: auxiliary heads, which only training reads"]


def _misfits(own: dict[str, Tensor], kept: dict[str, Tensor], head: set[str], name: str) -> str:
    """What does not fit the network `name`, and what to do; "" where all does."""
    both = [key for key in own if key in kept]
    missing = [key for key in own if key not in head and key not in kept]
    others = [
        f"{key} ({_sizes(kept[key])} there, {_sizes(own[key])} here)"
        for key in both
        if kept[key].shape != own[key].shape
    ]
    whole = [key for key in both if kept[key].is_floating_point() < own[key].is_floating_point()]
    strange = [key for key in kept if key not in own]
    if missing and not others + whole + strange and all(key.endswith(_STATISTICS) for key in missing):
        return f"lacks the statistics of batch norms ({_listed(missing)}), as model.parameters() does; save model.state_dict()"
    problems = {
        "missing there": missing, "of another shape": others, "whole numbers there": whole, f"not in {name}": strange
    }  # fmt: skip
    what = "; ".join(f"{start}: {_listed(names)}" for start, names in problems.items() if names)
    return what and (
        f"these are the weights of another network than {name} ({what}); give the model, number of classes, width and image size that "
        "they belong to"
    )


def _refuse_damaged(own: dict[str, Tensor], kept: dict[str, Tensor], source: str) -> None:
    """Raise ArtifactError for numbers that no trained network has."""
    if broken := [key for key in own if key in kept and not _finite_in(kept[key], own[key])]:
        raise ArtifactError(
            f"{source}: NaN or infinite numbers in {_listed(broken)}, as of a training that diverged "
            "or a conversion that overflowed; take an earlier file, or convert it again"
        )
    if below := [key for key in own if key in kept and key.endswith("running_var") and bool((kept[key] < 0).any())]:
        raise ArtifactError(
            f"{source}: negative variances in {_listed(below)}: its tensors stand in another order than here, or it is damaged"
        )


def _inside(
    own: dict[str, Tensor], state: dict[str, Tensor], head: set[str], source: str
) -> tuple[str, dict[str, Tensor]]:
    """The prefix before most of the network's names, of several within each other the shortest, and what stands behind it.

    Raises ArtifactError where the whole network stands behind another prefix, too: nothing says which is meant.
    """
    first = next((key for key in own if key not in head), next(iter(own), ""))
    prefixes = {key.removesuffix(first) for key in state if key == first or key.endswith(f".{first}")} | {""}
    count = {before: sum(before + key in state for key in own) for before in prefixes}
    prefix, *others = sorted((p for p in prefixes if count[p] == max(count.values())), key=lambda p: (len(p), p))
    body = [key for key in own if key not in head and not key.endswith(_COUNTER)]
    if same := [p for p in others if not p.startswith(prefix) and all(p + key in state for key in body)]:
        raise ArtifactError(
            f"{source}: holds several networks ({_listed([prefix, *same])}); save the one that you mean"
        )
    return prefix, {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _ordered(own: dict[str, Tensor], state: dict[str, Tensor], head: set[str]) -> dict[str, Tensor] | str:
    """The tensors under the network's names, given to them in order; or why not: the first difference in shape, but for other classes, or
    that they are in the order of their names, as a .safetensors file sorts them, where the network's are not.
    """
    names = [key for key, value in own.items() if not _counts(value)]
    tensors = [value for value in state.values() if not _counts(value)]
    for key, value in zip(names, tensors, strict=False):
        shapes = [tensor.shape[1:] if key in head else tensor.shape for tensor in (value, own[key])]
        if shapes[0] != shapes[1] or value.is_floating_point() < own[key].is_floating_point():
            return f"at {key} stands one of {_sizes(value)} there, {_sizes(own[key])} here"
    if len(names) != len(tensors):
        return f"{len(tensors)} there, {len(names)} here"
    if _by_name(state) and not _by_name(own):
        return (
            "they are there in the order of their names, as in a .safetensors, which says nothing about that of layers"
        )
    return dict(zip(names, tensors, strict=True))


def _by_name(state: dict[str, Tensor]) -> bool:
    """Whether the tensors of each number format are in the order of their names."""
    names: dict[object, list[str]] = {}
    for key, value in state.items():
        names.setdefault(value.dtype, []).append(key)
    return all(found == sorted(found) for found in names.values())


def _counts(tensor: Tensor) -> bool:
    """Whether this is a batch norm's count of batches, which not every file has."""
    return tensor.ndim == 0 and not tensor.is_floating_point()


def _finite_in(value: Tensor, own: Tensor) -> bool:
    """Whether all numbers are finite in the network's own format. Where its own are not (masks of attention), any are fine."""
    return is_finite(value if own.is_floating_point() else value.double()) or not is_finite(own)


def _listed(names: Iterable[str]) -> str:
    found = [name[:80] for name in names]
    more = len(found) - _SHOWN
    return ", ".join(found[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _sizes(tensor: Tensor | None) -> str:
    return "missing" if tensor is None else "x".join(map(str, tensor.shape)) or "one number"


def _read(path: Path) -> dict[str, Tensor]:
    if not path.exists():
        raise ArtifactError(
            f"{path}: there is no such checkpoint; give an artifact directory or a .safetensors, .pt or .pth file"
        )
    if path.is_dir() and not (path / ARCHITECTURE).exists():
        _refuse_folder(path)
    return dict(artifact.load(path).state_dict()) if path.is_dir() else read_state_dict(path)


def _refuse_folder(path: Path) -> None:
    """Raise ArtifactError for a folder that is no artifact but holds files of weights, as those of the Hugging Face hub do."""
    files = sorted(
        (file for file in path.iterdir() if file.suffix.lower() in _WEIGHTS and file.is_file()),
        key=lambda file: ("model" not in file.name, _WEIGHTS.index(file.suffix.lower()), file.name),  # not optimizer.pt
    )
    if any(re.search(r"-\d+-of-\d+$", file.stem) for file in files):
        raise ArtifactError(
            f"{path}: a folder with a network in pieces ({_listed(file.name for file in files)}); save them as one file, and give that"
        )
    if files:
        more = f" (also there: {_listed(file.name for file in files[1:])})" if files[1:] else ""
        raise ArtifactError(f"{path}: a folder, and no artifact of rmprune; give the file in it, {files[0]}{more}")


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file or of a state dict that torch.save wrote, by itself or in a dict: under one of the names in
    `NESTED`, or the only one there. Raises ArtifactError for what is none, and for weights that are no numbers.
    """
    try:
        content: Any = read_tensors(path)
    except (OSError, ValueError, pickle.UnpicklingError) as error:
        if what := not_data(path):
            raise ArtifactError(f"{path}: holds no weights: {what}") from None
        if path.suffix.lower() == ".onnx":
            raise ArtifactError(
                f"{path}: an ONNX file, which is not trained again; give the artifact or the state dict that it was made from (inspect, "
                "convert and measure take ONNX files)"
            ) from None
        if isinstance(error, pickle.UnpicklingError):
            raise ArtifactError(
                f"{path}: not a plain state dict ({first_line(error)}), and nothing in it is run; load it where it was made, and save "
                "model.state_dict()"
            ) from None
        raise ArtifactError(f"{path}: cannot be read as weights ({first_line(error)}); copy or save it again") from None
    for _ in range(_DEEPEST):
        inner = [k for k in NESTED if isinstance(content, dict) and isinstance(content.get(k), dict)]
        if not inner and isinstance(content, dict) and not any(isinstance(value, Tensor) for value in content.values()):
            inner = [k for k, value in content.items() if _holds_tensors(value)]
            if len(inner) > 1:
                raise ArtifactError(
                    f"{path}: holds several networks ({_listed(map(str, inner))}); save the one that you mean"
                )
        if inner:
            if len(inner) > 1:
                logger.info("%s: %s is taken, %s left out", path, inner[0], _listed(inner[1:]))
            content = content[inner[0]]
    if not isinstance(content, dict) or not content or not all(isinstance(key, str) for key in content):
        raise ArtifactError(f"{path}: not a state dict (name -> tensor); save model.state_dict()")
    for key, value in content.items():
        if not is_plain(value) or value.is_complex():
            raise ArtifactError(f"{path}: {key[:80]} is no plain tensor; save the state_dict() of a plain model")
    return {key.replace("_orig_mod.", ""): value for key, value in content.items()}  # which torch.compile puts before


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, dict) and any(isinstance(inner, Tensor) for inner in value.values())
