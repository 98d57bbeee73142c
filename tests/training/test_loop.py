"""The loop: it learns, continues exactly, follows its hook, and refuses what it must."""

import copy
import dataclasses
import logging
from pathlib import Path

import pytest
import torch
from torch import nn
from training_nets import CONFIG, Viewed, blobs, records, same, tiny_net

from rmprune.config import DataConfig, TrainConfig
from rmprune.data.load import Dataset
from rmprune.data.sources import Images
from rmprune.data.splits import TensorSplit
from rmprune.errors import RmpruneError
from rmprune.training import TrainState, evaluate, fit
from rmprune.training.checkpoint import load_checkpoint


def test_it_learns_and_leaves_the_argument_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    data, model = blobs(), tiny_net()
    before = copy.deepcopy(model)
    random_state = torch.get_rng_state()
    with caplog.at_level(logging.INFO, "rmprune"):
        trained = fit(
            model, data, dataclasses.replace(CONFIG, epochs=6), seed=0, log=tmp_path / "log.jsonl", label="dense"
        )
    assert same(model, before) and torch.equal(random_state, torch.get_rng_state())
    assert not trained.training
    assert evaluate(trained, data.test).accuracy > 0.95 > evaluate(before.eval(), data.test).accuracy
    lines = records(tmp_path / "log.jsonl")
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4, 5, 6]
    wanted = {
        "label",
        "train_loss",
        "train_accuracy",
        "validation_accuracy",
        "learning_rate",
        "images_per_second",
        "seconds",
    }
    assert wanted <= lines[0].keys() and lines[0]["label"] == "dense"
    assert lines[-1]["train_loss"] < lines[0]["train_loss"]
    assert lines[-1]["validation_accuracy"] == evaluate(trained, data.validation).accuracy
    assert len(caplog.records) == 6 and "epoch 6/6" in caplog.text


def test_the_seed_decides():
    first, again, other = (fit(tiny_net(), blobs(), CONFIG, seed=seed) for seed in (1, 1, 2))
    assert same(first, again) and not same(first, other)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("student", [Viewed, tiny_net])
def test_code_that_views_maps_as_they_lie_is_trained_and_followed(student: type[nn.Module], channels_last: bool):
    config = dataclasses.replace(CONFIG, epochs=1, distillation=0.5, channels_last=channels_last)
    trained = fit(student(), blobs(), config, seed=0, teacher=Viewed())
    assert trained(blobs().test.example(2)).isfinite().all()


def test_bfloat16_and_memory_order_change_only_the_rounding():
    plain = fit(tiny_net(0.0), blobs(), dataclasses.replace(CONFIG, channels_last=False), seed=0)
    for change in ({"channels_last": True}, {"precision": "bfloat16"}):
        other = fit(tiny_net(0.0), blobs(), dataclasses.replace(CONFIG, **change), seed=0)
        x = blobs().test.example(8)
        assert other[0].weight.dtype == torch.float32
        torch.testing.assert_close(other(x), plain(x), atol=0.3, rtol=0.3)


def test_no_epochs_is_no_training():
    model = tiny_net()
    assert same(fit(model, blobs(), dataclasses.replace(CONFIG, epochs=0), seed=0), model)


def test_a_replaced_model_gets_an_optimizer(tmp_path: Path):
    def hook(state: TrainState) -> None:
        if state.step == 2:
            state.model = copy.deepcopy(state.model).eval()

    trained = fit(tiny_net(), blobs(), CONFIG, seed=0, hook=hook)
    assert evaluate(trained, blobs().test).accuracy > 0.9  # it went on learning, in training mode


def test_a_loss_that_is_not_finite_says_what_to_do(tmp_path: Path):
    path = tmp_path / "c.pt"

    def poison(state: TrainState) -> None:
        if state.step == 7:
            state.model[0].weight.data.fill_(float("nan"))

    with pytest.raises(RmpruneError, match=r"step 8 of 15.*lower learning_rate"):
        fit(tiny_net(), blobs(), CONFIG, seed=0, hook=poison, checkpoint=path)
    assert load_checkpoint(path)["step"] == 5


def test_classes_that_count_alike_do_so_although_one_is_in_few_batches() -> None:
    """Of images that say nothing, a network that counts both alike says a half, however rare one is."""
    images, labels = torch.full((512, 1, 2, 2), 128, dtype=torch.uint8), (torch.arange(512) % 64 == 0).long()
    split = TensorSplit(Images(images, labels), torch.zeros(1), torch.ones(1) * 255, may_flip=False)
    weights = torch.tensor([512 / (2 * 504), 512 / (2 * 8)])
    data = Dataset("one", 2, (1, 2, 2), split, split, split, DataConfig(batch_size=16), class_weights=weights)
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    config = TrainConfig(epochs=30, learning_rate=0.02, warmup_epochs=0, momentum=0.0, weight_decay=0.0)
    found = fit(net, data, config, seed=0)(torch.full((1, 1, 2, 2), 128 / 255)).softmax(1)
    assert float(found[0, 1].detach()) == pytest.approx(0.5, abs=0.1)
