"""What is shown to users is true: examples in docstrings and pages run, command lines parse, links and paths lead somewhere."""

import doctest
import importlib.util
import re
import shlex
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from marks import long
from torch import nn

import rmprune
from rmprune import cli, config
from rmprune.amc.table import AMC_METHODS
from rmprune.measure import BACKENDS
from rmprune.methods import auto
from rmprune.methods.table import METHODS
from rmprune.pruning import IMPORTANCES

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
REPORTS = sorted((ROOT / "reports").rglob("*.md"))
LONG = [f"docs/{name}.md" for name in ("deploy", "int8", "own-model", "python")]
"""Pages whose Python takes seconds; the README's is `slim` as a whole."""
PUBLIC = {name: getattr(rmprune, name) for name in rmprune.__all__} | {
    f"models.{name}": getattr(rmprune.models, name) for name in rmprune.models.__all__
}
CONFIGS: dict[str, type[Any]] = {
    "slim": config.SlimConfig,
    "grid": config.GridConfig,
    "amc": config.AmcConfig,
    "train": config.TrainRunConfig,
    "inspect": config.InspectConfig,
    "convert": config.ConvertConfig,
    "measure": config.RemeasureConfig,
    "report": config.ReportConfig,
    "deploy": config.DeployConfig,
    "doctor": config.DoctorConfig,
}


def page_name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("name", [long(name) if name == "slim" else name for name in PUBLIC])
def test_every_public_name_has_an_example_that_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    globs = {"torch": torch, "nn": nn, "rmprune": rmprune}
    (test,) = doctest.DocTestFinder(recurse=False).find(PUBLIC[name], name, globs=globs) or [None]
    assert test is not None and test.examples, f"{name} has no example in its docstring"
    said: list[str] = []
    torch.manual_seed(0)
    with torch.random.fork_rng():
        found = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=said.append)
    assert not found.failed, "".join(said)


@pytest.mark.parametrize("page", [long(page) if page_name(page) in LONG else page for page in PAGES], ids=page_name)
def test_the_python_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(auto, "PROPOSED", 1)  # its search is looked at in methods/
    monkeypatch.setattr(auto, "MINUTES", 0.0)
    monkeypatch.setattr(auto, "PRESETS", {name: auto.PRESETS[name] for name in ("residual", "rm")})
    create = rmprune.models.create
    narrow = lambda name, **own: create(name, **({"width": 8} if name == "resnet8" else {}) | own)  # noqa: E731
    monkeypatch.setattr(rmprune.models, "create", narrow)
    text = page.read_text()
    namespace: dict[str, Any] = {"__name__": page.stem}
    torch.manual_seed(0)
    missing = set()
    for block in re.finditer(r"^```python(?: needs=(\w+))?\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        if block.group(1) and importlib.util.find_spec(block.group(1)) is None:
            missing.add(block.group(1))
            continue
        above = text[: block.start(2)].count("\n")
        with warnings.catch_warnings():
            if block.group(1):  # what others' packages warn of is theirs
                warnings.simplefilter("ignore")
            exec(compile("\n" * above + block.group(2), str(page), "exec"), namespace)
    if missing:
        pytest.skip(f"{page.name}: not installed, so its block did not run: {', '.join(sorted(missing))}")


def command_lines() -> list[str]:
    """Every command line shown: in blocks, between backticks, and in the README's table of commands."""
    commands = "|".join(CONFIGS)
    shown = rf"^python -m rmprune (.+?)(?: +#.*)?$|`python -m rmprune ([^`]+)`|^\| `((?:{commands})(?= |`)[^`]*)`"
    texts = [page.read_text() for page in (*PAGES, *REPORTS)]
    found = [match for text in texts for match in re.findall(shown, text, re.MULTILINE)]
    return sorted({next(filter(None, groups)) for groups in found})


@pytest.mark.parametrize("line", command_lines())
def test_a_command_line_parses(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    command, *arguments = shlex.split(line)
    assert cli._parse(CONFIGS[command], arguments, command)


def test_every_flag_of_a_page_exists(capsys: pytest.CaptureFixture[str]) -> None:
    for command in CONFIGS:
        with pytest.raises(SystemExit):
            cli.main([command, "--help"])
    known = set(re.findall(r"--[\w.-]+", capsys.readouterr().out)) | {"--help", "--config"}
    for page in PAGES:
        flags = {
            flag for text in re.findall(r"`(--[^`]+)`", page.read_text()) for flag in re.findall(r"--[\w.-]*\w", text)
        }
        assert flags - {"--measure"} <= known, page  # `--measure.*`


@pytest.mark.parametrize("page", [*PAGES, *REPORTS, ROOT / "CHANGELOG.md"], ids=page_name)
def test_links_and_paths_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (page.parent / target).exists(), target
    for target, anchor in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", text):
        headings = {
            re.sub(r"[^\w -]", "", line).lower().replace(" ", "-")
            for line in re.findall(r"^#+ (.*)$", (page.parent / target if target else page).read_text(), re.MULTILINE)
        }
        assert anchor in headings, f"{target}#{anchor}"
    for path in re.findall(r"`((?:\w+/)+\w+\.(?:py|toml|md|csv))`", text):
        assert (ROOT / path).exists() or (ROOT / "rmprune" / path).exists(), path


@pytest.mark.parametrize(
    ("page", "names"),
    [
        ("methods", METHODS),
        ("methods", AMC_METHODS),
        ("methods", IMPORTANCES),
        ("measuring", BACKENDS),
        ("commands", CONFIGS),
    ],
)
def test_tables_are_complete(page: str, names: dict[str, Any]) -> None:
    text = (ROOT / "docs" / f"{page}.md").read_text()
    assert [name for name in names if not re.search(rf"(`|rmprune ){name}\b", text)] == []


def test_the_readme_is_a_screen_and_a_half() -> None:
    assert (ROOT / "README.md").read_text().count("\n") <= 80
