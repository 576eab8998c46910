"""The site as `make docs` builds it: every link holds, mathematics is rendered, and a reader needs no network."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

import fused_kd

for needed in ("mkdocs", "mkdocstrings", "griffe", "ziamath"):
    pytest.importorskip(needed)

from mkdocs.commands.build import build  # noqa: E402
from mkdocs.config import load_config  # noqa: E402

from tools.site import docstrings, hooks  # noqa: E402

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Every page by its name. The build fails if a link leads nowhere."""
    folder = tmp_path_factory.mktemp("site")
    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder), strict=True))
    return {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}


def texts(site):
    return {name: path.read_text(encoding="utf-8") for name, path in site.items() if name.endswith(".html")}


class Loaded(HTMLParser):
    """What a browser fetches for a page by itself."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        if tag == "link" and given.get("rel") not in ("canonical", "next", "prev"):
            self.found.append(given["href"])
        self.found += [given["src"]] if "src" in given else []


def test_nothing_comes_from_a_network(site):
    for name, text in texts(site).items():
        loaded = Loaded()
        loaded.feed(text)
        assert loaded.found and not [each for each in loaded.found if "//" in each], name
    for name in ("assets/site.css", "assets/iframe-worker.js"):
        assert "//" not in re.sub(r"^//.*$", "", site[name].read_text(), flags=re.MULTILINE)


def test_lists_are_lists(site):
    """Markdown on the site wants four columns in a list and a line between its paragraphs; else a step becomes text."""
    for name, text in texts(site).items():
        assert not re.findall(r"^[1-9]\. .*", re.sub(r"<pre.*?</pre>", "", text, flags=re.DOTALL), re.MULTILINE), name


def test_every_loss_has_a_page_with_its_formula(site):
    pages = texts(site)
    for loss in fused_kd.catalogue():
        page = pages[f"api/{loss.name}.html"]
        assert f'id="fused_kd.{loss.function}"' in page and f'id="fused_kd.{loss.module}"' in page
        assert '<div class="formula"><math' in page
        assert "Infinities and NaN" in page, "the docstring as it is completed"


def test_no_mathematics_is_left_as_it_was_written(site):
    for name, page in texts(site).items():
        shown = re.sub(r"<(pre|code|script|style)\b.*?</\1>", "", page, flags=re.DOTALL)
        assert not re.search(r'class="arithmatex"|:(?:math|func|class|meth):|\.\. math|\$\$|\\frac', shown), name


def test_the_search_has_every_page(site):
    index = json.loads(site["search/search_index.json"].read_text(encoding="utf-8"))
    found = {entry["location"].partition("#")[0] for entry in index["docs"]}
    assert found == {name for name in site if name.endswith(".html")} - {"404.html"}
    assert site["search/search_index.js"].read_text(encoding="utf-8").startswith("var __index = {")


def test_the_font_has_what_formulas_are_set_in(site):
    from fontTools.ttLib import TTFont

    font = TTFont(site["assets/math.woff"])
    assert "MATH" in font and {ord(each) for each in "∑αβγρℓ𝑝𝑞𝛽∉≠‖^~"} <= font.getBestCmap().keys()


def test_docstrings_become_markdown():
    given = """Of :math:`p,
    q` and :func:`fused_kd.nkd_loss`, :class:`torch.nn.Linear`, :class:`Head`:

    .. math::
        a
            + b

``part``
    :math:`x`, of
    two lines

Example:
    >>> 1
"""
    made = docstrings.markdown(given)
    assert "$p, q$" in made and "[`nkd_loss`][fused_kd.nkd_loss], `torch.nn.Linear`, [`Head`][fused_kd.Head]" in made
    assert "\n    $$a + b$$\n" in made
    assert "``part``\n:   $x$, of\n    two lines" in made
    assert "Examples:\n    >>> 1" in made


def test_formulas_become_mathml():
    assert hooks.mathml("a &lt; b", block=False).startswith("<math") and "&#x0003C;" in hooks.mathml("a &lt; b", False)
    assert "<mspace" in hooks.mathml(r"\log p", block=False)
    assert hooks.mathml("p", block=True).startswith('<div class="formula"><math')
