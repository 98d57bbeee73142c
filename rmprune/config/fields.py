"""What the classes of settings share: tuples on the command line, and checks that refuse a value."""

import contextlib
import dataclasses
import functools
import math
import operator
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import tyro

from rmprune.errors import ConfigError


def comma_separated(kind: type[Any]) -> Any:
    """How the command line reads and shows a tuple: one word, values between commas; `none` is the empty one."""
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar=f"{kind.__name__.upper()}[,...]",
        instance_from_str=lambda words: () if is_unset(words[0]) else tuple(kind(v) for v in words[0].split(",") if v),
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda values: [",".join(map(str, values))],
    )


UNSET = "none"
Names = Annotated[tuple[str, ...], comma_separated(str)]
Numbers = Annotated[tuple[int, ...], comma_separated(int)]
Fractions = Annotated[tuple[float, ...], comma_separated(float)]


def require(condition: bool, message: str) -> None:
    """Raise `ConfigError(message)` unless the condition holds (NaN fails every comparison, so it is refused too)."""
    if not condition:
        raise ConfigError(message)


def require_inside(config: Any, interval: str, *names: str) -> None:
    """Raise `ConfigError` for the first of these settings outside of an interval, such as "(0, 1]" or "[1, inf)"; None is unset."""
    low, high = map(float, interval[1:-1].split(", "))
    said = f"{'at least' if interval[0] == '[' else 'above'} {low:g}"
    said += f" and {'at most' if interval[-1] == ']' else 'below'} {high:g}" if math.isfinite(high) else ", and finite"
    for name in names:
        value = getattr(config, name)
        end = (low if interval[0] == "[" else None, high if interval[-1] == "]" else None)
        require(value is None or low < value < high or value in end, f"{name} is {value}; it must be {said}")


def require_distinct(name: str, values: Iterable[float]) -> None:
    """Raise `ConfigError` unless these differ as cells are named by them."""
    shown = [f"{value:g}" for value in values]
    require(len(set(shown)) == len(shown), f"{name} is {', '.join(shown)}; give every value once")


class Settings:
    """Base of the classes of settings: from Python anything may come, and what a field cannot be is refused when one is made.

    Lists become tuples, strings paths, numbers of numpy and torch those of Python.
    """

    def __post_init__(self) -> None:
        names = [field.name for field in dataclasses.fields(self)]  # type: ignore[arg-type]
        for name, value in require_types(type(self), {name: getattr(self, name) for name in names}).items():
            require(not isinstance(value, float) or math.isfinite(value), f"{name} is {value}; give a finite number")
            object.__setattr__(self, name, value)


def require_types(kind: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """Values of these fields of a class, or arguments of a function, as `Settings` holds them.

    Raises ConfigError for the first that is of another type than it should be.
    """
    found = {}
    for name, value in values.items():
        hint = _hints(kind).get(name)
        try:
            found[name] = _fitting(hint, value)
        except (TypeError, ValueError, RuntimeError, OverflowError):  # of which each library raises its own
            listed = choices(hint)
            way = f"use one of {', '.join(map(str, listed))}" if listed else f"give {_in_words(hint)}"
            shown = " ".join(repr(value).split())[:100]
            raise ConfigError(f"{name} is {shown}; {way}") from None
    return found


_hints = functools.cache(get_type_hints)


def choices(hint: Any) -> list[Any]:
    """The values that a type lists, by itself, among others or in a tuple; none of any other type."""
    parts = get_args(hint)
    return list(parts) if get_origin(hint) is Literal else [choice for part in parts for choice in choices(part)]


def is_unset(value: Any) -> bool:
    """Whether a word of a command line, or of TOML, which has no null, says None, or no value of several: `none`, in any case."""
    return isinstance(value, str) and value.lower() == UNSET


def may_be_unset(hint: Any) -> bool:
    """Whether such a word is None for settings of this type, those that may be None and list no choice of that name, or the empty tuple for
    those of several values (paths apart: one may be called so)."""
    parts = get_args(hint)
    if get_origin(hint) is Annotated:
        return may_be_unset(parts[0])
    several = get_origin(hint) is tuple and Path not in parts
    return (several or NoneType in parts) and UNSET not in choices(hint)


def _fitting(hint: Any, value: Any) -> Any:
    """The value as this type has it; as it is for types that no setting has. Raises TypeError or ValueError where it is of another."""
    of, parts = get_origin(hint), get_args(hint)
    if of in (Union, UnionType):
        for part in parts:
            with contextlib.suppress(TypeError, ValueError, RuntimeError, OverflowError):
                return _fitting(part, value)
        raise TypeError
    if of is tuple:
        _must(isinstance(value, tuple | list) and parts[1:] in ((...,), (parts[0],) * (len(value) - 1)))
        return tuple(_fitting(parts[0], each) for each in value)
    if of is Literal:
        _must(isinstance(value, str) and value in parts)
        return value
    if hint in (int, float):
        _must(hasattr(value, "__index__" if hint is int else "__float__") and not isinstance(value, bool))
        return value if type(value) in (int, float) else operator.index(value) if hint is int else float(value)
    if hint is Path:
        _must(isinstance(value, str | Path))
        return Path(value)
    plain = hint in (bool, str, NoneType) or dataclasses.is_dataclass(hint)
    _must(not plain or isinstance(value, hint))
    return value


def _must(holds: bool) -> None:
    if not holds:
        raise TypeError


def _in_words(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and get_origin(hint) is None else str(hint).replace("pathlib.", "")


def require_seed(name: str, value: int) -> None:
    """Raise `ConfigError` unless the generators take this seed."""
    require(
        hasattr(value, "__index__") and 0 <= value < 2**32, f"{name} is {value}; it must lie between 0 and {2**32 - 1}"
    )


def changeable() -> Any:
    """Metadata of a field that may be another when an interrupted run goes on: no network depends on it (but on `search_minutes`)."""
    return {"changeable": True}


def transient() -> Any:
    """Metadata of a field that says where or whether to run, not what: it is left out of config.toml."""
    return {"transient": True}


def read_by(*datasets: str) -> Any:
    """Metadata of a field that only these data sets read."""
    return {"read_by": datasets}
