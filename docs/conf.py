"""The documentation: MyST Markdown by Sphinx, the reference from the docstrings. ``make docs`` builds it."""

import fastkd

project = "fastkd"
version = release = fastkd.__version__
copyright = "the fastkd authors, Apache-2.0"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = f"fastkd {version}"
html_show_sourcelink = False
autodoc_typehints = "none"  # docstrings say shapes and dtypes, which say more
autodoc_member_order = "bysource"
napoleon_google_docstring = True
nitpick_ignore_regex = [
    ("py:.*", ".*")
]  # docstrings name types and functions in plain code; Markdown links are checked
exclude_patterns = ["examples/*"]
