"""The agent alone: it must learn a small problem, keep its noise inside the bounds, and go on exactly after a stop."""

import math

import pytest
import torch

from rmprune.amc.agent import Agent, AgentConfig, Replay, Step, truncated_normal

TARGETS = tuple(0.5 + 0.4 * math.sin(2 * math.pi * index / 10) for index in range(10))
SMALL = AgentConfig(hidden=64, warm_up=15)


def play(agent: Agent, *, explore: bool = True) -> tuple[list[Step], float]:
    """Ten steps; the reward is 1 less the mean squared distance to targets that only the step's number tells apart."""
    steps: list[Step] = []
    action = 0.0
    for index in range(len(TARGETS)):
        state = (index / len(TARGETS), action)
        action = agent.act(state, explore=explore)
        last = index + 1 == len(TARGETS)
        steps.append(Step(state, action, ((index + 1) / len(TARGETS), action), last))
    error = sum((step.action - target) ** 2 for step, target in zip(steps, TARGETS, strict=True)) / len(TARGETS)
    return steps, 1 - error


def search(agent: Agent, episodes: int) -> list[float]:
    rewards = []
    for _ in range(episodes):
        steps, reward = play(agent)
        agent.learn(steps, reward)
        rewards.append(reward)
    return rewards


@pytest.mark.long
@pytest.mark.parametrize("seed", [0, 1])
def test_beats_random_search_of_the_same_length(seed: int) -> None:
    agent = Agent(2, SMALL, seed=seed)
    rewards = search(agent, 80)
    random_rewards = search(Agent(2, AgentConfig(hidden=8, warm_up=1000), seed=seed + 10), 80)
    mean_random, mean_last = sum(random_rewards) / 80, sum(rewards[-10:]) / 10
    assert mean_last > mean_random + 0.08
    assert max(rewards) > max(random_rewards)
    assert play(agent, explore=False)[1] > 0.93  # random policies: 0.84 on average


def test_noise_decays_after_the_warm_up_only() -> None:
    agent = Agent(2, SMALL, seed=0)
    assert agent.sigma == 0.5
    search(agent, 15)
    assert agent.sigma == 0.5
    search(agent, 2)
    assert agent.sigma == pytest.approx(0.5 * 0.95**2)


def test_actions_respect_the_bounds_even_where_the_actor_is_outside() -> None:
    agent = Agent(2, AgentConfig(hidden=8, warm_up=0), seed=0)
    actions = [agent.act((0.0, 0.0), 0.8, 0.9) for _ in range(50)]
    assert all(0.8 <= action <= 0.9 for action in actions)
    assert agent.act((0.0, 0.0), 0.8, 0.9, explore=False) == 0.8  # the fresh actor says about 0.5
    assert agent.act((0.0, 0.0), 0.3, 0.3) == 0.3


def test_truncated_normal_has_the_right_spread() -> None:
    generator = torch.Generator().manual_seed(0)
    draws = torch.tensor([truncated_normal(0.5, 0.1, 0.0, 1.0, generator) for _ in range(2000)])
    assert draws.mean().item() == pytest.approx(0.5, abs=0.01)
    assert draws.std().item() == pytest.approx(0.1, abs=0.01)
    wide = torch.tensor([truncated_normal(0.5, 50.0, 0.0, 1.0, generator) for _ in range(2000)])
    assert wide.std().item() == pytest.approx(12**-0.5, abs=0.02)  # nearly uniform, not piled up at the bounds


def test_replay_is_a_ring_and_holds_what_it_was_given() -> None:
    replay = Replay(3, states=1)
    for index in range(5):
        replay.add(torch.tensor([float(index)]), index / 10, 1.0, torch.tensor([index + 1.0]), index == 4)
    assert len(replay) == 3
    states, actions, rewards, following, last = replay.sample(64, torch.Generator().manual_seed(0))
    assert set(states[:, 0].tolist()) == {2.0, 3.0, 4.0}
    torch.testing.assert_close(actions, states / 10)
    torch.testing.assert_close(following, states + 1)
    torch.testing.assert_close(last, (states == 4).float())
    assert (rewards == 1).all()


def test_goes_on_exactly_from_its_state() -> None:
    whole = Agent(2, SMALL, seed=3)
    expected = search(whole, 24)
    first = Agent(2, SMALL, seed=3)
    rewards = search(first, 17)
    second = Agent(2, SMALL, seed=99)
    second.load_state_dict(first.state_dict())
    assert rewards + search(second, 7) == expected


def test_the_callers_random_state_is_left_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    search(Agent(2, AgentConfig(hidden=8, warm_up=1), seed=0), 3)
    assert torch.equal(torch.get_rng_state(), before)
