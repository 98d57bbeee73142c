"""The importers of PyPI on the files of experiments/onnx_files.py: do they read a file, is it equal, and can removal read what they make?

    pip install --no-deps --target runs/onnx-files/importers onnx2torch==1.5.15 onnx2pytorch==0.6.0
    python experiments/onnx_files.py && python experiments/onnx_importers.py

Writes importers.csv in reports/onnx-files; "ours" is the reader of rmprune.
"""

import csv
import importlib
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx_files import REPORT, RUNS, SIZES
from torch import Tensor

from rmprune.errors import RmpruneError
from rmprune.onnx.file import OnnxFile, open_onnx
from rmprune.onnx.read import read_network
from rmprune.onnx.runtime import run_file
from rmprune.removal import plan_removal

READERS: dict[str, Callable[[Path], Any]] = {
    "ours": lambda path: read_network(open_onnx(path), SIZES.get(path.stem)).model,
    "onnx2torch": lambda path: importlib.import_module("onnx2torch").convert(onnx.load(path)),
    "onnx2pytorch": lambda path: importlib.import_module("onnx2pytorch").ConvertModel(onnx.load(path)),
}


def tried(read: Callable[[Path], Any], path: Path, x: Tensor, expected: Tensor) -> dict[str, Any]:
    """One importer on one file."""
    try:
        model = read(path).eval()
        with torch.no_grad():
            found = model(x)
    except Exception as error:  # each importer has its own
        return {"read": "no", "said": f"{type(error).__name__}: {error}".split("\n")[0][:200]}
    first = found[0] if isinstance(found, tuple | list) else found
    row = {"read": "yes", "error": f"{float((first - expected).abs().max() / expected.abs().max()):.1e}"}
    try:
        blocks = plan_removal(model, x)
        return row | {"removable": f"{sum(block.removable for block in blocks)} of {len(blocks)}"}
    except RmpruneError as error:
        return row | {"removable": "cannot be read", "said": str(error)[:200]}


def inputs_of(file: OnnxFile) -> Tensor:
    """One image, of the file's own size or of 224 pixels."""
    sizes = file.inputs[0].sizes
    free = (1, 3, *[SIZES.get(file.path.stem, 224)] * (len(sizes) - 2))
    return torch.randn(
        [n or other for n, other in zip(sizes, free, strict=True)], generator=torch.Generator().manual_seed(0)
    )


def main() -> None:
    sys.path.insert(0, str(RUNS / "importers"))
    warnings.simplefilter("ignore")
    paths = [*sorted((RUNS / "exported").glob("*.onnx")), *sorted((RUNS / "unpacked").rglob("*.onnx"))]
    with (REPORT / "importers.csv").open("w", newline="") as out:
        writer = csv.DictWriter(out, ("file", "importer", "read", "error", "removable", "said"), lineterminator="\n")
        writer.writeheader()
        for path in paths:
            try:
                file = open_onnx(path)
                x = inputs_of(file)
                expected = run_file(file, [x])[0]
            except (
                RmpruneError,
                ValueError,
            ) as error:  # no float32 image goes in, or ONNX's control flow: nothing to compare
                print(path.name, str(error)[:120])
                continue
            for name, read in READERS.items():
                row = {"file": path.name, "importer": name} | tried(read, path, x, expected)
                writer.writerow(row)
                print(row, flush=True)


if __name__ == "__main__":
    main()
