"""The registry: names, settings, and what unknown ones raise."""

import importlib.util

import pytest
import torch
import torchvision
from torch import nn

from rmprune import models
from rmprune.errors import ConfigError
from rmprune.models import families, resnet


def test_every_family_is_listed_and_its_names_match_its_pattern():
    known = models.names()
    assert len(known) == len(set(known))
    assert {"resnet20", "resnet18", "mobilenet_v2"} <= set(known)
    for family in families.FAMILIES.values():
        for name in family.names:
            found = families._family(name)
            assert found is not None and found.build is family.build, name


def test_depths_that_torchvision_has_are_torchvisions():
    for name in ("resnet34", "resnet50", "resnet101", "resnet152"):
        assert families.FAMILIES["|".join(resnet.TORCHVISION_NAMES)] is families._family(name)
    model, theirs = models.create("resnet18"), torchvision.models.resnet18()
    assert isinstance(model, torchvision.models.ResNet)
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    assert not isinstance(models.create("resnet20"), torchvision.models.ResNet)


@pytest.mark.parametrize("name", ["squeezenet1_1", "mnasnet0_5", "googlenet"])
def test_input_channels_of_torchvisions_networks(name: str):
    model = models.create(name, num_classes=7, in_channels=2).train()
    if name == "googlenet":  # its training mode needs large images
        model.eval()
    with torch.no_grad():
        assert model(torch.randn(2, 2, 64, 64)).shape == (2, 7)


def test_accepts_tells_which_settings_a_builder_takes():
    assert models.accepts("resnet18", "small_images") and models.accepts("resnet20", "width")
    assert not models.accepts("resnet20", "small_images") and not models.accepts("alexnet", "width")


@pytest.mark.parametrize(
    "name", ["resnet2o", "resnett18", "timm/resnet26_x", "", "hf-hub:timm/resnet18", "timm/hf-hub:a/b"]
)
def test_unknown_names(name: str):
    with pytest.raises(ConfigError, match="there is no network"):
        models.create(name)


def test_unknown_names_come_with_close_matches():
    with pytest.raises(ConfigError, match=r"did you mean .*resnet18"):
        models.create("resnet_18")
    with pytest.raises(ConfigError, match="6n"):
        models.create("resnet21")


def test_unknown_settings():
    with pytest.raises(ConfigError, match=r"resnet20 cannot be built.*depth"):
        models.create("resnet20", depth=3)
    with pytest.raises(ConfigError, match="num_classes"):
        models.create("resnet20", num_classes=0)
    with pytest.raises(ConfigError, match="width"):
        models.create("resnet20", width=0)


def test_timm_by_either_name():
    pytest.importorskip("timm")
    for name in ("timm/resnet10t", "resnet10t"):
        model = models.create(name, num_classes=5, in_channels=1)
        assert isinstance(model, nn.Module)
        assert model(torch.randn(2, 1, 32, 32)).shape == (2, 5)
    with pytest.raises(ConfigError, match="Invalid pretrained tag"):
        models.create("timm/resnet10t.nope")


def test_timm_missing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'rmprune\[all\]'"):
        models.create("timm/resnet10t")
    with pytest.raises(ConfigError, match="there is no network"):
        models.create("resnet10t")
