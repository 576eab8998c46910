"""Every block of Python in docs/ runs: the named ones in tests of their own, the others page by page, as they stand."""

import inspect
import re
import textwrap
from pathlib import Path

import pages
import pytest
import torch

from fused_kd import reference

HERE = Path(__file__).parent
COLUMNS = 84  # what the site shows without a scroll bar


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


def test_the_loss_that_contributing_adds():
    text = (pages.DOCS.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^ *```python\n(.*?)```", text, flags=re.DOTALL | re.MULTILINE)
    names = {}
    exec(compile(textwrap.dedent(block), "CONTRIBUTING.md", "exec"), names)
    parameters = inspect.signature(names["trusted_kd_loss"]).parameters
    assert parameters.keys() - {"power"} == inspect.signature(reference.kd_loss).parameters.keys()
    student, teacher = torch.randn(2, 6, 9, dtype=torch.float64)
    target = torch.randint(9, (6,))
    loss, parts = names["trusted_kd_loss"](student, teacher, target, power=0.5, temperature=2.0, ce_weight=0.3)
    log_p, q = (student / 2).log_softmax(1), (teacher / 2).softmax(1)
    rows = q.gather(1, target[:, None]).squeeze(1) ** 0.5 * 4 * (q * (q.log() - log_p)).sum(1)
    torch.testing.assert_close(parts.distillation, rows.mean())
    torch.testing.assert_close(loss, rows.mean() + 0.3 * torch.nn.functional.cross_entropy(student, target))


def test_no_block_of_python_is_passed_over():
    """Another fence, or another word for the language, would be shown and never run."""
    for page in pages.PAGES:
        text = page.read_text(encoding="utf-8")
        blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
        assert not [line for block in blocks for line in block.splitlines() if len(line) > COLUMNS], page
        shown = len(re.findall(r"^ *(?:```|~~~) *\{?\.?(?:python|py|pycon)\b", text, flags=re.MULTILINE))
        named = sum(f"<!-- {name} -->\n```python" in text for name in pages.snippets())
        assert shown == named + len(pages.unnamed(page)), page
