"""Draws the pictures of docs/theory.md, as SVG beside this file.

    python docs/pictures/draw.py

Black ink on white paper of their own, so that they read on light and on dark pages.
"""

from collections.abc import Iterable
from pathlib import Path

INPUT, BRANCH, SUM, LINE, SOFT = "#1f7cde", "#f16200", "#16a157", "#1b1d20", "#6b727b"
STEP = 62  # from one map of a chain to the next
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"


def text(
    x: float, y: float, said: str, *, size: int = 14, fill: str = LINE, anchor: str = "middle", bold: bool = False
) -> str:
    weight = ' font-weight="600"' if bold else ""
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{fill}" text-anchor="{anchor}"{weight}>{said}</text>'


def box(x: float, y: float, width: float, height: float, fill: str, said: str = "", *, ink: str = "#ffffff") -> str:
    drawn = f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="3" fill="{fill}"/>'
    return drawn + (text(x + width / 2, y + height / 2 + 5, said, fill=ink) if said else "")


def path(d: str, *, stroke: str = LINE, width: float = 1.6, dash: str = "", arrow: bool = True) -> str:
    more = (f' stroke-dasharray="{dash}"' if dash else "") + (' marker-end="url(#tip)"' if arrow else "")
    return f'<path d="{d}" fill="none" stroke="{stroke}" stroke-width="{width:g}"{more}/>'


def dot(x: float, y: float, radius: float, fill: str) -> str:
    return f'<circle cx="{x:g}" cy="{y:g}" r="{radius:g}" fill="{fill}"/>'


def ring(x: float, y: float, radius: float, stroke: str) -> str:
    return f'<circle cx="{x:g}" cy="{y:g}" r="{radius:g}" fill="none" stroke="{stroke}" stroke-width="3"/>'


def picture(name: str, width: int, height: int, title: str, parts: Iterable[str]) -> None:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="{FONT}" role="img" aria-label="{title}">\n<title>{title}</title>\n'
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto-start-reverse">'
        f'<path d="M0 0L8 4L0 8z" fill="{LINE}"/></marker></defs>\n'
        f'<rect width="{width}" height="{height}" rx="10" fill="#ffffff"/>\n'
    )
    (Path(__file__).parent / f"{name}.svg").write_text(head + "\n".join(parts) + "\n</svg>\n")


def maps(x: float, y: float, channels: list[tuple[float, str, str]]) -> str:
    """A map as a bar, as wide as it has channels, centred at x."""
    left, drawn = x - sum(width for width, _, _ in channels) / 2, ""
    for width, fill, said in channels:
        drawn += box(left, y - 13, width - 2, 26, fill, said)
        left += width
    return drawn


def chain(
    x: float, top: float, rows: list[list[tuple[float, str, str]]], layers: list[str], *, side: float
) -> list[str]:
    """Maps below one another, with what computes the next beside the arrows."""
    drawn = []
    for place, row in enumerate(rows):
        y = top + STEP * place
        drawn.append(maps(x, y, row))
        if place:
            drawn += [
                path(f"M{x:g} {y - STEP + 14:g}V{y - 16:g}"),
                text(x + side, y - STEP / 2 + 5, layers[place - 1], fill=SOFT, anchor="start"),
            ]
    return drawn


def reserving_and_merging() -> None:
    c, h, top = 90.0, 130.0, 82.0
    x, y = (c, INPUT, "x"), (c, SUM, "y")
    left, right = 190.0, 560.0
    before = [[x], [(h, BRANCH, "f₁")], [(h, BRANCH, "act f₁")], [(c, BRANCH, "f₂")], [(c, SUM, "x + f₂")], [y]]
    after = [
        [x],
        [(c, INPUT, "x"), (h, BRANCH, "f₁")],
        [(c, INPUT, "x"), (h, BRANCH, "act f₁")],
        [(c, SUM, "x + f₂")],
        [y],
    ]
    bend, plus = left - 122, top + 4 * STEP
    corner = (
        f"H{bend + 12:g}Q{bend:g} {top:g} {bend:g} {top + 12:g}V{plus - 12:g}Q{bend:g} {plus:g} {bend + 12:g} {plus:g}"
    )
    way = f"M{left - 48:g} {top:g}{corner}H{left - 49:g}"
    parts = [
        text(left, 34, "a residual block", size=16, bold=True),
        text(right, 34, "the same function as a plain chain", size=16, bold=True),
        *chain(left, top, before, ["conv 1", "ReLU", "conv 2", "+", "ReLU"], side=10),
        path(way, stroke=INPUT, width=2.5),
        text(bend - 8, (top + plus) / 2, "x waits", fill=INPUT, anchor="end"),
        *chain(
            right,
            top,
            after,
            [
                "conv 1, and copies of x: reserving",
                "ReLU leaves the copies alone, as x ≥ 0",
                "conv 2 adds them up: merging",
                "ReLU",
            ],
            side=10,
        ),
        text(right, top + 5 * STEP - 14, "no addition, and every width is free", fill=SOFT),
    ]
    picture("reserving-and-merging", 860, 432, "A residual block, and the plain chain that computes the same", parts)


