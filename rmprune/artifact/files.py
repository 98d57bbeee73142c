"""A network on disk: architecture.json + model.safetensors (+ model.onnx), no pickle. It loads back bit for bit; it
trains nothing.

A directory is written beside its place and renamed, so what stands under the name is always whole.
"""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from rmprune.artifact.describe import describe, file_tensors
from rmprune.artifact.rebuild import build, fill
from rmprune.artifact.tensors import LARGEST_HEADER, read_safetensors
from rmprune.errors import ArtifactError, UnsupportedModel, first_line
from rmprune.graph.facts import facts_of, note
from rmprune.graph.finite import refuse_broken
from rmprune.graph.foreign import plain_module, refuse_weights
from rmprune.graph.inputs import Inputs, as_tuple, trial
from rmprune.graph.relative_error import relative_error
from rmprune.graph.run import evaluating, on_copies
from rmprune.graph.tf32 import tf32
from rmprune.onnx.export import export_onnx
from rmprune.runs.reading import check_regular, read_json, sha256_of
from rmprune.runs.writing import whole

SCHEMA = 1
ARCHITECTURE, WEIGHTS, ONNX = "architecture.json", "model.safetensors", "model.onnx"
_FORMAT = "rmprune-artifact"
_ALIKE = 1e-3  # relative, in the network's own dtype: far above what a kernel rounds otherwise


@tf32(False, "cuda")
def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    example_inputs: Inputs | None = None,
    extra: dict[str, Any] | None = None,
    overwrite: bool = False,
    write_onnx: Callable[[Path], object] | None = None,
) -> Path:
    """Writes `model` as the directory `path` and returns it.

    `example_inputs` (N, C, H, W), or a tuple or dict of inputs, where given, adds model.onnx, and what was written is compared with the
    network on one and two of them; `write_onnx` writes it instead, at the
    path that it gets. `extra` is any JSON-able dict kept with it (`read_extra`). Raises UnsupportedModel for a network outside the
    closed list, ArtifactError where `path` exists (an artifact is replaced with `overwrite=True`, anything else never) or cannot be
    written.

    >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()
    >>> sorted(file.name for file in rmprune.save(net, "runs/x/net", extra={"why": "an example"}).iterdir())
    ['architecture.json', 'model.safetensors']
    """
    path = Path(path)
    model = plain_module(model)
    refuse_weights(model)
    inputs = None if example_inputs is None else as_tuple(model, example_inputs)
    description = describe(model, inputs)
    _check_target(path, overwrite)
    with whole(path) as work:
        work.mkdir()
        _write(model, description, work, extra or {})
        if inputs is not None:
            _refuse_unlike(model, load(work), inputs)
            export_onnx(model, inputs, work / ONNX)
        if write_onnx is not None:
            write_onnx(work / ONNX)
    return path


