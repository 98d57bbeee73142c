"""The agent of AMC: deep deterministic policy gradient (DDPG) for one action in [0, 1]. It knows nothing about networks to prune.

Read from top to bottom: settings, networks, replay, agent. After "AMC: AutoML for Model Compression" (He et al. 2018,
section 3 and appendix): every transition of an episode carries the episode's reward R, and the critic learns
y = R - b + Q'(s', mu'(s')) with discount 1 and a moving-average baseline b; behind the last layer there is no next Q.
R - b is in units of the rewards' standard deviation during the warm-up, so that a narrow range of accuracies still teaches.
Unlike the public code the replay holds the action that was executed, i.e. after the environment's rounding and clipping.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class AgentConfig:
    """Settings of the agent; the defaults are AMC's unless said otherwise."""

    hidden: int = 300  # width of both hidden layers, in actor and critic
    actor_rate: float = 3e-4  # Adam's step of the actor (AMC: 1e-4 over 800 episodes)
    critic_rate: float = 1e-3  # Adam's step of the critic
    tau: float = 0.01  # how far the target networks follow at each update
    discount: float = 1.0
    batch: int = 64  # transitions of one update
    replay: int = 2000  # transitions kept
    sigma: float = 0.5  # exploration noise until the end of the warm-up
    sigma_decay: float = 0.95  # factor of sigma for every episode after the warm-up
    warm_up: int = 25  # episodes of random policies before the first update (AMC: 100)
    baseline_rate: float = 0.05  # of the moving average that is subtracted from rewards


def actor_network(states: int, hidden: int) -> nn.Sequential:
    """(N, states) -> (N, 1) in [0, 1]."""
    return nn.Sequential(
        nn.Linear(states, hidden),
        nn.ReLU(),
        nn.Linear(hidden, hidden),
        nn.ReLU(),
        _small(nn.Linear(hidden, 1)),
        nn.Sigmoid(),
    )


class Critic(nn.Module):
    """(N, states), (N, 1) -> (N, 1): the expected return; the action joins in the first hidden layer, as in AMC."""

    def __init__(self, states: int, hidden: int) -> None:
        super().__init__()
        self.of_state, self.of_action = nn.Linear(states, hidden), nn.Linear(1, hidden)
        self.rest = nn.Sequential(nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), _small(nn.Linear(hidden, 1)))

    def forward(self, state: Tensor, action: Tensor) -> Tensor:
        return self.rest(self.of_state(state) + self.of_action(action))


def _small(linear: nn.Linear) -> nn.Linear:
    """DDPG's initialisation of output layers, so that the first outputs are near 0 (0.5 behind the sigmoid)."""
    nn.init.uniform_(linear.weight, -3e-3, 3e-3)
    nn.init.zeros_(linear.bias)
    return linear


