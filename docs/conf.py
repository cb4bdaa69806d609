"""Sphinx configuration: `sphinx-build -n -W -b html docs docs/_build/html`. The build needs no network.

Napoleon renders the docstrings rather than the numpydoc extension, because it knows custom sections such as "Shapes".
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import generate

import nnx

generate.main()

project = "nnx"
author = "the authors of nnx"
version = release = nnx.__version__
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
]
exclude_patterns = ["_build", "_generated/*.inc.md"]
templates_path = ["_templates"]
nitpicky = True
smartquotes = False  # options such as --help keep their dashes
default_role = "literal"

autosummary_generate = True
autodoc_default_options = {"members": True}
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "none"  # the docstrings have types in words
napoleon_use_param = False  # types in words are no cross-references
napoleon_custom_sections = [
    "Shapes",
    *((name, "params_style") for name in ("Attributes", "Raises", "Returns")),
]

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 120
nb_merge_streams = True

html_title = f"nnx {release}"
html_theme = "pydata_sphinx_theme"
html_static_path = ["_static"]
html_css_files = ["nnx.css"]
html_theme_options = {
    "logo": {"text": "nnx"},
    "show_toc_level": 2,
    "navbar_align": "left",
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": [],
}
html_sidebars = {"index": [], "start": [], "chapter1": []}  # sections of a single page
html_show_sourcelink = False
html_show_copyright = False


def skip(app, what, name, member, *rest):
    """Leave out what estimators inherit from scikit-learn: those docstrings refer to its own site."""
    return True if str(getattr(member, "__module__", "")).startswith("sklearn") else None


def setup(app):
    """Connect `skip`."""
    app.connect("autodoc-skip-member", skip)
