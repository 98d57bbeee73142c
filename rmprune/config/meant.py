"""The setting that was meant by a name that is none: mistyped, of another table, or as other programs call it. Refuses nothing itself."""

import dataclasses
import difflib
from collections.abc import Iterator
from typing import Any, get_type_hints

import tyro

from rmprune.config.fields import may_be_unset

_ELSEWHERE = {  # in torchvision's reference scripts, timm's, and between our own commands
    "lr": "learning_rate", "wd": "weight_decay", "arch": "model", "pretrained": "weights", "resume": "checkpoint", "gpu": "device",
    "output": "out", "output_dir": "out", "o": "out", "input_size": "image_size", "img_size": "image_size", "num_workers": "workers",
    "ratio": "budget", "macs_ratio": "budget", "latency_ratio": "budget", "budget": "macs_ratio", "flops": "macs_ratio",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class NamedSetting:
    """One setting: its path in TOML, its flag, which a positional one has not, and whether `none` unsets it."""

    path: str
    flag: str | None
    may_be_unset: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """What it is called as a key and as a flag, without the tables around it."""
        return tuple(each.rpartition(".")[2] for each in self._both)

    @property
    def tables(self) -> tuple[str, ...]:
        """What stands before that."""
        return tuple(each.rpartition(".")[0] for each in self._both)

    @property
    def _both(self) -> tuple[str, str]:
        return self.path, (self.flag or self.path).strip("-").replace("-", "_")


def settings(kind: Any, table: str = "", prefix: str = "") -> Iterator[NamedSetting]:
    """All settings of a class of settings, in order.

    >>> from rmprune.config.meant import settings
    >>> [(each.path, each.flag) for each in settings(rmprune.config.SlimConfig) if each.path.endswith("seconds")][:2]
    [('train.checkpoint_seconds', '--checkpoint-seconds'), ('measure.seconds', '--measure.seconds')]
    """
    hints = get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        notes, bare = getattr(hint, "__metadata__", ()), getattr(hint, "__origin__", hint)
        name = next((note.name for note in notes if getattr(note, "name", None)), field.name.replace("_", "-"))
        if dataclasses.is_dataclass(bare):
            inner = prefix if tyro.conf.OmitArgPrefixes in notes else f"{prefix}{name}."
            yield from settings(bare, f"{table}{field.name}.", inner)
        else:
            flag = None if tyro.conf.Positional in notes else f"--{prefix}{name}"
            yield NamedSetting(table + field.name, flag, may_be_unset(hint))


def meant(wanted: str, kind: Any) -> NamedSetting | None:
    """The setting of this class that a flag (`--lr`) or a key (`prune.lr`) may have meant.

    >>> from rmprune.config.meant import meant
    >>> meant("--finetune.lr", rmprune.config.SlimConfig).flag, meant("train.batch_size", rmprune.config.SlimConfig).path
    ('--finetune.learning-rate', 'data.batch_size')
    """
    written = wanted.lower().strip("-").replace("-", "_")
    known, (table, _, name) = list(settings(kind)), written.rpartition(".")
    whole = next((each for each in known if each.path.replace(".", "_") == written), None)
    name = name.removeprefix("no_")
    names = list(dict.fromkeys(name for each in known for name in each.names))
    longer = sorted((each for each in names if each.startswith(name) and len(name) > 2), key=len)
    tried = [name, _ELSEWHERE.get(name), *longer[:1], *difflib.get_close_matches(name, names, 1, 0.65)]
    found = next(([each for each in known if one in each.names] for one in tried if one in names), [])
    return whole or max(found, key=lambda each: (table in each.tables, "" in each.tables), default=None)
