"""Data as loaders give it: read where it is what it should be, refused by name where it is not, before anything is cut."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rmprune
from rmprune.data.batches import watch_passes
from rmprune.errors import ConfigError, DataError

IMAGES = torch.randn(8, 3, 12, 12, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(8) % 3


def classifier(classes: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, classes)).eval()


def pruned(data: Any, importance: str = "taylor", net: nn.Module | None = None) -> nn.Module:
    budget = rmprune.Budget(ratio=0.3)
    return rmprune.prune(net or classifier(), IMAGES[:2], importance=importance, data=data, budget=budget)


def test_longer_tuples_lists_and_other_number_types_are_read() -> None:
    expected = pruned([(IMAGES, LABELS)])(IMAGES)
    for data in (
        [(IMAGES, LABELS, LABELS)],
        [[IMAGES, LABELS.int()]],
        [(IMAGES.double(), LABELS)],
        iter([(IMAGES, LABELS)]),
    ):
        assert torch.allclose(pruned(data)(IMAGES), expected, atol=1e-6)


def test_probabilities_are_labels_too() -> None:
    one_hot = nn.functional.one_hot(LABELS, 3).float()
    assert torch.allclose(pruned([(IMAGES, one_hot)])(IMAGES), pruned([(IMAGES, LABELS)])(IMAGES), atol=1e-6)


@pytest.mark.parametrize("importance", ["taylor", "taylor_squared", "activation"])
def test_data_without_images_is_refused(importance: str) -> None:
    used_up = iter([(IMAGES, LABELS)])
    list(used_up)
    for data in (used_up, [], [(IMAGES[:0], LABELS[:0])]):
        with pytest.raises(DataError, match="no images"):
            pruned(data, importance)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ([{"image": IMAGES, "label": LABELS}], "a batch is a dict of image, label"),
        ([IMAGES], "a batch is a tensor of sizes"),
        ([(IMAGES, LABELS[:3])], "8 images and 3 labels"),
        ([((IMAGES * 50).byte(), LABELS)], "images are torch.uint8"),
        ([(IMAGES, LABELS + 7)], "labels from 7 to 9, but the network has 3 classes"),
        ([(IMAGES, LABELS - 1)], "labels from -1"),
        ([(IMAGES, LABELS.float())], "labels are torch.float32"),
    ],
)
def test_other_forms_are_refused_by_name(data: Any, said: str) -> None:
    with pytest.raises(DataError, match=said):
        pruned(data)
    with pytest.raises(DataError, match=said):
        rmprune.pruning.prune_coupled(
            classifier(), IMAGES[:2], importance="taylor", data=data, budget=rmprune.Budget(ratio=0.3)
        )


def test_a_network_of_one_output_has_no_cross_entropy() -> None:
    """Its loss would be 0 whatever the weights, and channels would go by chance."""
    with pytest.raises(DataError, match="one score a class"):
        pruned([(IMAGES, torch.randn(8, 1))], net=classifier(classes=1))


class Silent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = classifier()

    def forward(self, x: Tensor) -> Tensor:
        return 0 * self.net(x)


def test_scores_that_tell_nothing_apart_are_refused() -> None:
    with pytest.raises(DataError, match="every score is 0"):
        pruned([(IMAGES, LABELS)], net=Silent().eval())


class Wordless(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError


def test_a_network_that_fails_without_a_word_is_refused_in_one() -> None:
    with pytest.raises(DataError, match="RuntimeError"):
        watch_passes([(IMAGES, LABELS)], Wordless(), [])


def test_maps_of_classes_are_ranked() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 1)).eval()
    labels = torch.randint(0, 4, (8, 10, 10))
    assert pruned([(IMAGES, labels)], net=net)[0].out_channels < 16


class TwoHeads(nn.Module):
    """Maps under names, as torchvision's segmentation networks give them; `aux` is no part of the loss below."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU())
        self.out, self.aux = nn.Conv2d(16, 1, 1), nn.Sequential(nn.Conv2d(16, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.body(x)
        return {"out": self.out(y), "aux": self.aux(y)}


def to_zero(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    found = model(batch["pixels"])
    return found["out"].square().mean() if isinstance(found, dict) else found.square().mean()


FORMS: dict[str, tuple[Any, Any]] = {
    "regression": (lambda model, batch: (model(batch[0])[:, 0] - batch[1]).square().mean(), [(IMAGES, torch.randn(8))]),
    "several labels": (
        lambda model, batch: nn.functional.binary_cross_entropy_with_logits(model(batch[0]), batch[2]),
        [(IMAGES, "names", torch.randint(0, 2, (8, 3)).float())],
    ),
    "dict": (to_zero, [{"pixels": IMAGES, "names": ["a"] * 8}]),
}


@pytest.mark.parametrize("importance", ["taylor", "taylor_squared", "activation"])
@pytest.mark.parametrize("form", FORMS)
def test_with_a_loss_batches_have_any_form(form: str, importance: str) -> None:
    loss, data = FORMS[form]
    net = TwoHeads().eval() if form == "dict" else classifier()
    cut = rmprune.prune(
        net, IMAGES[:2], importance=importance, data=iter(data), loss=loss, budget=rmprune.Budget(ratio=0.3)
    )
    assert rmprune.count_params(cut) < rmprune.count_params(net)


def test_the_loss_decides_what_goes() -> None:
    """Of the channels of a layer, those stay that the one output of the loss reads; the cross entropy of classes is the default."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)).eval()
    net[4].weight.data = torch.zeros(2, 8)  # type: ignore[union-attr]
    net[4].weight.data[0, 4:] = net[4].weight.data[1, :4] = 1  # type: ignore[union-attr,index]
    for output, stays in ((0, [4, 5, 6, 7]), (1, [0, 1, 2, 3])):
        for prune in (rmprune.prune, rmprune.pruning.prune_coupled):
            cut = prune(
                net, IMAGES[:2], importance="taylor", data=[IMAGES], budget=rmprune.Budget(ratio=0.5),
                loss=lambda model, x, output=output: model(x)[:, output].sum(),
            )  # fmt: skip
            assert torch.equal(cut[0].weight, net[0].weight[stays])  # type: ignore[index]
    ours = pruned([(IMAGES, LABELS)])
    same = rmprune.prune(
        classifier(), IMAGES[:2], importance="taylor", budget=rmprune.Budget(ratio=0.3), data=[(IMAGES, LABELS)],
        loss=lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1]),
    )  # fmt: skip
    assert torch.equal(ours(IMAGES), same(IMAGES))


def test_layers_are_fitted_on_what_the_network_reads_in_the_loss() -> None:
    budget, loss = rmprune.Budget(ratio=0.3), lambda model, batch: model(batch["pixels"]).square().mean()
    first, second = (
        rmprune.prune(classifier(), IMAGES[:2], budget=budget, data=data, loss=loss_, reconstruct=True)  # type: ignore[arg-type]
        for data, loss_ in (([(IMAGES, LABELS)], None), ([{"pixels": IMAGES}], loss))
    )
    assert torch.equal(first(IMAGES), second(IMAGES))


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (lambda model, batch: model(batch).mean().item(), "returns float"),
        (lambda model, batch: model(batch), "returns a torch.float32 tensor of \\(8, 3\\)"),
        (lambda model, batch: model(batch).detach().mean(), "no gradient"),
        (lambda model, batch: torch.zeros((), requires_grad=True), "does not run the network"),
        (lambda model, batch: model(batch).mean() / 0, "it is -?inf|it is nan"),
        (
            lambda model, batch: model(batch["image"]).mean(),
            "failed .(IndexError|TypeError).*batch 0",
        ),
        (
            lambda model, batch: torch._check(False, lambda: "one\ntwo"),
            r"^loss: failed \(RuntimeError: one\); it is called as loss\(model, batch\), where a batch is a tensor of .*batch 0\)$",
        ),
        (lambda model, batch: 0 * model(batch).mean(), "every score is 0"),
    ],
)
def test_a_loss_that_is_none_is_refused(loss: Any, said: str) -> None:
    with pytest.raises(DataError, match=said):
        rmprune.prune(
            classifier(), IMAGES[:2], importance="taylor", data=[IMAGES], loss=loss, budget=rmprune.Budget(ratio=0.3)
        )


def test_a_loss_needs_batches_and_what_needs_a_loss_says_so() -> None:
    with pytest.raises(ConfigError, match="pass data as well"):
        rmprune.prune(classifier(), IMAGES[:2], loss=to_zero, budget=rmprune.Budget(ratio=0.3))  # type: ignore[arg-type]
    for net, data in (
        (TwoHeads().eval(), [(IMAGES, LABELS)]),
        (classifier(1), [(IMAGES, LABELS)]),
        (classifier(), [{"x": IMAGES}]),
    ):
        with pytest.raises(DataError, match="pass loss="):
            pruned(data, net=net)
    with pytest.raises(DataError, match="holds no images"):
        rmprune.prune(
            classifier(), IMAGES[:2], importance="taylor", data=[], loss=to_zero, budget=rmprune.Budget(ratio=0.3)
        )  # type: ignore[arg-type]
