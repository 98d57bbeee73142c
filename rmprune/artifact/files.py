"""A network on disk: architecture.json + model.safetensors (+ model.onnx), no pickle. It loads back bit for bit; it
trains nothing.

A directory is written beside its place and renamed, so what stands under the name is always whole.
"""

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rmprune.artifact.describe import describe, file_tensors
from rmprune.artifact.onnx import export_onnx
from rmprune.artifact.rebuild import build, get_tensor, set_tensor
from rmprune.errors import ArtifactError

SCHEMA = 1
ARCHITECTURE, WEIGHTS, ONNX = "architecture.json", "model.safetensors", "model.onnx"
_FORMAT = "rmprune-artifact"


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    example_inputs: Tensor | None = None,
    extra: dict[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes `model` as the directory `path` and returns it.

    `example_inputs` (N, C, H, W), where given, adds model.onnx. `extra` is any JSON-able dict kept with it
    (`read_extra`). Raises UnsupportedModel for a network outside the closed list, ArtifactError where `path` exists (an
    artifact is replaced with `overwrite=True`, anything else never) or cannot be written.

    >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()
    >>> sorted(file.name for file in rmprune.save(net, "runs/x/net", extra={"why": "an example"}).iterdir())
    ['architecture.json', 'model.safetensors']
    """
    path = Path(path)
    description = describe(model)
    _check_target(path, overwrite)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    except OSError as error:
        raise ArtifactError(
            f"{path.parent}: cannot write there ({error.strerror}); choose another directory"
        ) from error
    try:
        _write(model, description, work, extra or {})
        if example_inputs is not None:
            export_onnx(model, example_inputs, work / ONNX)
        work.chmod(0o777 & ~_umask())
        _rename(work, path)
    except OSError as error:
        raise ArtifactError(f"{path}: writing failed ({error.strerror or error}); nothing was changed") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return path


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
        raise ArtifactError(f"{path / ARCHITECTURE}: {error}") from error
    tensors = _read_weights(path, str(content.get("sha256")))
    expected = file_tensors(model, content["description"])
    for name in [*(expected.keys() - tensors.keys()), *(tensors.keys() - expected.keys())]:
        raise ArtifactError(
            f"{path}: {ARCHITECTURE} and {WEIGHTS} do not belong together (tensor {name}); copy both again"
        )
    channels_last = content.get("channels_last")
    for name, blank in expected.items():
        tensor = tensors[name].clone()  # out of the mapped file: kernels round otherwise on memory that is not aligned
        if tensor.shape != blank.shape:
            raise ArtifactError(
                f"{path / WEIGHTS}: {name} has shape {tuple(tensor.shape)}, expected {tuple(blank.shape)}; copy both "
                "files again"
            )
        if tensor.is_floating_point() != blank.is_floating_point():
            raise ArtifactError(
                f"{path / WEIGHTS}: {name} is {tensor.dtype}, expected {blank.dtype}; copy both files again"
            )
        if isinstance(channels_last, list) and name in channels_last:
            tensor = torch.empty_like(tensor, memory_format=_channels_last(tensor)).copy_(tensor)
        if isinstance(blank, nn.Parameter):
            tensor = nn.Parameter(tensor, requires_grad=blank.requires_grad)
        set_tensor(model, name, tensor)
    for name, first in content["description"]["tied"]:
        set_tensor(model, name, get_tensor(model, first))
    return model


def read_extra(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The `extra` that `save` was given; ArtifactError where `path` is no artifact."""
    extra = _read_architecture(Path(path)).get("extra")
    return extra if isinstance(extra, dict) else {}


def is_artifact(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a directory that `save` wrote (its first file says so; the weights are not looked at)."""
    try:
        _read_architecture(Path(path))
    except ArtifactError:
        return False
    return True


def _write(model: nn.Module, description: dict[str, Any], work: Path, extra: dict[str, Any]) -> None:
    tensors = {name: tensor.detach() for name, tensor in file_tensors(model, description).items()}
    save_file(
        {name: t.cpu().contiguous().clone() for name, t in tensors.items()}, work / WEIGHTS, metadata={"format": "pt"}
    )
    content = {
        "format": _FORMAT,
        "schema": SCHEMA,
        "sha256": _sha256(work / WEIGHTS),
        "dtype": sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values() if t.is_floating_point()}),
        "channels_last": [name for name, t in tensors.items() if _is_channels_last(t)],
        "extra": extra,
        "description": description,
    }
    try:
        text = json.dumps(content, indent=1, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ArtifactError(f"extra: {error}; give plain JSON values") from error
    (work / ARCHITECTURE).write_text(text)


def _channels_last(tensor: Tensor) -> torch.memory_format:
    return torch.channels_last if tensor.dim() == 4 else torch.channels_last_3d


def _is_channels_last(tensor: Tensor) -> bool:
    """Whether the strides are exactly those of channels-last; kernels decide by strides even where both orders are
    the same in memory.
    """
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


def _rename(work: Path, path: Path) -> None:
    """Puts `work` in the place of `path`; if the last step fails, what stood there stands there again."""
    if not path.exists():
        work.rename(path)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.parent)) / "old"
    try:
        path.rename(old)
        try:
            work.rename(path)
        except OSError:
            old.rename(path)
            raise
    finally:
        shutil.rmtree(old.parent, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_architecture(path: Path) -> dict[str, Any]:
    file = path / ARCHITECTURE
    if not path.is_dir():
        raise ArtifactError(
            f"{path}: there is no such directory; an artifact is a directory with {ARCHITECTURE} and {WEIGHTS}"
        )
    try:
        content = json.loads(file.read_text())
    except FileNotFoundError as error:
        raise ArtifactError(f"{file}: missing; this is not an rmprune artifact, or its copy is incomplete") from error
    except OSError as error:
        raise ArtifactError(f"{file}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{file}: damaged ({error}); copy or write the artifact again") from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise ArtifactError(f"{file}: not written by rmprune; write it with rmprune.save")
    if content.get("schema") != SCHEMA:
        raise ArtifactError(
            f"{file}: schema {content.get('schema')!r}, this version reads {SCHEMA}; update rmprune or write it again"
        )
    return content


def _read_weights(path: Path, sha256: str) -> dict[str, Tensor]:
    file = path / WEIGHTS
    try:
        digest = _sha256(file)
    except FileNotFoundError as error:
        raise ArtifactError(f"{file}: missing; copy the whole directory") from error
    except OSError as error:
        raise ArtifactError(f"{file}: cannot be read ({error.strerror})") from error
    if digest != sha256:
        raise ArtifactError(
            f"{file}: damaged or from another artifact (its SHA-256 is not the one in {ARCHITECTURE}); copy it again"
        )
    try:
        return load_file(file)
    except (SafetensorError, OSError, ValueError) as error:
        raise ArtifactError(f"{file}: damaged ({error}); copy or write the artifact again") from error
