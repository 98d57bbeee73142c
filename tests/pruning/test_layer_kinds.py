"""Layers of every rank and kind: cut exactly or left whole with the reason, and counted always."""

import copy
import re
from pathlib import Path

import pytest
import torch
from marks import few
from torch import Tensor, fx, nn
from torch.nn import functional as F

import rmprune
from rmprune.errors import InfeasibleBudget, UnsupportedModel
from rmprune.measure import count_macs
from rmprune.pruning import Budget, find_structure, prune, prune_coupled
from rmprune.pruning.groups import total_cost
from rmprune.pruning.prove import prove_groups

X = {1: (2, 3, 10), 2: (2, 3, 6, 6), 3: (2, 3, 4, 4, 4)}


def kind(name: str, rank: int) -> type[nn.Module]:
    return getattr(nn, f"{name}{rank}d")  # type: ignore[no-any-return]


def conv(rank: int, cin: int, cout: int, groups: int = 1, *, bias: bool = True) -> nn.Module:
    return kind("Conv", rank)(cin, cout, 3, padding=1, groups=groups, bias=bias)


def up(rank: int, cin: int, cout: int, groups: int = 1) -> nn.Module:
    return kind("ConvTranspose", rank)(cin, cout, 3, stride=2, padding=1, groups=groups)


def between(*middle: nn.Module, rank: int, wide: int = 8) -> nn.Sequential:
    """A convolution of 8 outputs, `middle`, and a reader of `wide` channels."""
    torch.manual_seed(0)
    return nn.Sequential(conv(rank, 3, 8), *middle, nn.ReLU(), conv(rank, wide, 2)).double().eval()


def examples(rank: int) -> Tensor:
    return torch.randn(X[rank], generator=torch.Generator().manual_seed(0), dtype=torch.float64)


MIDDLE = {
    "a batch norm, no bias": lambda r: ([conv(r, 8, 8, bias=False), kind("BatchNorm", r)(8)], {"0": 8, "1": 8}, 8),
    "depthwise": lambda r: ([conv(r, 8, 8, 8, bias=False), kind("BatchNorm", r)(8)], {"0": 8}, 8),
    "two filters a channel": lambda r: ([conv(r, 8, 16, 8)], {"0": 8}, 16),
    "groups": lambda r: ([conv(r, 8, 12, 2)], {"0": 4, "1": 6}, 12),
    "transposed": lambda r: ([up(r, 8, 6), nn.ReLU(), up(r, 6, 4)], {"0": 8, "1": 6, "3": 4}, 4),
    "transposed, groups": lambda r: ([up(r, 8, 12, 2)], {"0": 4, "1": 6}, 12),
    "transposed, two filters a channel": lambda r: ([up(r, 8, 16, 8)], {"0": 8}, 16),
    "instance norm": lambda r: ([kind("InstanceNorm", r)(8)], {"0": 8}, 8),
    "instance norm, affine": lambda r: ([kind("InstanceNorm", r)(8, affine=True)], {"0": 8}, 8),
    "group norm": lambda r: ([nn.GroupNorm(4, 8)], {"0": 4}, 8),
    "shuffle": lambda r: ([nn.ChannelShuffle(2)], {"0": 4}, 8),
}


@pytest.mark.parametrize("rank", few([1, 2, 3], 1, 2))
@pytest.mark.parametrize("name", MIDDLE)
def test_what_stands_between_two_convolutions(name: str, rank: int) -> None:
    middle, units, wide = MIDDLE[name](rank)
    model, x = between(*middle, rank=rank, wide=wide), examples(rank)
    structure = find_structure(model, x)
    assert structure.units == units
    assert prove_groups(model, structure, x) < 1e-12
    assert total_cost(structure) == count_macs(model, x)


@pytest.mark.parametrize("name", ["two filters a channel", "transposed, groups", "group norm"])
@pytest.mark.parametrize("importance", few(["magnitude", "taylor", "activation"], "taylor"))
def test_budgets_are_met_by_every_importance(name: str, importance: str) -> None:
    rank = {"magnitude": 1, "taylor": 2, "activation": 3}[importance]
    middle, _, wide = MIDDLE[name](rank)
    model, x = nn.Sequential(*between(*middle, rank=rank, wide=wide), nn.Flatten(2), Mean()), examples(rank)
    data = [(x, torch.tensor([0, 1]))]
    smaller = prune(model, x, importance=importance, budget=Budget(macs_ratio=0.6), data=data)
    assert count_macs(smaller, x) <= 0.6 * count_macs(model, x)


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(2)