@torch.no_grad()
def _refuse_unlike(model: nn.Module, loaded: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Raises UnsupportedModel where the network that was written gives other outputs than the model, both in eval mode."""
    with evaluating(model), evaluating(loaded.to(inputs[0].device)):
        for count in (1, 2):
            batch = [torch.cat([x[:1]] * count) for x in inputs]
            try:
                expected = on_copies(model, *batch)
            except Exception as fault:
                if count > 1:  # made for one image
                    return
                trial(model, tuple(batch))  # says which layer takes what
                raise UnsupportedModel(
                    f"{type(model).__name__} does not run on example_inputs: {first_line(fault)}"
                ) from fault
            try:
                error = relative_error(expected, on_copies(loaded, *batch), [count])
            except Exception:  # indices and shapes of another number of images
                error = math.inf
            if not error <= _ALIKE:
                refuse_broken(model, tuple(batch))
                many = "two images" if count > 1 else "an image"
                raise UnsupportedModel(
                    f"{type(model).__name__}: what torch.fx reads of it gives something else on {many}: its code writes into tensors "
                    "unseen (y.data), or asks for the number of images (len(x)); write it without"
                )


def load(path: str | os.PathLike[str]) -> nn.Module:
    """The network saved at `path`, on the CPU: same outputs bit for bit, same dtype, memory format, mode and state_dict
    names.

    Raises ArtifactError that names the file and what is wrong with it: missing, damaged, foreign, or of a newer
    version.

    >>> net, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval(), torch.randn(2, 3, 8, 8)
    >>> torch.equal(rmprune.load(rmprune.save(net, "net"))(x), net(x))
    True
    """
    path = Path(path)
    content = _read_architecture(path)
    try:
        model = build(content.get("description"), device="meta")
    except ArtifactError as error:
        raise ArtifactError(f"{path / ARCHITECTURE}: {str(error)[:500]}") from error
    most = 8 * sum(tensor.numel() for tensor in file_tensors(model, content["description"]).values()) + LARGEST_HEADER
    tensors = _read_weights(path, str(content.get("sha256")), most)
    last = content.get("channels_last")
    channels_last = {name for name in last if isinstance(name, str)} if isinstance(last, list) else set()
    # Out of the mapped file: kernels round otherwise on memory that is not aligned.
    for name, tensor in tensors.items():
        order = _channels_last(tensor) if name in channels_last and tensor.dim() in (4, 5) else torch.contiguous_format
        tensors[name] = torch.empty_like(tensor, memory_format=order).copy_(tensor)
    try:
        unknown = tensors.keys() - fill(model, content["description"], tensors)
        for name in sorted(unknown)[:1]:
            raise ArtifactError(f"there is no tensor {name[:80]} in {ARCHITECTURE}")
    except ArtifactError as error:
        raise ArtifactError(
            f"{path / WEIGHTS}: {error}; {ARCHITECTURE} and {WEIGHTS} do not belong together, copy both again"
        ) from error
    facts = content.get("facts")
    if isinstance(facts, dict) and facts:
        note(model, **facts)
    return model


def read_extra(path: str | os.PathLike[str], *needed: str) -> dict[str, Any]:
    """The `extra` that `save` was given; ArtifactError where `path` is no artifact, or lacks one of the `needed` keys."""
    found = _read_architecture(Path(path)).get("extra")
    extra = found if isinstance(found, dict) else {}
    for key in needed:
        if key not in extra:
            raise ArtifactError(f"{Path(path) / ARCHITECTURE}: its extra has no {key!r}; make the artifact again")
    return extra


def is_artifact(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a directory that `save` wrote (its first file says so; the weights are not looked at)."""
    try:
        _read_architecture(Path(path))
    except ArtifactError:
        return False
    return True


def _write(model: nn.Module, description: dict[str, Any], work: Path, extra: dict[str, Any]) -> None:
    tensors = {name: tensor.detach() for name, tensor in file_tensors(model, description).items()}
    save_file(_apart(tensors), work / WEIGHTS, metadata={"format": "pt"})
    content = {
        "format": _FORMAT,
        "schema": SCHEMA,
        "sha256": sha256_of(work / WEIGHTS),
        "dtype": sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values() if t.is_floating_point()}),
        "channels_last": [name for name, t in tensors.items() if _is_channels_last(t)],
        "extra": extra,
        "facts": facts_of(model),
        "description": description,
    }
    try:
        text = json.dumps(content, indent=1, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ArtifactError(f"extra: {error}; give plain JSON values") from error
    (work / ARCHITECTURE).write_text(text)


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, each in memory of its own; copied where that is shared, or holds more."""
    found, seen = {}, set()
    for name, tensor in tensors.items():
        tensor = tensor.cpu().contiguous()
        memory = tensor.untyped_storage()
        alone = memory.data_ptr() not in seen and memory.nbytes() == tensor.nbytes
        found[name] = tensor if alone else tensor.clone()
        seen.add(memory.data_ptr())
    return found


def _channels_last(tensor: Tensor) -> torch.memory_format:
    return torch.channels_last if tensor.dim() == 4 else torch.channels_last_3d


def _is_channels_last(tensor: Tensor) -> bool:
    """Whether the strides are exactly those of channels-last; kernels decide by strides even where both orders are the same in memory."""
    if tensor.dim() not in (4, 5) or 0 in tensor.shape:
        return False
    blank = torch.empty(tensor.shape, device="meta")
    return (
        tensor.stride() != blank.stride() and tensor.stride() == blank.to(memory_format=_channels_last(tensor)).stride()
    )


def _check_target(path: Path, overwrite: bool) -> None:
    if not path.exists() and not path.is_symlink():
        return
    if path.is_dir() and not any(path.iterdir()):
        return
    if not is_artifact(path):
        raise ArtifactError(f"{path}: exists and is not an rmprune artifact; it is left alone, choose another name")
    if not overwrite:
        raise ArtifactError(f"{path}: exists already; pass overwrite=True (--overwrite) to replace it")


def _read_architecture(path: Path) -> dict[str, Any]:
    file = path / ARCHITECTURE
    if not path.is_dir():
        raise ArtifactError(
            f"{path}: there is no such directory; an artifact is a directory with {ARCHITECTURE} and {WEIGHTS}"
        )
    if not file.is_file() and (inside := sorted(path.glob(f"*/{ARCHITECTURE}"))):
        raise ArtifactError(
            f"{path}: no artifact itself; give one of those in it: {', '.join(str(one.parent) for one in inside)}"
        )
    content = read_json(
        file,
        missing="missing; this is not an rmprune artifact, or its copy is incomplete",
        damaged="copy or write the artifact again",
    )
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise ArtifactError(f"{file}: not written by rmprune; write it with rmprune.save")
    if content.get("schema") != SCHEMA:
        raise ArtifactError(
            f"{file}: schema {str(content.get('schema'))[:80]}, this version reads {SCHEMA}; update rmprune or write it again"
        )
    return content


def _read_weights(path: Path, sha256: str, most: int) -> dict[str, Tensor]:
    """The tensors of an artifact; a file of more than `most` bytes is not even looked through."""
    file = path / WEIGHTS
    try:
        check_regular(file, most)
        if sha256_of(file) != sha256:
            raise ValueError(f"its SHA-256 is not the one in {ARCHITECTURE}")
        return read_safetensors(file)
    except FileNotFoundError as error:
        raise ArtifactError(f"{file}: missing; copy the whole directory") from error
    except OSError as error:
        raise ArtifactError(f"{file}: cannot be read ({error.strerror or error})") from error
    except ValueError as error:
        raise ArtifactError(
            f"{file}: damaged or from another artifact ({error}); copy or write the artifact again"
        ) from error
