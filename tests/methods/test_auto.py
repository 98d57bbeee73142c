"""`auto`: what its surrogate says of a plan's cost is what the plan costs, and it ends at least as well as its presets."""

import itertools
import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from marks import few
from pruning_nets import Tokens
from slim_runs import QUICK, by_parameters, inverted
from torch import nn

import rmprune
from rmprune.config import PruneConfig, RemovalConfig, SlimConfig, TrainConfig
from rmprune.data.load import load_dataset
from rmprune.errors import ConfigError, InfeasibleBudget, UnsupportedModel
from rmprune.measure.latency_model import LatencyModel
from rmprune.measure.place import NEAR, Place, find_ratio
from rmprune.methods import auto, choose, cutter, outlook
from rmprune.methods.auto import Winner
from rmprune.methods.outlook import look, propose
from rmprune.methods.table import METHODS
from rmprune.pipelines import slim, stages
from rmprune.pipelines.slim import run_slim
from rmprune.pruning import Budget, find_structure
from rmprune.pruning.allocate import Meter
from rmprune.pruning.carry_out import carry_out_blocks
from rmprune.pruning.groups import macs
from rmprune.pruning.plan import CHOICES, SlimPlan
from rmprune.pruning.proposals import Proposal, Proposals
from rmprune.runs import records
from rmprune.training.job import Files, Job


class Grouped(nn.Module):
    """A basic block whose first convolution is grouped, so that the map before it has other widths than where it is merged."""

    def __init__(self) -> None:
        super().__init__()
        first, second = (nn.Conv2d(12, 12, 3, padding=1, groups=groups, bias=False) for groups in (3, 1))
        self.branch = nn.Sequential(first, nn.BatchNorm2d(12), nn.ReLU(), second, nn.BatchNorm2d(12))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x + self.branch(x))


