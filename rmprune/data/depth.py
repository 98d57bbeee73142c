"""Image files opened, and the values of those of more than 8 bits: Pillow gives grey ones whole, of colours the upper bytes alone."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from rmprune.errors import DataError, in_one_line
from rmprune.runs.progress import progress
from rmprune.runs.reading import not_data

logger = logging.getLogger("rmprune")
_DEPTHS = (8, 10, 12, 14, 16)  # bits that cameras put into 16
_LOOKED_AT = 64  # images, for whether any has 16 bits
Image.init()  # all readers, of which a few are used: others start programs (EPS) or read more than a photo
_KINDS = sorted(Image.OPEN.keys() & {"JPEG", "PNG", "TIFF", "WEBP", "BMP", "DIB", "PPM", "GIF", "JPEG2000", "AVIF"})


def bit_depth(paths: list[str]) -> int:
    """The bits that the 16-bit images among these use: cameras put 10, 12 or 14 into 16. Whether there are any, a few tell; then all are
    looked at, since a brighter one would lose its highlights. Where those few are none, 16, which loses nothing.
    """
    few = (
        [paths[i] for i in sorted({len(paths) * number // _LOOKED_AT for number in range(_LOOKED_AT)})] if paths else []
    )
    if not any(map(_brightest, few)):
        return 16
    highest = 0
    with progress("how bright 16-bit images are", len(paths)) as advance:
        for path in paths:
            highest = max(highest, _brightest(path))
            if highest >= 2 ** _DEPTHS[-2]:
                break
            advance(1)
    depth = next(bits for bits in _DEPTHS if highest < 2**bits)
    logger.info("16-bit images: brightest value %d, so %d bits become 8", highest, depth)
    return depth


def _brightest(path: str) -> int:
    """The largest value of a 16-bit image, 0 of any other."""
    with opened(path) as file:
        values = deep_values(file, path)
        return 0 if values is None else int(values.max())


@contextlib.contextmanager
def opened(path: str) -> Iterator[Image.Image]:
    """The image file. Raises DataError that names it where it, or what is done with it, fails."""
    try:
        with _image_file(path) as file:
            yield file
    except Image.DecompressionBombError as error:
        raise DataError(
            f"{in_one_line(path)} is larger than photos that are read ({' '.join(str(error).split()[:8])}); scale it down"
        ) from None
    except Exception as error:  # Pillow's readers stumble in many ways over damaged files
        said = getattr(error, "strerror", None) or str(error)
        reason = not_data(Path(path)) or " ".join(said.split())[:200] or type(error).__name__
        raise DataError(
            f"{in_one_line(path)} is missing or damaged ({reason}); replace it, take it out, or save it as one of the kinds that are "
            f"read: {', '.join(_KINDS)}"
        ) from None


@contextlib.contextmanager
def _image_file(path: str) -> Iterator[Any]:
    """An image file, by one of the readers of _KINDS. Raises OSError or ValueError where it is none.

    It is opened here, since Pillow maps what it opens by name into memory, and turns some maps (EXIF) into other pixels.
    """
    if Path(path).exists() and not Path(path).is_file():  # a pipe or a device would never end
        raise ValueError("not a regular file")
    with Path(path).open("rb") as held:
        try:
            file = Image.open(held, formats=_KINDS)
        except UnidentifiedImageError:
            raise ValueError("no image of a kind that is read, such as PNG or JPEG") from None
        with file:
            yield file


def deep_values(file: Any, path: str) -> Any:
    """The values of an image of more than 8 bits that was just opened, upright: [H, W], or of colours [H, W, 3]; None of any other.

    Raises ValueError for those that 16 bits do not hold, since nobody says what is black, and as `_deep_colours`.
    """
    if not file.mode.startswith("I"):
        return _deep_colours(file, path)
    if getattr(file, "tag_v2", {}).get(262) == 0:  # of which Pillow inverts 8 bits, and no more
        raise ValueError("16-bit grey of which 0 is white; invert it, so that 0 is black")
    values = np.asarray(ImageOps.exif_transpose(file))
    if values.min() < 0 or values.max() >= 2**16:
        raise ValueError(
            f"values from {values.min()} to {values.max()}, of which 16 bits hold 0 to 65535; convert it to these"
        )
    return values


def _deep_colours(file: Any, path: str) -> Any:
    """The values uint16 [H, W, 3], upright, of an image of 16-bit colours, of which Pillow keeps the upper bytes; None of any other.

    `file` was just opened; it is opened once more, for the lower bytes. Raises ValueError for colours in planes of their own.
    """
    tags = getattr(file, "tag_v2", {})  # of TIFF: planes, bits
    if tags.get(284) == 2 and 16 in tags.get(258, ()):
        # Pillow takes bytes of one colour for others, or gives no lower ones
        raise ValueError("16-bit colours in planes of their own; save it with the three values of a pixel side by side")
    orders = zip("BLN", ("L", "B", "B" if sys.byteorder == "little" else "L"), strict=True)
    lower_of = {f"{c};16{order}": f"{c};16{other}" for order, other in orders for c in ("RGB", "RGBA", "RGBX")}
    lower_of["LA;16B"] = "RGBA"  # both bytes of L, as R and G
    tiles: tuple[list[Any], list[Any]] = [], []
    for tile in file.tile:
        codec, box, offset, args = tile
        colours, *rest = (args,) if isinstance(args, str) else args or ("",)
        if (codec, colours, rest) == ("ppm", "RGB", [2**16 - 1]):
            codec, colours, rest = "raw", "RGB;16B", [0, 1]
        colours = str(colours).replace("RGBa", "RGBA")  # times their opacity, which is not read
        if colours not in lower_of:
            return None
        for part, unpacked in zip(tiles, (colours, lower_of[colours]), strict=True):
            part.append(getattr(tile, "_make", tuple)((codec, box, offset, (unpacked, *rest))))
    if not tiles[0]:
        return None
    with _image_file(path) as other:
        file.tile, other.tile = tiles
        upper, lower = (np.asarray(ImageOps.exif_transpose(half))[..., :3] for half in (file, other))
    return upper.astype(np.uint16) << 8 | (lower[..., 1:2] if colours == "LA;16B" else lower)
