"""What the classes of settings share: tuples on the command line, and checks that refuse a value."""

import math
from collections.abc import Mapping
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import tyro

from rmprune.errors import ConfigError


def _comma_separated(kind: type[Any]) -> Any:
    """How the command line reads and shows a tuple: one word, values between commas."""
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar=f"{kind.__name__.upper()}[,...]",
        instance_from_str=lambda words: tuple(kind(value) for value in words[0].split(",") if value),
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda values: [",".join(map(str, values))],
    )


Names = Annotated[tuple[str, ...], _comma_separated(str)]
Numbers = Annotated[tuple[int, ...], _comma_separated(int)]
Fractions = Annotated[tuple[float, ...], _comma_separated(float)]


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


def require_choice(config: Any, *names: str) -> None:
    """Raise `ConfigError` for the first of these settings that is none of the values that its type lists."""
    for name in names:
        value, known = getattr(config, name), get_args(get_type_hints(type(config))[name])
        require(value in known, f"{name} is {value!r}; use one of {', '.join(known)}")


def require_numbers(kind: Any, values: Mapping[str, Any]) -> None:
    """Raise `ConfigError` for the first of these settings of a class or function that holds no number, or no tuple, where its type
    has one: from Python anything may come."""
    for name, hint in get_type_hints(kind).items():
        if name in values and not _holds(hint, values[name]):
            raise ConfigError(f"{name} is {values[name]!r}; give {str(getattr(hint, '__name__', hint)).lower()}")


def _holds(hint: Any, value: Any) -> bool:
    """Whether a value is of a type as far as numbers go, those of numpy and torch among them; of other types all are."""
    of, parts, able = get_origin(hint), get_args(hint), {int: "__index__", float: "__float__"}
    if of in (Union, UnionType):
        return any(_holds(part, value) for part in parts)
    if of is tuple and parts[0] in able:
        sized = isinstance(value, tuple | list) and parts[1:] in ((...,), (parts[0],) * (len(value) - 1))
        return sized and all(_holds(parts[0], each) for each in value)
    return value is None if hint is NoneType else hint not in able or hasattr(value, able[hint])


def require_finite(config: Any) -> None:
    """Raise `ConfigError` for the first setting that is infinite or not a number: no record could hold it."""
    require_numbers(type(config), vars(config))
    for name, value in vars(config).items():
        require(not isinstance(value, float) or math.isfinite(value), f"{name} is {value}; give a finite number")


def require_seed(name: str, value: int) -> None:
    """Raise `ConfigError` unless the generators take this seed."""
    require(
        hasattr(value, "__index__") and 0 <= value < 2**32, f"{name} is {value}; it must lie between 0 and {2**32 - 1}"
    )


def changeable() -> Any:
    """Metadata of a field that may be another when an interrupted run goes on: no network depends on it."""
    return {"changeable": True}


def transient() -> Any:
    """Metadata of a field that says where or whether to run, not what: it is left out of config.toml."""
    return {"transient": True}
