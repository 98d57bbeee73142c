"""Importance: each criterion against its definition, computed here by other means."""

import pytest
import torch
import torch.nn.functional as F
from marks import few
from pruning_nets import batches, chain, conv, images, mobile_chain, residual
from torch import Tensor, nn

from rmprune.data.batches import WithLoss
from rmprune.errors import ConfigError, DataError, UnsupportedModel
from rmprune.pruning.coupled import loss_gradients
from rmprune.pruning.find_groups import find_structure
from rmprune.pruning.importance import IMPORTANCES, score_groups
from rmprune.pruning.taylor_sum import TaylorSum


class Gate(nn.Module):
    """A channel-wise factor of 1, whose gradient is the effect of the channel (the gate trick)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(channels, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor[:, None, None]


def gated_chain() -> tuple[nn.Module, Gate, nn.Module]:
    """A network, a gate behind its layer 3, and the network with the gate."""
    model, gate = chain(), Gate(12)
    return model, gate, nn.Sequential(*model[:6], gate, *model[6:])


def test_taylor_is_the_gradient_of_a_gate() -> None:
    (model, gate, gated), data = gated_chain(), batches(2)
    scores = IMPORTANCES["taylor"](model, find_structure(model, images()), data)
    expected = torch.zeros(12, dtype=torch.float64)
    for x, y in data:
        (gradient,) = torch.autograd.grad(F.cross_entropy(gated(x), y), gate.factor)
        expected += gradient.abs()
    torch.testing.assert_close(scores["3"], expected)


def test_taylor_squared_takes_image_by_image() -> None:
    (model, gate, gated), data = gated_chain(), batches(2)
    scores = IMPORTANCES["taylor_squared"](model, find_structure(model, images()), data)
    squares = []
    for x, y in data:
        for i in range(len(x)):
            loss = F.cross_entropy(gated(x[i : i + 1]), y[i : i + 1])
            squares.append(torch.autograd.grad(loss, gate.factor)[0].square())
    torch.testing.assert_close(scores["3"], torch.stack(squares).mean(0).sqrt())


def triplets(model: nn.Module, batch: list[Tensor]) -> Tensor:
    """Of three calls; the fourth says nothing, and has other images."""
    with torch.no_grad():
        model(torch.cat(batch))
    return F.triplet_margin_loss(*map(model, batch), margin=5.0)


def test_what_all_calls_of_a_loss_say_is_one_effect() -> None:
    model, gate, gated = gated_chain()
    data, structure = [list(images(9, seed=s).split(3)) for s in range(2)], find_structure(model, images())
    found = {
        name: IMPORTANCES[name](model, structure, WithLoss(data, triplets)) for name in ("taylor", "taylor_squared")
    }
    of_batches, of_images = (
        torch.stack([torch.autograd.grad(triplets(gated, batch), gate.factor)[0] for batch in some])
        for some in (data, [[x[i : i + 1] for x in batch] for batch in data for i in range(3)])
    )
    torch.testing.assert_close(found["taylor"]["3"], of_batches.abs().sum(0))
    torch.testing.assert_close(found["taylor_squared"]["3"], of_images.square().mean(0).sqrt())


def test_calls_of_different_numbers_of_images_have_no_effect_by_image() -> None:
    model, gate, gated = gated_chain()

    def loss(model: nn.Module, batch: list[Tensor]) -> Tensor:
        return model(batch[0]).square().mean() + model(batch[1]).square().mean()

    data, structure = [list(images(8).split([5, 3]))], find_structure(model, images())
    expected = torch.autograd.grad(loss(gated, data[0]), gate.factor)[0].abs()
    torch.testing.assert_close(IMPORTANCES["taylor"](model, structure, WithLoss(data, loss))["3"], expected)
    with pytest.raises(DataError, match=r"called with 5 and with 3 images.*take importance='taylor'"):
        IMPORTANCES["taylor_squared"](model, structure, WithLoss(data, loss))


@pytest.mark.parametrize("name", ["taylor", "taylor_squared"])
def test_a_batch_that_is_taken_in_parts_says_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its images' effects still meet before the modulus: of parts by themselves, Taylor's would not."""
    model, data = chain(), [(torch.cat([x, -x[:1]]), torch.cat([y, y[:1]])) for x, y in batches(2)]
    structure, found = find_structure(model, images()), []
    for part in (2**19, 3 * data[0][0][0, 0].numel(), 1):  # all images, three at a time, one
        monkeypatch.setattr("rmprune.data.batches.PART", part)
        seen: list[int] = []
        with model[0].register_forward_hook(lambda _, given, __, seen=seen: seen.append(len(given[0]))):
            found.append(score_groups(name, model, structure, data))
        assert max(seen) == min(len(data[0][0]), max(1, part // data[0][0][0, 0].numel()))
    assert len(data[0][0]) > 3
    for scores in found[1:]:
        for group, own in scores.items():
            torch.testing.assert_close(own, found[0][group])
    gradients = [loss_gradients(model, data)]  # Torch-Pruning's
    monkeypatch.setattr("rmprune.data.batches.PART", 2**19)
    for parameter, own in loss_gradients(model, data).items():
        torch.testing.assert_close(own, gradients[0][parameter])


def test_images_without_pixels_are_refused() -> None:
    model = chain()
    with pytest.raises(DataError, match="the network fails on images"):
        score_groups(
            "taylor", model, find_structure(model, images()), [(torch.zeros(2, 3, 0, 0), torch.zeros(2).long())]
        )


def test_taylor_of_a_stream_is_its_effect_on_all_readers() -> None:
    """Removing stream channel c of stage 1 silences it for every reader at once: signed effects add before the modulus."""
    model, data = residual(), batches(1)
    structure = find_structure(model, images())
    scores = IMPORTANCES["taylor"](model, structure, data)
    name = next(g.name for g in structure.groups if "0.0" in g.producers)
    x, y = data[0]
    inputs = {}
    layers = {m.layer: model.get_submodule(m.layer) for m in structure.group(name).consumers}
    assert set(layers) == {"1.conv1", "2.conv1", "2.shortcut.0"}
    loss = F.cross_entropy(model(x), y)
    for layer, module in layers.items():
        (gradient,) = torch.autograd.grad(loss, module.weight, retain_graph=True)  # type: ignore[arg-type]
        inputs[layer] = (gradient * module.weight).sum((0, 2, 3))
    torch.testing.assert_close(scores[name], torch.stack(list(inputs.values())).sum(0).abs().detach())


class Paired(nn.Module):
    """Queries and keys, which no layer reads, and values, which one reads."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.q, self.k, self.v = nn.Conv2d(3, 8, 3, 2), *(nn.Conv2d(8, 6, 1) for _ in range(3))
        self.o, self.head = nn.Linear(6, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        q, k, v = (y.flatten(2).mT for y in (self.q(x), self.k(x), self.v(x)))
        return self.head(self.o((q @ k.mT).softmax(-1) @ v).mean(1))


def test_channels_that_meet_in_a_product_count_by_what_becomes_of_it() -> None:
    model, data = Paired().double().eval(), batches(2)
    structure = find_structure(model, images())
    assert structure.group("k").paired and not structure.group("k").consumers
    scores = {name: IMPORTANCES[name](model, structure, data) for name in ("taylor", "taylor_squared")}
    gate = Gate(6)
    model.k = nn.Sequential(model.k, gate)
    of_batches, of_images = (
        torch.stack([torch.autograd.grad(F.cross_entropy(model(x), y), gate.factor)[0] for x, y in found])
        for found in (data, [(x[i : i + 1], y[i : i + 1]) for x, y in data for i in range(len(x))])
    )
    torch.testing.assert_close(scores["taylor"]["k"], of_batches.abs().sum(0))
    torch.testing.assert_close(scores["taylor_squared"]["k"], of_images.square().mean(0).sqrt())


def test_activation_is_no_measure_of_channels_that_meet_in_a_product() -> None:
    model = Paired().double().eval()
    with pytest.raises(UnsupportedModel, match="k: its channels meet in a product"):
        IMPORTANCES["activation"](model, find_structure(model, images()), batches(1))


@pytest.mark.parametrize("build", [chain, mobile_chain, residual, lambda: Paired().double().eval()])
def test_training_gradients_give_the_same_taylor_scores(build: object) -> None:
    model, data = build(), batches(3)  # type: ignore[operator]
    structure = find_structure(model, images())
    summed = TaylorSum(structure)
    assert not summed.update(model)  # no gradients yet
    for x, y in data:
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        assert summed.update(model)
    for name, expected in IMPORTANCES["taylor"](model, structure, data).items():
        torch.testing.assert_close(summed.scores[name], expected, rtol=1e-9, atol=1e-12)


def test_taylor_from_batch_norm_gradients() -> None:
    """Behind batch norm and ReLU the effect is gamma * dL/dgamma + beta * dL/dbeta."""
    model, data = chain().train(), batches(1)
    structure = find_structure(model, images())
    F.cross_entropy(model(data[0][0]), data[0][1]).backward()
    summed = TaylorSum(structure)
    summed.update(model)
    bn = model[4]
    expected = (bn.weight * bn.weight.grad + bn.bias * bn.bias.grad).abs().detach()
    torch.testing.assert_close(summed.scores["3"], expected)


def test_batch_norm_is_the_scale_and_adds_up_over_producers() -> None:
    model = residual()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data[::2] *= -1
    structure = find_structure(model, images())
    scores = IMPORTANCES["batch_norm"](model, structure, None)
    assert torch.equal(scores["1.conv1"], model[1].bn1.weight.abs().detach())
    name = next(g.name for g in structure.groups if "0.0" in g.producers)
    torch.testing.assert_close(scores[name], (model[0][1].weight.abs() + model[1].bn2.weight.abs()).detach())
    with pytest.raises(UnsupportedModel, match="no batch norm"):
        bare = nn.Sequential(conv(3, 4), nn.ReLU(), nn.Flatten(), nn.Linear(256, 5)).double()
        score_groups("batch_norm", bare, find_structure(bare, images()))


def test_magnitude_of_a_unit_of_several_filters() -> None:
    grouped = nn.Sequential(conv(3, 4), nn.ReLU(), conv(4, 8, groups=2), nn.ReLU(), conv(8, 6, groups=2)).double()
    structure = find_structure(grouped, images())
    assert structure.group("2").multiple == 2  # a filter of either half
    norms = grouped[2].weight.flatten(1).norm(dim=1).detach()
    torch.testing.assert_close(score_groups("magnitude", grouped, structure)["2"], torch.hypot(norms[:4], norms[4:]))


def test_magnitude_and_random() -> None:
    model = chain()
    structure = find_structure(model, images())
    scores = score_groups("magnitude", model, structure)
    torch.testing.assert_close(scores["3"], model[3].weight.flatten(1).norm(dim=1).detach())
    assert torch.equal(score_groups("random", model, structure)["3"], score_groups("random", model, structure)["3"])


def test_activation_is_the_variance_that_the_next_layer_loses() -> None:
    """For a 1x1 reader and independent channels the squared scores are shares of its output's variance."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 4, 1, bias=False), nn.Flatten(), nn.Linear(256, 5)).double()
    model[0].weight.data.copy_(torch.eye(3)[:, :, None, None] * torch.tensor([1.0, 2, 0])[:, None, None, None])
    x = torch.randn(64, 3, 8, 8, dtype=torch.float64)
    scores = score_groups("activation", model, find_structure(model, images()), [(x, torch.zeros(64))])["0"]
    norms = model[1].weight.flatten(1).square().sum(0).detach()
    shares = torch.tensor([1.0, 4, 0], dtype=torch.float64) * norms
    torch.testing.assert_close(scores.square(), shares / shares.sum(), rtol=0.1, atol=0.01)
    assert scores[2] == 0


@pytest.mark.parametrize("name", sorted(IMPORTANCES))
@pytest.mark.parametrize("build", few([mobile_chain, residual], residual))
def test_every_criterion_scores_every_unit_and_changes_nothing(name: str, build: object) -> None:
    model = build()  # type: ignore[operator]
    if build is mobile_chain and name == "batch_norm":
        pytest.skip("one layer has no batch norm")
    before = {n: t.clone() for n, t in model.state_dict().items()}
    structure = find_structure(model, images())
    scores = score_groups(name, model.train(), structure, batches(1))
    assert {n: len(s) for n, s in scores.items()} == structure.units
    assert all(bool((s >= 0).all()) for s in scores.values())
    assert model.training and all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_tables_callables_and_refusals() -> None:
    model = chain()
    structure = find_structure(model, images())
    table = {"0": torch.arange(8), "4": torch.arange(12), "6": torch.arange(16)}  # 4: the batch norm of layer 3
    assert torch.equal(score_groups(table, model, structure)["3"], torch.arange(12).double())
    assert torch.equal(
        score_groups(lambda *_: score_groups(table, model, structure), model, structure)["0"], table["0"]
    )
    with pytest.raises(ConfigError, match="unknown; there are: batch_norm"):
        score_groups("nonsense", model, structure)
    with pytest.raises(ConfigError, match="no entry for 6"):
        score_groups({"0": table["0"], "3": torch.arange(12)}, model, structure)
    for odd, said in ((None, "gives a NoneType"), ({}, "expected a tensor of 8 finite numbers, got NoneType")):
        with pytest.raises(ConfigError, match=said):
            score_groups(lambda *_, found=odd: found, model, structure)
    with pytest.raises(ConfigError, match="expected a tensor of 8 numbers, one for each channel, got ndarray"):
        score_groups({**table, "0": torch.arange(8).numpy()}, model, structure)
    with pytest.raises(ConfigError, match="expected a tensor of 8 finite numbers"):
        score_groups({**table, "0": torch.full((8,), torch.nan)}, model, structure)
    with pytest.raises(ConfigError, match="measured on images"):
        score_groups("taylor", model, structure)


class ChannelsLast(nn.Module):
    """A linear layer at every position, as in ConvNeXt; or the 1x1 convolution that it is."""

    def __init__(self, linear: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.middle, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 1), nn.Linear(6, 5)
        if linear:
            self.middle = nn.Linear(8, 6)
            torch.manual_seed(0)
            like = ChannelsLast(False)
            self.middle.load_state_dict({"weight": like.middle.weight[:, :, 0, 0], "bias": like.middle.bias})
            self.stem, self.head = like.stem, like.head

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = (
            self.middle(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            if isinstance(self.middle, nn.Linear)
            else self.middle(x)
        )
        return self.head(torch.relu(x).mean((2, 3)))


@pytest.mark.parametrize("name", ["taylor", "taylor_squared", "activation"])
def test_importance_of_what_a_linear_layer_reads_at_every_position(name: str) -> None:
    linear, convolution = (ChannelsLast(kind).double().eval() for kind in (True, False))
    assert torch.allclose(linear(images()), convolution(images()))
    scores = [IMPORTANCES[name](m, find_structure(m, images()), batches(2)) for m in (linear, convolution)]
    assert torch.allclose(scores[0]["stem"], scores[1]["stem"]) and scores[0]["stem"].shape == (8,)
