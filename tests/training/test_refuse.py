"""Training stops where values are no numbers any more, and says where that began; odd data and formats train, or are one clear error."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn
from training_nets import CONFIG, blobs, tiny_net

from rmprune.config import DataConfig
from rmprune.data.load import Dataset
from rmprune.data.sources import Images
from rmprune.data.splits import TensorSplit
from rmprune.errors import ConfigError, RmpruneError
from rmprune.training import TrainState, evaluate, fit

ONCE = dataclasses.replace(CONFIG, epochs=1, warmup_epochs=0.0)
NAN = float("nan")


@pytest.mark.parametrize(
    ("name", "value", "step", "where"),
    [
        ("4.weight", NAN, 8, r"the loss is .* step 9 of 15 .*\(4\.weight is not finite\)"),
        ("4.weight", 3e38, 8, r"the loss is .* step 9 of 15 .*\(the output of layer [459] \(\w+\) is not finite\)"),
        (
            "4.weight",
            3e38,
            10,
            r"outputs on validation images are .* step 10 of 15 .*\(5\.running_var is NaN\)",  # measured at an epoch's end
        ),
        ("9.bias", NAN, 10, r"weights are .* step 10 of 15 .*\(9\.bias is not finite\)"),
        ("1.running_mean", NAN, 10, r"weights are .* step 10 of 15 .*\(1\.running_mean is NaN\)"),
    ],
)
def test_what_is_not_finite_is_named_with_layer_step_and_checkpoint(
    name: str, value: float, step: int, where: str, tmp_path: Path
) -> None:
    def poison(state: TrainState) -> None:
        if state.step == step:
            state.model.state_dict()[name].fill_(value)

    log, checkpoint = tmp_path / "log.jsonl", tmp_path / "c.pt"
    with pytest.raises(RmpruneError, match=rf"dense: {where}; the last good checkpoint is .*c\.pt, of step 5; lower"):
        fit(tiny_net(), blobs(), CONFIG, seed=0, hook=poison, checkpoint=checkpoint, log=log, label="dense")
    assert log.read_text().count("\n") == 1 and "NaN" not in log.read_text()
    with pytest.raises(RmpruneError, match="no good checkpoint was written"):  # and no broken network is returned
        fit(tiny_net(), blobs(), CONFIG, seed=0, hook=poison)


def test_a_teacher_that_is_not_finite_is_named() -> None:
    teacher = tiny_net()
    nn.init.constant_(teacher[9].weight, NAN)
    with pytest.raises(RmpruneError, match=r"of the teacher, 9\.weight is not finite"):
        fit(tiny_net(), blobs(), dataclasses.replace(ONCE, distillation=0.5), seed=0, teacher=teacher)


def test_a_network_that_makes_nan_is_not_evaluated() -> None:
    model = tiny_net()
    nn.init.constant_(model[1].running_var, -1.0)
    with pytest.raises(RmpruneError, match=r"its outputs are NaN: the output of layer 1 \(BatchNorm2d\)"):
        evaluate(model, blobs().test)


def data(count: int, classes: int, batch: int, size: tuple[int, int]) -> Dataset:
    images = torch.arange(count * size[0] * size[1]).view(count, 1, *size).to(torch.uint8)
    split = TensorSplit(Images(images, torch.arange(count) % classes), torch.zeros(1), torch.ones(1), may_flip=False)
    return Dataset("odd", classes, (1, *size), split, split, split, DataConfig(batch_size=batch))


@pytest.mark.parametrize(
    ("classes", "batch", "size", "dtype"),
    [
        (1, 4, (8, 8), torch.float32),
        (2, 1, (7, 5), torch.float32),
        (2, 4, (1, 40), torch.float64),
        (2, 4, (1, 1), torch.float32),
    ],
)
def test_odd_data_and_double_precision_train(
    classes: int, batch: int, size: tuple[int, int], dtype: torch.dtype
) -> None:
    model = nn.Sequential(*tiny_net()[:7], nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, classes)).to(dtype)
    trained = fit(model, data(9, classes, batch, size), ONCE, seed=0)
    assert all(bool(value.isfinite().all()) for value in trained.state_dict().values())
    assert trained[9].weight.dtype == dtype and 0 <= evaluate(trained, data(9, classes, 4, size).test).accuracy <= 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_evaluated_but_not_trained(dtype: torch.dtype) -> None:
    model = tiny_net().to(dtype)
    assert evaluate(model, blobs().test).accuracy == pytest.approx(evaluate(tiny_net(), blobs().test).accuracy, abs=0.1)
    with pytest.raises(ConfigError, match=r"too coarse to train: pass model\.float\(\)"):
        fit(model, blobs(), ONCE, seed=0)


def test_what_cannot_be_trained_is_refused() -> None:
    with pytest.raises(ConfigError, match="no weights to train"):
        fit(nn.Sequential(nn.Flatten(), nn.Softmax(1)), blobs(), ONCE, seed=0)
    with pytest.raises(RmpruneError, match="one value a channel: take a larger batch_size"):
        fit(tiny_net(), data(3, 2, 1, (1, 1)), ONCE, seed=0)
