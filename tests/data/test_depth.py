"""Photos of more than 8 bits: one rule for grey and colours, in whatever file they come; what Pillow cannot tell is refused."""

import inspect
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from rmprune.artifact import predict
from rmprune.data import depth
from rmprune.data.depth import bit_depth
from rmprune.data.photos import Photos
from rmprune.errors import DataError


def square(path: Path) -> torch.Tensor:
    return Photos([str(path)], 4, bit_depth([str(path)]))[0]


@pytest.mark.parametrize("form", ["png", "tif"])
@pytest.mark.parametrize("bits", [8, 12, 16])
def test_grey_photos_of_any_depth_come_out_alike(tmp_path: Path, form: str, bits: int) -> None:
    grey = np.linspace(0, 2**bits - 1, 16).round().reshape(4, 4)
    path = tmp_path / f"a.{form}"
    Image.fromarray(grey.astype(np.uint8 if bits == 8 else np.uint16)).save(path)
    expected = torch.linspace(0, 255, 16).reshape(4, 4)
    assert all(float((channel - expected).abs().max()) <= 1 for channel in square(path).float())


def test_of_16_bit_photos_the_brightest_counts_wherever_it_lies(tmp_path: Path) -> None:
    paths = [str(tmp_path / f"{i:03d}.png") for i in range(70)]
    for i, path in enumerate(paths):
        Image.fromarray(np.full((2, 2), 60_000 if i == 68 else 4_000, np.uint16)).save(path)
    assert bit_depth(paths) == 16 and bit_depth(paths[:60]) == 12


def png(values: Any) -> bytes:
    """uint16 [H, W, C] as a PNG of 16 bits, which Pillow does not write."""

    def chunk(name: bytes, held: bytes) -> bytes:
        return struct.pack(">I", len(held)) + name + held + struct.pack(">I", zlib.crc32(name + held))

    height, width, channels = values.shape
    head = struct.pack(">IIBBBBB", width, height, 16, {2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    rows = zlib.compress(b"".join(b"\0" + row.astype(">u2").tobytes() for row in values))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def tiff(values: Any, order: str = "<", *, packed: bool = False, extra: int = 0, planes: bool = False) -> bytes:
    """uint16 [H, W, C] as a TIFF; `extra`: what a fourth channel is, 1 and 2 opacity (1: colours are times that), 0 nothing;
    `planes`: first all of the first channel, then the others."""
    height, width, channels = values.shape
    held = (values.transpose(2, 0, 1) if planes else values[None]).astype(f"{order}u2")
    parts = [zlib.compress(part.tobytes()) if packed else part.tobytes() for part in held]
    tags = [
        (256, 3, [width]),
        (257, 3, [height]),
        (258, 3, [16] * channels),
        (259, 3, [8 if packed else 1]),
        (262, 3, [2]),
    ]
    tags += [
        (273, 4, [0] * len(parts)),
        (277, 3, [channels]),
        (278, 3, [height]),
        (279, 4, [len(part) for part in parts]),
    ]
    tags += [(284, 3, [1 + planes])] + ([(338, 3, [extra])] if channels == 4 else [])
    after = 8 + 2 + 12 * len(tags) + 4
    lists = after + sum(len(found) * (2 if kind == 3 else 4) for _, kind, found in tags if len(found) > 1)
    tags[5] = (273, 4, [lists + sum(map(len, parts[:i])) for i in range(len(parts))])
    entries, far = b"", b""
    for tag, kind, found in tags:
        packed_up = struct.pack(f"{order}{len(found)}{'H' if kind == 3 else 'I'}", *found)
        where = packed_up.ljust(4, b"\0") if len(found) == 1 else struct.pack(f"{order}I", after + len(far))
        entries += struct.pack(f"{order}HHI", tag, kind, len(found)) + where
        far += packed_up if len(found) > 1 else b""
    head = struct.pack(f"{order}2sHIH", b"II" if order == "<" else b"MM", 42, 8, len(tags))
    return head + entries + bytes(4) + far + b"".join(parts)


def ppm(values: Any) -> bytes:
    return b"P6 4 4 65535\n" + values.astype(">u2").tobytes()


FILES: dict[str, Any] = {"PNG": png, "TIFF": tiff, "TIFF of a Mac": lambda values: tiff(values, ">"), "PPM": ppm}
FILES |= {
    "packed TIFF": lambda values: tiff(values, packed=True),
    "packed ones": lambda values: tiff(values, ">", packed=True),
}
FORMS = [(name, 3) for name in FILES] + [(name, 4) for name in FILES if name != "PPM"] + [("PNG", 2)]


@pytest.mark.parametrize("bits", [10, 12, 16])
@pytest.mark.parametrize(("form", "channels"), FORMS)
def test_colours_of_any_depth_come_out_as_grey_does(tmp_path: Path, form: str, channels: int, bits: int) -> None:
    """They came out dark, 12 bits at a sixteenth of their brightness, and so they did from a deployed network's predict.py."""
    colours = channels - (channels % 2 == 0)
    values = np.linspace(0, 2**bits - 1, 16 * colours).round().astype(np.uint16).reshape(4, 4, colours)
    opacity = np.full((4, 4, channels - colours), 2**16 - 1, np.uint16)
    path = tmp_path / "a.image"
    path.write_bytes(FILES[form](np.concatenate([values, opacity], 2)))
    found = square(path).permute(1, 2, 0).numpy()
    assert np.abs(found - values * (255 / (2**bits - 1))).max() <= 0.5 and bit_depth([str(path)]) == bits
    how = {"depth": bits, "resize": None}
    assert np.array_equal(predict._decoded(str(path), how, (3, 4, 4)), found)


@pytest.mark.parametrize("extra", [0, 1, 2])
@pytest.mark.parametrize("packed", [False, True])
def test_what_a_fourth_channel_of_a_tiff_holds_is_not_read(tmp_path: Path, extra: int, packed: bool) -> None:
    values = np.full((4, 4, 4), 1023, np.uint16)
    values[..., 3] = 50_000
    (tmp_path / "a.tif").write_bytes(tiff(values, packed=packed, extra=extra))
    assert bool((square(tmp_path / "a.tif") == 255).all())


def test_deep_photos_are_turned_as_their_exif_says(tmp_path: Path) -> None:
    values = np.arange(48, dtype=np.uint16).reshape(4, 4, 3) * 21
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter
    said = exif.tobytes()[6:]
    chunk = struct.pack(">I", len(said)) + b"eXIf" + said + struct.pack(">I", zlib.crc32(b"eXIf" + said))
    whole = png(values)
    (tmp_path / "a.png").write_bytes(whole[:33] + chunk + whole[33:])
    upright = torch.from_numpy((values * (255 / 1023)).round()).permute(2, 0, 1)
    assert torch.equal(square(tmp_path / "a.png").double(), torch.rot90(upright, -1, (1, 2)))


@pytest.mark.parametrize("packed", [False, True])
def test_deep_colours_in_planes_are_refused(tmp_path: Path, packed: bool) -> None:
    """Pillow gives half of the first plane for all of it, without a word."""
    (tmp_path / "a.tif").write_bytes(tiff(np.full((4, 4, 3), 999, np.uint16), packed=packed, planes=True))
    with pytest.raises(DataError, match=r"a\.tif .*in planes of their own; save it with"):
        bit_depth([str(tmp_path / "a.tif")])


def test_a_palette_with_transparency_is_no_warning_from_predict(tmp_path: Path) -> None:
    photo = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3)).quantize(16)
    photo.save(tmp_path / "a.png", transparency=bytes(range(16)))
    found = predict._decoded(str(tmp_path / "a.png"), {"depth": 16, "resize": None}, (3, 4, 4))
    assert np.array_equal(found, square(tmp_path / "a.png").permute(1, 2, 0).numpy())


