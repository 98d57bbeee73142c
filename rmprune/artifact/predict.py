"""What a deployed network says of images: python predict.py FILE... [--model model-int8.onnx] [--json]

Needs onnxruntime and numpy, and Pillow for image files. A FILE is an image, or a .npy array of the network's own size: bytes or 16-bit
values [H, W] or [H, W, C], or float32 [C, H, W] that is normalised already. This file reads model.json and
model.onnx beside it and nothing else; from Python: Deployed()(as_input("photo.png")).
"""

import argparse
import contextlib
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

try:
    from PIL import Image, ImageOps, UnidentifiedImageError
except ImportError:  # arrays can be read all the same
    Image = ImageOps = None  # type: ignore[assignment]
else:
    Image.init()  # all readers, of which a few are used: others start programs (EPS) or read more than a photo
    _KINDS = sorted(Image.OPEN.keys() & {"JPEG", "PNG", "TIFF", "WEBP", "BMP", "DIB", "PPM", "GIF", "JPEG2000", "AVIF"})

HERE = Path(__file__).resolve().parent


def as_input(file: str, folder: Path = HERE) -> Any:
    """The file as the network takes it, float32 [1, C, H, W]. Raises OSError or ValueError where it is no such image."""
    facts = json.loads((folder / "model.json").read_text(encoding="utf-8"))
    shape, how = tuple(facts["input_shape"]), facts["preprocessing"]
    if Path(file).exists() and not Path(file).is_file():
        raise ValueError("not a regular file")
    if file.lower().endswith(".npy"):
        values = np.load(file, allow_pickle=False)
        if not isinstance(values, np.ndarray):
            raise ValueError("several arrays in one file; give one array for each image")
    elif how is None:
        raise ValueError("only .npy arrays float32 [C, H, W], as your own loader made them for training")
    else:
        values = _decoded(file, how, shape)
    said = f"{values.dtype} of shape {values.shape}"
    if how is not None and values.dtype in (np.uint8, np.uint16) and values.ndim in (2, 3) and values.size:
        values = _as_bytes(values, how["depth"]).reshape(*values.shape[:2], -1).transpose(2, 0, 1)
        mean, std = (255 * np.array(how[key], np.float32).reshape(-1, 1, 1) for key in ("mean", "std"))
        values = (values - mean) / std  # of a grey array for a colour network three channels
    if values.shape != shape or values.dtype.kind != "f":
        raise ValueError(f"{said}, but the network takes images [C, H, W] of {shape}")
    if not np.isfinite(values).all():
        raise ValueError("values that are infinite or no numbers")
    return values.astype(np.float32)[None]


def _decoded(file: str, how: dict[str, Any], shape: tuple[int, ...]) -> Any:
    """The middle of an image file, bytes [H, W] or [H, W, 3]: upright, its shorter side scaled, cropped, as in training."""
    if Image is None:
        raise ValueError("Pillow is not there to open image files: pip install pillow, or give a .npy array")
    with _image_file(file) as opened:
        deep = _deep_values(opened, file)
        image = ImageOps.exif_transpose(opened) if deep is None else Image.fromarray(_as_bytes(deep, how["depth"]))
        if max(image.size) > 50 * min(image.size):
            raise ValueError(f"{image.width}x{image.height} pixels, which is no photo")
        if image.mode == "F":
            raise ValueError("32-bit floats have no range of their own; convert it to 8 or 16 bit")
        if isinstance(image.info.get("transparency"), bytes):  # of a palette, which Pillow wants to be asked for
            image = image.convert("RGBA")
        image = image.convert("L" if shape[0] == 1 else "RGB")
    if how["resize"] is not None:
        short = min(image.size)
        image = image.resize([how["resize"] * side // short for side in image.size], Image.Resampling.BILINEAR)
        for width, height in ((how["resize"], how["resize"]), (shape[2], shape[1])):
            left, top = round((image.width - width) / 2), round((image.height - height) / 2)
            image = image.crop((left, top, left + width, top + height))
    return np.asarray(image)


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


def _deep_values(file: Any, path: str) -> Any:
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


def _as_bytes(values: Any, depth: int) -> Any:
    """16-bit values of which `depth` bits are used, as bytes; bytes as they are."""
    if values.dtype == np.uint8:
        return values
    return (values.astype(np.float32) * (255 / (2**depth - 1))).round().clip(0, 255).astype(np.uint8)


class Deployed:
    """The network in ONNX Runtime: called with what `as_input` gives, it returns its outputs, float32 [1, classes]."""

    def __init__(self, file: str = "model.onnx", folder: Path = HERE) -> None:
        self.session = onnxruntime.InferenceSession(str(folder / file), providers=["CPUExecutionProvider"])
        self.classes = json.loads((folder / "model.json").read_text(encoding="utf-8"))["classes"]

    def __call__(self, x: Any) -> Any:
        outputs = self.session.run(None, {self.session.get_inputs()[0].name: x})
        return outputs[0] if len(outputs) == 1 else outputs

    def told(self, outputs: Any) -> dict[str, float]:
        """The probability of each class by the outputs for one image, the likeliest first."""
        scores = np.exp(outputs[0] - outputs[0].max())
        return {self.classes[i]: float(scores[i] / scores.sum()) for i in np.argsort(-scores, kind="stable")}


def _in_one_line(said: str) -> str:
    """What no screen shows, such as an end of a line in the name of a file, becomes ?."""
    return "".join(c if c.isprintable() else "?" for c in said)


def main() -> None:
    """The command line."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name that it cannot write is no reason to end
            stream.reconfigure(errors="backslashreplace")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+")
    parser.add_argument("--model", default="model.onnx", help="or model-int8.onnx, where it is there")
    parser.add_argument("--json", action="store_true", help="a line of JSON for each file: outputs, and all classes")
    given = parser.parse_args()
    if not (HERE / given.model).is_file():
        sys.exit(f"there is no {given.model} here; README.md says why")
    try:
        network = Deployed(given.model)
    except Exception as error:  # the runtime has errors of its own
        sys.exit(f"{given.model} and model.json: {type(error).__name__}: {error}")
    failed = False
    for file in given.files:
        try:
            outputs = network(as_input(file))
            told = {} if network.classes is None else network.told(outputs)
        except Exception as error:  # Pillow's readers stumble in many ways over damaged files
            print(_in_one_line(f"{file}: {' '.join(str(error).split())}"), file=sys.stderr)
            failed = True
            continue
        if given.json or not told:
            plain = [one.tolist() for one in outputs] if isinstance(outputs, list) else outputs.tolist()
            print(json.dumps({"file": file, "outputs": plain} | ({"classes": told} if told else {})))
        else:
            likely = ", ".join(f"{name} {chance:.3f}" for name, chance in list(told.items())[:5])
            print(_in_one_line(f"{file}: {likely}"))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
