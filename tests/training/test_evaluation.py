"""Evaluation: the images that it looks at, and the mode that it leaves behind."""

import pytest
from slim_runs import noise
from torch import nn
from training_nets import Viewed, blobs, tiny_net

from rmprune.training import evaluate


def test_evaluate_limits_and_restores_the_mode():
    data, model = blobs(), tiny_net().train()
    model[1].eval()
    result = evaluate(model, data.test, batch_size=7, limit=10)
    assert model.training and not model[1].training
    x, y = next(data.test.batches(10))
    output = model.eval()(x)
    assert result.accuracy == pytest.approx(float((output.argmax(1) == y).float().mean()))
    assert result.loss == pytest.approx(nn.functional.cross_entropy(output, y).item(), rel=1e-5)


def test_code_that_views_maps_as_they_lie_is_evaluated():
    data, model = noise(), Viewed()
    model.body[0], model.head = nn.Conv2d(3, 6, 3), nn.Linear(16, 10)  # of one channel maps lie alike in both orders
    model.eval()
    x, y = next(data.test.batches(len(data.test)))
    assert evaluate(model, data.test).accuracy == pytest.approx(float((model(x).argmax(1) == y).float().mean()))
