"""Settings from the words of a command line, and from a TOML file before them. The flags themselves follow from the classes of settings."""

import contextlib
import dataclasses
import io
import re
from pathlib import Path
from typing import Any, TypeVar

import tyro

from rmprune.config.fields import is_unset
from rmprune.config.meant import meant, settings
from rmprune.config.toml import from_toml
from rmprune.config.transfer import transfer_flags
from rmprune.errors import ConfigError

Config = TypeVar("Config")


def parse(kind: type[Config], arguments: list[str], prog: str, description: str) -> Config:
    """Flags to a config; `--config FILE` gives the defaults that the other flags override. Prints help, and ends, where that is asked for.

    Raises ConfigError in one line for a flag or a value that is none.
    """
    default: Any = tyro.MISSING_NONPROP
    said_by = ""
    arguments = [
        part for word in arguments for part in (word.split("=", 1) if word.startswith("--config=") else [word])
    ]
    arguments = _with_value("--augment", "True", arguments)
    arguments = _with_none(kind, arguments)
    weights = [
        a.partition("=")[2] or b
        for a, b in zip(arguments, [*arguments[1:], ""], strict=False)
        if a.split("=")[0] == "--weights"
    ]
    transfer = weights[-1] != "None" if weights else None  # else the file says it
    if "--config" in arguments:
        at = arguments.index("--config")
        if at + 1 == len(arguments):
            raise ConfigError("--config needs the path of a TOML file")
        path, arguments = arguments[at + 1], arguments[:at] + arguments[at + 2 :]
        default = from_toml(kind, Path(path), transfer=transfer, whole=False)
        said_by = f"{path} and the flags: " if arguments else f"{path}: "
    elif transfer:  # of two flags the last counts, which is the user's
        arguments = transfer_flags({field.name for field in dataclasses.fields(kind)}) + arguments  # type: ignore[arg-type]
    description, said = f"{description}\n\n--config FILE reads settings from TOML first.", io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(kind, args=arguments, default=default, prog=prog, description=description)
    except ConfigError as error:
        raise ConfigError(f"{said_by}{error}") from None
    except SystemExit as stopped:
        if not stopped.code:  # --help
            raise
        message = one_line(said.getvalue())
        raise ConfigError(f"{message}{_hint(kind, arguments, message)} ({prog} --help lists the flags)") from None


def _hint(kind: Any, arguments: list[str], message: str) -> str:
    """What was meant instead of a flag that is none, or of a word that belongs to none; nothing where that is not known."""
    unknown = message.partition("Unrecognized options: ")[2].split(", ")[0]
    if unknown and not unknown.startswith("-"):
        return "; a value follows its flag, and several of one flag are separated by commas"
    known = {each.flag for each in settings(kind)}
    for flag in (word.partition("=")[0] for word in arguments if re.match(r"-+[a-zA-Z]", word)):
        found = meant(flag, kind)
        if found is None or flag.replace("_", "-").replace("no-", "") in known:
            continue
        return f"; did you mean {found.flag}?" if found.flag else f"; give it as a word of its own, without {flag}"
    return ""


def _with_value(flag: str, value: str, arguments: list[str]) -> list[str]:
    """`flag` by itself, and its opposite, as they were before it took a value: `--augment`, `--no-augment`."""
    words = [
        word.replace("--no-", "--") + "=False" if word == flag.replace("--", "--no-") else word for word in arguments
    ]
    bare = {
        i for i, word in enumerate(words) if word == flag and (i + 1 == len(words) or words[i + 1].startswith("--"))
    }
    return [f"{word}={value}" if i in bare else word for i, word in enumerate(words)]


def _with_none(kind: Any, arguments: list[str]) -> list[str]:
    """`none` as None, in any case, where a flag's setting may be unset: `--weights none`, `--clip-norm=NONE`, `--macs-ratio none`."""
    flags = {each.flag for each in settings(kind) if each.may_be_unset}
    found = []
    for before, word in zip(["", *arguments], arguments, strict=False):
        flag, equals, value = word.partition("=")
        if equals and flag.replace("_", "-") in flags and is_unset(value):
            word = f"{flag}=None"
        elif before.replace("_", "-") in flags and is_unset(word):
            word = "None"
        found.append(word)
    return found


def one_line(box: str) -> str:
    """What tyro says in a box about a flag, without the help of that flag and of others."""
    box = re.sub(r"\x1b\[[\d;]*m", "", box).replace("─", "-")  # colours, on a terminal
    boxed = [line.strip("│")[1:] for line in box.splitlines() if line.startswith("│")]
    parts = re.split("-{10,}", "\n".join(boxed) if boxed else box)
    # Without UTF-8 it draws no box, and the title is a part of its own.
    words = parts[0] if boxed else "".join(parts[1:2])
    message = " ".join(row.strip() for row in words.splitlines() if not row.startswith(" " * 8)).strip().rstrip(".")
    return message or " ".join(box.split())
