"""Networks that hold what an artifact must bring back, with random batch-norm statistics (fresh ones hide bugs)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random batch-norm statistics and affine parameters: fresh ones hide bugs."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            for tensor, low, high in (
                (module.running_mean, -1.0, 1.0),
                (module.running_var, 0.5, 2.0),
                (module.weight.data, 0.3, 1.5),
                (module.bias.data, -1.0, 1.0),
            ):
                tensor.copy_(torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype) * (high - low) + low)
    return model


def chain() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect", bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU6(inplace=True),
        nn.Conv2d(8, 8, 1),
        nn.Hardswish(),
        nn.Conv2d(8, 8, (3, 5), stride=2, padding="valid", groups=4),
        nn.PReLU(8),
        nn.MaxPool2d(2),
        nn.AdaptiveAvgPool2d((1, None)),
        nn.Flatten(),
        nn.LazyLinear(5),
    )


class Net(nn.Module):
    """Branches, functions, methods, direct parameters, a non-persistent buffer, a shared layer and tied weights."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6))
        self.mix = nn.Conv2d(6, 6, 3, padding=1)
        self.again = self.mix
        self.twin = nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.twin.weight = self.mix.weight
        self.gamma = nn.Parameter(torch.rand(6, 1, 1) + 0.5, requires_grad=False)
        self.register_buffer("shift", torch.rand(6, 1, 1), persistent=False)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.stem(x), inplace=True)
        y = self.again(torch.relu(self.mix(x))) + x * self.gamma
        y += self.twin(F.pad(x, (1, 0, 1, 0)))[:, :, 1:, 1:]
        y = F.max_pool2d(y, 2) + self.shift
        y = torch.cat([y, F.hardtanh(y, -0.5, 0.5)], dim=1)
        return self.head(self.drop(F.adaptive_avg_pool2d(y, 1).view(y.size(0), -1)))


def net() -> nn.Module:
    torch.manual_seed(0)
    return randomise(Net())


def flat() -> nn.Module:
    torch.manual_seed(0)
    model = chain()
    model.eval()(torch.zeros(1, 3, 12, 12))
    return randomise(model)
