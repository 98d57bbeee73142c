"""ImageNet weights of networks by name, through torchvision's and timm's own loading: downloads and caches are theirs."""

from typing import Any

import torchvision
from torch import Tensor

from rmprune.data.splits import HALF, IMAGENET_STATISTICS, Statistics
from rmprune.errors import ArtifactError, ConfigError
from rmprune.models.families import is_timm, is_torchvision

IMAGENET = "imagenet"
"""What `--weights` calls them."""


# Their weights come from TensorFlow; torchvision's own modules undo ImageNet's normalisation inside.
_HALF_IN_TORCHVISION = ("googlenet", "inception_v3")


def imagenet_weights(name: str) -> dict[str, Tensor]:
    """The library's default weights of this network, 1,000 classes or what they have. Raises ConfigError where it has none,
    ArtifactError in one line where they are neither cached nor to be downloaded.
    """
    try:
        if is_torchvision(name):
            weights = torchvision.models.get_model_weights(name).DEFAULT
            return dict(torchvision.models.get_model(name, weights=weights).state_dict())
        if _timm_config(name):
            import timm

            return dict(timm.create_model(name.removeprefix("timm/"), pretrained=True).state_dict())
    except Exception as error:  # both libraries let through whatever the network, disk or hub raised
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ArtifactError(
            f"{name}: its ImageNet weights are not on this machine and could not be downloaded ({reason}); "
            "fetch them where there is a network and give the file: --weights FILE"
        ) from None
    raise ConfigError(f"{name}: neither torchvision nor timm has ImageNet weights of it; give a file: --weights FILE")


def image_statistics(name: str) -> Statistics:
    """What the network's ImageNet weights expect images to be normalised with. ImageNet's own where nothing is known."""
    if is_torchvision(name):
        if name in _HALF_IN_TORCHVISION:
            return HALF
        found: Any = torchvision.models.get_model_weights(name).DEFAULT.transforms()
    else:
        found = _timm_config(name)
    return Statistics(tuple(found.mean), tuple(found.std)) if found else IMAGENET_STATISTICS


def _timm_config(name: str) -> Any:
    """timm's description of the network's default weights, or None."""
    if not is_timm(name):
        return None
    import timm

    bare = name.removeprefix("timm/")
    return timm.get_pretrained_cfg(bare) if timm.models.is_model_pretrained(bare) else None
