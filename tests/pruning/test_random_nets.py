"""Random networks of everything that moves channels, cut at random: the result equals the original with what went silenced, or is refused.

`RMPRUNE_PROPERTY_DRAWS=2000 pytest tests/pruning/test_random_nets.py` draws that many (RMPRUNE_PROPERTY_FIRST: from which seed
on); the default ends in seconds. What went is read off
the numbers that the result says it kept, and silenced by hand: neither the groups nor the proof of the package have a say here.
"""

import copy
import os
import random
from collections import Counter
from collections.abc import Callable

import torch
from marks import draws
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd
from torchvision.ops import FrozenBatchNorm2d

import rmprune
from rmprune.errors import NotEquivalent, RmpruneError
from rmprune.pruning import find_structure, shrink
from rmprune.pruning.written_sizes import as_graph

DRAWS = int(os.environ.get("RMPRUNE_PROPERTY_DRAWS", draws(20, 8)))
FIRST = int(os.environ.get("RMPRUNE_PROPERTY_FIRST", "0"))
CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
BATCH_NORM = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
INSTANCE_NORM = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
ACTS = (nn.ReLU, nn.SiLU, nn.GELU, nn.Tanh, nn.LeakyReLU, nn.Hardswish)  # 0 at 0: a silent channel stays silent


class Step(nn.Module):
    """A map [N, C, ...] in, one of `channels` out: `run(step, y)` with layers of its own."""

    def __init__(self, channels: int, run: Callable[["Step", Tensor], Tensor], **layers: nn.Module | Tensor) -> None:
        super().__init__()
        self.channels, self.run = channels, run
        for name, layer in layers.items():
            setattr(self, name, nn.Parameter(layer) if isinstance(layer, Tensor) else layer)

    def forward(self, y: Tensor) -> Tensor:
        return self.run(self, y)


