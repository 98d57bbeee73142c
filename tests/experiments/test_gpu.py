"""The script that measures on a GPU, in miniature on the CPU: parts, rows at once, what is left out, figures and page."""

import functools
import importlib
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from torch import nn

import rmprune
from rmprune.measure import BACKENDS
from rmprune.methods.table import find_methods
from rmprune.runs.cells import plan_cells

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


@pytest.fixture(scope="module")
def gpu() -> Any:
    sys.path.insert(0, str(EXPERIMENTS))
    try:
        return importlib.import_module("gpu")
    finally:
        sys.path.remove(str(EXPERIMENTS))


@pytest.mark.long
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
    part = gpu.Part("speed", tmp_path, "cpu", time.monotonic() + 60, [])
    with part.trying("a network") as begun:
        assert begun
        raise RuntimeError("CUDA out of memory\nand so on")
    with part.trying("its neighbour"):
        raise AttributeError("torch 2.11 has none")
    with part.trying("another", 100.0) as begun:
        assert not begun
    with part.trying("the same as before", 5.0, kind="slow") as begun:
        assert begun
    part.took["slow"] = 100.0
    with part.trying("the same again", 5.0, kind="slow") as begun:
        assert not begun
    assert part.left_out == [
        "speed, a network: RuntimeError: CUDA out of memory",
        "speed, its neighbour: AttributeError: torch 2.11 has none",
        "speed, another: no time was left",
        "speed, the same again: no time was left",
    ]
    with pytest.raises(SystemExit, match="there is no GPU here; --quick"):
        gpu.main(gpu.Settings(device="cpu"))
    with pytest.raises(SystemExit, match="unknown parts sped; there are: exactness"):
        gpu.main(gpu.Settings(parts=("sped",), device="cpu", quick=True))


