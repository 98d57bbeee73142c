"""Networks by name, built with random weights: ours, torchvision's and timm's.

A new family: write models/FAMILY.py with a builder `build(name, *, num_classes, in_channels, **its own settings)` and
append one line to `FAMILIES`. The pattern must match the whole name; the first family that matches wins.
"""

import difflib
import importlib.util
import inspect
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torchvision
from torch import nn

from rmprune.config import require
from rmprune.errors import ConfigError, out_of_memory
from rmprune.models import mobilenet, preact, repvgg, resnet, rmnext

SMALL_IMAGE = 64  # up to this size networks that know a small-image stem get it


def create_network(
    name: str, *, num_classes: int, input_shape: tuple[int, int, int], batch_norm_eps: float | None = None, **given: Any
) -> nn.Module:
    """A new network with random weights for images of `input_shape` (C, H, W). `given`: its own settings; None leaves one out.
    `batch_norm_eps`: in the place of what its batch norms add to variances. Raises ConfigError for an unknown network, or a setting that it
    does not have.

    >>> network = rmprune.models.create_network("resnet18", num_classes=10, input_shape=(1, 28, 28), width=8)
    >>> network.conv1  # the stem for small images
    Conv2d(1, 8, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), bias=False)
    """
    settings = {key: value for key, value in given.items() if value is not None}
    for key in settings:
        if not accepts(name, key):
            raise ConfigError(f"{name} has no setting {key}; leave --{key.replace('_', '-')} out")
    if "width" in settings and not has_multiplier(name):
        width = settings["width"]
        require(
            width == int(width), f"{name}: width is {width:g}, but there it is a number of channels, not a multiplier"
        )
        settings["width"] = int(width)
    if accepts(name, "small_images") and max(input_shape[1:]) <= SMALL_IMAGE:
        settings["small_images"] = True
    model = create(name, num_classes=num_classes, in_channels=input_shape[0], **settings)
    for module in model.modules():
        if batch_norm_eps is not None and isinstance(module, nn.BatchNorm2d):
            module.eps = batch_norm_eps
    return model


Builder = Callable[..., nn.Module]


def names() -> list[str]:
    """Names that `create` knows: ours first, then torchvision's. timm's (over a thousand) come as "timm/NAME" too.

    >>> {"resnet20", "repvgg", "resnet50"} <= set(rmprune.models.names())
    True
    """
    ours = [name for family in FAMILIES.values() for name in family.names]
    return list(dict.fromkeys(ours + _torchvision_names()))


class Family(NamedTuple):
    """A builder and the names it is known for (a pattern may match more)."""

    build: Builder
    names: tuple[str, ...]


FAMILIES: dict[str, Family] = {  # pattern of the whole name -> family
    "|".join(resnet.TORCHVISION_NAMES): Family(resnet.torchvision_resnet, resnet.TORCHVISION_NAMES),
    r"resnet\d+": Family(resnet.cifar_resnet, resnet.CIFAR_NAMES),
    preact.PATTERN: Family(preact.preact_resnet, preact.NAMES),
    "|".join(mobilenet.NAMES): Family(mobilenet.mobilenet_v2, mobilenet.NAMES),
    repvgg.PATTERN: Family(repvgg.repvgg, repvgg.NAMES),
    rmnext.PATTERN: Family(rmnext.rmnext, rmnext.NAMES),
}
# Networks that return a tuple in training mode, or initialise slowly and warn about it, unless told otherwise.
_TORCHVISION_SETTINGS: dict[str, dict[str, Any]] = {
    "googlenet": {"aux_logits": False, "init_weights": True},
    "inception_v3": {"aux_logits": False, "init_weights": True},
}


def create(name: str, *, num_classes: int = 1000, in_channels: int = 3, **settings: Any) -> nn.Module:
    """A new network with random weights. Ours and torchvision's go by their name, timm's by "timm/NAME" as well.

    `settings` go to the network's builder (`accepts` tells which it takes). With `in_channels` other than 3 the first
    convolution is replaced. Raises `ConfigError` for an unknown name, with close matches, and for unknown settings.

    >>> rmprune.models.create("resnet20", num_classes=10, in_channels=1, width=8)(torch.randn(2, 1, 28, 28)).shape
    torch.Size([2, 10])
    >>> rmprune.models.create("resnet_20")
    Traceback (most recent call last):
    rmprune.errors.ConfigError: there is no network 'resnet_20'; did you mean resnet20, ...
    """
    require(num_classes >= 1, f"num_classes is {num_classes}; it must be at least 1")
    require(in_channels >= 1, f"in_channels is {in_channels}; it must be at least 1")
    family = _family(name)
    try:
        if family is not None:
            return family.build(name, num_classes=num_classes, in_channels=in_channels, **settings)
        if is_torchvision(name):
            settings = _TORCHVISION_SETTINGS.get(name, {}) | settings
            model = torchvision.models.get_model(name, num_classes=num_classes, **settings)
            return model if in_channels == 3 else _with_input_channels(model, name, in_channels)
        if is_timm(name):
            import timm

            bare = name.removeprefix("timm/")
            return timm.create_model(bare, num_classes=num_classes, in_chans=in_channels, **settings)
    except (TypeError, ValueError, RuntimeError) as error:  # timm's, for weights' tags that it does not know
        if out_of_memory(error):
            raise
        raise ConfigError(f"{name} cannot be built with {settings}: {error}") from error
    raise ConfigError(_unknown(name))


