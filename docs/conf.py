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
html_theme_options = {
    "header_links_before_dropdown": 8,
    "secondary_sidebar_items": ["page-toc"],
    "show_prev_next": False,
}
html_sidebars = {"*": []}  # guides have no pages below them; those of the reference have

myst_enable_extensions = ["deflist"]
myst_heading_anchors = 4
suppress_warnings = [
    "misc.highlighting_failure",  # console blocks that end in `…`
    "ref.python",  # annotations whose short name two modules have
]

autosummary_generate = True
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
add_module_names = False
numpydoc_show_class_members = False


def read_root_page(_app: Sphinx, name: str, source: list[str]) -> None:
    """Replace a page's text by that of a file in the root, with links as seen from docs/."""
    if name not in ROOT_PAGES:
        return
    text = (ROOT / ROOT_PAGES[name]).read_text().replace("](docs/", "](")
    for page, file in ROOT_PAGES.items():
        text = text.replace(f"]({file})", f"]({page}.md)")
    source[0] = text


def keep_aliases(
    _app: Sphinx,
    _what: str,
    _name: str,
    _obj: object,
    _options: object,
    args: str | None,
    _: object,
) -> tuple[None, None] | None:
    """Keep numpydoc from giving an alias the signature of its origin, which autodoc 9 rejects."""
    return (None, None) if args is None else None


def setup(app: Sphinx) -> None:
    """Connect to Sphinx's events."""
    app.connect("source-read", read_root_page)
    app.connect("autodoc-process-signature", keep_aliases, priority=400)  # before numpydoc's 500
