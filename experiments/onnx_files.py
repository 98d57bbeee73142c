"""Exact removal on ONNX files: of networks exported here, and of files that others exported and ship in packages on PyPI.

    pip download --no-deps --dest runs/onnx-files/wheels nudenet==3.4.2 ddddocr==1.6.1 rapidocr-onnxruntime==1.4.4
    pip download --no-deps --dest runs/onnx-files/wheels silero-vad==6.2.3 magika==1.0.3
    python experiments/onnx_files.py                      # goes on where it was interrupted; --only NAME ... does these again

Each file is converted by the command line, `python -m rmprune convert FILE.onnx --out DIR`. Exported networks
have random weights and random batch-norm statistics (`removal_coverage.randomise`). Writes files.csv and README.md in reports/onnx-files.
"""

import argparse
import contextlib
import csv
import io
import re
import time
import zipfile
from pathlib import Path
from typing import Any

import onnx
import torch
from removal_coverage import Net, build, randomise

from rmprune.cli import main
from rmprune.onnx.bare import quiet_export

ROOT = Path(__file__).resolve().parent.parent
RUNS = ROOT / "runs" / "onnx-files"
REPORT = ROOT / "reports" / "onnx-files"
NETWORKS = [
    *(
        f"tv:{name}"
        for name in ("mobilenet_v3_small", "mnasnet0_5", "mobilenet_v2", "resnet18", "regnet_x_400mf", "regnet_y_400mf")
    ),
    *(f"timm:{name}" for name in ("mobilenetv2_050", "seresnet18", "ghostnet_100", "efficientnet_lite0", "fbnetc_100")),
    *(f"tv:{name}" for name in ("shufflenet_v2_x1_0", "googlenet", "densenet121", "convnext_tiny", "efficientnet_b0")),
]
SIZES = {"ch_PP-OCRv4_rec_infer": 48}  # of images, where a file leaves them open and takes no others
PIXELS = 96
COLUMNS = (
    "file", "from", "opset", "operators", "mib", "removed", "kept", "float64_error", "onnxruntime_error", "mmacs_before", "mmacs_after",
    "cpu_seconds", "said",
)  # fmt: skip


def export(name: str) -> Path:
    """A network as torch exports it: opset 17, batch left open."""
    path = RUNS / "exported" / f"{name.rpartition(':')[2]}.onnx"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(0)
        model = build(Net(name, {"init_weights": True, "aux_logits": False} if name == "tv:googlenet" else {}))
        randomise(model, torch.randn(4, 3, PIXELS, PIXELS), 0)
        names: dict[str, Any] = {"input_names": ["input"], "output_names": ["output"]}
        axes = {"input": {0: "batch"}, "output": {0: "batch"}}
        with quiet_export():
            torch.onnx.export(
                model,
                (torch.randn(1, 3, PIXELS, PIXELS),),
                path,
                dynamo=False,
                opset_version=17,
                dynamic_axes=axes,
                **names,
            )
    return path


def unpacked() -> list[Path]:
    """The ONNX files in the wheels."""
    found = []
    for wheel in sorted((RUNS / "wheels").glob("*.whl")):
        folder = RUNS / "unpacked" / "-".join(wheel.name.split("-")[:2])
        with zipfile.ZipFile(wheel) as archive:
            inner = [name for name in archive.namelist() if name.endswith(".onnx")]
            archive.extractall(folder, inner)
        found += [folder / name for name in sorted(inner)]
    return found


def open_sizes(path: Path) -> bool:
    """Whether a file leaves the size of images open."""
    dims = onnx.load(path, load_external_data=False).graph.input[0].type.tensor_type.shape.dim
    return any(dim.dim_value <= 0 for dim in dims[2:])