class Product(nn.Module):
    """Attention of one head or two, written in several ways."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        if self.how == "matmul":
            return self.o((q @ k.transpose(-2, -1)).softmax(-1) @ v)
        if self.how == "bmm":
            return self.o(torch.bmm(F.softmax(torch.bmm(q, k.transpose(1, 2)), dim=-1), v))
        if self.how == "einsum":
            return self.o(torch.einsum("bnm, bmd -> bnd", torch.einsum("bnd,bmd->bnm", q, k).softmax(-1), v))
        if self.how == "two heads":
            q, k, v = (y.unflatten(-1, (2, -1)).transpose(1, 2) for y in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v)
        return self.o(y.transpose(1, 2).flatten(2) if self.how == "two heads" else y)


TOKENS = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("how", few(["matmul", "bmm", "einsum", "one head", "two heads"], "einsum", "two heads"))
def test_values_go_through_products_and_what_these_add_over_goes_together(how: str) -> None:
    model = Product(how).double().eval()
    structure = find_structure(model, TOKENS)
    wide, scaled = 4 if how == "two heads" else 8, "head" in how
    assert structure.units == ({"v": wide} if scaled else {"v": wide, "q": wide})
    if scaled:  # by the width that would be cut, and a module's code cannot be written anew
        assert structure.frozen["q"].endswith("(...) adds over them") and structure.frozen["k"] == structure.frozen["q"]
    else:
        assert sorted(structure.group("q").producers) == ["k", "q"] and structure.group("q").paired
    assert prove_groups(model, structure, TOKENS) < 1e-12
    assert total_cost(structure) == count_macs(model, TOKENS)  # the products with it
    pruned = prune(model, TOKENS, importance="magnitude", budget=Budget(macs_ratio=0.5))
    assert count_macs(pruned, TOKENS) <= 0.5 * count_macs(model, TOKENS)
    assert isinstance(pruned, fx.GraphModule) == scaled and equal_silenced(model, pruned)


def equal_silenced(model: nn.Module, pruned: nn.Module) -> bool:
    """Whether a network with zeros in the place of the outputs that went is the pruned one."""
    silent = copy.deepcopy(model)
    for name, stays in pruned.rmprune_facts["kept"].items():
        for tensor in silent.get_submodule(name).parameters():
            tensor.data[[i for i in range(len(tensor)) if i not in stays]] = 0
    return bool(torch.allclose(silent(TOKENS), pruned(TOKENS), 1e-9, 1e-12))


class Fused(nn.Module):
    """Attention as vision transformers write it: the widths stand in the code."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.how, self.heads, self.qkv, self.proj = how, 2, nn.Linear(8, 24), nn.Linear(8, 8)
        self.positions = nn.Parameter(torch.randn(2, 6, 6))

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        if self.how == "split":
            q, k, v = (y.view(b, n, 2, 4).transpose(1, 2) for y in self.qkv(x).split([8, 8, 8], -1))
        else:
            q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        if self.how == "scale":
            y = ((q * 0.5) @ k.transpose(-2, -1) + self.positions).softmax(-1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.positions)
        return x + self.proj(y.transpose(1, 2).reshape(b, n, c))


@pytest.mark.parametrize("how", few(["scale", "sdpa", "split"], "sdpa"))
def test_sizes_that_code_writes_are_written_anew_where_the_budget_needs_it(how: str, tmp_path: Path) -> None:
    model = Fused(how).double().eval()
    with pytest.raises(UnsupportedModel, match="no channel"):
        find_structure(model, TOKENS)
    pruned = prune(model, TOKENS, importance="magnitude", budget=Budget(macs_ratio=0.85))
    assert pruned.qkv.out_features < 24 == model.qkv.out_features and pruned.rmprune_facts["cut_error"] < 1e-12
    assert isinstance(pruned, fx.GraphModule) and equal_silenced(model, pruned)
    again = prune(
        pruned, TOKENS, importance="magnitude", budget=Budget(macs_ratio=0.8)
    )  # its scale is that of the first width
    assert again.qkv.out_features < pruned.qkv.out_features and equal_silenced(model, again)
    three = torch.cat([TOKENS, TOKENS[:1]])
    assert torch.equal(rmprune.load(rmprune.save(again, tmp_path / "net"))(three), again(three))


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.norm = nn.MultiheadAttention(8, 2, batch_first=True), nn.LayerNorm(8)
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x + self.attention(x, x, x, need_weights=False)[0])
        return self.down(F.gelu(self.up(y)))


def test_the_feed_forward_part_of_a_transformer_of_torch_is_cut() -> None:
    part = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.Sequential(nn.TransformerEncoder(part, 2, enable_nested_tensor=False), nn.Linear(8, 3)).double().eval()
    pruned = prune(model, TOKENS, importance="magnitude", budget=Budget(macs_ratio=0.7))
    assert pruned[0].layers[1].linear1.out_features < 16 and pruned.rmprune_facts["cut_error"] < 1e-9  # type: ignore[index, union-attr]
    assert "MultiheadAttention" in pruned.rmprune_facts["whole"]["0.layers.0.self_attn"]


