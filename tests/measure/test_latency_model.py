"""The latency model: layers as runtimes see them, interpolation that stays within a block, a cache that knows where
it was measured.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from rmprune.errors import ArtifactError
from rmprune.measure import latency_model
from rmprune.measure.latency_model import LatencyModel, _corners
from rmprune.measure.layers import TimedLayer, neighbours, network_layers
from rmprune.measure.rounds import Rounds
from rmprune.runs import progress

X = torch.zeros(1, 3, 16, 16)


def test_of_two_passes_the_faster_one_counts() -> None:
    class Drifting(LatencyModel):
        calls = 0

        def _measure(self, layers: list[TimedLayer]) -> list[float]:
            self.calls += 1
            return [float(self.calls)] * len(layers)

    model = Drifting("eager")
    model.require(network_layers(chain(8), X))
    assert model.overhead == 1 and set(model.table.values()) == {2.0} and model.calls == 3


def test_a_layer_alone_takes_the_first_quartile_of_its_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    turns = [9.0, 1.0, 3.0, 2.0, 4.0]
    monkeypatch.setattr(
        latency_model,
        "timed_rounds",
        lambda runs, *_, **__: Rounds(dict.fromkeys(runs, turns), dict.fromkeys(runs, 1), 0),
    )
    layers = network_layers(chain(8), X)
    assert LatencyModel("eager", threads=1)._measure(layers[:2]) == [2.0, 2.0]


def chain(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    before = 3
    for width in widths:
        layers += [nn.Conv2d(before, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
        before = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 4)).eval()


class Fake(LatencyModel):
    """Measures by formula: a thousandth of a millisecond for each pair of channels, 0.5 for the runtime."""

    measured: list[TimedLayer]

    def _measure(self, layers: list[TimedLayer]) -> list[float]:
        self.measured = [*getattr(self, "measured", []), *layers]
        return [0.5 + (layer.cin * layer.cout / 1000 if "Conv2d" in layer.kind else 0.0) for layer in layers]

    def _measure_networks(self, models: dict[str, nn.Module], x: Tensor, seconds: float) -> dict[str, float]:
        """The truth of this world: 0.5 + 1.2 of the sum + 0.01 for each layer."""
        sums = {n: network_layers(m, x) for n, m in models.items()}
        times = {
            n: 0.5 + 1.2 * sum(la.cin * la.cout / 1000 for la in ls if "Conv2d" in la.kind) + 0.01 * len(ls)
            for n, ls in sums.items()
        }
        return {n: ms * (5 if isinstance(models[n], Odd) else 1) for n, ms in times.items()}


class Odd(nn.Conv2d):
    """A network that takes five times as long as its layers say."""

    def __init__(self) -> None:
        super().__init__(3, 64, 3)


def test_layers_as_a_runtime_executes_them() -> None:
    layers = network_layers(chain(8, 12), X)
    assert [(la.cin, la.cout) for la in layers] == [(3, 8), (8, 12), (12, 12), (12, 4)]
    kinds = [json.loads(la.kind) for la in layers]
    assert [k["type"] for k in kinds] == ["Conv2d", "Conv2d", "AdaptiveAvgPool2d", "Linear"]
    assert kinds[0]["activation"]["type"] == "ReLU" and kinds[0]["size"] == [16, 16] and kinds[0]["args"]["bias"]
    assert network_layers(chain(8, 16), X)[1].kind == layers[1].kind


def test_residuals_belong_to_the_last_layer_before_them() -> None:
    torch.manual_seed(0)
    layers = network_layers(torchvision.models.resnet18(weights=None), torch.zeros(1, 3, 64, 64))
    kinds = [json.loads(la.kind) for la in layers]
    assert sum(k["add"] for k in kinds) == 8 and sum(k["type"] == "Conv2d" for k in kinds) == 20
    assert all(k["activation"] for k in kinds if k["add"])
    assert sum(bool(k["activation"]) for k in kinds) == 17
    for layer in dict.fromkeys(layers):
        module, x = layer.build(2)
        assert module(x).shape[:2] == (2, layer.cout)


def test_depthwise_layers_have_one_width() -> None:
    model = nn.Sequential(nn.Conv2d(24, 24, 3, groups=24), nn.ReLU6()).eval()
    (layer,) = network_layers(model, torch.zeros(1, 24, 8, 8))
    module, x = layer._replace(cin=40, cout=40).build(1)
    assert module(x).shape[1] == 40
    assert {la.cin for la, _ in _corners(layer._replace(cin=23, cout=23), 16)} == {17, 31}


@pytest.mark.parametrize("block", [8, 16])
def test_neighbours_stay_in_their_block_and_class(block: int) -> None:
    for width in range(1, 300):
        low, high = neighbours(width, block)
        assert low <= width <= high
        assert (low - 1) // block == (width - 1) // block == (high - 1) // block
        if width >= 8:
            assert {w % 2 == 0 for w in (low, width, high)} == {width % 2 == 0}
            assert {w % 4 == 0 for w in (low, width, high)} == {width % 4 == 0}
            assert {w % 8 == 0 for w in (low, width, high)} == {width % 8 == 0}


def test_prediction_is_the_sum_with_the_overhead_once() -> None:
    model = Fake()
    expected = 0.5 + (3 * 8 + 8 * 16) / 1000
    assert model.predict(chain(8, 16), X) == pytest.approx(expected)
    count = len(model.measured)
    assert model.predict(chain(8, 16), X) == pytest.approx(expected) and len(model.measured) == count


def test_timing_many_layers_says_how_long_it_takes(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO", logger="rmprune")
    monkeypatch.setattr(progress, "FIRST_LINE", 0.0)
    model, net = Fake(), chain(*range(8, 8 * 40, 8))
    time = model.predict(net, X)
    said = len(caplog.records)
    assert said and re.fullmatch(
        r"timing \d+ layer shapes one by one on onnxruntime: \d of \d, 0 s left", caplog.messages[0]
    )
    assert model.predict(net, X) == time and len(caplog.records) == said
    assert len(set(model.measured)) == len(model.table) + 1  # the overhead's empty network


def test_widths_between_are_interpolated() -> None:
    model = Fake()
    model.block = 16  # whatever this machine's is: 21 and 23 lie between 17 and 31
    assert model.predict(chain(21, 23), X) == pytest.approx(0.5 + (3 * 21 + 21 * 23) / 1000)
    assert not any(la.cout in (21, 23) for la in model.measured if "Conv2d" in la.kind)
    layers = network_layers(chain(8, 16), X)
    wider = [layers[0]._replace(cout=24), layers[1]._replace(cin=24), *layers[2:]]
    assert model.predict_layers(wider) == pytest.approx(0.5 + (3 * 24 + 24 * 16) / 1000)


def test_calibration_finds_what_isolation_hides() -> None:
    model = Fake()
    nets = {str(w): chain(*w) for w in ((8, 8), (16, 32, 32), (64, 64), (8, 16, 16, 16, 16), (40, 80))}
    times = model._measure_networks(nets, X, 0.0)
    before = max(abs(model.predict(net, X) / times[name] - 1) for name, net in nets.items())
    table = model.calibrate(nets, X)
    assert before > 0.1 and table.error.abs().max() < 0.05
    assert list(table.columns) == ["model", "predicted_ms", "measured_ms", "error"]
    once = model.fit
    table = model.calibrate(nets, X, unseen={"odd": Odd()})
    assert model.fit == once and list(table.model) == [*nets, "odd"]  # measured with the others, not fitted to
    assert abs(table.error.iloc[-1]) > 0.5


def test_no_layer_takes_less_than_nothing() -> None:
    class Steep(Fake):
        """Deep networks take less than their layers by themselves, by much a layer."""

        def _measure_networks(self, models: dict[str, nn.Module], x: Tensor, seconds: float) -> dict[str, float]:
            whole = {n: [self.layer_ms(layer) for layer in network_layers(m, x)] for n, m in models.items()}
            return {n: 0.5 + max(1.5 * sum(each) - 0.15 * len(each), 0.01) for n, each in whole.items()}

    model = Steep()
    model.calibrate({str(w): chain(*w) for w in ((40, 40), (32, 64, 32), (64, 64, 64), (24, 48, 48, 48, 48))}, X)
    a, b = model.fit
    assert a > 0 and b >= 0
    assert model.predict(chain(1), X) - (model.overhead or 0.0) > 0


def test_the_cache_is_read_back_and_knows_its_place(tmp_path: Path) -> None:
    path = tmp_path / "latency" / "table.json"
    first = Fake(cache=path)
    time = first.predict(chain(8, 16), X)
    again = Fake(cache=path)
    assert again.predict(chain(8, 16), X) == time and not hasattr(again, "measured")
    with pytest.raises(ArtifactError, match="threads 2, here it is 1"):
        Fake(cache=path, threads=1)
    content = json.loads(path.read_text()) | {"processor": "another"}
    path.write_text(json.dumps(content))
    with pytest.raises(ArtifactError, match="measured with processor 'another'"):
        Fake(cache=path)
    path.write_text("{}")
    with pytest.raises(ArtifactError, match="not a latency table"):
        Fake(cache=path)


def test_times_taken_in_another_way_are_kept_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "table.json"
    Fake(cache=path).predict(chain(8, 16), X)
    content = json.loads(path.read_text())
    for timed in ({}, {"timed": content["timed"] | {"way": 1}}):  # as before there was a word of it, and with another
        path.write_text(json.dumps(old := {k: v for k, v in content.items() if k != "timed"} | timed))
        caplog.clear()
        again = Fake(cache=path)
        assert not again.table and "kept as table.before.json, measured anew" in caplog.text
        assert json.loads((tmp_path / "table.before.json").read_text()) == old
        again.predict(chain(8, 16), X)
        assert json.loads(path.read_text()) == content
    caplog.clear()
    assert Fake(cache=path).table and not caplog.records


@pytest.mark.parametrize("other", ["set aside", "measured"])
def test_two_processes_may_meet_times_taken_in_another_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: str
) -> None:
    path, read = tmp_path / "table.json", latency_model.read_json
    Fake(cache=path).predict(chain(8, 16), X)
    new = json.loads(path.read_text())
    path.write_text(json.dumps(old := {k: v for k, v in new.items() if k != "timed"}))

    def while_other(*arguments: Any, **more: Any) -> Any:
        found = read(*arguments, **more)
        monkeypatch.setattr(latency_model, "read_json", read)
        model = Fake(cache=path)
        if other == "measured":
            model.predict(chain(8, 16), X)
        return found

    monkeypatch.setattr(latency_model, "read_json", while_other)
    assert not Fake(cache=path).table
    assert json.loads((tmp_path / "table.before.json").read_text()) == old
    assert json.loads(path.read_text()) == (new if other == "measured" else old)


def test_real_layers_are_measured() -> None:
    model = LatencyModel(threads=1, seconds=0.0, min_rounds=5)
    small, large = model.predict(chain(8, 8), X), model.predict(chain(64, 64), X)
    assert 0 < small < large
    assert set(model.table) >= set(network_layers(chain(8, 8), X))
