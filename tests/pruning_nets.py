"""Small networks for the pruning tests, with random batch-norm statistics (fresh ones hide bugs)."""

import torch
from torch import Tensor, nn


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            for tensor, low, high in (
                (module.weight.data, 0.5, 1.5),
                (module.bias.data, -0.5, 0.5),
                (module.running_mean, -0.5, 0.5),
                (module.running_var, 0.5, 2.0),
            ):
                tensor.copy_(torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype) * (high - low) + low)
    return model


def conv(cin: int, cout: int, kernel: int = 3, padding: int | None = None, **kwargs: int) -> nn.Conv2d:
    return nn.Conv2d(cin, cout, kernel, padding=kernel // 2 if padding is None else padding, bias=False, **kwargs)


def chain(
    widths: tuple[int, ...] = (8, 12, 16), kernel: int = 3, padding: int | None = None, seed: int = 0
) -> nn.Sequential:
    """conv bn relu ... pool flatten linear on 3-channel images, float64, eval mode."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    cin = 3
    for width in widths:
        layers += [conv(cin, width, kernel, padding), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
        cin = width
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(cin, 5)]
    return randomise(nn.Sequential(*layers), seed).double().eval()  # type: ignore[return-value]


class Block(nn.Module):
    def __init__(self, cin: int, cout: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(cin, cout, stride=stride), nn.BatchNorm2d(cout)
        self.conv2, self.bn2 = conv(cout, cout), nn.BatchNorm2d(cout)
        self.shortcut = nn.Sequential()
        if stride > 1 or cin != cout:
            self.shortcut = nn.Sequential(conv(cin, cout, 1, stride=stride), nn.BatchNorm2d(cout))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


def residual(width: int = 8, seed: int = 0) -> nn.Sequential:
    """A small ResNet of three stages, float64, eval mode."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Sequential(conv(3, width), nn.BatchNorm2d(width), nn.ReLU()),
        Block(width, width),
        Block(width, 2 * width, 2),
        Block(2 * width, 2 * width),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * width, 5),
    )
    return randomise(model, seed).double().eval()  # type: ignore[return-value]


def images(n: int = 2, size: int = 8, seed: int = 0) -> Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3


def measured_macs(model: nn.Module, x: Tensor) -> int:
    """Multiply-accumulates of one image, counted from the layers' own shapes by hooks (not by the code under test)."""
    total = 0

    def count(module: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        total += module.weight[0].numel() * output[0].numel()

    handles = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return total


def mobile_chain() -> nn.Sequential:
    """Depthwise in the middle, a grouped convolution after it, flattening to 4x4 features a channel."""
    torch.manual_seed(0)
    model = nn.Sequential(
        conv(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU6(),
        conv(8, 8, 3, groups=8), nn.BatchNorm2d(8), nn.PReLU(8),
        conv(8, 12, 3, stride=2), nn.BatchNorm2d(12), nn.ReLU(),
        conv(12, 18, 3, groups=3), nn.ReLU(),
        nn.Flatten(), nn.Linear(18 * 16, 5),
    )  # fmt: skip
    return randomise(model).double().eval()  # type: ignore[return-value]


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = chain()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) if float(x.sum()) < 1e9 else self.body(-x)


class Tokens(nn.Module):
    """A map of one channel as tokens, with attention whose widths stand in the code."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.qkv = nn.Conv2d(1, 16, 4, 4), nn.LayerNorm(16), nn.Linear(16, 48)
        self.mlp, self.head = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        b, n, _ = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(b, n, 3, 2, 8).permute(2, 0, 3, 1, 4).unbind(0)
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return self.head(self.mlp(x + y.reshape(x.shape)).mean(1))


class Shared(nn.Module):
    """A layer and a norm that run twice, and two layers of one weight, among layers that can be cut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv(3, 12), nn.BatchNorm2d(12), nn.ReLU())
        self.turn, self.norm, self.slope = nn.Conv2d(12, 8, 1), nn.BatchNorm2d(8), nn.PReLU(8)
        self.again = nn.Conv2d(8, 8, 3, padding=1)
        self.one, self.other = (nn.Sequential(conv(8, 8, 1), nn.BatchNorm2d(8)) for _ in range(2))
        self.other[0].weight = self.one[0].weight
        self.last = nn.Sequential(conv(8, 16), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.slope(self.norm(self.turn(self.stem(x))))
        y = self.slope(self.norm(self.again(self.again(y))))
        return self.head(self.last(self.other(torch.relu(self.one(y)))))


def shared() -> nn.Module:
    torch.manual_seed(0)
    return randomise(Shared()).double().eval()


def kill(model: nn.Module, name: str, channels: list[int], shift: float | None = None) -> None:
    """Batch-norm scale 0; the shift stays random unless given."""
    bn = model.get_submodule(name)
    bn.weight.data[channels] = 0  # type: ignore[index, union-attr, operator]
    if shift is not None:
        bn.bias.data[channels] = shift  # type: ignore[index, union-attr, operator]


def batches(count: int = 2) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(7)
    return [(images(6, seed=i), torch.randint(5, (6,), generator=generator)) for i in range(count)]