def create(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name != "inverted":
        return rmprune.models.create(name, num_classes=10, in_channels=1, width=4).eval()
    return inverted()


STEPS = {"resnet8": 19, "inverted": 5}  # one of so many combinations


@pytest.mark.parametrize("name", few(STEPS, "resnet8"))
def test_the_surrogate_knows_what_a_plan_costs(name: str) -> None:
    config = SlimConfig(prune=PruneConfig(macs_ratio=(0.6,), round_to=1))
    data = load_dataset(config.data)
    job = Job(config, data, torch.device("cpu"), 0)
    model, images = create(name), data.train.example(48)
    whole = rmprune.count_macs(model, images[:1])
    shapes = look(model, Budget(macs_ratio=0.6, reference_macs=whole), job)
    assert shapes.limit == pytest.approx(0.6 * whole)
    every = list(itertools.product(*(own.items() for own in shapes.nothing.values())))
    wider = {  # the wider the better
        choice: replace(
            sight, losses={group: [1.0 / units for units in widths] for group, widths in sight.widths.items()}
        )
        for choice, sight in shapes.sights.items()
    }
    for number in range(0, len(every), STEPS[name]):
        losses = {block: {choice: 0.0} for block, (choice, _) in zip(shapes.nothing, every[number], strict=True)}
        if name == "inverted" and every[number][0][0] == "fuse" and every[number][1][0] not in ("remove", "fuse"):
            continue  # its last layer has no linear one behind it
        proposals = Proposals(wider, shapes.layers, losses)
        for limit in (10.0 * whole, shapes.limit):
            found = proposals.best(limit)
            if found is None:
                assert proposals.least_cost() > limit
                continue
            network, _ = carry_out_blocks(
                model, found.blocks, lambda count: images[:count], RemovalConfig(fuse="never")
            )
            structure = find_structure(network, images[:2])
            units = SlimPlan(widths=found.widths).units(structure, strict=False)
            if limit > whole:
                assert found.cost == pytest.approx(rmprune.count_macs(network, images[:1])), found.blocks
            assert found.cost == pytest.approx(sum(Meter(structure, macs).at(units))), found.blocks
            assert found.cost <= limit * (1 + 1e-6)


def test_what_widths_lose_is_not_taken_from_notes_on_other_widths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = SlimConfig(prune=PruneConfig(macs_ratio=(0.6,), round_to=1))
    job = Job(config, load_dataset(config.data), torch.device("cpu"), 0)
    model = create("resnet8")
    budget = Budget(macs_ratio=0.6, reference_macs=rmprune.count_macs(model, job.data.train.example(1)))
    shapes, files, measured = look(model, budget, job), Files.of(tmp_path, "auto"), []
    files.note("losses").parent.mkdir()
    files.note("losses").write_text(json.dumps({"keep": {}, "remove": {}}))  # of before, which does not say for what

    def losses(*given: Any) -> dict[str, list[float]]:
        measured.append(given)
        return {group: [0.0] * len(own) for group, own in given[3].items()}

    monkeypatch.setattr(outlook, "ends_of", lambda *_: None)
    monkeypatch.setattr(outlook, "job_scores", lambda *_: {})
    monkeypatch.setattr(outlook, "block_losses", lambda *_: shapes.nothing)
    monkeypatch.setattr(outlook, "width_losses", losses)
    for _ in range(2):
        propose(shapes, job, files)
    assert len(measured) == 2  # kept and removed, once
    sight = shapes.sights["keep"]
    fewer = replace(sight, widths={group: own[1:] for group, own in sight.widths.items()})
    propose(replace(shapes, sights={**shapes.sights, "keep": fewer}), job, files)
    assert len(measured) == 3


@pytest.mark.long
def test_widths_may_go_as_low_as_it_takes_to_keep_or_remove_all_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not only to have some plan: at the floor that is enough for that, here, blocks must be dropped."""
    monkeypatch.setattr(outlook, "LEAST_FRACTION", 1.2)
    config = SlimConfig(prune=PruneConfig(macs_ratio=(0.5,), round_to=1))
    job, model = Job(config, load_dataset(config.data), torch.device("cpu"), 0), create("resnet8")
    whole = rmprune.count_macs(model, job.data.train.example(1))
    found = look(model, Budget(macs_ratio=0.5, reference_macs=whole), job)
    plans = Proposals(found.sights, found.layers, found.nothing)
    for choice in ("keep", "remove"):
        assert plans.best(found.limit, near=dict.fromkeys(found.options, choice), changes=0) is not None
    kept, floor = found.sights["keep"], 1.2 * 0.5**0.5
    assert all(kept.widths[g.name][0] < floor * g.units for g in kept.structure.groups)
    at_first = {g.name: [u for u in kept.widths[g.name] if u >= floor * g.units] for g in kept.structure.groups}
    cost = Meter(kept.structure, macs).at({name: widths[0] for name, widths in at_first.items()})
    assert sum(cost) > found.limit  # so it is the floor that had to go


@pytest.mark.long
def test_blocks_that_read_in_groups_are_not_merged_and_cost_what_is_said() -> None:
    stem, end = (nn.Conv2d(1, 12, 3, padding=1), nn.ReLU()), (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 10))
    model = nn.Sequential(*stem, Grouped(), Grouped(), *end).eval()
    config = SlimConfig(prune=PruneConfig(macs_ratio=(0.6,), round_to=1))
    job = Job(config, load_dataset(config.data), torch.device("cpu"), 0)
    images = job.data.train.example(48)
    whole = rmprune.count_macs(model, images[:1])
    shapes = look(model, Budget(macs_ratio=0.6, reference_macs=whole), job)
    assert "merge" in shapes.nothing["2"]
    plans = Proposals(shapes.sights, shapes.layers, shapes.nothing)
    for choice in ("keep", "merge"):
        found = plans.best(shapes.limit, near={"2": choice, "3": "remove"}, changes=0)
        assert found is not None and found.blocks == {"2": "remove" if choice == "merge" else choice, "3": "remove"}
        network, _ = carry_out_blocks(model, found.blocks, lambda count: images[:count], RemovalConfig(fuse="never"))
        structure = find_structure(network, images[:2])
        units = SlimPlan(widths=found.widths).units(structure, strict=False)
        assert found.cost == pytest.approx(sum(Meter(structure, macs).at(units))) and found.cost <= shapes.limit


@pytest.mark.long
def test_auto_ends_as_well_as_its_presets_and_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auto, "PROPOSED", 2)
    monkeypatch.setattr(auto, "PRESETS", {name: auto.PRESETS[name] for name in ("residual", "uniform", "rm-collapse")})
    prune = PruneConfig(macs_ratio=(0.5,), memory_ratio=(0.7,), round_to=1)
    config = replace(QUICK, method=(), prune=prune, train=TrainConfig(epochs=0), finetune=TrainConfig(epochs=0))
    config = replace(config, search_minutes=0.001)
    config = replace(config, data=replace(config.data, train_images=256))
    (path,) = run_slim(replace(config, out=tmp_path / "run"), command="x")
    record = records.read_record(path)
    found = record["pruned"]
    losses = {name: verdict["loss"] for name, verdict in found["candidates"].items() if "loss" in verdict}
    assert found["chosen"] == min(losses, key=lambda name: losses[name]) and {"residual", "plan-1"} <= set(losses)
    assert found["candidates"]["plan-3"]["why"].startswith(
        f"{min(('residual', 'uniform', 'rm-collapse', 'plan-1', 'plan-2'), key=losses.__getitem__)} with"
    )
    assert found["macs"] <= 0.5 * record["original"]["macs"]
    assert found["activation_bytes"] <= 0.7 * record["original"]["activation_bytes"]
    assert record["budget"] == {"macs_ratio": 0.5, "memory_ratio": 0.7}
    assert set(found["plan"]["blocks"]) <= {"layer1.0", "layer2.0"} and found["plan"]["widths"]
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["plan"] for line in log if "search" in line] == ["plan-1", "plan-2", "plan-3"]  # the third by a change
    left = [line["seconds_left"] for line in log if "search" in line]
    assert left[0] > left[1] == pytest.approx(60 * 0.001, abs=0.05)  # one plan more, and then the changes
    (path.parent / "record.json").unlink()
    shutil.rmtree(tmp_path / "run" / "pruned")
    monkeypatch.setattr(auto, "make_cutter", lambda *_: pytest.fail("judged again"))
    monkeypatch.setattr(slim, "check_budgets", lambda *_: None)  # as the first time
    run_slim(replace(config, out=tmp_path / "run"), command="x")
    again = records.read_record(path)["pruned"]
    assert again["candidates"] == found["candidates"] and again["accuracy"] == found["accuracy"]
    assert again["search"] == found["search"] and found["search"]["seconds"] > 0  # nothing was looked for again


@pytest.mark.parametrize("images", few([144, 100], 144))
def test_so_many_plans_as_validation_images_tell_apart(
    images: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auto, "TOLD_APART", images)
    monkeypatch.setattr(auto, "PRESETS", {name: auto.PRESETS[name] for name in ("residual", "uniform")})
    monkeypatch.setattr(slim, "check_budgets", lambda *_: None)
    if images == 144:
        monkeypatch.setattr(auto, "propose", lambda *_: pytest.fail("what blocks and widths lose is not asked for"))
    prune, none = PruneConfig(macs_ratio=(0.5,), round_to=1), TrainConfig(epochs=0)
    config = replace(QUICK, method=("auto",), prune=prune, train=none, finetune=none, out=tmp_path)
    (path,) = run_slim(config, command="x")
    validation = len(load_dataset(config.data).validation)
    plans = [name for name in records.read_record(path)["pruned"]["candidates"] if name.startswith("plan-")]
    assert validation == 143 and bool(plans) == (images == 100)


@pytest.mark.long
def test_plans_keep_to_the_choices_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "PROPOSED", 1)
    monkeypatch.setattr(auto, "PRESETS", {name: auto.PRESETS[name] for name in ("residual", "rm-collapse")})
    monkeypatch.setattr(slim, "check_budgets", lambda *_: None)
    prune, none = PruneConfig(macs_ratio=(0.5,), round_to=1), TrainConfig(epochs=0)
    config = replace(QUICK, method=("auto",), prune=prune, train=none, finetune=none, search_minutes=0.0)
    config = replace(config, data=replace(config.data, train_images=256), out=tmp_path, choices=("remove", "merge"))
    (path,) = run_slim(config, command="x")
    found = records.read_record(path)["pruned"]
    tried = {name for name, verdict in found["candidates"].items() if "loss" in verdict}
    assert tried == {"rm-collapse", "plan-1"} == found["candidates"].keys()
    blocks = [verdict["blocks"] for name, verdict in found["candidates"].items() if name.startswith("plan-")]
    assert {choice for own in blocks for choice in own.values()} <= {"remove", "merge"}
    pruned = rmprune.load(path.parent / "pruned")
    assert not list(rmprune.plan_removal(pruned, torch.randn(2, 1, 8, 8)))


def test_a_block_that_no_choice_is_left_to_is_refused_with_its_reason_before_training(tmp_path: Path) -> None:
    prune = PruneConfig(macs_ratio=(0.5,))
    config = replace(QUICK, method=("auto",), prune=prune, choices=("fuse", "merge"), out=tmp_path / "no")
    config = replace(config, removal=RemovalConfig(keep=("layer2.0",)))
    with pytest.raises(
        ConfigError, match=r"^block layer2.0 can be none of the choices fuse, merge \(merge: .*; allow keep$"
    ):
        run_slim(config, command="x")
    assert not (tmp_path / "no").exists()
    for wrong, said in (
        ({"choices": ("collapse",)}, "use one of keep, remove, merge, drop, fuse"),
        ({"choices": ("keep",), "method": ("rm",)}, "is for method auto"),
    ):
        with pytest.raises(ConfigError, match=said):
            replace(config, **wrong)


def test_a_search_counts_how_many_changes_in_a_row_were_no_better() -> None:
    changes = ["plan-9", "plan-10", "plan-11"]
    for losses, count in (((0.5, 0.7, 0.8), 2), ((0.7, 0.8, 0.5), 0), ((0.7, 0.8, 0.9), 3)):
        verdicts = {"rm": {"loss": 0.6}, "plan-8": {"refused": "why"}}
        verdicts |= {name: {"loss": loss} for name, loss in zip(changes, losses, strict=True)}
        assert auto._no_better(verdicts, changes) == count


class OfThree:
    """A surrogate of three blocks: at first it knows `few` plans, near others one change after the other."""

    def __init__(self, few: int) -> None:
        self.plans = [dict(zip("abc", own, strict=True)) for own in itertools.product(("keep", "drop"), repeat=3)]
        self.few = few

    def believing(self, _: object) -> "OfThree":
        return self

    def best(self, _: float, *, other_than: list[Any], near: Any = None, changes: int = 1, **__: int) -> Any:
        of_presets = [near] if near else []
        known = of_presets if changes == 0 else self.plans[: self.few] if near is None else self.plans
        off = lambda plan: sum(near[block] != plan[block] for block in plan) if near else 0  # noqa: E731
        found = next((plan for plan in known if plan not in other_than and off(plan) <= changes), None)
        return found and Proposal(found, {}, 0.0, 0.0, {})  # type: ignore[arg-type]


def searched(
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
    few: int,
    losses: dict[str, float],
    stop: str = "",
    presets: bool = False,
) -> Winner:
    """A search in which a plan loses so much, and no preset meets the budget but where `presets` says so; interrupted, and begun
    again, where `stop` is judged."""
    stops = [stop]

    def judged(budget: object, cutter: Any, files: Files) -> None:
        cutter.network = files.label.removeprefix("auto-")
        if cutter.network in stops:
            stops.clear()
            raise KeyboardInterrupt

    def none(*_: object) -> Any:
        raise InfeasibleBudget("too dear")

    made = lambda *_: SimpleNamespace(once=lambda name, _: Named(name), begin=None, network=None)  # noqa: E731
    options = {block: dict.fromkeys(CHOICES) for block in "abc"} if presets else {}
    monkeypatch.setattr(auto, "look", lambda *_: SimpleNamespace(options=options, allowed=options, limit=1.0))
    monkeypatch.setattr(auto, "propose", lambda *_: OfThree(few))
    monkeypatch.setattr(auto, "learned", lambda *_: {})
    monkeypatch.setattr(auto, "carry_out_blocks", lambda *_: (Named("carried out"), {}))
    monkeypatch.setattr(auto, "make_cutter", made)
    monkeypatch.setattr(auto, "_rough", lambda cutter: cutter)
    monkeypatch.setattr(auto, "_cutter", made if presets else none)
    monkeypatch.setattr(auto, "evaluate", lambda *_, **__: SimpleNamespace(loss=0.0))
    monkeypatch.setattr(choose, "met", judged)
    monkeypatch.setattr(choose, "evaluate", lambda named, *_, **__: SimpleNamespace(loss=losses.get(named.name, 1.0)))
    data = SimpleNamespace(validation=range(250), class_weights=None)
    job: Any = Job(SlimConfig(prune=PruneConfig(macs_ratio=(0.5,))), data, torch.device("cpu"), 0)  # type: ignore[arg-type]
    starts = Named if presets else none
    search = partial(auto.choose_plan, Named("original"), starts, Budget(macs_ratio=0.5), job, Files.of(out, "auto"))
    try:
        return search()
    except KeyboardInterrupt:
        return search()


class Named(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name


def test_the_blocks_of_the_best_method_are_tried_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = searched(tmp_path, monkeypatch, 6, {"rm": 0.3, "residual": 0.6}, presets=True)
    tried = [plan["why"] for plan in found.plans.values() if not plan["near"]]
    assert tried == ["the blocks of rm", "the blocks of residual"]  # two, by the number of images


def test_an_interrupted_search_is_the_same_as_one_that_was_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = {"plan-2": 0.5, "plan-6": 0.4}
    whole = searched(tmp_path / "whole", monkeypatch, 6, losses)
    assert sum("surrogate" in plan["why"] for plan in whole.plans.values()) == 6  # 2 by the images, 8 without a preset
    for stop in whole.plans:
        again = searched(tmp_path / stop, monkeypatch, 6, losses, stop)
        assert (again.plans, again.verdicts, again.name) == (whole.plans, whole.verdicts, "plan-6")


def test_changes_are_counted_from_the_first_however_few_plans_were_proposed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = searched(tmp_path, monkeypatch, 1, {"plan-1": 0.5})
    assert [plan["near"] for plan in found.plans.values()] == [None, "plan-1", "plan-1", "plan-1"]  # all its neighbours
    monkeypatch.setattr(auto, "WORSE", 2)
    assert len(searched(tmp_path / "fewer", monkeypatch, 1, {"plan-1": 0.5}).plans) == 3


@pytest.mark.long
def test_a_plan_goes_on_where_no_preset_meets_the_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "PROPOSED", 2)
    monkeypatch.setattr(auto, "PRESETS", {"residual": auto.PRESETS["residual"]})
    prune = PruneConfig(macs_ratio=(0.12,), round_to=1, min_fraction=0.5)  # half of every width is 0.27 of the MACs
    config = replace(QUICK, method=("auto",), prune=prune, train=TrainConfig(epochs=0), finetune=TrainConfig(epochs=0))
    monkeypatch.setattr(auto, "WORSE", 1)
    monkeypatch.setattr(slim, "check_budgets", lambda *_: None)
    config = replace(config, model="resnet8", data=replace(config.data, train_images=256))
    (path,) = run_slim(replace(config, out=tmp_path / "run"), command="x")
    found = records.read_record(path)["pruned"]
    *better, last = (verdict["loss"] for name, verdict in found["candidates"].items() if name.startswith("plan-"))
    assert (
        len(better) >= 2 and last >= min(better) and better[2:] == sorted(better[2:], reverse=True)
    )  # then it gave up
    assert found["chosen"].startswith("plan-") and set(found["plan"]["blocks"].values()) != {"keep"}
    assert (
        "refused" in found["candidates"]["residual"]
        and found["macs"] <= 0.12 * records.read_record(path)["original"]["macs"]
    )


def test_a_budget_that_no_plan_meets_is_refused_with_the_least(tmp_path: Path) -> None:
    prune = PruneConfig(macs_ratio=(0.001,), round_to=1)
    with pytest.raises(
        InfeasibleBudget, match=r"macs_ratio 0.001 cannot be met by any plan.*least .* about 0\.0"
    ) as refused:
        run_slim(replace(QUICK, method=("auto",), prune=prune, out=tmp_path / "no"), command="x")
    assert "\n" not in str(refused.value) and not (tmp_path / "no").exists()


@pytest.mark.parametrize("budget", few(["macs_ratio", "latency_ratio"], "macs_ratio"))
def test_attention_is_refused_before_anything_is_trained(budget: str, tmp_path: Path) -> None:
    batches = [(torch.randn(8, 1, 8, 8), torch.arange(8))]
    with pytest.raises(
        UnsupportedModel, match=r"^norm: fitting layers cannot .*; auto weighs widths by fits: use another"
    ):
        rmprune.slim(Tokens().eval(), batches, batches, method="auto", out=tmp_path / "no", **{budget: 0.8})  # type: ignore[arg-type]
    assert not (tmp_path / "no").exists()


@pytest.mark.long
def test_a_budget_in_time_is_divided_up_by_the_table_of_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made_up = lambda table, layers: [1e-2 + 1e-3 + 1e-5 * layer.cin * layer.cout for layer in layers]  # noqa: E731
    monkeypatch.setattr(LatencyModel, "_measure", made_up)
    config = SlimConfig(prune=PruneConfig(latency_ratio=(0.5,), round_to=1), out=tmp_path)
    job = Job(config, load_dataset(config.data), torch.device("cpu"), 0, teacher=create("resnet8"))
    networks = outlook._networks(job.original, job)
    monkeypatch.setattr(outlook, "_networks", lambda *_: networks)  # made once
    sights = look(job.original, Budget(latency_ratio=0.5), job)
    losses = {block: {choice: float(choice != "keep") for choice in own} for block, own in sights.nothing.items()}
    found = Proposals(sights.sights, sights.layers, losses).best(sights.limit)
    assert found is not None and found.cost <= sights.limit * (1 + 1e-6)
    assert 0 < found.loss <= 3 and "keep" in found.blocks.values()  # each layer has a time that no width saves
    with pytest.raises(InfeasibleBudget, match=r"latency_ratio 0.01 cannot be met by any plan.*least .* about 0\.\d"):
        look(job.original, Budget(latency_ratio=0.01), job)


@pytest.mark.long
def test_auto_meets_a_budget_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Times are made up: a layer takes as long as it has weights, a network as long as it has parameters."""
    monkeypatch.setattr(LatencyModel, "_measure", lambda _, layers: [1e-3 * layer.cin * layer.cout for layer in layers])
    monkeypatch.setattr(Place, "ratios", by_parameters)
    monkeypatch.setattr(stages, "create_network", lambda *_, **__: inverted())
    monkeypatch.setattr(auto, "PROPOSED", 2)
    searches: list[tuple[list[float], float]] = []

    def noted(*given: Any) -> float:
        searches.append((list(given[5]), given[6]))
        return find_ratio(*given)

    monkeypatch.setattr(cutter, "find_ratio", noted)
    monkeypatch.setattr(slim, "check_budgets", lambda *_: None)
    monkeypatch.setattr(auto, "PRESETS", {"rm-v1": auto.PRESETS["rm-v1"]})
    monkeypatch.setitem(METHODS, "auto", METHODS["auto"]._replace(candidates=("rm-v1",)))
    prune, none = PruneConfig(latency_ratio=(0.5,), round_to=1), TrainConfig(epochs=0)
    config = replace(QUICK, method=("auto",), prune=prune, train=none, finetune=none, search_minutes=0.0, out=tmp_path)
    found = records.read_record(run_slim(config, command="x")[0])
    assert found["pruned"]["params"] <= 0.5 * found["original"]["params"]
    tried = found["pruned"]["candidates"]
    assert all("loss" in tried[name] for name in ("rm-v1", "plan-1")) and found["pruned"]["plan"]["blocks"].keys() == {
        "3",
        "4",
    }
    assert found["pruned"]["plan"]["fuse"] == ("always" if found["pruned"]["chosen"] == "rm-v1" else "cheaper")
    preset, first, second, anew = searches  # the first plan is looked for below its widths, the second by the first
    assert preset[0] == [] and [near for _, near in searches] == [auto.ROUGH] * 3 + [NEAR]
    assert [share / first[0][0] for share in first[0]] == pytest.approx(cutter.BELOW)
    assert 0 < tried["plan-1"]["of_widths"] <= 1 + 1e-6
    assert [share / second[0][0] for share in second[0]] == pytest.approx(auto.AROUND)
    assert [share / anew[0][0] for share in anew[0]] == pytest.approx(
        [1.0, NEAR / auto.ROUGH]
    )  # and what goes on, by itself
