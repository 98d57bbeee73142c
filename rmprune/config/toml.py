"""Configs as TOML, there and back: what a run writes beside its results and what `--config` reads. Nothing read is executed."""

import dataclasses
import tomllib
from collections.abc import Collection
from pathlib import Path
from typing import Any, TypeVar, get_origin, get_type_hints

import dacite
import tomli_w
import tyro

from rmprune.config.fields import UNSET, choices, is_unset, may_be_unset
from rmprune.config.meant import meant
from rmprune.config.transfer import TRANSFER
from rmprune.errors import ConfigError

Config = TypeVar("Config")
# Bytes of a config; the reader's memory grows with the square of a key's dots, so those are counted too.
LARGEST_TOML = 2**18
MOST_DOTS = 300  # on a line


def to_dict(config: Any) -> dict[str, Any]:
    """The config as plain values: paths as strings, tuples as lists, nested stages as tables.

    Unset (None) values are left out, or "none" where that is not the default; so are fields whose metadata says `transient`: they
    say where and whether to run, not what.
    """

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return to_dict(value)
        if isinstance(value, Path):
            return str(value)
        if isinstance(value, tuple | list):
            return [plain(item) for item in value]
        return value

    kept = (field for field in dataclasses.fields(config) if not field.metadata.get("transient"))
    pairs = ((field, getattr(config, field.name)) for field in kept)
    return {
        field.name: UNSET if value is None else plain(value)
        for field, value in pairs
        if value is not None or field.default is not None
    }


def to_toml(config: Any) -> str:
    """The settings as TOML text, enough for `from_toml` to read the same config back."""
    return tomli_w.dumps(to_dict(config))


def from_toml(kind: type[Config], path: Path, *, transfer: bool | None = None, whole: bool = True) -> Config:
    """Read a config of dataclass `kind` from TOML. Settings left out keep the defaults of `kind`, stage by stage; with `transfer`
    those of transfer (None: where the file names `weights`).

    Not `whole`: flags come after the file and may give what it lacks, so whether its settings fit one another is not looked at.

    Raises ConfigError that names the file where it is missing, is not TOML, or holds an unknown setting or a wrong value.
    """
    values = _read(path)
    _refuse_unknown(kind, values, path)
    if transfer is None:
        transfer = not is_unset(values.get("weights", UNSET))
    gentle = TRANSFER if transfer else {}
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        given = values.get(field.name, gentle.get(field.name))
        if isinstance(given, dict) and dataclasses.is_dataclass(field.default):
            values[field.name] = to_dict(field.default) | gentle.get(field.name, {}) | given
    try:
        return from_dict(kind, values) if whole else _taken_for(kind, from_dict(_unlooked(kind), values))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def from_dict(kind: type[Config], values: dict[str, Any]) -> Config:
    """The config of these plain values, as `to_dict` gives them. Raises ConfigError for an unknown setting or a wrong value."""
    types = dacite.Config(strict=True, cast=[tuple], type_hooks={float: _as_float, Path: _as_path})
    try:
        return dacite.from_dict(kind, _as_python(kind, values), types)
    except dacite.WrongTypeError as error:
        listed = choices(error.field_type)
        said = f"{error.field_path} is {error.value!r}; use {' or '.join(map(repr, listed))}" if listed else str(error)
        raise ConfigError(said[:500]) from None
    except (dacite.DaciteError, ConfigError, TypeError, ValueError, ArithmeticError, RecursionError) as error:
        raise ConfigError(str(error)[:500]) from None


def _unlooked(kind: Any) -> Any:
    """A dataclass of the same settings that requires none of them, and does not look whether they fit one another."""
    settings: list[Any] = []
    for own in dataclasses.fields(kind):
        hint, field = get_type_hints(kind)[own.name], dataclasses.field(default=tyro.MISSING)
        if own.default is not dataclasses.MISSING:
            field = dataclasses.field(default=own.default)
        elif dataclasses.is_dataclass(hint):
            hint = _unlooked(hint)
            field = dataclasses.field(default=hint())
        settings.append((own.name, hint, field))
    return dataclasses.make_dataclass(kind.__name__, settings, frozen=True)


