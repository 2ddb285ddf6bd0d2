"""Sphinx: https://www.sphinx-doc.org/en/master/usage/configuration.html"""

import os
import re
from pathlib import Path

from sphinx.application import Sphinx

import sb3_seer

project = "sb3_seer"
author = copyright = "The sb3_seer contributors"
version = release = sb3_seer.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.intersphinx", "sphinx_copybutton"]
exclude_patterns = ["_build"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = f"sb3_seer {version}"
html_static_path = ["_static"]
html_css_files = ["tables.css"]
templates_path: list[str] = []
# Commands are copied without their output
copybutton_exclude = ".linenos, .gp, .go"

autodoc_member_order = "bysource"
autodoc_typehints = "none"
# Links to the documentation of others: fetched where the site is built, so that "make docs" needs no network
if os.environ.get("READTHEDOCS"):
    intersphinx_mapping = {
        "python": ("https://docs.python.org/3", None),
        "torch": ("https://docs.pytorch.org/docs/stable", None),
        "stable_baselines3": ("https://stable-baselines3.readthedocs.io/en/master", None),
        "sb3_contrib": ("https://sb3-contrib.readthedocs.io/en/master", None),
    }

# Pages that are files elsewhere in the repository
FILES = {"changelog": "CHANGELOG.md", "contributing": "CONTRIBUTING.md", "results": "benchmarks/results/README.md"}


def read_file(app: Sphinx, docname: str, source: list[str]) -> None:
    """Put the file in place of the page, with its relative links seen from here."""
    if docname in FILES:
        file = Path("..") / FILES[docname]
        text = (Path(app.srcdir) / file).read_text()
        source[0] = re.sub(r"\]\((?!\w+:|#)", f"]({file.parent.as_posix()}/", text)
        app.env.note_dependency(str(Path(app.srcdir) / file))


def setup(app: Sphinx) -> None:
    app.connect("source-read", read_file)
