"""Batch norms fold exactly, and stay where something else reads their input."""

import torch
from artifact_nets import flat, net, randomise
from torch import Tensor, nn

from rmprune.graph.fold import fold_batch_norms


def test_batch_norms_fold_exactly() -> None:
    for model in (flat(), net()):
        model = model.double().eval()
        folded = fold_batch_norms(model)
        x = torch.randn(2, 3, 12, 12, dtype=torch.float64) * 4
        assert torch.allclose(folded(x), model(x), rtol=1e-12, atol=1e-12)
        assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
        assert any(isinstance(m, nn.BatchNorm2d) for m in model.modules())


def test_a_batch_norm_whose_input_is_read_elsewhere_stays() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return y + self.bn(y)

    model = randomise(Two()).double().eval()
    folded = fold_batch_norms(model)
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    assert any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    assert torch.allclose(folded(x), model(x), rtol=1e-12, atol=1e-12)


def test_a_norm_of_tokens_is_not_folded_into_a_linear_layer() -> None:
    """BatchNorm1d takes dimension 1 of (N, L, F), which with L == F looks like the features."""
    model = randomise(nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8))).double().eval()
    vectors, tokens = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, 8, 5, dtype=torch.float64)
    for inputs, norms in (((vectors,), 0), ((tokens,), 1), (None, 1)):
        folded = fold_batch_norms(model, inputs)
        assert sum(isinstance(m, nn.BatchNorm1d) for m in folded.modules()) == norms
        for x in (vectors, tokens) if norms else (vectors,):
            assert torch.allclose(folded(x), model(x), rtol=1e-12, atol=1e-12)