class Draw:
    """Draws the steps of a network of `dims` spatial dimensions."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.dims = self.chance.choice([1, 2, 2, 2, 3])
        self.size = {1: 8, 2: 4, 3: 3}[self.dims]
        self.positions = self.size**self.dims
        self.residuals = 0

    def one(self, *among):
        return self.chance.choice(among)

    def conv(self, c: int, out: int | None = None, kernel: int | None = None) -> nn.Module:
        out = out or 4 * self.chance.randint(1, 4)
        kernel = kernel or self.one(1, 3)
        groups = self.one(1, 1, 1, 1 + (c % 2 == 0), c if out % c == 0 else 1)
        kind = self.one(*[CONV] * 6, TRANSPOSED)[self.dims - 1]
        found: nn.Module = kind(c, out, kernel, padding=kernel // 2, groups=groups, bias=self.one(True, False))
        return found

    def act(self) -> nn.Module:
        found: nn.Module = self.one(*ACTS)()
        return found

    def norm(self, c: int) -> nn.Module:
        kind = self.one(*["batch"] * 5, "frozen", "group", "instance", "none", "none")
        if kind == "frozen" and self.dims == 2:
            return FrozenBatchNorm2d(c)
        if kind in ("batch", "frozen"):
            return BATCH_NORM[self.dims - 1](c)
        if kind == "instance":
            return INSTANCE_NORM[self.dims - 1](c, affine=self.one(True, False))
        return nn.GroupNorm(self.one(*(g for g in (1, 2, c) if c % g == 0)), c) if kind == "group" else nn.Identity()

    def block(self, c: int, out: int | None = None) -> Step:
        conv = self.conv(c, out)
        out = conv.out_channels
        return Step(out, lambda s, y: s.act(s.norm(s.conv(y))), conv=conv, norm=self.norm(out), act=self.act())

    def step(self, c: int) -> Step:
        name = self.one(*STEPS)
        found: Step = getattr(self, "block" if c % 2 and name in ("halves", "moved") else name)(c)
        return found

    def residual(self, c: int) -> Step:
        self.residuals += 1
        inner = self.block(c)
        last = nn.Sequential(self.conv(inner.channels, c), self.norm(c))
        return Step(c, lambda s, y: s.act(y + s.last(s.inner(y))), inner=inner, last=last, act=self.act())

    def cat(self, c: int) -> Step:
        other = self.block(c)
        order = self.one(1, -1)
        return Step(c + other.channels, lambda s, y: torch.cat([y, s.other(y)][::order], 1), other=other)

    def halves(self, c: int) -> Step:
        inner, way, whole = self.block(c // 2), self.one("chunk", "split", "slices", "unpack"), self.one(True, False)

        ways = {
            "chunk": lambda y: y.chunk(2, 1),
            "split": lambda y: y.split(c // 2, 1),
            "unpack": lambda y: y.split([c // 2, c // 2], dim=1),
            "slices": lambda y: (y[:, : c // 2], y[:, c // 2 :]),
        }

        def run(s: Step, y: Tensor) -> Tensor:
            a, b = ways[way](y)
            return torch.cat([b, s.inner(a), a] if whole else [b, s.inner(a)], 1)

        return Step(inner.channels + (c if whole else c // 2), run, inner=inner)

    def moved(self, c: int) -> Step:
        perm = torch.tensor(self.chance.sample(range(c), c))
        return self.one(
            Step(c, lambda s, y: y.flip(1)),
            Step(c, lambda s, y: y.roll(1, 1)),
            Step(c // 2, lambda s, y: y[:, ::2]),
            Step(c, lambda s, y: y[:, perm]),
            Step(c, lambda s, y: y.index_select(1, perm)),
            Step(c, lambda s, y: s.move(y), move=nn.ChannelShuffle(2)),
            Step(c, lambda s, y: y.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)),
            Step(c, lambda s, y: y.view(y.size(0), 2, c // 2, *y.shape[2:]).transpose(1, 2).reshape(y.shape)),
            Step(2 * c, lambda s, y: torch.stack([y, -y], 1).flatten(1, 2)),
            Step(2 * c, lambda s, y: torch.stack([y, -y], 2).flatten(1, 2)),
            Step(2 * c, lambda s, y: y.repeat(1, 2, *[1] * (y.dim() - 2))),
            Step(c, lambda s, y: y.reshape(y.shape[0], c, -1).reshape(y.shape)),
        )

    def scaled(self, c: int) -> Step:
        return self.one(
            Step(c, lambda s, y: y * s.gain, gain=torch.rand(c, *[1] * self.dims) + 0.5),
            Step(c, lambda s, y: y * y.mean(1, keepdim=True).sigmoid()),
            Step(c, lambda s, y: y * y.amax(tuple(range(2, y.dim())), keepdim=True).sigmoid()),
            Step(c, lambda s, y: y - 0.5 * y.mean(2, keepdim=True)),
        )

    def gate(self, c: int) -> Step:
        squeeze, excite = self.conv(c, 4, 1), self.conv(4, c, 1)

        def run(s: Step, y: Tensor) -> Tensor:
            z = y.mean(tuple(range(2, y.dim())), keepdim=True)
            return y * torch.sigmoid(s.excite(torch.relu(s.squeeze(z))))

        return Step(c, run, squeeze=squeeze, excite=excite)

    def last_axis(self, c: int) -> Step:
        """Channels last: a linear layer, or an MLP with a residual, with or without a LayerNorm."""
        wide = 4 * self.chance.randint(1, 4)
        norm = self.one(nn.Identity(), nn.LayerNorm(c))
        if self.one(True, False):
            return Step(
                wide, lambda s, y: s.one(s.norm(y.movedim(1, -1))).movedim(-1, 1), norm=norm, one=nn.Linear(c, wide)
            )
        mlp = nn.Sequential(norm, nn.Linear(c, wide), self.act(), nn.Linear(wide, c))
        return Step(c, lambda s, y: y + s.mlp(y.movedim(1, -1)).movedim(-1, 1), mlp=mlp)

    def tokens(self, c: int) -> Step:
        """Layers along positions, whose zeros stay zeros, or a norm of tokens."""
        n = self.positions
        line, norm = nn.Linear(n, n, bias=False), nn.LayerNorm(n, elementwise_affine=False)
        mlp = nn.Sequential(nn.Linear(n, 4, bias=False), self.act(), nn.Linear(4, n, bias=False))
        one = self.one(line, norm, mlp, nn.BatchNorm1d(c))
        return self.one(
            Step(c, lambda s, y: s.one(y.flatten(2)).reshape(y.shape), one=one),
            Step(c, lambda s, y: y + s.one(y.flatten(2)).unflatten(2, y.shape[2:]), one=one),
            Step(
                c, lambda s, y: y * s.one(y.flatten(2)).mean(-1).sigmoid().view(*y.shape[:2], *[1] * self.dims), one=one
            ),
            Step(c, lambda s, y: s.one(y.flatten(2).mean(-1, keepdim=True).expand(-1, -1, n)).view_as(y), one=one),
        )

    def attention(self, c: int) -> Step:
        heads, width = self.one(1, 2), 4
        how = self.one("matmul", "einsum", "sdpa")
        if self.chance.random() < 0.1 and c % heads == 0:
            return self.stock_attention(c, heads)
        if self.one(True, False):
            return self.fused_attention(c, heads, how)
        q, k, v = (nn.Linear(c, heads * width, bias=self.one(True, False)) for _ in range(3))

        def run(s: Step, y: Tensor) -> Tensor:
            tokens = y.flatten(2).transpose(1, 2)
            q, k, v = (f(tokens).unflatten(2, (heads, -1)).transpose(1, 2) for f in (s.q, s.k, s.v))
            if how == "sdpa":
                z = nn.functional.scaled_dot_product_attention(q, k, v)
            elif how == "einsum":
                z = torch.einsum("nhij,nhjd->nhid", torch.einsum("nhid,nhjd->nhij", q, k).softmax(-1), v)
            else:
                z = (q @ k.transpose(-2, -1)).softmax(-1) @ v
            z = s.out(z.transpose(1, 2).flatten(2))
            return y + z.transpose(1, 2).reshape(y.shape)

        return Step(c, run, q=q, k=k, v=v, out=nn.Linear(heads * width, c))

    def stock_attention(self, c: int, heads: int) -> Step:
        def run(s: Step, y: Tensor) -> Tensor:
            z = y.flatten(2).transpose(1, 2)
            return y + s.layer(z, z, z, need_weights=False)[0].transpose(1, 2).reshape(y.shape)

        return Step(c, run, layer=nn.MultiheadAttention(c, heads, batch_first=True))

    def fused_attention(self, c: int, heads: int, how: str) -> Step:
        """As vision transformers write it, their widths in the code."""
        width = self.one(4, 5)
        sizes, inner = self.one((3, heads, width), (3, heads, -1)), self.one(heads * width, -1)

        def run(s: Step, y: Tensor) -> Tensor:
            tokens = y.flatten(2).transpose(1, 2)
            b, n, _ = tokens.shape
            q, k, v = s.qkv(tokens).reshape(b, n, *sizes).permute(2, 0, 3, 1, 4).unbind(0)
            z = (q * 0.4 @ k.transpose(-2, -1)).softmax(-1) @ v
            if how == "sdpa":
                z = nn.functional.scaled_dot_product_attention(q, k, v)
            return y + s.out(z.transpose(1, 2).reshape(b, n, inner)).transpose(1, 2).reshape(y.shape)

        qkv = nn.Linear(c, 3 * heads * width, bias=self.one(True, False))
        return Step(c, run, qkv=qkv, out=nn.Linear(heads * width, c))

    def pixels(self, c: int) -> Step:
        if self.dims != 2 or c % 4:
            return self.block(c)
        return Step(
            c, lambda s, y: s.down(s.act(s.up(y))), up=nn.PixelShuffle(2), act=self.act(), down=nn.PixelUnshuffle(2)
        )


STEPS = [
    "block",
    "block",
    "residual",
    "residual",
    "cat",
    "halves",
    "moved",
    "moved",
    "scaled",
    "gate",
    "last_axis",
    "tokens",
    "attention",
    "pixels",
]


class Net(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        draw = Draw(seed)
        steps = [draw.block(3)]
        for _ in range(draw.chance.randint(1, 3)):
            steps.append(draw.step(steps[-1].channels))
            if draw.one(True, False):
                steps.append(draw.block(steps[-1].channels))
        self.residuals = draw.residuals
        self.steps = nn.Sequential(*steps)
        self.input = torch.randn(2, 3, *[draw.size] * draw.dims, dtype=torch.float64)
        c, self.way = steps[-1].channels, draw.one("pooled", "pooled", "flat", "last", "dict")
        self.head = nn.Linear(c * draw.positions if self.way in ("flat", "last") else c, 3)
        randomise(self)
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor | dict[str, Tensor]:
        y = self.steps(x)
        if self.way == "flat":
            return self.head(y.flatten(1))
        if self.way == "last":
            return self.head(y.movedim(1, -1).flatten(1))
        z = self.head(y.mean(tuple(range(2, y.dim()))))
        return {"classes": z, "energy": y.square().mean(1)} if self.way == "dict" else z


def randomise(model: nn.Module) -> None:
    for module in model.modules():
        if getattr(module, "running_mean", None) is not None:
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
        for tensor in learned(module):
            if tensor.dim() == 1:
                nn.init.uniform_(tensor, 0.3, 1.5)


def learned(module: nn.Module) -> list[Tensor]:
    """A module's own parameters, or what a frozen batch norm has in their place."""
    return [
        t
        for n, t in (*module._parameters.items(), *module._buffers.items())
        if t is not None and "running" not in n and t.dim()
    ]


