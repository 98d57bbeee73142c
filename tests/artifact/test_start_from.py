"""Training starts from weights of others: prefixes, heads of other classes, other names; what does not fit is listed."""

from collections import OrderedDict
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

from rmprune.artifact.weights import load_checkpoint_into, put_weights, start_from
from rmprune.errors import ArtifactError
from rmprune.models.families import auxiliary_tensors, create, create_network
from rmprune.models.head import head_parameters


def net(classes: int = 3, width: int = 4) -> nn.Module:
    return create("resnet8", num_classes=classes, width=width)


def equal_but_for_the_head(model: nn.Module, state: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, state[key]) for key, value in model.state_dict().items() if not key.startswith("fc."))


@pytest.mark.parametrize(
    ("nested", "prefix"),
    [
        ("", "_orig_mod."),
        ("state_dict", "model."),
        ("model_state_dict", ""),
        ("model_ema", "module."),
        ("module", "student.net.module."),
    ],
)
def test_names_of_training_frameworks(tmp_path: Path, prefix: str, nested: str) -> None:
    there = net().state_dict()
    content = {prefix + key: value for key, value in there.items()}
    torch.save({nested: content, "epoch": 3} if nested else content, tmp_path / "a.pt")
    model = net()
    assert start_from(model, str(tmp_path / "a.pt"), "resnet8") == ""
    assert all(torch.equal(value, there[key]) for key, value in model.state_dict().items())


def test_a_head_of_other_classes_is_made_anew_and_quiet() -> None:
    there, model = net(10).state_dict(), net(3)
    nn.init.ones_(model.fc.weight)  # as loud as timm's EfficientNets begin
    assert put_weights(model, there, "a.pt", "resnet8") == "the head is new: fc.weight is 10x16 there, 3x16 here"
    assert equal_but_for_the_head(model, there) and 0 < float(model.fc.weight.detach().abs().max()) <= 16**-0.5


def test_a_backbone_without_a_head_and_what_lies_beside_it() -> None:
    there = net().state_dict()
    state = {f"backbone.{key}": value for key, value in there.items() if not key.startswith("fc.")}
    model = net()
    said = put_weights(model, state | {"head.fc.weight": torch.ones(9, 16)}, "a.pt", "resnet8")
    assert said.startswith("head.fc.weight beside backbone.* left out; the head is new: fc.weight is missing there")
    assert equal_but_for_the_head(model, there)


@pytest.mark.parametrize("other", ["student", "moving"])
def test_of_two_whole_networks_none_is_taken(other: str) -> None:
    """Whichever has the shorter name."""
    there = net().state_dict()
    state = {f"{prefix}.{key}": value for prefix in (other, "ema") for key, value in there.items()}
    with pytest.raises(ArtifactError, match=rf"^a\.pt: holds several networks \(ema\., {other}\.\); save the one"):
        put_weights(net(), state, "a.pt", "resnet8")
    del state[f"{other}.bn1.bias"]
    assert put_weights(net(), state, "a.pt", "resnet8").endswith("beside ema.* left out")


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.float64])
def test_weights_of_other_formats(kind: torch.dtype, tmp_path: Path) -> None:
    there = {key: value.to(kind) if value.is_floating_point() else value for key, value in net().state_dict().items()}
    save_file(there, tmp_path / "a.safetensors")
    model = net()
    assert start_from(model, str(tmp_path / "a.safetensors"), "resnet8") == ""
    assert all(torch.equal(value, there[key].to(value.dtype)) for key, value in model.state_dict().items())
    there["bn1.bias"] = torch.full((4,), torch.nan).to(kind)
    with pytest.raises(ArtifactError, match=r"NaN or infinite numbers in bn1\.bias"):
        put_weights(net(), there, "a.pt", "resnet8")


