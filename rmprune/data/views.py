"""What training sees of a square photo: a window in it, mirrored and turned; the same one by one as in a batch on a GPU."""

from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.transforms import v2

from rmprune.config.data import Augmentation

_SHIFT = 8  # light augmentation moves by up to this part of the image in all, beyond what lies outside the crop anyway


class View(NamedTuple):
    """A window's upper left corner in the square with its margin, whether it is flipped, and the quarters it is then turned by."""

    top: int
    left: int
    mirrored: int = 0
    upside_down: int = 0
    quarters: int = 0


def margin(side: int, size: int) -> int:
    """The pixels by which the edges of a square are mirrored outwards, where it is hardly larger than the window."""
    return max(0, -(-(size + size // _SHIFT - side) // 2))


def middle(side: int, size: int) -> View:
    """The window in the middle of the square with its margin, as it is without augmentation."""
    at = round((side - size) / 2) + margin(side, size)
    return View(at, at)


def drawn(side: int, size: int, generator: torch.Generator, kind: Augmentation) -> View:
    """A view of a photo: mirrored left and right in half of the cases; `mirrors`: upside down in half as well; `turns`: turned by
    quarters instead, which makes all eight ways a square can lie."""

    def draw(count: int) -> int:
        return int(torch.randint(count, (), generator=generator))

    places = side + 2 * margin(side, size) - size + 1
    top, left, mirrored = draw(places), draw(places), draw(2)
    return View(top, left, mirrored, draw(2) if kind == "mirrors" else 0, draw(4) if kind == "turns" else 0)


def lightly_augmented(square: Tensor, size: int, generator: torch.Generator, kind: Augmentation) -> Tensor:
    """A drawn view [C, size, size] of the square [C, side, side]."""
    view, edge = drawn(square.shape[-1], size, generator, kind), margin(square.shape[-1], size)
    wide = v2.functional.pad(square, [edge], padding_mode="reflect") if edge else square
    window = wide[:, view.top : view.top + size, view.left : view.left + size]
    if view.mirrored:
        window = window.flip(2)
    if view.upside_down:
        window = window.flip(1)
    return torch.rot90(window, view.quarters, (1, 2))


def views_of(squares: Tensor, numbers: Tensor, views: Tensor, size: int) -> Tensor:
    """The views [B, C, size, size] of the squares [N, C, side, side] with these `numbers` [B]; `views`: int64 [B, 5], a View each.

    All lie on one device, and nothing is waited for.
    """
    side = squares.shape[-1]
    top, left, mirrored, upside_down, quarters = views.unbind(1)
    step = torch.arange(size, device=squares.device)

    def read(first: Tensor, back: Tensor) -> Tensor:
        """The rows (or columns) [B, size] of the square that the window has, mirrored at its edges; `back`: from the last to the first."""
        at = first[:, None] + torch.where(back[:, None] == 1, size - 1 - step, step) - margin(side, size)
        return side - 1 - (side - 1 - at.abs()).abs()

    rows = read(top, upside_down ^ (quarters // 2))  # two quarters flip both, one and three flip one of them and swap
    columns = read(left, mirrored ^ ((quarters + 1) // 2 % 2))
    window = squares[numbers[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    return torch.where((quarters % 2 == 1)[:, None, None, None], window.transpose(2, 3), window)
