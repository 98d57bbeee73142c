"""Which layers of a network put out the classes: what transfer to other classes replaces, and lets learn faster. It changes nothing."""

from torch import nn


def head_parameters(model: nn.Module) -> list[str]:
    """Names of the parameters of the last layer, and of those just before it that are as wide and cannot feed it, since it reads
    another number of values (heads side by side, as DeiT's).

    Empty where the last layer with parameters is neither linear nor a convolution.

    >>> rmprune.models.head.head_parameters(rmprune.models.create("resnet20"))
    ['fc.weight', 'fc.bias']
    """
    leaves = [(name, module) for name, module in model.named_modules() if module._parameters and not module._modules]
    found: list[str] = []
    width: int | None = None
    for name, module in reversed(leaves):
        if not isinstance(module, nn.Linear | nn.Conv2d) or width not in (None, module.weight.shape[0]):
            break
        width = module.weight.shape[0]
        found = [
            f"{name}.{key}" if name else key for key, value in module._parameters.items() if value is not None
        ] + found
        if module.weight.shape[1] == width:  # the layer before may be what it reads
            break
    return found
