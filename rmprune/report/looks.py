"""How a method looks, in figures and on the page: no two of a report alike, told apart by colour and by marker."""

from typing import NamedTuple

import pandas as pd

# Told apart with every kind of colour vision, on white (page.css has the ones for the dark); a test measures it.
COLOURS = ("#1f7cde", "#f16200", "#16a157", "#7c098c", "#a23a00", "#7f92ae", "#6c3c29")
MARKERS = {"circle": "o", "square": "s", "triangle": "^", "down": "v", "plus": "P", "times": "X", "hexagon": "h"}
"""Name on the page -> matplotlib's."""
_KNOWN = {"dense": ("star", "*"), "plain": ("diamond", "D")}
SERIES_AT_ONCE = 8


class Look(NamedTuple):
    """`colour` for print, its `number` in COLOURS (None: dense and plain, black and grey), and the marker's two names."""

    colour: str
    number: int | None
    marker: str
    print_marker: str


def looks(methods: list[str]) -> dict[str, Look]:
    """The look of each method; the first seven besides dense and plain have colours and markers of their own."""
    found: dict[str, Look] = {}
    others = 0
    for method in methods:
        if method in _KNOWN:
            found[method] = Look("#000000" if method == "dense" else "#6b6b6b", None, *_KNOWN[method])
            continue
        turn, number = divmod(others, len(COLOURS))  # each turn pairs the colours with other markers
        marker = list(MARKERS)[(number + turn) % len(MARKERS)]
        found[method] = Look(COLOURS[number], number, marker, MARKERS[marker])
        others += 1
    return found


def ranked(data: pd.DataFrame) -> list[str]:
    """The methods of `tables.frame`, dense and plain first, then those with the most networks: the first are shown by default."""
    networks = data.drop_duplicates(["method", "budget", "seed", "model", "dataset"]).method.value_counts()
    return sorted(
        networks.index, key=lambda m: (list(_KNOWN).index(m) if m in _KNOWN else len(_KNOWN), -networks[m], m)
    )
