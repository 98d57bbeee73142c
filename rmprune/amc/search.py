"""The search: episodes of an agent or of a control over one environment; resumable, logged, deterministic. It trains no network.

Files in the search's directory: `search.safetensors`, written whole or not at all (the agent's tensors, and in its header, as
JSON, the episodes and the scored policies), and `episodes.jsonl`, one line an episode, rewritten to fit when a search goes on.
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rmprune.amc.agent import Agent, AgentConfig, Step, truncated_normal
from rmprune.amc.environment import FEATURES, Environment
from rmprune.amc.space import Widths
from rmprune.errors import ArtifactError, ConfigError
from rmprune.runs.writing import append_line, whole, write_text
from rmprune.training.interrupt import DeferredInterrupt

SearchMethod = Literal["agent", "random", "uniform"]
SEARCHES: dict[str, str] = {
    "agent": "DDPG, after a warm-up of random policies; a share of its episodes varies the best policy",
    "random": "random policies only, each scaled to use up the budget",
    "uniform": "the one policy with the same kept fraction everywhere",
}
STATE_FILE, LOG_FILE = "search.safetensors", "episodes.jsonl"
_VARIED_SHARE = 0.3  # of the layers change when the best policy is varied, by a deviation between these:
_LEAST_VARIATION, _MOST_VARIATION = 0.05, 0.2
_TRIES = 5  # to find a variation that was not scored before
_FORMAT = "rmprune amc search 1"


@dataclass(frozen=True)
class Episode:
    """One policy that was tried; `cost` in the unit of the budget. `source`: warm-up (random), agent (its own action),
    refined (the best so far, varied), random or uniform."""

    episode: int
    source: str
    widths: Widths
    reward: float
    accuracy: float
    cost: float
    sigma: float
    seconds: float


@dataclass
class SearchResult:
    """All episodes in order. `best` is the earliest with the highest reward."""

    method: str
    episodes: list[Episode] = field(default_factory=list)

    @property
    def best(self) -> Episode:
        """The episode of the largest reward; of equal ones the first."""
        return max(self.episodes, key=lambda episode: (episode.reward, -episode.episode))

    @property
    def seconds(self) -> float:
        """Time of all episodes, without pauses between interrupted parts."""
        return sum(episode.seconds for episode in self.episodes)


Watcher = Callable[[SearchResult], None]


class Search:
    """A search in progress. `run` goes on to the end; a search of the same settings and directory goes on where it was.

    refine: share of the agent's episodes after the warm-up that vary the best policy so far; their transitions go into
    the replay as all others do. directory: where its files are kept (None: nowhere, nothing is resumed). identity: what
    the result depends on besides these settings (network, data, budget ...), any JSON; a state of another is refused.
    """

    def __init__(
        self, environment: Environment, *, method: SearchMethod = "agent", episodes: int, seed: int,
        agent: AgentConfig | None = None, refine: float = 0.5, directory: Path | None = None, identity: Any = None,
        save_seconds: float = 10.0,
    ) -> None:  # fmt: skip
        if method not in SEARCHES:
            raise ConfigError(f"search method {method!r} is unknown; there are: {', '.join(SEARCHES)}")
        if episodes < 1:
            raise ConfigError(f"episodes is {episodes}; it must be at least 1")
        self.environment, self.method, self.directory, self.save_seconds = environment, method, directory, save_seconds
        self.refine = refine
        self.total = 1 if method == "uniform" else episodes
        agent = agent or AgentConfig()
        self.identity = json.loads(json.dumps([method, seed, asdict(agent), refine, environment.kind, identity]))
        self.agent = Agent(len(FEATURES), agent, seed=seed)
        self.generator = torch.Generator().manual_seed(seed)  # of random policies
        self.result = SearchResult(method)
        self.scored: dict[Widths, float] = {}
        if directory is not None:
            directory.mkdir(parents=True, exist_ok=True)
            self._load(directory / STATE_FILE)
            self._rewrite_log(directory / LOG_FILE)

    def run(self, watch: Watcher | None = None) -> SearchResult:
        """Play the episodes that are left. `watch` is called after each. State is saved at the end and when interrupted, for which
        Ctrl-C waits until an episode is whole."""
        saved_at, complete = time.monotonic(), True
        try:
            with DeferredInterrupt() as interrupt:
                while len(self.result.episodes) < self.total:
                    complete = False
                    self._play()
                    complete = True
                    if watch is not None:
                        watch(self.result)
                    if interrupt.requested:
                        raise KeyboardInterrupt
                    if time.monotonic() - saved_at > self.save_seconds:
                        self.save()
                        saved_at = time.monotonic()
        finally:
            if complete:  # of a part of an episode the state before it stands
                self.save()
        return self.result

    def _play(self) -> None:
        """One episode: a policy through the environment, its score, and what the agent learns from it."""
        started, sigma = time.perf_counter(), self.agent.sigma
        plan = self._planned()
        self._walk(plan)
        widths = self.environment.completed()
        steps = self._walk(self.environment.space.fractions(widths))
        widths = self.environment.widths  # the same again, unless a cost falls where a layer grows
        if widths not in self.scored:
            self.scored[widths] = self.environment.score(widths)
        accuracy = self.scored[widths]
        reward = self.environment.reward(accuracy, widths)
        source: str = self.method
        if self.method == "agent":
            source = "agent" if plan is None else "warm-up" if self.agent.warming_up else "refined"
            self.agent.learn(steps, reward)
        cost, seconds = self.environment.space.cost(widths), time.perf_counter() - started
        number = len(self.result.episodes)
        episode = Episode(number, source, widths, reward, accuracy, cost, sigma if plan is None else 0.0, seconds)
        self.result.episodes.append(episode)
        if self.directory is not None:
            append_line(self.directory / LOG_FILE, json.dumps(asdict(episode)))

    def _walk(self, plan: tuple[float, ...] | None) -> list[Step]:
        """Through the environment once, by a plan or by the agent's actions; what was executed."""
        steps: list[Step] = []
        state, done = self.environment.reset(), False
        while not done:
            wanted = self.agent.act(state, *self.environment.bounds()) if plan is None else plan[len(steps)]
            outcome = self.environment.step(wanted)
            steps.append(Step(state, outcome.action, outcome.state, outcome.done))
            state, done = outcome.state, outcome.done
        return steps

    def _planned(self) -> tuple[float, ...] | None:
        """The fractions of an episode that no actor chooses; None where the agent does."""
        space = self.environment.space
        if self.method == "uniform":
            return space.fractions(space.uniform())
        if self.method == "random" or self.agent.warming_up:
            first = not self.result.episodes  # begin with the policy that everybody would try
            return space.fractions(space.uniform() if first else space.random(self.generator))
        if self.result.episodes and torch.rand((), generator=self.generator).item() < self.refine:
            return space.fractions(self._varied(self.result.best.widths))
        return None

    def _varied(self, widths: Widths) -> Widths:
        """The best policy so far with some of its layers changed, scaled to the budget; if it can be, one not tried yet."""
        space, generator = self.environment.space, self.generator
        sigma = min(max(self.agent.sigma, _LEAST_VARIATION), _MOST_VARIATION)
        found = widths
        for _ in range(_TRIES):
            fractions = [
                truncated_normal(f, sigma, 0.0, 1.0, generator)
                if torch.rand((), generator=generator).item() < _VARIED_SHARE
                else f
                for f in space.fractions(widths)
            ]
            found = space.fit(fractions)
            if found not in self.scored:
                break
        return found

    def save(self) -> None:
        """Write the state, whole or not at all."""
        if self.directory is None:
            return
        facts = {
            "format": _FORMAT,
            "identity": self.identity,
            "episodes": [asdict(episode) for episode in self.result.episodes],
            "scored": [[list(widths), accuracy] for widths, accuracy in self.scored.items()],
        }
        tensors: dict[str, Tensor] = {f"agent.{name}": value for name, value in self.agent.state_dict().items()}
        tensors["random"] = self.generator.get_state()
        with whole(self.directory / STATE_FILE) as work:
            save_file(tensors, work, metadata={"search": json.dumps(facts)})

    def _load(self, path: Path) -> None:
        if not path.exists():
            return
        try:
            with safe_open(path, framework="pt") as file:
                facts = json.loads((file.metadata() or {})["search"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if facts["format"] != _FORMAT:
                raise ArtifactError(f"{path}: written by another version of rmprune; delete it to search anew")
            if facts["identity"] != self.identity:
                raise ArtifactError(
                    f"{path}: belongs to a search of another network or with other settings; delete it to search anew"
                )
            self.result.episodes = [
                Episode(**{**episode, "widths": tuple(episode["widths"])}) for episode in facts["episodes"]
            ]
            self.scored = {tuple(widths): accuracy for widths, accuracy in facts["scored"]}
            self.generator.set_state(tensors["random"])
            prefix = "agent."
            self.agent.load_state_dict({n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)})
        except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise ArtifactError(f"{path}: damaged ({error}); delete it to search anew") from error

    def _rewrite_log(self, path: Path) -> None:
        """The log holds the episodes of the state: those after it will be played again."""
        write_text(path, "".join(json.dumps(asdict(episode)) + "\n" for episode in self.result.episodes))
