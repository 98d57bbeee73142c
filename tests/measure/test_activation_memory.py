"""The planner of activation memory, by numbers worked out by hand. A channel of the small net is 10 x 10 float32: 400 bytes."""

import pytest
import torch
from marks import few
from torch import Tensor, nn

import rmprune
from rmprune.measure import activation_memory
from rmprune.measure.layers import network_layers
from rmprune.measure.planner import ALIGNMENT, _arena, _Buffer

CHANNEL = 400
X = torch.randn(1, 3, 10, 10)


def conv(cin: int, cout: int, kernel: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(cin, cout, kernel, padding=kernel // 2, bias=False), nn.BatchNorm2d(cout))


class Bottleneck(nn.Module):
    """8 channels through 2 and back, the shortcut an identity."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = conv(8, 2), conv(2, 2, 3), conv(2, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.second(torch.relu(self.first(x))))
        return torch.relu(self.third(y) + x)


def residual_net() -> nn.Module:
    net = nn.Sequential(conv(3, 8, 3), nn.ReLU(), Bottleneck(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    return net.eval()


def plain_net(copies: int) -> nn.Module:
    """What removal makes of it, of whose 8 copied channels `copies` are left."""
    w = 2 + copies
    layers = [conv(3, 8, 3), nn.ReLU(), conv(8, w), nn.ReLU(), conv(w, w, 3), nn.ReLU(), conv(w, 8), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval()


def test_a_residual_lives_until_it_is_added() -> None:
    memory = activation_memory(residual_net(), X)
    assert memory.peak_bytes == (8 + 2 + 8) * CHANNEL  # shortcut, input and output of the last convolution
    assert sorted(size // CHANNEL for _, size in memory.live) == [2, 8, 8]
    assert "third" in memory.at and memory.arena_bytes >= memory.peak_bytes
    weights = 8 * 27 + 8 + 8 * 2 + 2 + 2 * 18 + 2 + 2 * 8 + 8 + 8 * 4 + 4  # batch norms are folded into biases
    assert memory.parameter_bytes == 4 * weights
    assert activation_memory(residual_net(), X, bytes_per_value=2).parameter_bytes == 2 * weights


def test_exact_removal_does_not_lower_the_peak_and_pruned_copies_do() -> None:
    net = residual_net()
    removed = rmprune.remove_residuals(net, X, fuse="never")
    assert len(removed.removed) == 1
    plain = activation_memory(removed.model, X)
    assert plain.peak_bytes == ((2 + 8) + (2 + 8)) * CHANNEL  # both sides of the middle convolution carry 8 copies
    assert plain.peak_bytes == activation_memory(plain_net(8), X).peak_bytes > activation_memory(net, X).peak_bytes
    assert activation_memory(plain_net(4), X).peak_bytes == (2 + 4 + 8) * CHANNEL  # at the last convolution


@pytest.mark.long
def test_resnet_50_as_in_the_notes() -> None:
    """Stage 1 at 224 pixels: 56 x 56 positions; 64 + 256 + 256 channels before removal, twice 64 + 256 after (ANCHORS)."""
    net = nn.Sequential(*list(rmprune.models.create("resnet50", num_classes=10).eval().children())[:5])
    x = torch.randn(1, 3, 224, 224)
    assert activation_memory(net, x).peak_bytes == (64 + 256 + 256) * 56 * 56 * 4  # 7.2 MB


def test_in_place_steps_and_views_hold_nothing_of_their_own() -> None:
    steps = [nn.ReLU(), nn.Dropout(), nn.Hardswish(), nn.Identity(), nn.Flatten()]
    assert activation_memory(nn.Sequential(*steps).eval(), X).peak_bytes == 3 * CHANNEL
    assert activation_memory(nn.Sequential(*steps).eval(), X.expand(5, -1, -1, -1)).peak_bytes == 15 * CHANNEL
    assert activation_memory(nn.Sequential(*steps).eval(), X, bytes_per_value=1).peak_bytes == 300

    class ReadAgain(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x * 2  # x is read again below: no place to write to
            return torch.cat([x, y.flatten(1).reshape(1, 3, 10, 10)], 1)  # the view keeps y

    assert activation_memory(ReadAgain(), X).peak_bytes == (3 + 3 + 6) * CHANNEL


def test_buffers_that_live_at_once_lie_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        draws = torch.randint(1, 40, (12, 3), generator=generator).tolist()
        buffers = [
            _Buffer(str(i), ALIGNMENT * size, first, first + more) for i, (size, first, more) in enumerate(draws)
        ]
        most = max(sum(b.size for b in buffers if b.first <= t <= b.last) for t in range(80))
        assert most <= _arena(buffers) <= sum(b.size for b in buffers)
    apart = [_Buffer("a", 640, 0, 1), _Buffer("b", 320, 2, 3)]
    assert _arena(apart) == 640  # b takes a's place
    together = [_Buffer("a", 100, 0, 2), _Buffer("b", 100, 2, 3)]
    assert _arena(together) == 128 + 100  # at the next aligned address


@pytest.mark.parametrize("name", few(["resnet20", "densenet121", "mobilenet_v2"], "resnet20"))
def test_named_networks(name: str) -> None:
    net = rmprune.models.create(name, num_classes=4).eval()
    memory = activation_memory(net, torch.randn(2, 3, 32, 32))
    assert 0 < memory.peak_bytes <= memory.arena_bytes and sum(size for _, size in memory.live) == memory.peak_bytes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_networks_of_every_format_have_the_same_peak_and_layers(
    dtype: torch.dtype, capsys: pytest.CaptureFixture[str]
) -> None:
    net, x = nn.Sequential(conv(3, 8), Bottleneck()).eval(), X[:, :, :4, :4]
    peak, layers = activation_memory(net, x).peak_bytes, network_layers(net, x)
    assert activation_memory(net.to(dtype), x.to(dtype)).peak_bytes == peak and network_layers(net, x) == layers
    assert capsys.readouterr().err == ""


def test_whole_numbers_stay_whole() -> None:
    net = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 2))
    assert activation_memory(net, torch.zeros(1, 5, dtype=torch.long)).peak_bytes == 4 * 5 * (4 + 2)


class Pieces(nn.Module):
    """A map of 16 channels in two halves, one after the other."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.first, self.how = conv(3, 16), how

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.how == "chunk":
            one, two = x.chunk(2, 1)
        elif self.how == "split":
            one, two = torch.split(x, [8, 8], 1)
        else:
            one, two = x[:, :8], x[:, 8:]
        return torch.relu(one) + torch.relu(two)


@pytest.mark.parametrize("how", ["chunk", "split", "slices"])
def test_pieces_are_tensors_of_their_own_however_they_are_written(how: str) -> None:
    assert activation_memory(Pieces(how).eval(), X).peak_bytes == (16 + 16) * CHANNEL


def test_attention_and_recurrent_layers_write_to_tensors_of_their_own() -> None:
    class One(nn.Module):
        def __init__(self, layer: nn.Module, reads: int) -> None:
            super().__init__()
            self.layer, self.reads = layer, reads

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(*[x] * self.reads)[0]

    x = torch.randn(1, 5, 8)
    for layer, held in (
        (One(nn.MultiheadAttention(8, 2, batch_first=True), 3), 2 * 40 + 25),
        (One(nn.GRU(8, 8, batch_first=True), 1), 2 * 40 + 8),
    ):
        assert activation_memory(layer.eval(), x).peak_bytes == 4 * held
