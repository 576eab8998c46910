"""The study's page: what it says of orders, rates and ablations is what the records say."""

from pathlib import Path

import pytest
from study_results import ACCURACY, RATE, SEEDS, TASK, TEXT, made_up, put, searched

pytest.importorskip("matplotlib")

from study.comparison import ablations, findings, page, plan
from study.comparison.ablations import Ablation, Variant
from study.comparison.records import Records
from study.training.errors import RunError

ROOT = Path(__file__).resolve().parents[2]


def text_of(records):
    return page.markdown(page.views_of(records), records.cost, "study", "make study")


def rows(text, beginning):
    return [line for line in text.splitlines() if line.startswith(f"| {beginning} |")]


def test_what_is_missing_is_said():
    records = made_up()
    for method, seed in (("uskd", 1), ("nkd", 2)):
        del records.runs[TASK.name][plan.Spec(TASK.name, method, RATE, seed).key]
    assert "these runs are missing: glyphs, CNN: NKD with seed 2, USKD with seed 1." in text_of(records)
    assert "missing" not in text_of(made_up())


def test_each_task_has_its_own_seeds():
    records = made_up(tasks=(TASK, TEXT))
    for method in plan.METHODS:
        if method != "nkd":
            del records.runs[TASK.name][plan.Spec(TASK.name, method, RATE, 2).key]
    assert "missing: glyphs, CNN: baseline with seed 2, " in text_of(records)
    del records.runs[TASK.name][plan.Spec(TASK.name, "nkd", RATE, 2).key]
    text = text_of(records)
    assert "missing" not in text and "with 8 losses, each with 2 to 3 seeds" in text


def test_page_says_where_the_order_shows_and_where_not():
    text = text_of(made_up())
    assert "Of the 14 pairs that the paper ranks, over 1 task, 14 agree with its order, 0 disagree" in text
    # KD worse than the baseline in every seed, DKD here and there.
    records = made_up({**ACCURACY, "kd": 69.0}, {"dkd": (-3.0, 0.0, 3.0), "kd": (0.01, 0.0, 0.02)})
    text = text_of(records)
    kd, dkd, nkd = (rows(text, f"{name} over baseline")[-1] for name in ("KD", "DKD", "NKD"))
    assert kd.endswith("| **disagrees** |") and dkd.endswith("| undecided |") and nkd.endswith("| agrees |")
    assert "glyphs, CNN: of 14 pairs" in text and "2 disagree, and 3 are undecided" in text


def test_outcome_has_every_task():
    text = findings.outcome(page.views_of(made_up(tasks=(TASK, TEXT))))
    assert rows(text, "points of accuracy") == ["| points of accuracy | glyphs, CNN | text, GRU |"]
    assert rows(text, "NKD over baseline") == ["| NKD over baseline | +4.00 ± 0.00 | +4.00 ± 0.00 |"]
    assert rows(text, "USKD over label smoothing") == ["| USKD over label smoothing | +2.00 ± 0.00 | +2.00 ± 0.00 |"]
    assert "- **Best with a teacher**, over the baseline: NKD on glyphs, CNN (+4.00 ± 0.00); NKD on" in text
    assert "- **Best without one**, over the baseline: USKD on glyphs, CNN (+3.00 ± 0.00); USKD on" in text
    assert text.splitlines()[-1] == (
        "Of the 25 pairs that the paper ranks, over 2 tasks, 25 agree with its order, 0 disagree, and 0 are undecided; "
        "the 95 % intervals are ±0.00 to ±0.00 points, ±0.00 in the median."
    )


def test_a_task_without_a_method_says_so():
    text = text_of(made_up(tasks=(TASK, TEXT)))
    assert rows(text, "USKD over Zipf's LS")[0].endswith("| – | not of this task |")
    assert "perplexity" in text and "2.72 ± 0.00" in text


def test_own_rates_have_a_table_of_their_own():
    records = made_up()
    assert "own rate" not in text_of(records)
    for method in plan.METHODS:
        searched(records, TASK, method, {0.1: 68.0, 0.2: 70.0, 0.4: 69.0})
    searched(records, TASK, "nkd", {0.4: 75.0})
    for seed in SEEDS:
        put(records, 60.0 + seed, "nkd", seed, lr=0.4)
    text = text_of(records)
    row = next(row for row in rows(text, "NKD") if " ± " in row)
    assert row.endswith("| 0.4 | 61.00 ± 1.00 |")
    _, shared, own = rows(text, "NKD over baseline")
    assert shared.endswith("| agrees |") and own.endswith("| **disagrees** |")


