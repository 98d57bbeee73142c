"""The files that a run's settings name, its photos among them: which they are, and whether they are as they were when it began."""

import contextlib
import hashlib
import json
from pathlib import Path
from typing import Any

from rmprune.errors import ArtifactError, ConfigError
from rmprune.runs.reading import parse_json, read_json, read_text, sha256_of
from rmprune.runs.writing import write_text

FILES = "files.json"
PHOTOS = "photos"
_OF_ARTIFACTS = (".json", ".safetensors")


def named_files(config: Any) -> dict[str, Path]:
    """Setting -> the file, or the artifact directory, that it names."""
    data = getattr(config, "data", None)
    named = {name: getattr(config, name, None) for name in ("plan", "checkpoint", "weights")}
    named |= {"labels": None if data is None else data.labels_file}
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


def digests(config: Any) -> dict[str, str]:
    """Setting -> the SHA-256 of all that the file or artifact says, of those that are there; a plan is kept as a text.

    Reading a checkpoint takes longer than that (a gigabyte in a second or two).
    """
    found: dict[str, str] = {}
    for name, path in named_files(config).items():
        inside = sorted(path.glob("*")) if path.is_dir() else [path]
        with contextlib.suppress(OSError):  # who needs it says so
            own = [
                sha256_of(file) for file in inside if file.is_file() and (file == path or file.suffix in _OF_ARTIFACTS)
            ]
            if own and name != "plan":
                found[name] = own[0] if len(own) == 1 else hashlib.sha256("".join(own).encode()).hexdigest()
    return found


def keep_digests(directory: Path, config: Any, photos: str = "") -> None:
    """Write down in the run what its files are, and the digest of its photos, unless that was done when it began."""
    now = digests(config) | ({PHOTOS: photos} if photos else {})
    if now and not (directory / FILES).exists():
        write_text(directory / FILES, json.dumps(now, indent=1))


def refuse_changed(
    directory: Path, config: Any, way: str = "choose another --out, or --overwrite", photos: str = ""
) -> None:
    """Raise ConfigError where a file that the settings name is another one than when this run began (one that is gone is not asked for),
    or `photos`, where they are known, are others."""
    if not (directory / FILES).is_file():
        return
    begun = read_json(directory / FILES, missing="gone", damaged="delete it to go on")
    begun = begun if isinstance(begun, dict) else {}
    if photos and begun.get(PHOTOS, photos) != photos:
        raise ConfigError(
            f"{directory}: holds a run on other photos (in {config.data.data_dir} some have come, gone, or changed class, part or size "
            f"since it began, so that others would be drawn for its test); bring them back as they were, or {way}"
        )
    for name, digest in digests(config).items():
        if begun.get(name, digest) != digest:
            raise ConfigError(
                f"{directory}: holds a run with another --{name} ({named_files(config)[name]} has changed since it began); bring it back "
                f"as it was, or {way}"
            )
