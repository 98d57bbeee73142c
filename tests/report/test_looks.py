"""No two methods look alike, with any kind of colour vision; names in figures lie beside their panels."""

import itertools
import re
from pathlib import Path

import numpy as np
import page_records
import pandas as pd
import pytest
from marks import few
from matplotlib.backends.backend_agg import FigureCanvasAgg

from rmprune.report import looks as looks_module
from rmprune.report.figures import accuracy_against_time, spread_apart
from rmprune.report.gather import gather
from rmprune.report.looks import COLOURS, looks, ranked
from rmprune.report.tables import frame_of

CSS = (Path(looks_module.__file__).parent / "page.css").read_text()
LIGHT, DARK = (
    dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", part)) for part in CSS.split("prefers-color-scheme: dark")[:2]
)
# What each kind of colour vision makes of linear RGB (Machado, Oliveira and Fernandes 2009, severity 1).
VISIONS = {
    "normal": np.eye(3),
    "protan": np.array([[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]]),
    "deutan": np.array([[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]]),
    "tritan": np.array([[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]]),
}


def linear(colour: str) -> np.ndarray:
    c = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = to_xyz @ np.clip(rgb, 0, 1) / np.array([0.9505, 1, 1.089])
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def contrast(one: str, other: str) -> float:
    low, high = sorted(float(np.array([0.2126, 0.7152, 0.0722]) @ linear(c)) + 0.05 for c in (one, other))
    return high / low


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_colours_are_told_apart_with_every_kind_of_colour_vision(theme: dict[str, str]) -> None:
    colours = [theme[name] for name in ("dense", "plain", *(f"c{number}" for number in range(len(COLOURS))))]
    assert min(contrast(colour, theme["paper"]) for colour in colours) > 3
    for vision in VISIONS.values():
        seen = [lab(vision @ linear(colour)) for colour in colours]
        assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) > 15


def test_the_text_can_be_read() -> None:
    for theme in (LIGHT, DARK):
        assert all(contrast(theme[name], theme["paper"]) > 4.5 for name in ("ink", "soft", "accent", "warn"))
        assert contrast(theme["soft"], theme["raised"]) > 4.5


def test_print_and_page_have_the_same_colours() -> None:
    assert [LIGHT[f"c{number}"] for number in range(len(COLOURS))] == list(COLOURS)


def test_no_two_methods_look_alike() -> None:
    found = looks(["dense", "plain", *(f"m{n}" for n in range(40))]).values()
    assert (
        len({(look.colour, look.print_marker) for look in found})
        == len({(look.number, look.marker) for look in found})
        == 42
    )
    first = list(found)[:9]
    assert len({look.colour for look in first}) == len({look.print_marker for look in first}) == 9


def test_methods_with_the_most_networks_come_first() -> None:
    rows = [
        ("b", "1", 0),
        ("b", "2", 0),
        ("a", "1", 0),
        ("c", "1", 0),
        ("c", "1", 1),
        ("c", "1", 1),
        ("plain", "", 0),
        ("dense", "", 0),
    ]
    data = pd.DataFrame(rows, columns=["method", "budget", "seed"]).assign(model="m", dataset="d")
    assert ranked(data) == ["dense", "plain", "b", "c", "a"]


def test_names_are_moved_apart() -> None:
    assert spread_apart([0.1, 0.5, 0.9], 0.1, 1.0) == [0.1, 0.5, 0.9]
    assert spread_apart([0.5, 0.5, 0.5], 0.1, 1.0) == pytest.approx([0.5, 0.6, 0.7])
    assert spread_apart([0.95, 0.97, 1.0], 0.1, 1.0) == pytest.approx([0.8, 0.9, 1.0])


@pytest.mark.parametrize("count", few([2, 9, 20], 9))
def test_every_method_is_named_beside_every_panel(count: int, tmp_path: Path) -> None:
    data = frame_of(gather([page_records.write_runs(tmp_path, seeds=2, budgets=(0.5,), methods=("rm",))])[0])
    data = data[(data.model == "resnet20") & (data.threads == 2)]
    own = data[data.method == "rm"]
    many = [
        own.assign(method=f"a-method-$-with-a-long-name-{n}", accuracy=own.accuracy + 0.0001 * n) for n in range(count)
    ]
    figure = accuracy_against_time(pd.concat([data[data.method == "dense"], *many]), "resnet20 on $digits")
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    assert len(figure.axes) == 4
    for ax in figure.axes:
        names = [text for text in ax.texts if text.get_text()]
        boxes = sorted((name.get_window_extent(renderer) for name in names), key=lambda box: box.y0)
        assert len(names) == count + 1 and sum(name.get_text().startswith("dense, 97") for name in names) == 1
        assert all(low.y1 <= high.y0 + 2 for low, high in itertools.pairwise(boxes))  # none lies on another
        assert all(box.x0 > ax.bbox.x1 and box.x1 <= figure.bbox.width for box in boxes)
        assert ax.get_xlabel() == "measured time for a batch (ms)"
