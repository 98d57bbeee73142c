"""Random networks of every layer kind and of operations that move channels: what may go is cut exactly, or all stays with a reason.

Ten draws; RMPRUNE_PROPERTY_DRAWS=2000 makes as many.
"""

import os
import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rmprune.errors import UnsupportedModel
from rmprune.measure import count_macs
from rmprune.pruning import find_structure
from rmprune.pruning.groups import total_cost
from rmprune.pruning.prove import prove_cut

DRAWS = int(os.environ.get("RMPRUNE_PROPERTY_DRAWS", "10"))
Step = tuple[Callable[..., Tensor], nn.Module | None]


def layer(name: str, rank: int, *args: object, **kwargs: object) -> nn.Module:
    return getattr(nn, f"{name}{rank}d")(*args, **kwargs)  # type: ignore[no-any-return]


class Drawn(nn.Module):
    """A chain of drawn steps, some of which read an earlier map of the same shape as well."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        chance = random.Random(seed)
        torch.manual_seed(seed)
        self.rank = chance.choice([1, 2, 2, 3])
        self.layers = nn.ModuleDict()
        self.steps: list[tuple[Callable[..., Tensor], str]] = []
        self.shapes: list[list[int]] = []
        self.x = torch.randn(2, 4, *[8] * self.rank, dtype=torch.float64)
        self.double().eval()
        shape = list(self.x.shape)
        for place in range(chance.randint(3, 7)):
            call, module = self.draw(chance, shape)
            name = f"s{place}"
            if module is not None:
                self.layers[name] = module.double().eval()
            self.steps.append((call, name))
            with torch.no_grad():
                shape = list(self(self.x).shape)
            self.shapes.append(shape)
        self.head = nn.Linear(shape[1], 3).double()

    def draw(self, chance: random.Random, shape: list[int]) -> Step:
        rank, c = self.rank, shape[1]
        wide = chance.choice([4, 8, 12])
        conv = lambda *a, **k: layer("Conv", rank, *a, **{"padding": 1, "bias": chance.random() < 0.5} | k)  # noqa: E731
        even = c % 2 == 0
        plain: list[Callable[[], nn.Module]] = [
            lambda: conv(c, wide, 3),
            lambda: conv(c, wide, 3),
            lambda: conv(c, c * chance.choice([1, 2]), 3, groups=c),
            lambda: layer("ConvTranspose", rank, c, wide, 3, padding=1),
            lambda: layer("BatchNorm", rank, c),
            lambda: layer("InstanceNorm", rank, c, affine=chance.random() < 0.5),
            lambda: nn.PReLU(c),
            lambda: nn.ReLU(),
            lambda: layer("MaxPool", rank, 3, 1, 1),
        ]
        if even:
            plain += [
                lambda: conv(c, wide, 3, groups=2),
                lambda: layer("ConvTranspose", rank, c, wide, 3, padding=1, groups=2),
                lambda: nn.GroupNorm(2, c),
                lambda: nn.ChannelShuffle(2),
            ]
        moved: list[Callable[[Tensor], Tensor]] = [
            lambda x: x.flip(1),
            lambda x: torch.roll(x, 1, 1),
            lambda x: torch.cat([x, -x], 1),
            lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
            lambda x: torch.stack([x, x.abs()], 1).flatten(1, 2),
            lambda x: x.repeat(1, 2, *[1] * rank),
            lambda x: x * torch.sigmoid(x.mean(tuple(range(2, x.dim())), keepdim=True)),
            lambda x: x.softmax(-1),
            lambda x: torch.einsum("bcl,bml->bcm", x.flatten(2), x.flatten(2)[:, :1].expand(-1, 8, -1))[
                (...,) + (None,) * (rank - 1)
            ].expand(*x.shape[:2], *[8] * rank),
        ]
        if even:
            moved += [
                lambda x: torch.cat(x.chunk(2, 1)[::-1], 1),
                lambda x: x[:, : c // 2] + x[:, c // 2 :],
                lambda x: x[:, x.shape[1] // 2 :],
                lambda x: x.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2),
                lambda x: x.view(x.shape[0], 2, c // 2, *x.shape[2:]).transpose(1, 2).reshape(x.shape),
            ]
        if chance.random() < 0.25 and len(self.steps) > 1:
            early = chance.randrange(len(self.steps))
            if self.shapes[early] == shape:
                return lambda x, seen: x + seen[early], None
            return lambda x, seen: torch.cat([x, seen[early]], 1), None
        if chance.random() < 0.6:
            module = chance.choice(plain)()
            return lambda x, seen: module(x), module
        move = chance.choice(moved)
        return lambda x, seen: move(x), None

    def forward(self, x: Tensor) -> Tensor:
        seen: list[Tensor] = []
        for call, name in self.steps:
            x = self.layers[name](x) if name in self.layers else call(x, seen)
            seen.append(x)
        return self.head(F.relu(x).mean(tuple(range(2, x.dim())))) if hasattr(self, "head") else x


@pytest.mark.parametrize("seed", range(DRAWS))
def test_what_may_go_is_cut_exactly(seed: int) -> None:
    model = Drawn(seed).eval()
    x = model.x
    try:
        structure = find_structure(model, x)
    except UnsupportedModel as error:
        assert "no channel can be pruned" in str(error)
        return
    assert total_cost(structure) == count_macs(model, x)
    chance = torch.Generator().manual_seed(seed)
    for _ in range(3):
        keep = {name: torch.rand(units, generator=chance) < 0.6 for name, units in structure.units.items()}
        for mask in keep.values():
            mask[int(torch.randint(len(mask), (1,), generator=chance))] = True
        assert prove_cut(model, structure, keep, x) < 1e-9
