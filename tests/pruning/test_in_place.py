"""Networks that write over their values are fitted and grouped as those that do not."""

import pytest
import torch
from torch import Tensor, nn

from rmprune import Budget, prune
from rmprune.pruning import find_structure
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