def silenced(model: nn.Module, kept: dict[str, list[int]]) -> nn.Module:
    """The network whose layers put out zeros in the place of the channels that were not kept."""
    model = copy.deepcopy(model)
    for name, stays in kept.items():
        module = model.get_submodule(name)
        for parameter in learned(module):
            rows = parameter.data
            if isinstance(module, _ConvTransposeNd) and parameter.dim() > 1:  # [in, out of a group, ...]
                rows = rows.unflatten(0, (module.groups, -1)).transpose(1, 2).flatten(0, 1)
            gone = torch.ones(len(rows), dtype=torch.bool).index_fill(0, torch.tensor(stays), False)
            assert len(stays) == len(rows) - int(gone.sum())
            rows[gone] = 0
            if rows.data_ptr() != parameter.data_ptr():
                shape = (module.groups, -1, *rows.shape[1:])
                parameter.data = rows.reshape(shape).transpose(1, 2).flatten(0, 1)
        if isinstance(getattr(module, "running_mean", None), Tensor) and module.weight is None:
            raise AssertionError(name)
    return model


def pruned(model: nn.Module, x: Tensor, chance: random.Random) -> nn.Module:
    budget = rmprune.Budget(ratio=chance.uniform(0.1, 0.7), min_fraction=chance.choice([0.0, 0.3]))
    return rmprune.prune(model, x, importance="random", budget=budget, compensate=False)