def test_order_is_offered_and_taken_only_when_asked_for() -> None:
    there = {f"layer{number}": value for number, value in enumerate(net(10).state_dict().values())}
    model = net(3)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ArtifactError, match=r"layer0; here conv1.weight\).*add --weights-by-order"):
        put_weights(model, there, "a.pt", "resnet8")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    there = {f"w{number}": value for number, value in enumerate(net(10).state_dict().values()) if value.ndim}
    assert "the head is new" in put_weights(model, there, "a.pt", "resnet8", by_order=True)
    assert torch.equal(model.conv1.weight, there["w0"])


def test_parameters_alone_are_no_weights() -> None:
    model = net(3)
    with pytest.raises(
        ArtifactError, match=r"a\.pt: lacks the statistics of batch norms \(bn1.running_mean, .*save model\.state_dict"
    ):
        put_weights(model, {key: value.detach() for key, value in net(10).named_parameters()}, "a.pt", "resnet8")


@pytest.mark.parametrize("kind", ["norm", "numbered", "named"])
def test_tensors_in_the_order_of_names_say_nothing_about_layers(kind: str, tmp_path: Path) -> None:
    """As .safetensors files sort them: a norm's bias before its weight, layer 10 before layer 2, key before query; of one shape each."""
    layers = {
        "norm": lambda: {"first": nn.Conv2d(3, 4, 1, bias=False), "second": nn.BatchNorm2d(4)},
        "numbered": lambda: {f"block{number}": nn.Linear(4, 4, bias=False) for number in range(12)},
        "named": lambda: {name: nn.Linear(4, 4, bias=False) for name in ("query", "key", "value")},
    }[kind]
    there, here = nn.Sequential(OrderedDict(layers())), nn.ModuleDict({"trunk": nn.Sequential(OrderedDict(layers()))})
    there = nn.ModuleDict({"encoder": there})
    path, before = tmp_path / "a.safetensors", {key: value.clone() for key, value in here.state_dict().items()}
    save_file({key: value for key, value in there.state_dict().items() if value.ndim}, path)
    for by_order, told in ((False, "another network than net"), (True, "in the order of their names")):
        with pytest.raises(ArtifactError, match=told) as raised:
            start_from(here, str(path), "net", by_order=by_order)
        assert "add --weights-by-order" not in str(raised.value)
    assert all(torch.equal(value, before[key]) for key, value in here.state_dict().items())
    torch.save(there.state_dict(), tmp_path / "a.pt")
    start_from(here, str(tmp_path / "a.pt"), "net", by_order=True)
    assert all(map(torch.equal, here.state_dict().values(), there.state_dict().values()))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda state: state.pop("bn1.bias"), "missing there: bn1.bias"),
        (lambda state: state.update(extra=torch.ones(2)), "not in resnet8: extra"),
        (lambda state: state.update({"bn1.bias": torch.ones(5)}), r"of another shape: bn1.bias \(5 there, 4 here\)"),
        (lambda state: state.clear() or state.update(a=torch.ones(2)), "and 41 more"),
    ],
)
@pytest.mark.parametrize("by_order", [False, True])
def test_what_does_not_fit_is_listed(change, told: str, by_order: bool) -> None:
    state = net(10).state_dict()
    change(state)
    with pytest.raises(
        ArtifactError, match=r"not those of resnet8 in order \(.*there, .*here" if by_order else told
    ) as caught:
        put_weights(net(3), state, "a.pt", "resnet8", by_order=by_order)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


def test_torchvisions_own_weights_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    there = torchvision.models.squeezenet1_1()
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save(there.state_dict(), folder / torchvision.models.SqueezeNet1_1_Weights.DEFAULT.url.rsplit("/", 1)[-1])
    model = create("squeezenet1_1", num_classes=4)
    assert "the head is new: classifier.1.weight" in start_from(model, "imagenet", "squeezenet1_1")
    assert torch.equal(model.features[0].weight, there.features[0].weight)


