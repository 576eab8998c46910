"""How tools/gpu/times.py reads a profile, and that the page shows the committed files."""

import json

import pytest

from tools.gpu import times


def test_launches_of_one_name_count_together():
    events = []
    for repeat in range(5):
        events += [
            ("rows_looped", 10.0 + repeat),
            ("void fused_kd::cuda::scale_rows<float>(ScaleCall)", 2.0),
            ("void fused_kd::cuda::scale_rows<float>(ScaleCall)", 3.0),
            ("Memset (Device)", 50.0),
            ("void at::native::vectorized_elementwise_kernel<4, FillFunctor<float>>(int)", 40.0),
        ]
    events.append(("seen_once", 7.0))  # a first call's, none of every call
    assert times.summed(events, 5) == {"rows_looped": 12.0, "scale_rows": 5.0}


def test_a_table_with_what_was_before():
    entry = {"loss": "nkd", "backend": "triton", "rows": 8, "classes": 10, "share": 0.5}
    now = {"machine": {"gpu": "X"}, "copy": 2e12, "results": [{**entry, "kernels": {"a": 1.25, "b": 250.0}}]}
    before = {"results": [{**entry, "kernels": {"a": 3.0}}]}
    text = times.table(now, before)
    assert "| nkd, triton | 8×10 | a 1.2 (3.0), b 250 | 251 | 50% |" in text
    assert "In brackets" in text
    assert "In brackets" not in times.table(now)


def test_the_page_is_made_of_the_files():
    results = times.PAGE.parent.parent / "benchmarks" / "results"
    before, now = (json.loads(path.read_text()) for path in sorted(results.glob("kernel-times-cuda-*.json")))
    begin, end = times.MARKS
    assert times.PAGE.read_text().split(begin)[1].split(end)[0] == times.table(now, before)


def test_without_a_gpu(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(times.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        times.main([str(tmp_path / "x.json")])
    assert "finds no GPU" in capsys.readouterr().err
