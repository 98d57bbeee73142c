"""Networks by name: ours, torchvision's and timm's. The networks themselves live in the modules beside this one."""

from rmprune.models.families import accepts, create, create_network, names

__all__ = ["accepts", "create", "create_network", "names"]
