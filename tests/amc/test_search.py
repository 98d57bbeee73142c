"""The search: what the replay holds, exact resumption, one validation split, and an agent that beats its controls."""

import functools
import itertools
import json
import signal
from pathlib import Path

import pytest
import torch
from marks import few
from torch import nn

from rmprune.amc.agent import AgentConfig
from rmprune.amc.environment import FEATURES, Environment
from rmprune.amc.search import LOG_FILE, STATE_FILE, Search, SearchResult
from rmprune.amc.space import Limits, Space, Widths
from rmprune.errors import ArtifactError, ConfigError
from rmprune.pruning.find_groups import find_structure
from rmprune.pruning.groups import Structure
from rmprune.pruning.layers import macs

SMALL = AgentConfig(hidden=32, warm_up=6, batch=16)


def chain(groups: int = 6, units: int = 32) -> Structure:
    """A chain of 1x1 convolutions."""
    widths = [3, *[units] * groups, 10]
    model = nn.Sequential(*[nn.Conv2d(a, b, 1) for a, b in itertools.pairwise(widths)])
    return find_structure(model, torch.zeros(1, 3, 4, 4))


IDEAL = (0.9, 0.3, 0.8, 0.2, 0.7, 0.4)


def environment(ratio: float = 0.35, score=None) -> Environment:  # type: ignore[no-untyped-def]
    """Widths near IDEAL score best."""
    structure = chain()
    whole = sum(macs(layer, layer.cin, layer.cout) for layer in structure.layers)
    space = Space(structure, macs, ratio * whole, Limits(lowest=0.1, multiple=2))

    def near(widths: Widths) -> float:
        return 1 - sum((w / 32 - i) ** 2 for w, i in zip(widths, IDEAL, strict=True)) / len(IDEAL)

    return Environment(space, score or near)


def search(**kwargs) -> Search:  # type: ignore[no-untyped-def]
    env = kwargs.pop("environment", None) or environment()
    return Search(env, **{"episodes": 20, "seed": 0, "agent": SMALL, **kwargs})


@functools.cache
def undisturbed() -> SearchResult:
    return search().run()


def test_every_episode_is_inside_the_budget() -> None:
    env = environment()
    for method in ("agent", "random", "uniform"):
        result = search(environment=env, method=method).run()
        assert len(result.episodes) == (1 if method == "uniform" else 20)
        assert all(episode.cost <= env.space.budget for episode in result.episodes)
        assert all(env.space.cost(episode.widths) == episode.cost for episode in result.episodes)


def test_the_replay_holds_executed_actions_and_the_next_layers_states() -> None:
    found = search(environment=environment(ratio=0.1))
    result = found.run()
    states, count = len(FEATURES), len(IDEAL)
    rows = found.agent.replay.rows[: len(found.agent.replay)]
    assert len(rows) == 20 * count
    for number, episode in enumerate(result.episodes):
        mine = rows[number * count : (number + 1) * count]
        executed = torch.tensor([width / 32 for width in episode.widths])
        torch.testing.assert_close(mine[:, 2 * states], executed)
        torch.testing.assert_close(mine[:, 2 * states + 1], torch.full((count,), episode.reward))
        assert mine[:, 2 * states + 2].tolist() == [0] * (count - 1) + [1]
        torch.testing.assert_close(mine[:-1, states : 2 * states], mine[1:, :states])
        last_action = FEATURES.index("last_action")
        torch.testing.assert_close(mine[:-1, states + last_action], executed[:-1])


def test_the_agent_beats_random_search_and_uniform_widths() -> None:
    env = environment()
    config = AgentConfig(hidden=64, warm_up=15)
    best = {
        method: Search(env, method=method, episodes=70, seed=1, agent=config).run().best.reward  # type: ignore[arg-type]
        for method in ("agent", "random", "uniform")
    }
    assert best["agent"] > best["random"] > best["uniform"]


@pytest.mark.long
def test_sources_say_where_a_policy_came_from() -> None:
    result = undisturbed()
    sources = [episode.source for episode in result.episodes]
    assert sources[:6] == ["warm-up"] * 6
    assert {"agent", "refined"} == set(sources[6:])
    assert {episode.source for episode in search(refine=0.0).run().episodes[6:]} == {"agent"}
    assert all((episode.sigma > 0) == (episode.source == "agent") for episode in result.episodes)


