"""One self-contained HTML page of a report: figures, tables, where it was measured and the command. No scripts,
nothing fetched.
"""

import html
import re
from pathlib import Path
from typing import Any

import pandas as pd

from rmprune.report.tables import amount, configuration_label, measured_apart, milliseconds, refusals, relative

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 1080px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
figure { margin: 1rem 0; } figure svg { width: 100%; height: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .5rem 0 1.5rem; }
th, td { padding: .25rem .8rem; text-align: right; border-bottom: 1px solid #e4e4e4; }
th { color: #555; font-weight: 600; } th:first-child, td:first-child { text-align: left; }
th:nth-child(2), td:nth-child(2) { text-align: left; }
code { background: #f4f4f4; padding: .15rem .35rem; border-radius: 3px; overflow-wrap: anywhere; }
pre { white-space: pre-wrap; }
.note { color: #555; }
"""


def page(data: pd.DataFrame, figures: dict[str, Path], records: list[dict[str, Any]], command: str) -> str:
    """The page as HTML text. `figures`: title to SVG file; of the records come where they were measured and what was left out."""
    parts = ["<h1>Accuracy against measured time</h1>"]
    for title, path in figures.items():
        parts.append(f"<figure aria-label='{html.escape(title, quote=True)}'>{_inline(path)}</figure>")
    parts.append(
        "<p class=note>A point is the mean over seeds; horizontal whiskers are the quartiles of the measured time, "
        "vertical "
        "ones the standard deviation over seeds. Ratios are against the dense network, measured in the same "
        "process.</p>"
    )
    if measured_apart(data):
        parts.append(
            "<p class=note>The records were measured under different conditions: the dense network's own time differs between "
            "them. Milliseconds do not compare across them, ratios do; <code>python -m rmprune measure RUNS</code> "
            "measures all of them again, in turns.</p>"
        )
    for (model, dataset), part in data.groupby(["model", "dataset"], sort=False, dropna=False):
        parts += _section(f"{model} on {dataset}", part)
    if left_out := list(dict.fromkeys(line for record in records for line in refusals(record))):
        parts.append("<h2>Left out</h2>")
        parts += [f"<p>{html.escape(line)}</p>" for line in left_out]
    parts.append("<h2>Measured on</h2>")
    places = dict.fromkeys(_place(record["environment"]) for record in records)
    parts += [f"<p>{html.escape(place)}</p>" for place in places]
    parts.append(f"<h2>Made by</h2><pre><code>{html.escape(command)}</code></pre>")
    body = "\n".join(parts)
    return (
        "<!doctype html>\n<html lang=en><head><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>rmprune report</title><style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def _section(title: str, data: pd.DataFrame) -> list[str]:
    """A heading, and for each configuration a table with everything relative to the dense network."""
    parts = [f"<h2>{html.escape(title)}</h2>"]
    headings = ["method", "budget", "accuracy", "points", "MACs", "of dense", "parameters", "ms", "of dense", "seeds"]
    for key, rows in relative(data).groupby(["backend", "device", "threads", "batch_size"], sort=False):
        parts.append(f"<h3>{html.escape(configuration_label(key))}</h3><table><tr>")
        parts += [f"<th>{heading}</th>" for heading in headings]
        for row in rows.to_dict("records"):
            cells = [
                str(row["method"]),
                str(row["budget"]),
                f"{row['accuracy']:.2%}" + (f" ± {row['accuracy_spread'] * 100:.2f}" if row["seeds"] > 1 else ""),
                f"{row['accuracy_change']:+.2f}",
                amount(row["macs"]),
                f"{row['macs_ratio']:.2f}",
                f"{row['params_ratio']:.2f}",
                milliseconds(row["median_ms"]),
                f"{row['ratio']:.2f}",
                str(row["seeds"]),
            ]
            parts.append("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells))
        parts.append("</table>")
    return parts


def _inline(path: Path) -> str:
    """The <svg> element of a file, without the declaration that only a file of its own may have."""
    text = path.read_text()
    return re.sub(r"^.*?(?=<svg)", "", text, count=1, flags=re.DOTALL)


def _place(environment: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in environment.get("versions", {}).items())
    gpu = f", {environment['gpu']}" if environment.get("gpu") else ""
    cores = environment.get("cores")
    return f"{environment.get('processor')}{f', {cores} cores' if cores else ''}{gpu}: {versions}"