def test_attention_as_a_module_is_counted_and_what_reads_it_is_cut() -> None:
    model = Transformer().double().eval()
    structure = find_structure(model, TOKENS)
    assert structure.units == {"up": 32}
    assert structure.frozen["attention"] == "layers of type MultiheadAttention are not pruned"
    assert prove_groups(model, structure, TOKENS) < 1e-12
    assert total_cost(structure) == count_macs(model, TOKENS)
    smaller = prune(model, TOKENS, importance="magnitude", budget=Budget(macs_ratio=0.7))
    assert count_macs(smaller, TOKENS) <= 0.7 * count_macs(model, TOKENS)


class Left(nn.Module):
    """Two convolutions, and what `between` makes of the map of 8 channels between them."""

    def __init__(self, name: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = conv(2, 3, 8), conv(2, 8, 6), conv(2, 6, 2)
        self.norm, self.one, self.axis = nn.LayerNorm(8), nn.GroupNorm(1, 8), nn.Linear(6, 6)
        self.gain = nn.Parameter(torch.rand(8, 1, 1))
        self.register_buffer("index", torch.randperm(8))
        self.between = LEFT[name][0]

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.relu(self.b(self.between(self, torch.relu(self.a(x))))))


LEFT = {
    "half of what is there": (lambda _, y: torch.cat([y[:, : y.shape[1] // 2], -y[:, y.shape[1] // 2 :]], 1), "slice"),
    "a norm of one group": (lambda s, y: s.one(y), r"one \(GroupNorm\) normalises over channels"),
    "LayerNorm": (lambda s, y: s.norm(y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), "normalises over channels"),
    "a function of groups": (lambda _, y: F.group_norm(y, 4), r"group_norm\(...\) mixes them"),
    "a gain": (lambda s, y: y + s.gain, "a free-standing parameter has these channels"),
    "another axis": (lambda s, y: s.axis(y), "axis reads its channels as positions"),
    "a parameter's product": (
        lambda s, y: (s.gain.expand(8, 8, 8)[0] @ y.flatten(2)).unflatten(2, (6, 6)),
        "adds over them",
    ),
    "index_select": (lambda s, y: y.index_select(1, s.index), "index_select"),
    "einsum with dots": (lambda s, y: torch.einsum("...hw,...hw->...hw", y, y), "mixes them"),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_needs_all_channels_leaves_them_and_says_why(name: str) -> None:
    model, x = Left(name).double().eval(), examples(2)
    structure = find_structure(model, x)
    assert structure.units == {"b": 6}
    assert re.search(LEFT[name][1], structure.frozen["a"]), structure.frozen["a"]
    assert prove_groups(model, structure, x) < 1e-12


def test_a_norm_on_tokens_is_not_the_linear_layers() -> None:
    """BatchNorm1d takes dimension 1 of (N, L, F), the tokens: with L == F it looks as if it were the features."""
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)).double().eval()
    x = torch.randn(2, 8, 5, dtype=torch.float64)
    with pytest.raises(UnsupportedModel, match="0: 1 reads its channels as positions"):
        find_structure(model, x)
    assert find_structure(model, x[:, 0]).units == {"0": 8}


def test_what_torch_pruning_would_cut_wrongly_is_left_to_it_no_more() -> None:
    x = examples(1)
    model = nn.Sequential(
        *between(nn.GroupNorm(4, 8), rank=1, wide=8), nn.ReLU(), conv(1, 2, 8), conv(1, 8, 2)
    ).double()
    pruned = prune_coupled(model.eval(), x, importance="magnitude", budget=Budget(macs_ratio=0.8))
    assert pruned[0].out_channels == 8 and pruned[5].out_channels < 8  # type: ignore[operator]
    assert count_macs(pruned, x) <= 0.8 * count_macs(model, x)
    with pytest.raises(InfeasibleBudget, match="was met by no cut of Torch-Pruning"):
        prune_coupled(
            Product("one head").double().eval(), TOKENS, importance="magnitude", budget=Budget(macs_ratio=0.75)
        )


class Named(nn.Conv3d):
    """A class of one's own that computes what its base computes, as torchvision's Conv3DSimple."""


def test_a_class_that_inherits_its_forward_is_a_layer() -> None:
    model = nn.Sequential(Named(3, 8, 1), nn.ReLU(), Named(8, 2, 1)).double().eval()
    assert find_structure(model, examples(3)).units == {"0": 8}
