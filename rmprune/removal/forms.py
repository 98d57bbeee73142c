"""How a carried value passes an activation exactly: as it is, shifted, as a pair, with slope 1, or not at all (RM.md 2)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rmprune.graph.activations import Rule
from rmprune.graph.obstacle import Obstacle
from rmprune.graph.ranges import constant

FORMS = ("auto", "shift", "pair", "slice")
LOOSE = 256.0  # a shift this many times the values themselves rounds them to 256 * 2^-24 = 1.5e-5 in float32
_SLACK = 2e-11  # the outward rounding of the ranges is no overshoot
_GRID = 2.0**-12  # offsets are multiples of it, so that float32 adds and takes them off exactly


@dataclass(frozen=True)
class Code:
    """Rows that carry a value of K channels: row r emits scale[r] * v[channel[r]] + offset[r].

    After the activation, v[k] = sum of decode[r] * row r over the rows of channel k, + constant[k].
    """

    channel: Tensor
    scale: Tensor
    offset: Tensor
    decode: Tensor
    constant: Tensor
    forms: frozenset[str]


@dataclass(frozen=True)
class CodeShift:
    """scale * v + offset, one each a row."""

    scale: Tensor
    offset: Tensor


def free(rule: Rule | None, low: Tensor, high: Tensor) -> Tensor:
    """Which channels with values in [low, high] pass unchanged."""
    if rule is None or rule.slopes:
        return torch.ones_like(low, dtype=torch.bool)
    bottom, top = rule.low - _SLACK * max(1.0, abs(rule.low)), rule.high
    if math.isfinite(top):
        top += _SLACK * max(1.0, abs(top))
    return (low >= bottom) & (high <= top)


def cheapest_code(
    rule: Rule | None, low: Tensor, high: Tensor, needed: Tensor, form: str, size: float = math.inf
) -> Code:  # fmt: skip
    """The cheapest code for the channels in `needed`. Raises Obstacle where there is none.

    low, high: (K,) ranges; needed: (K,) bool; form: auto, shift or pair (what a channel that is not free may use). size: how
    large values are in fact; "auto" takes a pair where the bounds are so loose that a shift would cost float32 its precision.
    """
    fixed = constant(low, high)
    carried = needed & ~fixed
    passes = free(rule, low, high)
    value = torch.where(fixed, (low + high) / 2, 0.0)
    if rule is None or bool((passes | ~carried).all()):
        channel = carried.nonzero().flatten()
        one = torch.ones(len(channel), dtype=torch.float64)
        name = "slope" if rule is not None and rule.slopes else "free"
        return Code(channel, one, torch.zeros_like(one), one, value, frozenset([name] if len(channel) else []))
    shifted, pairs = shift(rule, low, high), _pair_scale(rule, low, high)
    shiftable, pairable = torch.isfinite(shifted.scale), torch.isfinite(pairs)
    use_shift = carried & ~passes & shiftable & (form in ("auto", "shift"))
    if form == "auto":
        use_shift &= ~(pairable & (shifted.offset.abs() / shifted.scale > LOOSE * size))
    use_pair = carried & ~passes & pairable & (form in ("auto", "pair")) & ~use_shift
    missing = carried & ~passes & ~use_shift & ~use_pair
    if missing.any():
        raise Obstacle(_why(rule, low[missing], high[missing], form))
    return _rows_of_forms(rule, carried & passes, use_shift, use_pair, shifted, pairs, value)


def _rows_of_forms(
    rule: Rule, passes: Tensor, use_shift: Tensor, use_pair: Tensor, shifted: CodeShift, pairs: Tensor, value: Tensor
) -> Code:
    index = torch.arange(len(passes))
    one = torch.ones(len(passes), dtype=torch.float64)
    zero = torch.zeros_like(one)
    blocks = [
        (passes, one, zero, one),
        (use_shift, shifted.scale, shifted.offset, 1 / shifted.scale),
        (use_pair, pairs, zero, 1 / (pairs * (rule.odd or 1.0))),
        (use_pair, -pairs, zero, -1 / (pairs * (rule.odd or 1.0))),
    ]
    channel, scale, offset, decode = (
        torch.cat(parts)
        for parts in zip(*[(index[m], s[m], o[m], d[m]) for m, s, o, d in blocks], strict=True)
    )  # fmt: skip
    order = torch.argsort(channel, stable=True)
    constant = torch.where(use_shift, -shifted.offset / torch.where(use_shift, shifted.scale, one), value)
    names = [name for name, mask in (("free", passes), ("shift", use_shift), ("pair", use_pair)) if mask.any()]
    return Code(channel[order], scale[order], offset[order], decode[order], constant, frozenset(names))


def shift(rule: Rule, low: Tensor, high: Tensor) -> CodeShift:
    """a * v + b inside the identity interval, for rows v in [low, high]; NaN where impossible.

    a is a power of two, at most 1; b the offset nearest to 0.
    """
    nan = torch.full_like(low, math.nan)
    bottom, top = rule.low, rule.high
    if bottom >= top:
        return CodeShift(nan, nan)
    size = torch.where(torch.isinf(high), low.abs(), torch.maximum(low.abs(), high.abs()))
    margin = 1e-5 * size.clamp(min=1e-30)
    low, high = low - margin, torch.where(torch.isinf(high), high, high + margin)
    if math.isinf(top):
        offset = torch.ceil((bottom - low).clamp(min=0.0) / _GRID) * _GRID
        possible = torch.isfinite(low)
        return CodeShift(torch.where(possible, 1.0, nan), torch.where(possible, offset, nan))
    possible = torch.isfinite(low) & torch.isfinite(high)
    width = torch.where(possible, high - low, 1.0).clamp(min=1e-30)
    scale = torch.exp2(torch.floor(torch.log2((top - bottom) / width))).clamp(max=1.0)
    least, most = bottom - scale * low, top - scale * high
    offset = torch.where(least > 0, _up(least, most), torch.where(most < 0, -_up(-most, -least), 0.0))
    return CodeShift(torch.where(possible, scale, nan), torch.where(possible, offset, nan))


def _up(least: Tensor, most: Tensor) -> Tensor:
    """The least multiple of the grid in [least, most], or `least` itself where none lies inside."""
    rounded = torch.ceil(least / _GRID) * _GRID
    return torch.where(rounded <= most, rounded, least)


def _pair_scale(rule: Rule, low: Tensor, high: Tensor) -> Tensor:
    nan = torch.full_like(low, math.nan)
    if rule.odd is None or rule.odd == 0:
        return nan
    if math.isinf(rule.reach):
        return torch.ones_like(low)
    most = torch.maximum(low.abs(), high.abs()) * (1 + 1e-5)
    scale = torch.exp2(torch.floor(torch.log2(rule.reach / most.clamp(min=1e-30)))).clamp(max=1.0)
    return torch.where(torch.isfinite(most), scale, nan)


def _why(rule: Rule, low: Tensor, high: Tensor, form: str) -> str:
    if rule.low > rule.high and rule.odd is None:
        return "its activation is nowhere the identity and has no linear odd part, so nothing passes it exactly"
    unbounded = int((torch.isinf(low) | torch.isinf(high)).sum())
    if form == "shift" and rule.low > rule.high:
        return "its activation is nowhere the identity, so no shift helps (form='pair' does)"
    if form == "pair" and rule.odd is None:
        return "its activation has no linear odd part, so no pair recovers x (form='shift' may)"
    if unbounded:
        return (
            f"{unbounded} channels have no provable bounds that the activation needs; ranges='calibrated' takes them from data, "
            "or give input_range"
        )
    return f"no form {form!r} passes its activation"
