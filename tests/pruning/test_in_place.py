"""Networks that write over their values are fitted and grouped as those that do not, and leave the caller's images as they are."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from marks import few
from torch import Tensor, nn

from rmprune import Budget, collapse_blocks, prune, remove_residuals, save
from rmprune.errors import DataError
from rmprune.pruning import find_structure
from rmprune.pruning.coupled import prune_coupled
from rmprune.pruning.surrogate import Ends, width_losses


class Net(nn.Module):
    """`over`: its additions are written over what they add to."""

    def __init__(self, over: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.over = over
        self.a, self.b, self.c = (nn.Conv2d(i, 8, 3, padding=1) for i in (3, 8, 8))
        self.norm, self.head = nn.BatchNorm2d(8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        if self.over:
            x -= 0.5
            x *= 3
            y = self.a(x)
            y += self.c(torch.relu(self.norm(self.b(y))))
        else:
            y = self.a((x - 0.5) * 3)
            y = y + self.c(torch.relu(self.norm(self.b(y))))
        return self.head(torch.relu(y).mean((2, 3)))


class Input(Net):
    """The same, `over` its images alone: a network that can be trained."""

    def forward(self, x: Tensor) -> Tensor:
        if self.over:
            x.sub_(0.5).mul_(3)
        else:
            x = (x - 0.5) * 3
        y = self.norm(self.a(x))
        return self.head(torch.relu(y + self.c(torch.relu(self.b(y)))).mean((2, 3)))


Batches = list[tuple[Tensor, Tensor]]
CUT = Budget(macs_ratio=0.6, round_to=1)


def own_loss(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def refused(net: nn.Module, x: Tensor, data: Batches) -> nn.Module:
    with pytest.raises(DataError, match="one number"):
        prune(net, x, budget=CUT, data=data, importance="taylor", loss=lambda model, batch: model(batch[0]))
    return net


CALLS: dict[str, Callable[[nn.Module, Tensor, Batches], nn.Module]] = {
    "activation": lambda net, x, data: prune(net, x, budget=CUT, data=data, importance="activation"),
    "own loss": lambda net, x, data: prune(net, x, budget=CUT, data=data, importance="taylor", loss=own_loss),
    "memory": lambda net, x, data: prune(net, x, budget=Budget(memory_ratio=0.8), importance="magnitude"),
    "coupled": lambda net, x, data: prune_coupled(net, x, budget=CUT, data=data, importance="taylor"),
    "removal": lambda net, x, data: remove_residuals(net, x, ranges="calibrated").model,
    "collapse": lambda net, x, data: collapse_blocks(net, data[0][0]).model,
    "refused": refused,
}


@pytest.mark.parametrize("name", few(list(CALLS), "activation", "own loss", "refused"))
def test_images_stay_and_what_is_made_is_the_same(name: str) -> None:
    made = []
    for over in (False, True):
        draw = torch.Generator().manual_seed(1)
        x, data = (
            torch.randn(4, 3, 8, 8, generator=draw),
            [(torch.randn(16, 3, 8, 8, generator=draw), torch.arange(16) % 4)] * 2,
        )
        before = [x.clone(), data[0][0].clone()]
        torch.manual_seed(2)
        made.append(CALLS[name](Input(over).eval(), x, data).state_dict())
        assert torch.equal(x, before[0]) and torch.equal(data[0][0], before[1])
    assert all(torch.equal(a, b) for a, b in zip(*(states.values() for states in made), strict=True))


def test_a_file_is_written_and_the_images_stay(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 8, 8)
    before = x.clone()
    save(Net(True).eval(), tmp_path / "net", example_inputs=x)
    assert torch.equal(x, before)


@pytest.mark.long
@torch.no_grad()
def test_fits_and_what_narrow_groups_lose_are_the_same() -> None:
    x, labels = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(64) % 4
    outputs, losses = [], []
    for over in (False, True):
        net, data = Net(over).eval(), [(x.clone(), labels)]
        budget = Budget(macs_ratio=0.6, round_to=1)
        smaller = prune(net, x[:2].clone(), budget=budget, data=data, importance="magnitude", reconstruct=True)
        outputs.append(smaller(x.clone()))
        structure = find_structure(net, x[:2].clone())
        scores = {group.name: torch.arange(group.units) for group in structure.groups}
        widths = {group.name: [1, 2, 4, 8] for group in structure.groups}
        ends = Ends(x.clone(), labels, net(x.clone()).double().log_softmax(1))
        losses.append(width_losses(net, structure, scores, widths, ends))
    assert torch.allclose(*outputs, atol=1e-6)
    assert losses[0].keys() == losses[1].keys() and len(losses[0]) > 1
    for name, own in losses[0].items():
        assert own == pytest.approx(losses[1][name], rel=1e-3, abs=1e-9)


def test_moves_that_write_over_a_shape_leave_groups_as_they_are() -> None:
    class Moved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(*sizes, 3) for sizes in ((3, 8), (8, 8), (8, 4)))

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x).unsqueeze_(1).squeeze_(1)
            return self.c(torch.relu(self.b(torch.relu(x))))

    assert find_structure(Moved().eval(), torch.randn(2, 3, 12, 12)).units == {"a": 8, "b": 8}
