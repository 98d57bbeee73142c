"""The script that measures on a GPU, in miniature on the CPU: parts, rows at once, what is left out, figures and page."""

import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import nn

import rmprune

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


@pytest.fixture(scope="module")
def gpu() -> Any:
    sys.path.insert(0, str(EXPERIMENTS))
    try:
        return importlib.import_module("gpu")
    finally:
        sys.path.remove(str(EXPERIMENTS))


def test_in_miniature(gpu: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = ("exactness", "additions", "training")
    gpu.main(gpu.Settings(parts=parts, device="cpu", quick=True, out=tmp_path))
    run = json.loads((tmp_path / "run-exactness-additions-training.json").read_text())
    assert list(run["seconds"]) == list(parts) and run["left_out"] == [] and run["environment"]["gpu"] is None
    exact = pd.read_csv(tmp_path / "exactness.csv").set_index("number_format")
    assert list(exact.index) == ["float64", "float32", "tf32", "bfloat16", "float16"]
    assert exact.error["float64"] < 1e-9 < exact.error["float32"] < 1e-3 and (exact.removed == 10).all()
    assert set(pd.read_csv(tmp_path / "additions.csv").form) == {"with", "without"}
    assert list(pd.read_csv(tmp_path / "training.csv").loop) == ["rmprune", "plain"]
    gpu.main(gpu.Settings(figures=tmp_path))
    assert (tmp_path / "additions.png").stat().st_size > 1000 and "page.md" in capsys.readouterr().out
    assert "a CPU, which says nothing of GPUs" in (tmp_path / "page.md").read_text()


def test_what_fails_and_what_has_no_time_is_noted(gpu: Any, tmp_path: Path) -> None:
    part = gpu.Part(gpu.Settings(device="cpu", out=tmp_path), "speed", time.monotonic() + 3, [])
    with part.trying("a network") as begun:
        assert begun
        raise RuntimeError("CUDA out of memory\nand so on")
    with part.trying("another", 5.0) as begun:
        assert not begun
    assert part.left_out == ["speed, a network: RuntimeError: CUDA out of memory", "speed, another: no time was left"]
    with pytest.raises(SystemExit, match="there is no GPU here; --quick"):
        gpu.main(gpu.Settings(device="cpu"))


def test_additions_go_and_layers_stay(gpu: Any) -> None:
    pair = gpu.networks.with_and_without("resnet18", quick=True)
    x = torch.randn(1, 3, 32, 32)
    assert not torch.allclose(pair["with"](x), pair["without"](x))
    weights = [sum(isinstance(m, nn.Conv2d) for m in net.modules()) for net in pair.values()]
    assert weights[0] == weights[1]


def test_networks_travel_without_weights(gpu: Any, tmp_path: Path) -> None:
    gpu.networks.write(tmp_path, ("resnet18",), quick=True)
    made, read = (gpu.networks.forms_in(folder, "resnet18", quick=True) for folder in (None, tmp_path))
    x = torch.randn(1, 3, 32, 32)
    macs = [{form: rmprune.count_macs(net, x) for form, net in forms.items()} for forms in (made, read)]
    assert macs[0] == macs[1] and list(made)[:3] == ["original", "RM", "RM fused"] and len(made) == 4
    for net in read.values():
        assert not net.training and 0.01 < float(net(x).detach().abs().max()) < 1e3


def test_the_page_weighs_the_goals(gpu: Any, tmp_path: Path) -> None:
    rows = [
        {"network": "mobilenet_v2", "form": form, "backend": backend, "batch_size": batch, "speed_up": speed_up}
        for form, speed_up in (("original", 1.0), ("RM 0.60", 1.4))
        for backend, batch in (("eager", 32), ("eager", 256), ("cudagraph", 32), ("cudagraph", 256))
    ]
    rows[-1]["speed_up"] = 1.3
    pd.DataFrame(rows).to_csv(tmp_path / "speed.csv")
    points = [("original", 0.9, 1.0), ("residual-amc", 0.8, 0.5), ("rm-amc", 0.87, 0.6), ("rm-amc", 0.7, 0.5)]
    pd.DataFrame(
        [
            {"comparison": "amc", "network": "n", "method": m, "seed": 0, "accuracy": a, "time_ratio": t}
            for m, a, t in points
        ]
    ).to_csv(tmp_path / "accuracy.csv")
    gpu.gpu_report.draw(tmp_path)
    page = (tmp_path / "page.md").read_text()
    assert "RM 0.60 of its MACs, batch 32 and more: at least 1.36 times in 1 of 2 backends (eager)" in page
    assert "rm-amc lies -10.00 to +4.37 points over residual-amc at equal measured time; above in 1 of 2" in page


def test_every_path_is_there_and_in_the_docs(gpu: Any, capsys: pytest.CaptureFixture[str]) -> None:
    gpu.main(gpu.Settings(paths=True))
    said, docs = capsys.readouterr().out, (EXPERIMENTS.parent / "docs" / "gpu.md").read_text()
    for path in gpu.PATHS:
        parts = path.split(".")
        module = next(".".join(parts[:n]) for n in range(len(parts), 0, -1) if importable(".".join(parts[:n])))
        found = importlib.import_module(module)
        for name in parts[module.count(".") + 1 :]:
            found = getattr(found, name)
        assert path in said and f"`{path}`" in docs
    assert all(name in docs for name in gpu.GPU_ONLY)


def importable(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False
