"""The documentation site: `bash .ci/docs` builds it into out/site, warnings as errors. docs/contributing/documentation.md says how.

Pages are the Markdown files of docs/ and of reports/ as they lie there, one notebook, and the docstrings of the public names. The site asks
for nothing from elsewhere: formulas are MathML, fonts the reader's own.
"""

import re
import shutil
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx import addnodes

ROOT = Path(__file__).parents[1]
BESIDE = ("index.html", "*.csv")  # what a link to a folder of figures shows: its page, or its table

project = "rmprune"
root_doc = "docs/index"
include_patterns = ["docs/**", "reports/**.md", "CONTRIBUTING.md", "CHANGELOG.md"]
extensions = ["myst_nb", "sphinx.ext.autodoc"]
html_theme = "furo"
html_title = "rmprune"
html_theme_options = {"light_css_variables": {"font-stack": "system-ui, sans-serif"}}
html_show_sphinx = html_show_copyright = html_copy_source = False
html_static_path, html_css_files = ["style"], ["notebook.css"]
html_math_renderer = "mathml"

default_role = "literal"  # docstrings have single backticks
autodoc_member_order = "bysource"
autodoc_class_signature = "separated"
python_display_short_literal_types = True
python_maximum_signature_line_length = 100
myst_heading_anchors = 3
myst_enable_extensions = ["dollarmath"]
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 120


def mathml(writer: Any, node: nodes.Element) -> None:
    """A formula as MathML, which browsers draw by themselves."""
    block = isinstance(node, nodes.math_block)
    writer.body.append(tex2mathml(node.astext(), as_block=block))
    raise nodes.SkipNode


def titled(app: Any, name: str, source: list[str]) -> None:
    """A table of reports/ that has no heading gets its path."""
    if name.startswith("reports/") and "\n# " not in f"\n{source[0]}":
        source[0] = f"# {name.removeprefix('reports/')}\n\n{source[0]}"


def folders(app: Any, doctree: nodes.document) -> None:
    """A link to a folder of figures leads to its page or its table, which is copied beside."""
    for link in list(doctree.findall(addnodes.pending_xref)):
        place = ROOT / Path(app.env.docname).parent / link["reftarget"]
        found = [file for name in BESIDE for file in sorted(place.glob(name))] if link["reftype"] == "myst" else []
        if found:
            copy = Path(app.outdir) / found[0].relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(found[0], copy)
            link.replace_self(nodes.reference("", "", *link.children, refuri=f"{link['reftarget']}/{found[0].name}"))


def start(app: Any, error: Exception | None) -> None:
    """The first page of the folder leads to that of docs/."""
    leads = f'<!doctype html><meta http-equiv="refresh" content="0; url={root_doc}.html"><a href="{root_doc}.html">rmprune</a>'
    (Path(app.outdir) / "index.html").write_text(leads)


def paragraphs(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """In a docstring a line `name: what it is` begins a paragraph of its own."""
    for place in range(len(lines) - 1, 0, -1):
        if re.match(r"`?\w+`?(, `?\w+`?)*: \w", lines[place]):
            lines.insert(place, "")


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.add_html_math_renderer("mathml", (mathml, None), (mathml, None))
    app.connect("autodoc-process-docstring", paragraphs)
    app.connect("source-read", titled)
    app.connect("doctree-read", folders)
    app.connect("build-finished", start)