def test_convergence_and_room_are_told():
    records = made_up()
    for seed in SEEDS:
        put(records, 71.0 + 0.3 * seed, "ce", seed, longer=2)
    text = text_of(records)
    row = next(row for row in rows(text, "glyphs, CNN") if "68.00 / 70.00 / 69.00" in row)
    # The last of four epochs adds 0.5; the teacher of 80 is over a mean of 70.3.
    assert row == "| glyphs, CNN | 0.2 | 68.00 / 70.00 / 69.00 | +0.50 | 0.30 | +9.70 |"
    assert "the baseline has not converged on glyphs, CNN: the last quarter" in text
    wide = text_of(made_up(wobble={"ce": (0.0, 1.0, 2.0)}))
    assert "not converged" not in wide


def test_longer_training_is_told():
    assert "Longer training" not in text_of(made_up())
    records = made_up()
    for factor, accuracy in ((2, 71.0), (4, 73.0)):
        for seed in SEEDS:
            put(records, accuracy + 0.3 * seed, "ce", seed, longer=factor)
    for seed in SEEDS:
        put(records, 74.0 + 0.3 * seed, "uskd", seed, longer=4)
    assert rows(text_of(records), "glyphs, CNN")[-4:-1] == [
        "| glyphs, CNN | 4 | 3 | 70.30 ± 0.30 | – | +0.50 | +3.00 ± 0.00 |",
        "| glyphs, CNN | 8 | 3 | 71.30 ± 0.30 | +1.00 ± 0.00 | +0.50 | – |",
        "| glyphs, CNN | 16 | 3 | 73.30 ± 0.30 | +2.00 ± 0.00 | +0.50 | +1.00 ± 0.00 |",
    ]


def test_ablations_compare_with_the_studys_own_setting(monkeypatch):
    variants = (Variant("γ = 1", ("gamma=1",)), Variant("γ = 1.5"))
    monkeypatch.setattr(
        findings, "ABLATIONS", (Ablation("x", "NKD's weight γ", "Table 10", "nkd", variants, (TASK.name,)),)
    )
    records = made_up()
    for seed in SEEDS:
        put(records, 73.0 + 0.3 * seed, "nkd", seed, settings=("gamma=1",))
    text = text_of(records)
    assert rows(text, "γ = 1") == ["| γ = 1 | 73.30 ± 0.30 (−1.00 ± 0.00) |"]
    assert rows(text, "γ = 1.5") == ["| γ = 1.5 | 74.30 ± 0.30 |"]
    assert rows(text, "NKD's weight γ") == ["| NKD's weight γ | 1 worse |"]
    put(records, 76.0, "nkd", 0, settings=("gamma=1",))
    assert rows(text_of(records), "NKD's weight γ") == ["| NKD's weight γ | 1 undecided |"]


def test_ablations_have_the_studys_own_setting_among_their_variants():
    for ablation in ablations.ABLATIONS:
        assert [variant.settings for variant in ablation.variants].count(()) == 1, ablation.name
        assert set(ablation.tasks) <= set(plan.TASKS)


def test_different_data_are_told():
    records = made_up()
    assert "different data" not in text_of(records)
    put(records, 70.0, "ce", 0, data="4567")
    assert "runs of glyphs, CNN were made with different data" in text_of(records)


def test_page_shows_the_published_figures_and_no_others():
    text = text_of(made_up())
    assert rows(text, "NKD | 71.96 (+2.06)") and rows(text, "KD | 71.03")  # of another source, so without a gain
    assert not rows(text, "USKD | 71") and "label smoothing, Tf-KD and Zipf's LS are not shown" in text


def test_cost_is_told_or_how_to_measure_it():
    assert "- At 3755 classes **USKD** takes 49% of a training step as published" in text_of(made_up())
    assert "Not measured; `python -m study --part cost page` does so." in text_of(made_up(cost=False))


def test_outcome_goes_into_other_pages(tmp_path):
    path, other = tmp_path / "pages" / "page.md", tmp_path / "README.md"
    other.write_text(f"before\n{page.BEGIN}\nold\n{page.END}\nafter\n")
    assert page.make(made_up(), path, "make study", [other])[-1] == other
    lines = other.read_text().splitlines()
    assert lines[0] == "before" and lines[-1] == "after" and "old" not in lines
    assert "[The study](pages/page.md) has all pairs" in other.read_text()
    other.write_text("no place for it")
    with pytest.raises(RunError, match="expected one line <!-- study:begin -->"):
        page.make(made_up(), path, "make study", [other])


def test_the_page_in_docs_and_the_outcome_elsewhere_are_what_the_records_give():
    records = Records(ROOT / "study" / "records", plan.TASKS)
    views, path = page.views_of(records), ROOT / "docs" / "study.md"
    assert path.read_text(encoding="utf-8") == text_of(records)
    for name in ("differences", "convergence", "cost"):
        assert (
            f"(study-{name}.png)" in path.read_text(encoding="utf-8")
            and (ROOT / "docs" / f"study-{name}.png").is_file()
        )
    for other in (ROOT / "README.md", ROOT / "docs" / "which-loss.md"):
        block = other.read_text(encoding="utf-8").partition(page.BEGIN)[2].partition(page.END)[0]
        assert block.strip() == page.block(views, path, other)