def predicted(path: Path) -> Any:
    return predict._decoded(str(path), {"depth": 16, "resize": None}, (3, 4, 4))


@pytest.mark.parametrize("turned", [1, 3, 5, 6, 7, 8])
@pytest.mark.parametrize("mode", ["L", "I;16", "RGB", "RGBA", "CMYK"])
def test_plain_tiffs_are_turned_as_their_exif_says(tmp_path: Path, mode: str, turned: int) -> None:
    """Not packed, as Pillow maps them into memory."""
    size = (4, 6) if mode in ("L", "I;16") else (4, 6, len(mode))
    values = np.random.default_rng(0).integers(0, 256, size).astype(np.uint16 if mode == "I;16" else np.uint8)
    exif = Image.Exif()
    exif[0x0112] = turned
    plain = values * 257 if mode == "I;16" else values
    path = tmp_path / "a.tif"
    Image.frombytes(mode, (6, 4), plain.tobytes()).save(path, exif=exif)
    turn: Any = {
        1: lambda x: x,
        3: lambda x: x[::-1, ::-1],
        5: lambda x: x.swapaxes(0, 1),
        6: lambda x: np.rot90(x, -1),
        7: lambda x: x.swapaxes(0, 1)[::-1, ::-1],
        8: np.rot90,
    }[turned]
    colours = np.atleast_3d(values)[..., :3].astype(float)
    if mode == "CMYK":
        colours = (255 - colours) * (1 - values[..., 3:] / 255)
    found = np.asarray(Photos([str(path)], 4, 16).whole(0))
    assert np.abs(found - turn(colours)).max() <= (1 if mode == "CMYK" else 0)
    assert np.array_equal(predicted(path), found)


def refused_alike(path: Path, told: str) -> None:
    with pytest.raises(DataError, match=told):
        square(path)
    with pytest.raises(ValueError, match=told):
        predicted(path)


def test_grey_of_which_0_is_white_is_refused(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 999, np.uint16)).save(tmp_path / "a.tif", tiffinfo={262: 0})
    refused_alike(tmp_path / "a.tif", "0 is white; invert it")


def test_whole_numbers_beyond_16_bits_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 2**16, np.int32)).save(tmp_path / "a.tif")
    refused_alike(tmp_path / "a.tif", "values from 65536 to 65536")


def test_other_kinds_of_files_are_not_opened(tmp_path: Path) -> None:
    """As an EPS, for which Pillow starts a program."""
    Image.new("RGB", (4, 4)).save(tmp_path / "a.jpg", "EPS")
    with pytest.raises(DataError, match=r"a\.jpg is missing or damaged"):
        square(tmp_path / "a.jpg")
    with pytest.raises(ValueError, match="no image of a kind that is read"):
        predicted(tmp_path / "a.jpg")
    os.mkfifo(tmp_path / "b.jpg")
    refused_alike(tmp_path / "b.jpg", "not a regular file")


def test_predict_reads_files_as_training_does() -> None:
    """It stands by itself, so the same lines stand in it."""
    assert predict._KINDS == depth._KINDS
    for name in ("_image_file", "_deep_values", "_deep_colours"):
        here = getattr(depth, name.replace("_deep_values", "deep_values"))
        assert inspect.getsource(getattr(predict, name)).replace("_deep_values", "deep_values") == inspect.getsource(
            here
        )
