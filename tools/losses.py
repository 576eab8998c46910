"""``python -m tools.losses`` writes docs/losses.md and the README's table of losses from the catalogue."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from benchmarks.show.report import replace_block
from fused_kd.backends.topk import DENSE
from fused_kd.core.catalogue import LOSSES, ROW_LOSSES, has_column_term

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- losses:begin -->", "<!-- losses:end -->"

NOTATION = """`p`, `q` and `v` are the softmax of the student's, the teacher's and the weak logits. `y` is the target
class and `Y` the set of targets of a mixed label. A hat means the softmax over the other classes, at temperature T.
Every loss adds `ce_weight` times the ordinary cross-entropy in the same pass. `python -m tools.losses` writes this
page."""
SOURCES = """The table shows what a loss accepts in place of a matrix of logits, on the CPU (native) and on a GPU
(Triton). For most losses and values of `rest=` a kernel reads only the classes that a `TopK` teacher has. In two cases
the teacher is made dense instead, a chunk of rows at a time, and the ordinary kernel runs: for the values in brackets,
and for `"renormalize"` and `"uniform"` with probability targets of sharded classes. No kernel supports `"drop"` and
`"bucket"` with probability targets of sharded classes: `backend="auto"` then takes the reference and warns.
Jensen–Shannon is not defined for `"drop"`, nor DIST for `"drop"` and `"bucket"`: such a call raises an error.
`fused_kd.explain` shows what a call would run."""
SHARED = """All losses also take `ignore_index=-100`, `reduction="mean"`, `weight=None` (a tensor, one weight per row),
`normalizer=None` (a number or tensor that replaces the mean's divisor), `class_dim=None` (the last dimension; required
for logits of four or more dimensions), `backend="auto"` and `return_parts=False`. All but USKD and Zipf's LS take
`num_classes=None` (how many columns are classes; the rest is padding). `fused_kd.decompose` returns the parts of KD,
NKD and DKD side by side, for ablations."""

PUBLISHED = """The tests expect the values and gradients that these implementations give in float64, on every backend.
Where one of them differs from its paper, [migration](migration.md) says so."""


def markdown_table() -> str:
    """Markdown table of the losses, for README.md and docs/losses.md; a test checks that both are up to date."""
    lines = ["| loss | function, module | per row | paper |", "|---|---|---|---|"]
    for loss in LOSSES.values():
        formula = re.sub(r"_\{([^}]*)\}|_(\w)", r"<sub>\1\2</sub>", loss.formula)
        cells = (loss.title, f"`{loss.function}`, `{loss.module}`", formula, loss.paper)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def kernels_table() -> str:
    """Markdown table of the backends with a kernel for each loss, by device."""
    lines = ["| loss | fused on the CPU | on CUDA |", "|---|---|---|"]
    for loss in LOSSES.values():
        fused = [", ".join(name for name in names if name != "reference") for names in loss.backends.values()]
        lines.append("| " + " | ".join((loss.title, *(text or "no" for text in fused))) + " |")
    return "\n".join(lines)


def sources_table() -> str:
    """Markdown table of the sources that each loss accepts in place of logits."""
    lines = ["| loss | `Head` | `ClassShard`, DTensor | `TopK` teacher, for `rest=` |", "|---|---|---|---|"]
    for name, loss in LOSSES.items():
        yes = "with `gamma=0`" if has_column_term(name) else "yes"
        cells = [yes if source in loss.sources else "no" for source in ("Head", "ClassShard")]
        rests = "no"
        if "TopK" in loss.sources:
            fused = ROW_LOSSES[name].rests
            whole = [f"(`{rest}`)" for rest in DENSE if rest not in fused]
            rests = ", ".join((*(f"`{rest}`" for rest in fused), *whole, *([yes] if yes != "yes" else [])))
        lines.append("| " + " | ".join((loss.title, *cells, rests)) + " |")
    return "\n".join(lines)


def published_list() -> str:
    """Markdown list of the published implementations that the tests compare with."""
    return "\n".join(
        f"- {loss.title}: [{loss.published}](https://github.com/{loss.published})"
        if loss.published
        else f"- {loss.title}: values of none; the tests compare with the formula in float64"
        for loss in LOSSES.values()
    )


def markdown_page() -> str:
    """docs/losses.md: the table of losses, their defaults, the sources they accept, their kernels, and where their
    values come from."""
    text = f"# The losses\n\n{NOTATION}\n\n{markdown_table()}\n\n## Defaults\n\n"
    for loss in LOSSES.values():
        options = ", ".join(f"{name}={value!r}" for name, value in loss.defaults.items())
        text += f"- `{loss.function}({options})`\n"
    text += f"\n{SHARED}\n\n## Sources\n\n{SOURCES}\n\n{sources_table()}\n"
    text += f"\n## Kernels\n\n{kernels_table()}\n"
    return text + f"\n## Published implementations\n\n{PUBLISHED}\n\n{published_list()}\n"


def main() -> int:
    replace_block(ROOT / "README.md", BEGIN, END, markdown_table())
    (ROOT / "docs" / "losses.md").write_text(markdown_page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
