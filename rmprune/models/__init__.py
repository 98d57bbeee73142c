"""Networks by name: ours, torchvision's and timm's. The networks themselves live in the modules beside this one.

>>> rmprune.models.create("resnet20", num_classes=10)(torch.randn(2, 3, 32, 32)).shape
torch.Size([2, 10])
"""

from rmprune.models.families import accepts, create, create_network, names

__all__ = ["accepts", "create", "create_network", "names"]