def _taken_for(kind: Any, unlooked: Any) -> Any:
    """These settings as an instance of `kind`, which is not looked at either."""
    config = object.__new__(kind)
    for field in dataclasses.fields(kind):
        value, hint = getattr(unlooked, field.name), get_type_hints(kind)[field.name]
        partial = dataclasses.is_dataclass(value) and type(value) is not hint and dataclasses.is_dataclass(hint)
        object.__setattr__(config, field.name, _taken_for(hint, value) if partial else value)
    return config


def _read(path: Path) -> dict[str, Any]:
    """The tables and values of a TOML file; ConfigError where it is none, or where reading it would cost too much."""
    try:
        if path.exists() and (not path.is_file() or path.stat().st_size > LARGEST_TOML):
            raise ValueError(f"not a regular file of at most {LARGEST_TOML} bytes")
        text = path.read_text(encoding="utf-8-sig")  # with or without what Windows writes before it
        if any(line.count(".") > MOST_DOTS for line in text.splitlines()):
            raise ValueError(f"a line with more than {MOST_DOTS} dots")
        return tomllib.loads(text)
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such config file") from None
    except (OSError, ValueError, RecursionError) as error:  # all of tomllib's are ValueErrors
        raise ConfigError(f"{path}: cannot be read as TOML: {error}") from None


def _as_python(kind: Any, values: dict[str, Any]) -> dict[str, Any]:
    """What TOML says in other words: one value is a list of one, "none" is None, or an empty list."""
    fields = get_type_hints(kind)

    def python(name: str, value: Any) -> Any:
        wanted = fields[name]
        if isinstance(value, dict) and dataclasses.is_dataclass(wanted):
            return _as_python(wanted, value)
        unset = is_unset(value) and may_be_unset(wanted)
        if get_origin(wanted) is tuple and not isinstance(value, list):
            return [] if unset else [value]
        return None if unset else value

    return {name: python(name, value) for name, value in values.items()}


def _as_float(value: Any) -> Any:
    """TOML's 1 is a fine value for a float; its "1" and true are not."""
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _as_path(value: Any) -> Path:
    if not isinstance(value, str | Path) or "\0" in str(value):
        raise ValueError(f"{str(value)[:80]!r} is not a path")
    return Path(value)


def _refuse_unknown(whole: Any, values: dict[str, Any], path: Path, kind: Any = None, table: str = "") -> None:
    """`kind`: the class of this table of `whole`."""
    fields = {field.name: get_type_hints(kind or whole)[field.name] for field in dataclasses.fields(kind or whole)}
    for key, value in values.items():
        if key not in fields:
            close = meant(table + key, whole)
            hint = f"; did you mean {close.path!r}?" if close else f"; known here: {', '.join(fields)}"
            raise ConfigError(f"{path}: unknown setting {table + key!r}{hint}")
        if isinstance(value, dict) and dataclasses.is_dataclass(fields[key]):
            _refuse_unknown(whole, value, path, fields[key], f"{table}{key}.")


def differences(old: Any, new: Any, prefix: str = "", *, free: Collection[str] = ()) -> list[str]:
    """The settings in which two configs of one kind differ, as `data.dataset: 'digits' -> 'cifar10'`; transient and changeable ones
    may, and those of these paths (`free`)."""
    found: list[str] = []
    for field in dataclasses.fields(old):
        was, now = getattr(old, field.name), getattr(new, field.name)
        if field.metadata.keys() & {"transient", "changeable"} or f"{prefix}{field.name}" in free:
            continue
        if dataclasses.is_dataclass(was) and type(was) is type(now):
            found += differences(was, now, f"{prefix}{field.name}.", free=free)
        elif was != now:
            found.append(f"{prefix}{field.name}: {was!r} -> {now!r}")
    return found