def shrunk(model: nn.Module, x: Tensor, chance: random.Random) -> tuple[nn.Module, nn.Module]:
    """A chain and what is left of it by chance: `prune` would also fold the reserved channels that become constant, not silence them."""
    structure = find_structure(model, x)
    keep = {
        g.name: torch.tensor([True, *(chance.random() < 0.6 for _ in range(g.units - 1))]) for g in structure.groups
    }
    return model, shrink(model, keep, structure)[0]


def outcome(seed: int) -> list[str]:
    """What became of a network or its graph, coupled and, where residuals go, free. AssertionError where the result is another function."""
    net, said = Net(seed), []
    x, chance = net.input, random.Random(seed)
    graph = as_graph(net, (x,)) if chance.random() < 0.5 else None  # whose sizes a cut writes anew
    network: nn.Module = graph or net
    forms: dict[str, Callable[[], tuple[nn.Module, nn.Module]]] = {
        "coupled": lambda: (network, pruned(network, x, chance))
    }
    if net.residuals:
        forms["free"] = lambda: shrunk(rmprune.remove_residuals(network, x).model, x, chance)
    for form, make in forms.items():
        try:
            model, cut = make()
        except NotEquivalent:
            raise
        except RmpruneError as error:
            said.append(f"{form}: {type(error).__name__}: {error}")
            continue
        with torch.no_grad():
            for one in (x, torch.randn_like(x)):
                a, b = (m(one) for m in (silenced(model, cut.rmprune_facts["kept"]), cut))
                for wanted, got in zip(*([v.values() if isinstance(v, dict) else [v] for v in (a, b)]), strict=True):
                    error = float((wanted - got).abs().max())
                    assert error <= 1e-9 * float(wanted.abs().max()), f"seed {seed}, {form}: {error:.1e}\n{net}"
        said.append(f"{form}: cut")
    return said


def test_random_networks_are_cut_right_or_refused() -> None:
    said = Counter(word.split(": ")[1] for seed in range(FIRST, FIRST + DRAWS) for word in outcome(seed))
    print(f"seeds {FIRST} to {FIRST + DRAWS - 1}, none wrong:", dict(said))
    assert said["cut"] >= DRAWS // 4  # refusing everything would be easy
