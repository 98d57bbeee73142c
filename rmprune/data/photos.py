"""Image files decoded: one at a time, or all once into a cache of uint8 squares. Which of them are trained on is others' business."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from torchvision.transforms import v2

from rmprune.config.data import CacheKind
from rmprune.data.depth import deep_values, opened
from rmprune.data.sources import cache_folder
from rmprune.errors import ArtifactError, DataError, in_one_line
from rmprune.runs.progress import progress
from rmprune.runs.writing import whole

logger = logging.getLogger("rmprune")
ELONGATED = 50  # times the shorter side: what is longer is no photo, and its enlarged form would fill the memory
_AT_ONCE = 32  # images, from a loader process
_VERSION = 4  # of what decoding does: another one makes new caches


class Photos(TorchDataset[Tensor]):
    """Image files by number: `whole(i)`, or `photos[i]`, the middle square uint8 [3, side, side], from the cache where there is one.

    Any kind that Pillow reads becomes RGB: grey, palettes, 16 bit (of which `depth` are used), turned as its EXIF says.
    """

    def __init__(self, paths: list[str], side: int, depth: int) -> None:
        self.paths, self.side, self.depth = paths, side, depth
        self.squares: Tensor | None = None  # uint8 [N, 3, side, side]
        self._held: tuple[torch.device, Tensor] | None = None  # the copy on a GPU

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        if self.squares is not None:
            return self.squares[index]
        image = self.whole(index)
        if max(image.size) > ELONGATED * min(image.size):
            raise DataError(
                f"{in_one_line(self.paths[index])} is {image.width}x{image.height} pixels, which is no photo; take it out"
            )
        return _square(image, self.side)

    def __getstate__(self) -> dict[str, Any]:
        """For loader processes, which read the cache."""
        return self.__dict__ | {"_held": None}

    def on(self, device: torch.device) -> Tensor | None:
        """The squares on a GPU, brought there once; None where they would take more than half of its free memory, or there are none."""
        if self._held is None or self._held[0] != device:
            if self.squares is None or self.squares.nbytes > torch.cuda.mem_get_info(device)[0] / 2:
                return None
            self._held = device, self.squares.to(device)
        return self._held[1]

    def whole(self, index: int) -> Image.Image:
        """The photo as it is, in RGB. Raises DataError that names the file where it cannot be decoded."""
        path = self.paths[index]
        with opened(path) as file:
            if file.mode == "F":
                raise ValueError("32-bit floats have no range of their own; convert it to 8 or 16 bit")
            if (deep := deep_values(file, path)) is not None:
                scaled = deep.astype(np.float32) * (255 / (2**self.depth - 1))
                return Image.fromarray(scaled.round().clip(0, 255).astype(np.uint8)).convert("RGB")
            upright = ImageOps.exif_transpose(file)
            if isinstance(upright.info.get("transparency"), bytes):  # of a palette, which Pillow wants to be asked for
                upright = upright.convert("RGBA")
            return upright.convert("RGB")

    def decode_all(self, kind: CacheKind, workers: int) -> None:
        """Decode every image once: into a file of the user's cache, into memory, or (where it fits into neither) not at all.

        What is damaged is found here, before anything is trained. Raises DataError that names the file.
        """
        shape = (len(self), 3, self.side, self.side)
        size, where = int(np.prod(shape, dtype=np.int64)), cache_folder(None) / "photos"
        kind = room_for(size, where) if kind == "auto" else kind
        what = f"{len(self):,} images of {self.side}x{self.side} pixels, {size / 2**20:,.0f} MiB"
        if kind == "none":
            logger.info("%s: decoded anew in every epoch", what)
            return
        if kind == "memory":
            logger.info("decoding %s, into memory", what)
            into = torch.empty(shape, dtype=torch.uint8)
            for at, squares in self._decoded(workers):
                into[at : at + len(squares)] = squares
            self.squares = into
            return
        path = where / f"{self._digest()}.npy"
        if (known := _known(path, shape)) is None:
            logger.info("decoding %s, once, into %s", what, path)
            with whole(path) as work, work.open("wb") as file:  # not mapped: a full disk would end the process
                header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
                for _, squares in self._decoded(workers):
                    file.write(squares.numpy().tobytes())
            known = _known(path, shape)
        if known is None:
            raise ArtifactError(f"{path}: cannot be read back; use --cache memory or none")
        self.squares = torch.from_numpy(known)

    def _decoded(self, workers: int) -> Iterator[tuple[int, Tensor]]:
        """(the number of its first image, some squares), one after the other."""
        loader = DataLoader(
            self, _AT_ONCE, num_workers=workers if len(self) > _AT_ONCE else 0, generator=torch.Generator()
        )
        done = 0
        with one_line_errors(), progress("decoding", len(self)) as advance:
            for squares in to_its_end(loader):
                yield done, squares
                done += len(squares)
                advance(len(squares))

    def _digest(self) -> str:
        """16 hex digits for the files (names, sizes, times of change) and what is made of them."""
        files = []
        for path in map(Path, self.paths):
            try:
                about = path.stat()
            except OSError as error:
                raise DataError(
                    f"{in_one_line(str(path))} cannot be read ({error.strerror}); replace it or take it out"
                ) from None
            files.append((str(path.absolute()), about.st_size, about.st_mtime_ns))
        told = json.dumps([_VERSION, self.side, self.depth, files], ensure_ascii=True)
        return hashlib.sha256(told.encode()).hexdigest()[:16]


def to_its_end(loader: DataLoader[Any]) -> Iterator[Any]:
    """What a loader gives. Its processes end with this, also where one fails: the error's traceback would hold them for seconds."""
    batches = iter(loader)
    try:
        yield from batches
    finally:
        getattr(batches, "_shutdown_workers", lambda: None)()


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """A DataError from a loader process comes with that process's traceback; out of this block it comes as it was raised."""
    try:
        yield
    except DataError as error:
        *_, last = str(error).strip().splitlines()
        raise DataError(last.removeprefix(f"{DataError.__module__}.{DataError.__qualname__}: ")) from None


def _square(image: Image.Image, side: int) -> Tensor:
    """The middle of the photo, its shorter side scaled to `side`: uint8 [3, side, side]. Pillow scales, which on every processor and
    in the predict.py of a deployed network gives the same bytes; torch's own kernels do not.
    """
    scaled = v2.functional.center_crop(v2.functional.resize(image, [side]), [side, side])
    return v2.functional.to_image(scaled).as_subclass(Tensor)


def room_for(size: int, folder: Path) -> CacheKind:
    """Where a cache of so many bytes may lie: half of the free disk at most, or half of the free memory, or nowhere."""
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if size <= shutil.disk_usage(there).free / 2 and os.access(there, os.W_OK):
        return "disk"
    pages = "SC_AVPHYS_PAGES"  # which not every system tells
    free = os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE") if pages in getattr(os, "sysconf_names", {}) else 0
    return "memory" if size <= free / 2 else "none"


def _known(path: Path, shape: tuple[int, ...]) -> Any:
    """The cache in this file, mapped; None where there is none that is whole."""
    try:
        found = np.load(path, mmap_mode="c", allow_pickle=False)  # copy on write: torch wants what it could write to
    except (OSError, ValueError, EOFError):
        return None
    return found if found.shape == shape and found.dtype == np.uint8 else None
