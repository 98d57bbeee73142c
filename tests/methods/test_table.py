"""The methods are what they were before they became a product of choices, under every name that they had."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from rmprune import count_macs
from rmprune.config import DataConfig, PruneConfig, SlimConfig
from rmprune.data.load import Dataset, load_dataset
from rmprune.errors import ConfigError, UnsupportedModel
from rmprune.methods.cutter import make_cutter
from rmprune.methods.start import start
from rmprune.methods.table import METHODS, STARTS, find_methods
from rmprune.models import create
from rmprune.pruning import Budget
from rmprune.report import comparable
from rmprune.report.tables import method_of
from rmprune.training.job import Job

ONE_CUT = {"gradual": False}
BEFORE: dict[str, dict[str, Any]] = {  # name: directory of the network that it prunes, and what else is not the default
    "rm": {"start": "plain"},
    "rm-collapse": {"start": "collapsed"},
    "mixed-collapse": {"start": "half-collapsed"},
    "coupled-collapse": {"start": "collapsed-residual"},
    "coupled-half-collapse": {"start": "half-collapsed-residual"},
    "mixed-auto": {"start": "dense", "candidates": ("residual", "mixed-collapse", "rm-collapse", "rm")},
    "rm-slimming": {
        "start": "plain",
        "settings": {"gradual": False, "reconstruct": False, "importance": "batch_norm", "rank": "importance"},
    },
    "mixed": {"start": "dense", "faster": True},
    "coupled": {"start": "dense", "pruner": "torch-pruning", "settings": ONE_CUT | {"importance": "batch_norm"}},
    "coupled-taylor": {"start": "dense", "pruner": "torch-pruning", "settings": ONE_CUT | {"importance": "taylor"}},
    "coupled-norm": {"start": "dense", "pruner": "torch-pruning", "settings": ONE_CUT | {"importance": "magnitude"}},
    "residual": {"start": "dense"},
    "inner": {"start": "dense", "widths": "inner"},
    "uniform": {"start": "dense", "widths": "uniform", "settings": ONE_CUT},  # not fitted until 4963b67
}
SINCE = {"auto", "plan", "rm-v1", "scratch", "depth", "coupled-isomorphic"}
BLOCKS = ["layer1.0", "layer2.0", "layer3.0"]


@pytest.mark.parametrize("name", BEFORE)
def test_every_name_of_before_means_what_it_meant(name: str) -> None:
    (method,) = find_methods((name,)).values()
    expected = {"widths": "free", "pruner": "ours", "settings": {}, "candidates": (), "faster": False} | BEFORE[name]
    found = {field: getattr(method, field) for field in expected}
    assert found | {"settings": dict(method.settings)} == expected
    assert method.faster == (name == "mixed") and method.about and method.start in STARTS


def test_a_renamed_method_is_listed_by_its_name_and_a_run_keeps_the_one_it_began_with() -> None:
    assert {"residual-collapse", "residual-half-collapse"} < set(METHODS) and len(METHODS) == len(BEFORE) + len(SINCE)
    assert not {"coupled-collapse", "coupled-half-collapse"} & set(METHODS)
    found = find_methods(("coupled-half-collapse", "rm"))
    assert list(found) == ["coupled-half-collapse", "rm"]
    assert found["coupled-half-collapse"] is METHODS["residual-half-collapse"]
    with pytest.raises(ConfigError, match="unknown method 'collapse'; there are: rm, "):
        find_methods(("collapse",))


def test_reports_and_runs_agree_which_methods_read_no_settings_of_a_removal() -> None:
    assert {name for name, method in METHODS.items() if not method.reads_removal} - {"plan"} == set(
        comparable._RESIDUALS_STAY
    )


def test_reports_call_it_by_its_name_now() -> None:
    network = {"accuracy": 0.5, "macs": 1, "params": 1, "latency": [], "method": "coupled-collapse"}
    assert method_of({"original": network, "coupled-collapse": network}, "coupled-collapse") == "residual-collapse"


@pytest.fixture(scope="module")
def data() -> Dataset:
    return load_dataset(DataConfig(train_images=256))


@pytest.fixture(scope="module")
def dense(data: Dataset) -> nn.Module:
    torch.manual_seed(0)
    return create("resnet8", num_classes=10, in_channels=1, width=4).eval()


def convolutions(model: nn.Module) -> int:
    return sum(isinstance(module, nn.Conv2d) for module in model.modules())


def test_the_networks_that_methods_start_from(data: Dataset, dense: nn.Module) -> None:
    assert start(dense, "dense", data.train.example) == (dense, {})
    images = data.train.example(32)
    with pytest.raises(UnsupportedModel, match=r"no block to fuse: layer1\.0: no linear layer stands beside it"):
        start(dense, "fused", data.train.example)
    for name, rule in STARTS.items():
        if name == "fused":
            continue
        network, facts = start(dense, name, lambda count: images[:count])
        collapses, removes = rule.prefer[0] in ("merge", "collapse"), rule.prefer[0] in ("merge", "remove")
        explained = facts.get("collapsed", {})
        assert len(explained) == (math.ceil(len(BLOCKS) / (1 + rule.half)) if collapses else 0)
        assert facts.get("removal", {}).get("removed", []) == ((list(explained) or BLOCKS) if removes else [])
        # no reserved channels: never dearer
        assert (count_macs(network, images[:1]) <= count_macs(dense, images[:1])) == (name != "plain")


def test_the_device_reaches_what_a_cutter_measures_and_fits(data: Dataset, dense: nn.Module) -> None:
    """Stands for a GPU: the meta device, which computes nothing."""
    job = Job(SlimConfig(prune=PruneConfig(macs_ratio=(0.6,))), data, torch.device("meta"), 0, dense)
    cutter = make_cutter(dense, METHODS["residual"], job)
    tensors = [cutter.example, *cutter.network.parameters(), *(x for batch in job.batches for x in batch)]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert {tensor.device.type for tensor in dense.parameters()} == {"cpu"}  # a copy went there
    assert job.examples(100).shape == (100, 1, 8, 8) and job.examples(10**6).shape[0] == len(data.train)


def test_the_floor_is_half_of_an_even_cut_and_cuts_are_spread_over_a_part_of_training(
    data: Dataset, dense: nn.Module
) -> None:
    config = SlimConfig(prune=PruneConfig(macs_ratio=(0.64,), cuts=5, cut_fraction=0.4))
    cutter = make_cutter(dense, METHODS["residual"], Job(config, data, torch.device("cpu"), 0, dense))
    floored = cutter.floored(Budget(macs_ratio=0.64))
    assert floored.min_fraction == pytest.approx(0.4)  # of 0.8, MACs going with the square
    hook = cutter.hook(floored, steps=100, epochs=4)
    assert hook.every == 8 and hook.prune_epochs == pytest.approx(1.6)


def test_the_examples_of_a_job_are_the_first_training_images(data: Dataset) -> None:
    job = Job(SlimConfig(prune=PruneConfig(macs_ratio=(0.6,))), data, torch.device("cpu"), 0)
    for count in (1, 128, 200, 10**6):
        assert torch.equal(job.examples(count), data.train.example(count))