def auxiliary_tensors(name: str) -> set[str]:
    """Names of the tensors of GoogLeNet's and Inception's auxiliary heads, which `create` leaves out: only training reads them."""
    slow = {"init_weights": False}
    bare = name.split(".")[0]  # without timm's tag of weights
    settings: dict[str, dict[str, Any]] = {"googlenet": slow, "inception_v3": slow, "timm/inception_v3": {}}
    if bare not in settings:
        return set()
    with torch.device("meta"):
        whole, made = (create(bare, aux_logits=has, **settings[bare]).state_dict() for has in (True, False))
    return whole.keys() - made.keys()


def accepts(name: str, setting: str) -> bool:
    """Whether `create(name, ...)` takes this setting ("small_images", "width"), judged by the builder's signature.

    False for networks straight from torchvision or timm, whose settings are their own.

    >>> rmprune.models.accepts("resnet20", "width"), rmprune.models.accepts("alexnet", "width")
    (True, False)
    """
    family = _family(name)
    return family is not None and setting in inspect.signature(family.build).parameters


def has_multiplier(name: str) -> bool:
    """Whether the network's `width` multiplies every width (MobileNet's), rather than being the channels of its first stage."""
    family = _family(name)
    return family is not None and inspect.signature(family.build).parameters["width"].annotation in (float, "float")


def default_width(name: str) -> float | None:
    """The `width` that a network has where none is given; None where it has no such setting, or its depth decides."""
    family = _family(name)
    found = inspect.signature(family.build).parameters.get("width") if family is not None else None
    return None if found is None or found.default is inspect.Parameter.empty else found.default


def _family(name: str) -> Family | None:
    return next((family for pattern, family in FAMILIES.items() if re.fullmatch(pattern, name)), None)


def _torchvision_names() -> list[str]:
    return torchvision.models.list_models(module=torchvision.models)


def is_torchvision(name: str) -> bool:
    """Whether torchvision has the network, which may be one of ours too (resnet18)."""
    return name in _torchvision_names()


def is_timm(name: str) -> bool:
    """Whether timm has the network. Names of its model hub ("hf-hub:...") are never tried: they would be fetched."""
    if importlib.util.find_spec("timm") is None:
        require(not name.startswith("timm/"), f"{name} needs timm; install it with: pip install 'rmprune[all]'")
        return False
    import timm

    bare = name.removeprefix("timm/")
    return ":" not in bare and timm.is_model(bare)


def _with_input_channels(model: nn.Module, name: str, in_channels: int) -> nn.Module:
    """The model with its first convolution replaced by one that reads `in_channels` channels."""
    for path, old in model.named_modules():
        if isinstance(old, nn.Conv2d):
            if old.in_channels != 3 or old.groups != 1:
                break
            new = nn.Conv2d(
                in_channels,
                old.out_channels,
                old.kernel_size,  # type: ignore[arg-type]
                old.stride,  # type: ignore[arg-type]
                old.padding,  # type: ignore[arg-type]
                old.dilation,  # type: ignore[arg-type]
                bias=old.bias is not None,
                padding_mode=old.padding_mode,
            )
            resnet.initialise_convolutions(new)
            model.set_submodule(path, new)
            return model
    raise ConfigError(f"{name}: its first layer is no plain convolution of 3 channels; use in_channels=3")


def _unknown(name: str) -> str:
    known = names()
    if importlib.util.find_spec("timm") is not None:
        import timm

        known += [f"timm/{other}" for other in timm.list_models()]
    close = difflib.get_close_matches(name, known, n=5, cutoff=0.5)
    hint = f"did you mean {', '.join(close)}?" if close else f"there are {', '.join(names()[:12])}, ..."
    return f"there is no network {name!r}; {hint} rmprune.models.names() lists them; timm's go by 'timm/NAME'"