def kernels() -> None:
    parts = [
        text(150, 32, "conv 1", size=16, bold=True),
        text(150, 52, "C in, C + H out", fill=SOFT),
        box(100, 70, 98, 80, INPUT, "I"),
        box(100, 152, 98, 120, BRANCH, "W₁"),
        text(90, 115, "C rows", fill=SOFT, anchor="end"),
        text(90, 217, "H rows", fill=SOFT, anchor="end"),
        text(355, 32, "conv 2", size=16, bold=True),
        text(355, 52, "C + H in, C out", fill=SOFT),
        box(250, 122, 80, 98, INPUT, "S"),
        box(332, 122, 128, 98, BRANCH, "W₂"),
        text(290, 240, "the shortcut", fill=SOFT),
        text(396, 240, "as it was", fill=SOFT),
        text(640, 100, "a row of I", size=16, bold=True),
        text(640, 288, "1 where the output pixel’s own input lies, 0 elsewhere", fill=SOFT, size=13),
    ]
    for row in range(3):
        for column in range(3):
            own = row == column == 1
            parts.append(
                box(
                    578 + 42 * column,
                    120 + 42 * row,
                    40,
                    40,
                    INPUT if own else "#e6eaee",
                    "1" if own else "0",
                    ink="#ffffff" if own else SOFT,
                )
            )
    picture("kernels", 860, 308, "The weights of both convolutions, and the Dirac kernel of a reserved channel", parts)


def axes(x: float, y: float, said: str) -> list[str]:
    return [
        path(f"M{x - 110:g} {y:g}H{x + 160:g}", stroke=SOFT, width=1),
        path(f"M{x:g} {y + 40:g}V{y - 150:g}", stroke=SOFT, width=1),
        text(x + 10, 34, said, size=16, bold=True),
    ]


def passing() -> None:
    """Where ReLU and ReLU6 are the identity, and the map that brings a range there."""
    parts, y, unit = [], 210.0, 20.0
    for x, name, top in ((130.0, "ReLU", 7.2), (440.0, "ReLU6", 6.0)):
        parts += axes(x, y, name)
        flat = f"H{x + 155:g}" if name == "ReLU6" else ""
        parts += [
            path(f"M{x:g} {y:g}L{x + top * unit:g} {y - top * unit:g}", stroke=INPUT, width=10, arrow=False).replace(
                "/>", ' stroke-opacity=".25"/>'
            ),
            path(
                f"M{x - 105:g} {y:g}H{x:g}L{x + top * unit:g} {y - top * unit:g}{flat}",
                stroke=LINE,
                width=2.5,
                arrow=False,
            ),
        ]
    parts += [
        text(155, 270, "the identity from 0 on", fill=INPUT),
        text(465, 270, "the identity from 0 to 6", fill=INPUT),
        text(745, 34, "a range is brought there", size=16, bold=True),
        *(text(640, y, said, anchor="start", fill=SOFT) for y, said in ((88, "x"), (192, "a x + b"))),
        path("M640 120H880", stroke=SOFT, width=1, arrow=False),
        box(660, 112, 190, 16, INPUT),
        text(660, 146, "lo", fill=SOFT),
        text(850, 146, "hi", fill=SOFT),
        path("M660 150L710 206"),
        path("M850 150L810 206"),
        path("M640 220H880", stroke=SOFT, width=1, arrow=False),
        box(710, 212, 100, 16, INPUT),
        text(710, 246, "0", fill=SOFT),
        text(810, 246, "6", fill=SOFT),
        text(755, 270, "undone where they merge", fill=INPUT),
    ]
    picture("passing", 910, 292, "Where ReLU and ReLU6 are the identity, and how bounds bring a channel there", parts)


def grids() -> None:
    """A branch that begins with stride 2, beside a shortcut of one pixel and beside one that averages four."""
    parts = []
    for x, title, reads in (
        (70.0, "a shortcut of 1 x 1: the same pixels", [(0, 0)]),
        (480.0, "of 2 x 2: pixels that no copy has read", [(0, 0), (0, 1), (1, 0), (1, 1)]),
    ):
        parts.append(text(x + 113, 34, title, size=16, bold=True))
        parts += [box(x + 38 * column, 54 + 38 * row, 34, 34, "#e6eaee") for row in range(6) for column in range(6)]
        for row in range(0, 6, 2):
            for column in range(0, 6, 2):
                parts.append(dot(x + 17 + 38 * column, 71 + 38 * row, 6, INPUT))
                for down, right in reads:
                    centre = x + 17 + 38 * (column + right), 71 + 38 * (row + down)
                    parts.append(ring(*centre, 11, BRANCH if down or right else SUM))
    parts += [
        dot(140, 312, 6, INPUT),
        text(158, 317, "what the branch, a convolution of 1 x 1 with stride 2, can copy", anchor="start", fill=SOFT),
        ring(140, 340, 9, LINE),
        text(158, 345, "what the shortcut reads", anchor="start", fill=SOFT),
    ]
    picture("grids", 800, 366, "Pixels that copies and shortcut read, where they agree and where they do not", parts)


if __name__ == "__main__":
    for draw in (reserving_and_merging, kernels, passing, grids):
        draw()
