"""How the documentation is built: `make docs` writes docs/_build/html, and every warning is an error."""

from lightning_softprompt import __version__

project = "Lightning SoftPrompt"
copyright = "2026, the Lightning SoftPrompt authors"
version = release = __version__

extensions = [
    "myst_nb",  # Markdown and notebooks
    "sphinx.ext.apidoc",  # a page for each module
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",  # Google style docstrings
    "sphinx_copybutton",
]
INTERNAL = [  # what plug-ins and users have no need to call
    f"../lightning_softprompt/{part}"
    for part in (
        "backbones/execution", "backbones/generation", "backbones/insertion", "backbones/kernels", "cli", "distributed",
        "moved.py", "studies", "system",
    )
]  # fmt: skip
apidoc_modules = [
    {
        "path": "../lightning_softprompt",
        "exclude_patterns": INTERNAL,
        "destination": "api",
        "separate_modules": True,
        "module_first": True,
        "max_depth": 2,
        "automodule_options": {"members", "show-inheritance"},
    }
]
exclude_patterns = ["_build"]
source_suffix = {".md": "myst-nb", ".ipynb": "myst-nb", ".rst": "restructuredtext"}
nb_execution_mode = "off"  # the outputs of notebooks are stored
nb_merge_streams = True

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
default_role = "code"  # docstrings put names in single backticks
autodoc_default_options = {"ignore-module-all": True}  # re-exports are documented once, where they are defined
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
suppress_warnings = ["ref.python"]  # some names, such as DataError, are importable from two modules

html_theme = "furo"
html_title = "Lightning SoftPrompt"