def test_a_part_is_stopped_when_its_time_is_up(gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it is doing, and although what it does would go on after any error; its rows stay, and the next part comes."""
    monkeypatch.setattr(importlib.import_module("gpu_part"), "AGAIN", 0.05)
    before = signal.getsignal(signal.SIGALRM)
    part = gpu.Part("speed", tmp_path, "cpu", time.monotonic() + 0.1, [])

    def measure() -> None:
        part.write({"form": "original"})
        with part.trying("a network"):
            while True:
                try:
                    time.sleep(30)
                except Exception:
                    continue

    part.run(measure)
    assert part.left_out == ["speed, a network: time was up", "speed, the rest: time was up"] and -5 < part.left <= 0
    assert pd.read_csv(tmp_path / "speed.csv").form.tolist() == ["original"]
    assert signal.getsignal(signal.SIGALRM) is before and signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_kit_fits_the_time_that_a_machine_is_lent_for(gpu: Any) -> None:
    """Fifteen minutes with its start; one command takes ten at most, and the script promises nine for what it does by itself."""
    assert sorted(name for parts in gpu.KITS.values() for name in parts) == sorted(gpu.PARTS) == sorted(gpu.SECONDS)
    for parts in gpu.KITS.values():
        assert sum(gpu.SECONDS[name] for name in parts) <= 9 * 60 - 15  # what is imported before
    said = subprocess.run(
        ["bash", str(EXPERIMENTS / "gpu.sh"), "leases"], capture_output=True, text=True, check=True
    ).stdout
    assert said in (EXPERIMENTS.parent / "docs" / "gpu.md").read_text()
    asked = re.findall(r"(\w+), timeout_s (\d+): .* there (\w+) --parts ([a-z,]+)(?: --scale ([0-9.]+))?", said)
    assert len(asked) == said.count("--parts") and {part for *_, parts, _ in asked for part in parts.split(",")} == set(
        gpu.PARTS
    )
    for carried, seconds, kit, parts, scale in asked:
        assert carried == kit and set(parts.split(",")) <= set(gpu.KITS[kit])
        needed = 30 + float(scale or 1) * sum(
            gpu.SECONDS[name] for name in parts.split(",")
        )  # 30: to install and import
        assert needed <= int(seconds) <= 600


def test_every_backend_of_a_gpu_has_its_turn(gpu: Any) -> None:
    on_gpus = {name for name, entry in BACKENDS.items() if "cuda" in entry.devices}
    assert set(gpu.BACKENDS) == on_gpus
    jobs = gpu.in_turn(list(gpu.BACKENDS), gpu.BATCHES, list(gpu.networks.FAMILIES))
    assert len(set(jobs)) == len(jobs) == len(on_gpus) * 3 * len(gpu.networks.FAMILIES)
    assert jobs[0] == ("cudagraph-float16", 32, "mobilenet_v2") and {batch for _, batch, _ in jobs[:30]} == {32, 256, 1}
    assert {network for _, _, network in jobs[:60]} == set(gpu.networks.FAMILIES)


def test_every_run_of_full_size_is_one_that_its_command_takes(gpu: Any, tmp_path: Path) -> None:
    runs = [
        r
        for part in ("accuracy", "solar")
        for r in gpu.gpu_runs.planned(part, (), range(5), "cuda", tmp_path, tmp_path, quick=False)
    ]
    by_comparison: dict[str, set[int]] = {}
    for run in runs:
        by_comparison.setdefault(run.comparison, set()).add(run.seed)
        if run.config.command == "slim":
            assert "auto" in find_methods(run.config.method) and run.config.search_minutes <= 0.1
        else:  # from the network that slim trained just before
            slim = runs[runs.index(run) - 1].config
            cells = plan_cells(slim.directory, slim.seed, slim.seeds, slim.prune.budgets)
            assert {cell.shared / "dense" for cell in cells} == {run.config.checkpoint}
            assert set(run.config.method) == {"rm-amc", "residual-amc"} and run.config.model != "resnet20"
        assert (
            run.config.measure.device == run.config.device == "cuda" and run.config.measure.backends[0] in gpu.GPU_ONLY
        )
    assert all(seeds == set(range(5)) for seeds in by_comparison.values()) and len(runs) == 5 * (1 + 3 * 2)
    solar = [run.config.data for run in runs if run.config.data.dataset == "imagefolder"]
    assert {(data.image_size, str(data.labels)) for data in solar} == {(128, f"split{n}.csv") for n in range(5)}
    assert {run.config.data.dataset for run in runs} == {"fashion-mnist", "fashion-mnist-64", "imagefolder"}
    only = gpu.gpu_runs.planned("accuracy", ("mobilenet_v2",), range(1), "cuda", None, tmp_path, quick=False)
    assert {run.comparison for run in only} == {"mobilenet_v2, fashion-mnist-64"}


def test_additions_go_and_layers_stay(gpu: Any) -> None:
    pair = gpu.networks.with_and_without("resnet18", quick=True)
    x = torch.randn(1, 3, 32, 32)
    assert not torch.allclose(pair["with"](x), pair["without"](x))
    weights = [sum(isinstance(m, nn.Conv2d) for m in net.modules()) for net in pair.values()]
    assert weights[0] == weights[1]


@pytest.mark.long
def test_networks_travel_without_weights(gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu.networks, "forms", functools.cache(gpu.networks.forms))
    gpu.networks.write(tmp_path, ("resnet18",), quick=True)
    made, read = (gpu.networks.forms_in(folder, "resnet18", quick=True) for folder in (None, tmp_path))
    x = torch.randn(1, 3, 32, 32)
    macs = [{form: rmprune.count_macs(net, x) for form, net in forms.items()} for forms in (made, read)]
    assert macs[0] == macs[1] and list(made)[:2] == ["original", "RM"] and len(made) == 3  # nothing to fuse
    for net in read.values():
        assert not net.training and 0.01 < float(net(x).detach().abs().max()) < 1e3


def test_the_page_weighs_the_goals(gpu: Any, tmp_path: Path) -> None:
    rows = [
        {
            "card": "an H100",
            "network": "mobilenet_v2",
            "form": form,
            "backend": backend,
            "batch_size": batch,
            "speed_up": speed_up,
        }
        for form, speed_up in (("original", 1.0), ("RM 0.60", 1.4))
        for backend, batch in (("eager", 32), ("eager", 256), ("cudagraph", 32), ("cudagraph", 256))
    ]
    rows[-1]["speed_up"] = 1.3
    pd.DataFrame(rows).to_csv(tmp_path / "speed.csv")
    points = [("original", 0.9, 1.0), ("residual-amc", 0.8, 0.5), ("rm-amc", 0.87, 0.6), ("rm-amc", 0.7, 0.5)]
    pd.DataFrame(
        [
            {
                **{
                    "card": "an H100",
                    "comparison": "n, photos",
                    "network": "n",
                    "method": m,
                    "seed": 0,
                    "begun": begun,
                },
                **{"accuracy": a + lucky, "time_ratio": t},
            }
            for begun, shown, lucky in ((1, 2, 0.05), (2, 4, 0.0))  # time was up before all of the first were measured
            for m, a, t in points[:shown]
        ]
    ).to_csv(tmp_path / "accuracy.csv")
    (tmp_path / "another").mkdir()
    other = rows[0] | {"card": "an H200"}
    pd.DataFrame([other, other | {"form": "RM 0.60"}]).to_csv(tmp_path / "another" / "speed.csv")
    made = {path.name for path in gpu.gpu_report.draw(tmp_path)}
    assert made == {"speed-an-H100.png", "speed-an-H200.png", "accuracy-an-H100.png", "page.md"}
    page = (tmp_path / "page.md").read_text()
    assert "RM 0.60 of its MACs, batch 32 and more: at least 1.36 times in 1 of 2 backends (eager)" in page
    found = "rm-amc lies -10.00 to +4.37 points over residual-amc at equal measured time; above in 1 of 2 networks (0 are above"
    assert f"n, photos: {found} its next slower network too), 1 seeds" in page


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


def test_another_time_goes_on_where_the_last_one_stopped(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was measured on this card is not measured again, a seed as a whole; what another card measured is."""
    run = gpu.gpu_runs.Run("n, photos", 0, SimpleNamespace(command="slim"), 0.0)
    planned = [run, run._replace(config=SimpleNamespace(command="amc"))]
    planned += [one._replace(seed=1) for one in planned]
    started: list[str] = []
    monkeypatch.setattr(gpu.gpu_runs, "planned", lambda *args, **settings: iter(planned))
    monkeypatch.setattr(gpu, "run_amc", lambda config, command: started.append(config.command))
    monkeypatch.setattr(gpu.gpu_runs, "rows", lambda records: [{"method": "rm", "accuracy": 0.9}])

    def lease(card: str, out: str, stop: int) -> Any:
        monkeypatch.setattr(gpu.gpu_runs, "planned", lambda *args, **settings: iter(planned[:stop]))
        before = gpu.gpu_report.read(tmp_path, "accuracy")
        (tmp_path / out).mkdir(exist_ok=True)
        part = gpu.Part("accuracy", tmp_path / out, "cpu", time.monotonic() + 60, [], card, before)
        started.clear()
        gpu.accuracy(part, gpu.Settings())
        return pd.read_csv(tmp_path / out / "accuracy.csv") if started else None

    assert list(lease("an H100", "1", 3).seed) == [0, 0, 1]
    assert list(lease("an H100", "2", 4).seed) == [1, 1]  # the seed that was not finished, from its beginning
    assert lease("an H100", "3", 4) is None
    assert list(lease("an H200", "1", 4).seed) == [0, 0, 1, 0, 0, 1, 1]  # added to what lies there


def test_widths_of_equal_macs_for_networks_without_a_multiplier(gpu: Any) -> None:
    def widths(net: nn.Module) -> list[int]:
        return [m.out_channels for m in net.modules() if isinstance(m, nn.Conv2d)]

    with torch.device("meta"):
        for name in ("timm/repvgg_a0", "timm/efficientnet_lite0"):
            whole = widths(rmprune.models.create(name))
            assert widths(gpu.networks.of_width(name, 1.0, False)) == whole
            narrow = widths(gpu.networks.of_width(name, 0.7, False))[
                1:-1
            ]  # EfficientNet-Lite's first and last layer stay
            assert all(n % 8 == 0 and n <= w for n, w in zip(narrow, whole[1:-1], strict=True))
            assert 0.65 < sum(narrow) / sum(whole[1:-1]) < 0.75
