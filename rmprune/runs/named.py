"""The files that a run's settings name, beside its images."""

from pathlib import Path
from typing import Any

from rmprune.errors import ArtifactError
from rmprune.runs.reading import parse_json, read_text


def named_files(config: Any) -> dict[str, Path]:
    """Setting -> the file, or the artifact directory, that it names."""
    named = {name: getattr(config, name, None) for name in ("plan", "checkpoint", "weights")}
    return {name: Path(path) for name, path in named.items() if path is not None and path != "imagenet"}


def plan_text(config: Any) -> str | None:
    """What the plan's file says, where settings name one. Raises ArtifactError where it cannot be read as JSON."""
    plan = named_files(config).get("plan")
    if plan is None:
        return None
    try:
        text = read_text(plan)
        parse_json(text)
    except OSError as error:
        raise ArtifactError(f"{plan}: cannot be read ({error.strerror or error}); give a plan that is there") from None
    except ValueError as error:
        raise ArtifactError(f"{plan}: is no plan ({error}); give a JSON file") from None
    return text
