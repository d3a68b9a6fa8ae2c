"""The site: ``make docs`` writes it to docs/_build/html; nothing of it is fetched from elsewhere."""

import gc
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from docutils import nodes  # noqa: E402
from docutils.utils.math.latex2mathml import tex2mathml  # noqa: E402

from docs.generate.pages import write_all  # noqa: E402
from docs.generate.text import relinked  # noqa: E402

project = "repr"
copyright = "the authors of repr; Apache-2.0"  # noqa: A001
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "generate"]

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 4
nb_execution_mode = "off"  # a test executes them; the site shows the outputs that they hold

smartquotes = False  # they would make a dash of --show
add_module_names = False
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 88
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_custom_sections = [("Args of the flows that take them", "params_style")]
napoleon_use_rtype = False
toc_object_entries_show_parents = "hide"

html_math_renderer = "mathml"  # MathJax would come from a CDN
html_theme = "furo"
html_title = "repr"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_extra_path = ["generated/llms.txt"]
html_show_sourcelink = False
html_copy_source = False
html_theme_options = {"source_view_link": "", "footer_icons": []}


def _relinked(app, name, source):
    if not name.startswith("generated/"):
        folder = (Path(app.srcdir) / name).parent
        source[0] = relinked(source[0], folder, folder)


def _short_navigation(app, name, template, context, doctree):
    """Let the sidebar open the branch of its page alone: all branches on all pages are most of the time of a build."""
    whole = context["toctree"]
    context["toctree"] = lambda **options: whole(**options | {"collapse": True})


def _math(self, node):
    """Write a formula as MathML, which browsers draw by themselves."""
    self.body.append(tex2mathml(node.astext(), as_block=isinstance(node, nodes.math_block)))
    raise nodes.SkipNode


def setup(app):
    """Write the generated pages, and lead links of hand-written ones to them."""
    write_all()
    gc.disable()  # it would look through all nodes of all pages again and again
    app.add_html_math_renderer("mathml", (_math, None), (_math, None))
    app.connect("source-read", _relinked)
    app.connect("html-page-context", _short_navigation, priority=400)  # before the theme's
