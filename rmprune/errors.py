"""The errors that a user can cause. Every message says what is wrong, where, and what to do; the command line exits with status 2."""

import decimal


class RmpruneError(Exception):
    """Base of every error that a user's input, files or limits can cause.

    >>> try:
    ...     rmprune.remove_residuals(nn.Sequential(nn.Conv2d(3, 4, 3)), torch.randn(2, 3, 8, 8))
    ... except rmprune.RmpruneError as error:
    ...     print(error)
    there is no residual to remove: the network adds no two maps of one source
    """


class UnsupportedModel(RmpruneError):
    """The network, or a part of it, cannot be handled exactly; the message names the place and the way out."""


class NotEquivalent(RmpruneError):
    """A rewrite changed the function beyond its tolerance. Nothing is returned; the message carries the measured error."""


class InfeasibleBudget(RmpruneError):
    """A budget that the limits forbid; the message says which limit and what is the nearest budget that can be met."""


class DataError(RmpruneError):
    """A data set or one of its files is unknown, missing or damaged."""


class ArtifactError(RmpruneError):
    """A file on disk (artifact, checkpoint, record, config) is missing, damaged, or belongs to something else."""


class ConfigError(RmpruneError):
    """A setting is outside its range or contradicts another."""


def rounded(value: float, digits: int, *, up: bool = True) -> float:
    """`value` in so many significant digits, never below it (`up`; else never above): what a message says can be met, can be."""
    rounding = decimal.ROUND_CEILING if up else decimal.ROUND_FLOOR
    return float(decimal.Context(prec=digits, rounding=rounding).create_decimal(repr(float(value))))


def out_of_memory(error: BaseException) -> bool:
    """Whether Python, torch or a runtime says so, on the CPU or on a GPU."""
    signs = ("can't allocate memory", "out of memory", "failed to allocate", "bad allocation")
    return isinstance(error, MemoryError) or any(sign in str(error).lower() for sign in signs)


def loader_killed(error: BaseException) -> bool:
    """Whether torch says that a process which reads images is gone. It does so wherever the program is at that moment. An error that
    such a process raised itself ("Caught RuntimeError in DataLoader worker process 0") is none of these."""
    return isinstance(error, RuntimeError) and "DataLoader worker (pid" in str(error)


LOADER_KILLED = (
    "a loader process was killed, as the system does where memory runs out (or shared memory: docker's --shm-size); free some, or take "
    "--workers 0 or fewer than now, and begin again: what was saved stays"
)


def first_line(error: Exception) -> str:
    """What an error says, in one line of bounded length."""
    return str(getattr(error, "strerror", None) or error).strip().split("\n", 1)[0][:200] or type(error).__name__


def in_one_line(name: str) -> str:
    """A name from outside as it can be printed: what no screen shows, such as an end of a line in a path, becomes ?."""
    return "".join(c if c.isprintable() else "?" for c in name)
