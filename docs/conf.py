"""The documentation: `pip install -e ".[docs]"`, then `sphinx-build -W docs build/docs`. Nothing is downloaded."""

import effkernels

project = "effkernels"
author = "the authors of effkernels"
version = release = effkernels.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["samples"]
html_theme = "furo"
html_title = f"effkernels {release}"

myst_heading_anchors = 3  # links to headings, as GitHub has them
default_role = "code"
autodoc_default_options = {"exclude-members": "forward, fused, models, ops, read_parts, unfused"}
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # signatures have them; docstrings say more
napoleon_custom_sections = [("Shape", "notes_style")]