@pytest.mark.long
def test_same_seed_same_search_other_seed_another() -> None:
    runs = [undisturbed(), *(search(seed=seed).run() for seed in (0, 1))]
    policies = [[episode.widths for episode in run.episodes] for run in runs]
    assert policies[0] == policies[1] != policies[2]


class Stop(Exception):
    pass


@pytest.mark.parametrize("stop_after", few([3, 11], 11))
def test_goes_on_exactly_where_it_was(tmp_path: Path, stop_after: int) -> None:
    expected = undisturbed()

    def watch(result) -> None:  # type: ignore[no-untyped-def]
        if len(result.episodes) == stop_after:
            raise Stop

    with pytest.raises(Stop):
        search(directory=tmp_path).run(watch)
    again = search(directory=tmp_path)
    assert len(again.result.episodes) == stop_after
    result = again.run()
    assert [e.widths for e in result.episodes] == [e.widths for e in expected.episodes]
    assert [e.reward for e in result.episodes] == [e.reward for e in expected.episodes]
    lines = [json.loads(line) for line in (tmp_path / LOG_FILE).read_text().splitlines()]
    assert [tuple(line["widths"]) for line in lines] == [e.widths for e in expected.episodes]
    assert [line["episode"] for line in lines] == list(range(20))
    assert not list(tmp_path.glob(".*partial"))


@pytest.mark.long
@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_within_an_episode_changes_nothing(tmp_path: Path, times: int) -> None:
    """The first waits until it is whole, the second leaves the state before it."""
    scored: list[Widths] = []

    def score(widths: Widths) -> float:
        scored.append(widths)
        if len(scored) == 9:
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)
        return 1 - sum((w / 32 - i) ** 2 for w, i in zip(widths, IDEAL, strict=True)) / len(IDEAL)

    usual = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    with pytest.raises(KeyboardInterrupt):
        search(environment=environment(score=score), directory=tmp_path, save_seconds=0.0).run()
    signal.signal(signal.SIGINT, usual)
    again = search(directory=tmp_path)
    assert len(again.result.episodes) == 10 - times
    assert [e.widths for e in again.run().episodes] == [e.widths for e in undisturbed().episodes]


def test_lines_of_episodes_that_were_not_saved_are_dropped(tmp_path: Path) -> None:
    """Killed between two saves: the log is ahead of the state."""
    search(directory=tmp_path, episodes=4).run()
    with (tmp_path / LOG_FILE).open("a") as log:
        log.write('{"episode": 4, "half a li')
    longer = search(directory=tmp_path, episodes=8)
    assert len((tmp_path / LOG_FILE).read_text().splitlines()) == 4
    assert [e.widths for e in longer.run().episodes] == [e.widths for e in search(episodes=8).run().episodes]


def test_a_state_of_another_search_is_refused(tmp_path: Path) -> None:
    search(directory=tmp_path, identity={"network": "a"}, episodes=2).run()
    for other in ({"identity": {"network": "b"}}, {"identity": {"network": "a"}, "seed": 5}):
        with pytest.raises(ArtifactError, match="another network or with other settings"):
            search(directory=tmp_path, **other)
    path = tmp_path / STATE_FILE
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ArtifactError, match="damaged"):
        search(directory=tmp_path, identity={"network": "a"})


def test_no_policy_is_scored_twice() -> None:
    seen: list[Widths] = []

    def score(widths: Widths) -> float:
        seen.append(widths)
        return 0.5

    structure = chain(groups=1, units=8)
    space = Space(structure, macs, 1e9, Limits(multiple=4))
    result = Search(Environment(space, score), episodes=15, seed=0, agent=SMALL).run()
    assert len(result.episodes) == 15
    assert len(seen) == len(set(seen)) <= 2


def test_the_first_episode_is_the_uniform_policy() -> None:
    env = environment()
    for method in ("agent", "random"):
        assert search(environment=env, method=method).run().episodes[0].widths == env.space.uniform()


def test_unknown_methods_and_empty_searches_are_refused() -> None:
    with pytest.raises(ConfigError, match="uniform"):
        search(method="evolution")
    with pytest.raises(ConfigError, match="episodes"):
        search(episodes=0)


def test_a_search_without_warm_up_runs() -> None:
    assert len(search(agent=AgentConfig(hidden=8, warm_up=0), refine=1.0, episodes=5).run().episodes) == 5