def test_auxiliary_heads_are_taken_off_as_torchvision_does() -> None:
    there = torchvision.models.googlenet(aux_logits=True, init_weights=False, num_classes=4).state_dict()
    model = create("googlenet", num_classes=4)
    for prefix in ("", "module."):
        said = put_weights(model, {prefix + key: value for key, value in there.items()}, "a.pt", "googlenet")
        assert said == "aux1.*, aux2.* left out: auxiliary heads, which only training reads"
    assert all(torch.equal(value, there[key]) for key, value in model.state_dict().items())
    for key in ("aux3.fc.weight", "aux1.extra"):  # which no auxiliary head has
        with pytest.raises(ArtifactError, match=f"not in googlenet: {key}"):
            put_weights(model, there | {key: torch.ones(2)}, "a.pt", "googlenet")
    for name in ("inception_v3", "timm/inception_v3", "timm/inception_v3.tv_in1k"):
        assert {key.split(".")[0] for key in auxiliary_tensors(name)} == {"AuxLogits"}
    assert auxiliary_tensors("resnet18") == set()


@pytest.mark.parametrize("name", ["squeezenet1_0", "timm/test_resnet"])
def test_a_failed_download_is_one_line(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError("no\nnetwork")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen", fail)
    monkeypatch.setattr("timm.create_model", fail)
    with pytest.raises(ArtifactError, match=r"could not be downloaded \(no network\).*--weights FILE"):
        start_from(nn.Identity(), "imagenet", name)


def test_batch_norms_of_weights_made_elsewhere() -> None:
    norms = [
        {
            m.eps
            for m in create_network("resnet8", num_classes=2, input_shape=(3, 8, 8), **given).modules()
            if isinstance(m, nn.BatchNorm2d)
        }
        for given in ({}, {"batch_norm_eps": 1e-3})
    ]
    assert norms == [{1e-5}, {1e-3}]


class Versioned(nn.Linear):
    """Asks for the version of what it loads, as torchvision's MNASNet."""

    _version = 2

    def _load_from_state_dict(
        self, state: dict[str, Tensor], prefix: str, metadata: dict[str, int], *rest: object
    ) -> None:
        assert metadata["version"] == 2
        super()._load_from_state_dict(state, prefix, metadata, *rest)


def test_modules_that_ask_for_their_version(tmp_path: Path) -> None:
    there = dict(nn.Sequential(nn.Linear(3, 3), Versioned(3, 2)).state_dict())
    model = nn.Sequential(nn.Linear(3, 3), Versioned(3, 2))
    assert put_weights(model, there, "a.pt", "versioned") == ""
    torch.save(there, tmp_path / "a.pt")
    load_checkpoint_into(model, tmp_path / "a.pt", "versioned")
    assert torch.equal(model[1].weight, there["1.weight"])


def test_the_head() -> None:
    assert head_parameters(net()) == ["fc.weight", "fc.bias"]
    assert head_parameters(nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4))) == []
    side_by_side = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Linear(8, 4), nn.Linear(8, 4, bias=False))
    assert head_parameters(side_by_side) == ["2.weight", "2.bias", "3.weight"]


def test_a_hidden_layer_as_wide_as_the_head_keeps_its_weights() -> None:
    there, here = (nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, classes)) for classes in (9, 4))
    assert head_parameters(here) == ["2.weight", "2.bias"]
    put_weights(here, there.state_dict(), "a.pt", "mlp")
    assert torch.equal(here[0].weight, there[0].weight)


@pytest.mark.parametrize("by_order", [False, True])
def test_variances_below_zero_are_no_variances(by_order: bool) -> None:
    """As where another framework puts the mean behind the variance, of one shape each."""
    state = net(4).state_dict()
    state["layer2.0.bn1.running_var"][3] = -0.01
    with pytest.raises(ArtifactError, match=r"^a.pt: negative variances in layer2.0.bn1.running_var: "):
        put_weights(net(4), state, "a.pt", "resnet8", by_order=by_order)
