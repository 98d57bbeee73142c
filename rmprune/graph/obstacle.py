"""The private exception of everything that asks whether something can be done: it carries the reason why not."""

from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class Obstacle(Exception):
    """Why a layer is no kernel, an addition cannot go, or an ONNX node is not read. Raised and caught inside, never a user's error."""


def or_none(ask: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
    """`ask(*args)`, or None where it meets an obstacle: for callers that try something else then."""
    try:
        return ask(*args, **kwargs)
    except Obstacle:
        return None