class Replay:
    """A ring of transitions (state, executed action, reward, next state, last)."""

    def __init__(self, capacity: int, states: int) -> None:
        self.rows = torch.zeros(capacity, 2 * states + 3)
        self.states, self.seen = states, 0

    def __len__(self) -> int:
        return min(self.seen, len(self.rows))

    def add(self, state: Tensor, action: float, reward: float, following: Tensor, last: bool) -> None:
        """Keep one transition: state and following state [features], action and reward as numbers; the oldest goes when it is full."""
        self.rows[self.seen % len(self.rows)] = torch.cat(
            [state, following, torch.tensor([action, reward, float(last)])]
        )
        self.seen += 1

    def sample(self, count: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        """States (count, S), actions, rewards, next states (count, S), last: (count, 1) where nothing is said."""
        rows = self.rows[torch.randint(len(self), (count,), generator=generator)]
        states, following, rest = rows.split([self.states, self.states, 3], dim=1)
        action, reward, last = rest.split(1, dim=1)
        return states, action, reward, following, last


def truncated_normal(mean: float, sigma: float, low: float, high: float, generator: torch.Generator) -> float:
    """One draw of N(m, sigma²) conditioned on [low, high], by the inverse of the distribution function; m: the value in [low, high] that is
    nearest to `mean`."""
    mean = min(max(mean, low), high)
    if sigma <= 0 or high <= low:
        return mean
    below, above = (0.5 * (1 + math.erf((bound - mean) / (sigma * math.sqrt(2)))) for bound in (low, high))
    uniform = torch.rand((), generator=generator, dtype=torch.float64).item()
    quantile = torch.tensor(2 * (below + uniform * (above - below)) - 1, dtype=torch.float64)
    return min(max(mean + sigma * math.sqrt(2) * torch.erfinv(quantile).item(), low), high)


@dataclass(frozen=True)
class Step:
    """One decision: what the agent saw, the action that was executed, and what it saw next (unused where `last`)."""

    state: Sequence[float]
    action: float
    following: Sequence[float]
    last: bool


class Agent:
    """DDPG over episodes. Deterministic by `seed`; runs on the CPU (the networks are tiny).

    A search calls `act` for each layer, `learn` with the episode's steps and reward, and stores `state_dict` to go on later.
    States are standardised with the mean and variance seen during the warm-up.
    """

    def __init__(self, states: int, config: AgentConfig, *, seed: int) -> None:
        self.config = config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.actor, self.critic = actor_network(states, config.hidden), Critic(states, config.hidden)
            self.target_actor, self.target_critic = actor_network(states, config.hidden), Critic(states, config.hidden)
        self.target_actor.load_state_dict(self.actor.state_dict())
        self.target_critic.load_state_dict(self.critic.state_dict())
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), lr=config.actor_rate, fused=True)
        self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), lr=config.critic_rate, fused=True)
        self.replay = Replay(config.replay, states)
        self.generator = torch.Generator().manual_seed(seed)
        self.mean, self.variance, self.spread = torch.zeros(states), torch.ones(states), 1.0
        self.baseline: float | None = None
        self.episode = 0

    @property
    def warming_up(self) -> bool:
        """Whether the replay is still being filled with random policies."""
        return self.episode < self.config.warm_up

    @property
    def sigma(self) -> float:
        """Standard deviation of the exploration in this episode."""
        return self.config.sigma * self.config.sigma_decay ** max(0, self.episode - self.config.warm_up)

    @torch.no_grad()
    def act(self, state: Sequence[float], low: float = 0.0, high: float = 1.0, *, explore: bool = True) -> float:
        """The action for `state` within [low, high]: uniform during the warm-up, then the actor's plus truncated noise."""
        if explore and self.warming_up:
            return low + (high - low) * torch.rand((), generator=self.generator).item()
        mean = float(self.actor(self._standardise(torch.tensor([list(state)])))[0, 0])
        return truncated_normal(mean, self.sigma if explore else 0.0, low, high, self.generator)

    def learn(self, steps: Sequence[Step], reward: float) -> None:
        """Store an episode; after the warm-up update the networks once for every step of it."""
        for step in steps:
            self.replay.add(torch.tensor(step.state), step.action, reward, torch.tensor(step.following), step.last)
        self.episode += 1
        if self.warming_up:
            return
        if self.episode == max(1, self.config.warm_up):
            self._measure_scales()
        for _ in steps:
            self._update()

    def _measure_scales(self) -> None:
        rows = self.replay.rows[: len(self.replay)]
        states, rewards = rows[:, : self.replay.states], rows[:, -2]
        self.mean, self.variance = states.mean(0), states.var(0, correction=0)
        self.spread = max(rewards.std(correction=0).item(), 1e-3)

    def _standardise(self, states: Tensor) -> Tensor:
        return (states - self.mean) / (self.variance + 1e-4).sqrt()

    def _update(self) -> None:
        """One step of critic and actor on a batch, then the targets follow."""
        states, actions, rewards, following, last = self.replay.sample(self.config.batch, self.generator)
        states, following = self._standardise(states), self._standardise(following)
        seen, rate = rewards.mean().item(), self.config.baseline_rate
        self.baseline = seen if self.baseline is None else (1 - rate) * self.baseline + rate * seen
        with torch.no_grad():
            future = self.target_critic(following, self.target_actor(following))
            wanted = (rewards - self.baseline) / self.spread + self.config.discount * (1 - last) * future
        self.critic_optimizer.zero_grad()
        F.mse_loss(self.critic(states, actions), wanted).backward()
        self.critic_optimizer.step()
        gain = self.critic(states, self.actor(states)).mean()
        weights = list(self.actor.parameters())  # the critic's own gradients are not needed here
        for weight, gradient in zip(weights, torch.autograd.grad(-gain, weights), strict=True):
            weight.grad = gradient
        self.actor_optimizer.step()
        with torch.no_grad():
            for target, source in ((self.target_actor, self.actor), (self.target_critic, self.critic)):
                for slow, fast in zip(target.parameters(), source.parameters(), strict=True):
                    slow.lerp_(fast, self.config.tau)

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that the next episode depends on, as tensors by name (safetensors can hold it)."""
        found = {
            "mean": self.mean,
            "variance": self.variance,
            "replay": self.replay.rows,
            "random": self.generator.get_state(),
            "spread": torch.tensor(self.spread, dtype=torch.float64),
            "counters": torch.tensor([self.replay.seen, self.episode]),
            "baseline": torch.tensor(np.nan if self.baseline is None else self.baseline, dtype=torch.float64),
        }
        for name, network in self._networks().items():
            found |= {f"{name}.{key}": value for key, value in network.state_dict().items()}
        for name, optimizer in self._optimizers().items():
            for index, moments in optimizer.state_dict()["state"].items():
                found |= {f"{name}.{index}.{key}": value for key, value in moments.items()}
        return {name: tensor.detach().clone() for name, tensor in found.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from `state_dict`; the agent then acts as if it had never stopped."""
        self.mean, self.variance = state["mean"].clone(), state["variance"].clone()
        self.spread = state["spread"].item()
        self.replay.rows = state["replay"].clone()
        self.generator.set_state(state["random"])
        self.replay.seen, self.episode = (int(count) for count in state["counters"])
        baseline = state["baseline"].item()
        self.baseline = None if math.isnan(baseline) else baseline
        for name, network in self._networks().items():
            network.load_state_dict({key: state[f"{name}.{key}"] for key in network.state_dict()})
        for name, optimizer in self._optimizers().items():
            saved = optimizer.state_dict()
            moments: dict[int, dict[str, Tensor]] = {}
            for key, value in state.items():
                if key.startswith(f"{name}."):
                    index, field = key.removeprefix(f"{name}.").split(".")
                    moments.setdefault(int(index), {})[field] = value.clone()
            optimizer.load_state_dict({**saved, "state": moments})

    def _networks(self) -> dict[str, nn.Module]:
        return {name: getattr(self, name) for name in ("actor", "critic", "target_actor", "target_critic")}

    def _optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {"actor_optimizer": self.actor_optimizer, "critic_optimizer": self.critic_optimizer}
