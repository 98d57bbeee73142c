"""Pieces of a split or a chunk are slices of channels: a block that passes some of its channels on, however it is written."""

from collections.abc import Callable, Sequence

import pytest
import torch
from removal_nets import images, prepared, worst_error
from torch import Tensor, nn

from rmprune.removal import remove_residuals

CUTS = [
    (2, lambda x: x.split([2, 4], 1)),
    (2, lambda x: torch.split(x, split_size_or_sections=[2, 4], dim=-3)),
    (4, lambda x: x.split(4, 1)),
    (3, lambda x: x.chunk(2, dim=1)),
    (3, lambda x: torch.chunk(x, 2, 1)),
]


class Passes(nn.Module):
    """relu(cat(x[:count], conv(x) + bn(x[count:])))."""

    def __init__(self, count: int, cut: Callable[[Tensor], Sequence[Tensor]]) -> None:
        super().__init__()
        self.stem, self.conv, self.bn = (
            nn.Conv2d(3, 6, 3),
            nn.Conv2d(6, 6 - count, 3, padding=1),
            nn.BatchNorm2d(6 - count),
        )
        self.cut = cut

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        passed, rest = self.cut(x)
        return torch.relu(torch.cat([passed, self.conv(x) + self.bn(rest.contiguous())], 1))


@pytest.mark.parametrize(("passed", "cut"), CUTS)
def test_pieces_are_slices(passed: int, cut: Callable[[Tensor], Sequence[Tensor]]) -> None:
    model = prepared(Passes(passed, cut))
    removal = remove_residuals(model, images(), batch_norm=False)
    assert removal.removed and not removal.kept
    assert [type(layer) for layer in removal.model] == [nn.Conv2d, nn.ReLU] * 2  # type: ignore[arg-type]
    assert worst_error(removal, model) < 1e-12