def convert(path: Path, source: str) -> dict[str, Any]:
    """One row: what the command said of a file."""
    graph = onnx.load(path, load_external_data=False)
    out = RUNS / "converted" / f"{source.replace(':', '-')}-{path.stem}"
    size = ["--image-size", str(SIZES[path.stem])] if path.stem in SIZES else []
    started, said, wrong = time.process_time(), io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(wrong):
        try:
            main(["convert", str(path), "--out", str(out), "--overwrite", *size])
            refused = False
        except SystemExit:
            refused = True
    stdout, stderr = said.getvalue(), wrong.getvalue()
    row: dict[str, Any] = {
        "file": path.name,
        "from": source,
        "opset": next(entry.version for entry in graph.opset_import if entry.domain in ("", "ai.onnx")),
        "operators": len(graph.graph.node),
        "mib": round(path.stat().st_size / 2**20, 1),
        "cpu_seconds": round(time.process_time() - started),
    }
    if refused:
        return row | {"said": stderr.strip().splitlines()[-1].removeprefix("rmprune: error: ").replace(f"{path}: ", "")}
    removed, kept, error = re.search(r"(\d+) residuals removed, (\d+) kept, largest error (\S+)", stdout).groups()  # type: ignore[union-attr]
    before, after = re.search(r"MACs ([\d,.]+) M -> ([\d,.]+) M", stdout).groups()  # type: ignore[union-attr]
    (runtime,) = re.findall(r"differs from .* by (\S+) of its scale in ONNX Runtime", stdout)
    reasons = dict.fromkeys(re.findall(r"^kept \S+: (.*)$", stdout, re.MULTILINE))
    fixed = ["the size of its images is fixed in the new file"] * (
        open_sizes(path) and not open_sizes(out / "model.onnx")
    )
    said = "; ".join([*fixed, *(f"kept: {reason}" for reason in reasons)])
    row |= {"removed": removed, "kept": kept, "float64_error": error, "onnxruntime_error": runtime}
    return row | {"mmacs_before": before, "mmacs_after": after, "said": said}


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| file | from | opset | operators | residuals removed | kept | error, float64 | error, ONNX Runtime | MMACs | what it said |"
    ]
    lines.append("|" + " --- |" * 11)
    for row in rows:
        macs = f"{row['mmacs_before']} → {row['mmacs_after']}" if row.get("removed") else ""
        said = row["said"] if len(row["said"]) < 260 else row["said"][:257] + "..."
        cells = [f"`{row['file']}`", row["from"], row["opset"], row["operators"], row.get("removed") or "refused"]
        cells += [row.get(name) or "" for name in ("kept", "float64_error", "onnxruntime_error")] + [
            macs,
            said.replace("|", "\\|"),
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def write(rows: list[dict[str, Any]]) -> None:
    REPORT.mkdir(parents=True, exist_ok=True)
    with (REPORT / "files.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    commands = [line.strip() for line in (__doc__ or "").splitlines() if line.startswith("    ")]
    done = [row for row in rows if row.get("removed")]
    text = f"""# Exact removal on ONNX files

`python -m rmprune convert FILE.onnx --out DIR` on {len(rows)} files: {len(done)} converted, {len(rows) - len(done)} refused.
Errors: the largest difference of the read network and its plain form in float64, relative to what the inputs change in the outputs;
and that of both files in ONNX Runtime, over the largest output (at most 1e-4, or 4 times what float32 itself does to the network:
efficientnet_b0, whose random weights amplify rounding). MACs are those before pruning, at the files' own image size
(224 where they leave it open, networks exported here: {PIXELS}). [files.csv](files.csv) holds the whole text of each refusal, and the
processor's seconds. [importers.csv](importers.csv): the same files through importers (`experiments/onnx_importers.py`).

```
{chr(10).join(commands)}
```

## Networks of torchvision and timm, exported here

{table([row for row in rows if ":" in row["from"]])}

## Files that others exported

{table([row for row in rows if ":" not in row["from"]])}
"""
    (REPORT / "README.md").write_text(text)


def run() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], help="files to do again, by name without .onnx")
    only = parser.parse_args().only
    path = REPORT / "files.csv"
    rows = list(csv.DictReader(path.open())) if path.exists() else []
    known = {(row["file"], row["from"]): row for row in rows if Path(row["file"]).stem not in only}
    found: list[dict[str, Any]] = []
    todo: list[tuple[str, str, Path | None]] = [
        (path.name, path.relative_to(RUNS / "unpacked").parts[0], path) for path in unpacked()
    ]
    todo += [(name.rpartition(":")[2] + ".onnx", name, None) for name in NETWORKS]
    for name, source, file in todo:
        row = known.get((name, source)) or convert(file or export(source), source)
        print(
            {key: row.get(key) for key in ("file", "removed", "kept", "float64_error", "onnxruntime_error", "said")},
            flush=True,
        )
        found.append(row)
        write(found + [known[key] for key in known if key not in {(r["file"], r["from"]) for r in found}])


if __name__ == "__main__":
    run()
