"""MkDocs hooks: pages from outside docs/, mathematics as MathML, and its font."""

from __future__ import annotations

import html
import io
import re
from importlib import resources
from pathlib import Path

from fontTools import subset
from fontTools.ttLib import TTFont
from latex2mathml import converter
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import fused_kd

ROOT = Path(__file__).parents[2]
#: Files outside docs/ that are pages of the site too, and the pages' names.
BESIDE = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md", "benchmarks/README.md": "measuring.md"}
#: More entries of a loss's reference page, after its function and module.
FURTHER = {"uskd": ("uskd_soft_labels",)}
#: Latin, accents, Greek, primes, script l, arrows, operators, and mathematical italics.
RANGES = (
    *((0x20, 0x7E), (0xA0, 0xB7), (0x2C6, 0x2DC), (0x300, 0x308), (0x391, 0x3C9), (0x2016, 0x2034), (0x2113, 0x2113)),
    *((0x2190, 0x2193), (0x2200, 0x226B), (0x22A4, 0x22C5), (0x1D434, 0x1D467), (0x1D6E2, 0x1D71B)),
)
_MATH = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.S)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the pages of the losses into the navigation, after the page of all losses."""
    (pages,) = (section["Losses"] for section in config.nav or () if "Losses" in section)
    pages[1:1] = [f"api/{loss.name}.md" for loss in fused_kd.catalogue()]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for loss in fused_kd.catalogue():
        names = (loss.function, loss.module, *FURTHER.get(loss.name, ()))
        text = f"# {loss.title}\n\n{loss.paper}. In code its name is `{loss.name}`.\n\n"
        text += "\n\n".join(f"::: fused_kd.{name}" for name in names)
        files.append(File.generated(config, f"api/{loss.name}.md", content=f"{text}\n"))
    for path, name in BESIDE.items():
        files.append(File.generated(config, name, abs_src_path=str(ROOT / path)))
    files.append(File.generated(config, "assets/math.woff", content=_font()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Replace links from docs/ to files outside it, and from these to docs/, by links to their pages of the site."""
    for path, name in BESIDE.items():
        markdown = markdown.replace(f"](../{path}", f"]({name}")
    return markdown.replace("](docs/", "](")


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    return _MATH.sub(lambda found: mathml(found[2], found[1] == "div"), html)


def mathml(escaped: str, block: bool) -> str:
    """Convert TeX from arithmatex to MathML; add the space after a logarithm that the converter omits."""
    text = re.sub(r"\\log\b", r"\\log\\,", html.unescape(escaped).strip())
    made = converter.convert(text, display="block" if block else "inline")
    return f'<div class="formula">{made}</div>' if block else made


def _font() -> bytes:
    """STIX Two Math from ziamath's distribution, under the Open Font License, reduced to RANGES."""
    font = TTFont(io.BytesIO((resources.files("ziamath.fonts") / "STIXTwoMath-Regular.ttf").read_bytes()))
    options = subset.Options(flavor="woff", layout_features=["*"], name_IDs=["*"], notdef_outline=True)
    chosen = subset.Subsetter(options)
    chosen.populate(unicodes=[code for first, last in RANGES for code in range(first, last + 1)])
    chosen.subset(font)
    font.flavor = "woff"
    made = io.BytesIO()
    font.save(made)
    return made.getvalue()
