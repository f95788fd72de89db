"""Sphinx configuration: `make docs` builds docs/*.md and the API reference into build/docs."""

import importlib.metadata
from pathlib import Path

from sphinx.application import Sphinx

ROOT = Path(__file__).parents[1]
ROOT_PAGES = {
    "architecture": "ARCHITECTURE.md",
    "contributing": "CONTRIBUTING.md",
    "changelog": "CHANGELOG.md",
}
"""Pages of the site that lie in the repository's root, where GitHub looks for them."""

project = "brainray"
release = importlib.metadata.version("brainray")
html_title = f"brainray {release}"

extensions = [
    "myst_parser",
    "numpydoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
]
templates_path = ["_templates"]
html_theme = "pydata_sphinx_theme"
html_theme_options = {"show_prev_next": False, "secondary_sidebar_items": ["page-toc"]}

myst_enable_extensions = ["deflist"]
myst_heading_anchors = 4
suppress_warnings = ["misc.highlighting_failure"]  # console blocks that end in `…`

autosummary_generate = True
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
numpydoc_show_class_members = False


def read_root_page(_app: Sphinx, name: str, source: list[str]) -> None:
    """Replace a page's text by that of a file in the root, with links as seen from docs/."""
    if name not in ROOT_PAGES:
        return
    text = (ROOT / ROOT_PAGES[name]).read_text().replace("](docs/", "](")
    for page, file in ROOT_PAGES.items():
        text = text.replace(f"]({file})", f"]({page}.md)")
    source[0] = text


def setup(app: Sphinx) -> None:
    """Connect to the event at which pages are read."""
    app.connect("source-read", read_root_page)
