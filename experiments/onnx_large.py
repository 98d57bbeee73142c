"""ONNX files over 2 GiB, whose weights lie beside them, in both directions: what `inspect`, `convert` and export take in memory.

    python experiments/onnx_large.py DIR [GIB]      # 2 GiB by default; up to 11 GiB of memory, three times that on disk in DIR

A chain of residual blocks of two 1x1 convolutions, 1,024 channels wide and 32,768 inside, for maps of 4x4. Each step is a process of its
own; its peak is the largest resident memory that the kernel saw, pages of mapped files included. Outputs are compared in ONNX
Runtime.
Writes reports/onnx-files/large.csv.
"""

import csv
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper

ROOT = Path(__file__).resolve().parent.parent
WIDTH, INSIDE, PIXELS = 1024, 32768, 4
BLOCK = 2 * WIDTH * INSIDE * 4  # bytes
SAVE = """
import sys, torch, rmprune
from torch import nn
class Block(nn.Module):
    def __init__(self, width, inside):
        super().__init__()
        self.a, self.b = nn.Conv2d(width, inside, 1), nn.Conv2d(inside, width, 1)
    def forward(self, x):
        return torch.relu(x + self.b(torch.relu(self.a(x))))
blocks, width, inside, pixels, out = *map(int, sys.argv[1:5]), sys.argv[5]
model = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), *(Block(width, inside) for _ in range(blocks))).eval()
rmprune.save(model, out, example_inputs=torch.randn(2, 3, pixels, pixels))
"""


def write(path: Path, blocks: int) -> None:
    """The network as another program would write it; no tensor but the one at hand is in memory."""
    generator, data = np.random.default_rng(0), path.with_name("weights.bin")
    layers = [("stem", WIDTH, 3, 3)] + [(f"{i}.{k}", *of) for i in range(blocks) for k, of in enumerate(SHAPES)]
    weights, nodes, last, shortcut = [], [], "x", ""
    with data.open("wb") as file:
        for name, out, into, kernel in layers:
            sizes = (out, into, kernel, kernel)
            value = generator.standard_normal(sizes, np.float32) / np.float32((into * kernel**2) ** 0.5)
            tensor = TensorProto(name=name, data_type=1, dims=sizes, data_location=TensorProto.EXTERNAL)
            for key, said in (("location", data.name), ("offset", file.tell()), ("length", value.nbytes)):
                tensor.external_data.add(key=key, value=str(said))
            file.write(value.data)
            weights.append(tensor)
            shortcut = last if name.endswith(".0") else shortcut
            nodes.append(helper.make_node("Conv", [last, name], [f"{name}.c"], pads=[kernel // 2] * 4))
            last = f"{name}.c"
            if name.endswith(".1"):
                nodes.append(helper.make_node("Add", [last, shortcut], [f"{name}.s"], name=f"block{name[:-2]}"))
                last = f"{name}.s"
            nodes.append(helper.make_node("Relu", [last], [f"{name}.r"]))
            last = f"{name}.r"
    nodes += [helper.make_node("GlobalAveragePool", [last], ["y"])]
    ends = [helper.make_tensor_value_info(n, 1, ["n", c, p, p]) for n, c, p in (("x", 3, PIXELS), ("y", WIDTH, 1))]
    graph = helper.make_graph(nodes, "large", ends[:1], ends[1:], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


SHAPES = ((INSIDE, WIDTH, 1), (WIDTH, INSIDE, 1))


def measured(step: str, command: list[str]) -> dict[str, object]:
    """A command in a process of its own: exit status, peak of memory, the processor's seconds."""
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    return {
        "step": step,
        "status": os.waitstatus_to_exitcode(status),
        "peak_gib": round(usage.ru_maxrss / 2**20, 2),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime),
    }


def outputs(path: Path) -> np.ndarray:
    images = np.random.default_rng(1).standard_normal((2, 3, PIXELS, PIXELS), np.float32)
    return onnxruntime.InferenceSession(path).run(None, {"x": images})[0]


def steps(folder: Path, blocks: int) -> Iterator[dict[str, object]]:
    source, plain, saved = folder / "large.onnx", folder / "plain", folder / "saved"
    sizes = map(str, (blocks, WIDTH, INSIDE, PIXELS))
    found = measured("export (rmprune.save)", [sys.executable, "-c", SAVE, *sizes, str(saved)])
    yield found | {"gib": round(sum(file.stat().st_size for file in saved.glob("model.onnx*")) / 2**30, 3)}
    shutil.rmtree(saved, ignore_errors=True)
    write(source, blocks)
    size = sum(file.stat().st_size for file in folder.glob("*.*")) / 2**30
    rmprune = [sys.executable, "-m", "rmprune"]
    found = measured("convert", [*rmprune, "convert", str(source), "--out", str(plain)])
    if found["status"] == 0:
        expected, new = outputs(source), outputs(plain / "model.onnx")
        found["difference"] = f"{abs(new - expected).max() / abs(expected).max():.1e}"
    yield found | {"gib": round(sum(file.stat().st_size for file in plain.glob("model.onnx*")) / 2**30, 3)}
    yield measured("inspect", [*rmprune, "inspect", str(source)]) | {"gib": round(size, 3)}


def main() -> None:
    folder, gib = Path(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else 2.0
    folder.mkdir(parents=True)
    rows = []
    for row in steps(folder, -int(-gib * 2**30 // BLOCK)):
        print(row, flush=True)
        rows.append(row)
    with (ROOT / "reports" / "onnx-files" / "large.csv").open("w", newline="") as file:
        writer = csv.DictWriter(
            file, ("step", "gib", "status", "difference", "peak_gib", "cpu_seconds"), lineterminator="\n"
        )
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
