"""Every block of Python in docs/ runs: the named ones in tests of their own, the others page by page, as they stand."""

import re
from pathlib import Path

import pages
import pytest
import torch

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("page", [page for page in pages.PAGES if pages.unnamed(page)], ids=lambda page: page.stem)
def test_the_blocks_of_a_page_run_one_after_the_other(page):
    names = {"__name__": f"docs_{page.stem}"}
    for number, block in enumerate(pages.unnamed(page), 1):
        exec(compile(block, f"{page.name}, block {number}", "exec"), names)


def test_a_test_of_its_own_runs_each_named_block():
    ran = {name for path in HERE.glob("test_*.py") for name in re.findall(r'snippet\("(\w+)"\)', path.read_text())}
    assert ran == set(pages.snippets())


def test_no_block_of_python_is_passed_over():
    """Another fence, or another word for the language, would be shown and never run."""
    for page in pages.PAGES:
        text = page.read_text(encoding="utf-8")
        shown = len(re.findall(r"^ *(?:```|~~~) *\{?\.?(?:python|py|pycon)\b", text, flags=re.MULTILINE))
        named = sum(f"<!-- {name} -->\n```python" in text for name in pages.snippets())
        assert shown == named + len(pages.unnamed(page)), page
