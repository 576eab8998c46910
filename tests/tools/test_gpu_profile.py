"""How tools/gpu/profile.py reads ncu's output, without ncu or a GPU."""

import json
from types import SimpleNamespace

import pytest
import torch

from fused_kd.core.catalogue import LOSSES
from tools.gpu import drive, profile
from tools.gpu.profile import METRICS, READ, SHARE, TIME, WRITTEN, Call

HEADER = (
    '"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size","Device",'
    '"CC","Section Name","Metric Name","Metric Unit","Metric Value"'
)


def line(number, kernel, metric, unit, value):
    return (
        f'"{number}","4711","python3","127.0.0.1","{kernel}","1","7","(512, 1, 1)","(4096, 1, 1)","0","9.0",'
        f'"Command line profiler metrics","{metric}","{unit}","{value}"'
    )


SORT = "void cub::DeviceSegmentedRadixSortKernel<cub::Policy<float, int>, 1>(const T1 *, T2 (*)(int), int)"
OUTPUT = "\n".join(
    [
        "==PROF== Connected to process 4711 (/usr/bin/python3.12)",
        '==PROF== Profiling "rows_looped" - 0: 0%....50%....100% - 2 passes',
        "==PROF== Disconnected from process 4711",
        HEADER,
        line(0, "rows_looped", READ, "byte", "1,200"),
        line(0, "rows_looped", WRITTEN, "byte", "600"),
        line(0, "rows_looped", TIME, "ns", "2,000"),
        line(0, "rows_looped", SHARE, "%", "44.50"),
        line(1, SORT, READ, "Mbyte", "0.0015"),
        line(1, SORT, WRITTEN, "Kbyte", "0.5"),
        line(1, SORT, TIME, "usecond", "4"),
        line(1, SORT, SHARE, "", "n/a"),
        "",
    ]
)
DENIED = """==PROF== Connected to process 4711 (/usr/bin/python3.12)
==ERROR== ERR_NVGPUCTRPERM - The user does not have permission to access NVIDIA GPU Performance Counters.
==PROF== Disconnected from process 4711
==WARNING== No kernels were profiled.
"""


def test_parse():
    first, second = profile.parse(OUTPUT)
    assert first == {"kernel": "rows_looped", READ: 1200.0, WRITTEN: 600.0, TIME: pytest.approx(2e-6), SHARE: 0.445}
    assert second["kernel"] == "DeviceSegmentedRadixSortKernel"
    assert [second[metric] for metric in METRICS] == [1500.0, 500.0, pytest.approx(4e-6), None]


def test_units_that_are_not_known_are_refused():
    with pytest.raises(ValueError, match="expected a unit among byte, Kbyte, "):
        profile.parse("\n".join([HEADER, line(0, "k", TIME, "parsec", "3")]))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (DENIED, "ERR_NVGPUCTRPERM - The user does not have permission"),
        ("==ERROR== Failed to initialize the profiler: LibraryNotLoaded", "LibraryNotLoaded"),
        ("", "printed nothing"),
        ("\n".join([HEADER, line(0, "k", READ, "", "n/a")]), "no value of dram__bytes_read.sum"),
    ],
)
def test_counters_that_cannot_be_read(text, reason):
    with pytest.raises(profile.CountersNotReadable, match=reason):
        profile.parse(text)


def test_table():
    call = Call("nkd", 100, 10, 3)
    entry = profile.measure(call, "ncu", lambda *_, **__: SimpleNamespace(stdout=OUTPUT, stderr=""))
    assert entry["moved_bytes"] == 1800 + 2000
    header, first, second, total = profile.table([entry]).splitlines()
    assert [header.index(column) for column in profile.COLUMNS] == sorted(map(header.index, profile.COLUMNS))
    assert first.split() == ["nkd", "100x10", "rows_looped", "2", "0.0012", "0.0006", "0.9", "44%"]
    assert second.split() == ["DeviceSegmentedRadixSortKernel", "4", "0.0015", "0.0005", "0.5", "–"]
    assert total.strip() == "total: 0.63 times the minimum of 0.006 MB"


def test_every_loss_is_looked_at():
    assert {call.loss for call in profile.CALLS} == {*LOSSES}


def test_command():
    words = profile.command("/cuda/bin/ncu", Call("kd", 8, 10, 3))
    assert words[0] == "/cuda/bin/ncu" and "--csv" in words
    assert words[words.index("--metrics") + 1].split(",") == list(METRICS)
    assert words[-4:] == ["--rows", "8", "--classes", "10"]


@pytest.fixture
def machine(monkeypatch):
    """A machine with a GPU, and an ncu that prints one text per call and repeats the last."""
    said, facts = SimpleNamespace(outputs=[OUTPUT], stderr=""), {"gpu": "some GPU"}

    def ncu(*_, **__):
        return SimpleNamespace(
            stdout=said.outputs.pop(0) if len(said.outputs) > 1 else said.outputs[0], stderr=said.stderr
        )

    measure = profile.measure
    monkeypatch.setattr(profile, "about", lambda commit: facts)
    monkeypatch.setattr(profile, "find_ncu", lambda: "ncu")
    monkeypatch.setattr("fused_kd.check.runnable", lambda device, loss: ["triton"] if loss != "dist" else [])
    monkeypatch.setattr(profile, "measure", lambda call, program: measure(call, program, ncu))
    return said, facts


def test_a_run(machine, tmp_path, capsys):
    assert profile.main([str(tmp_path / "new"), "--loss", "nkd,dist"]) == 0
    printed = capsys.readouterr()
    assert "dist 4096x21841: no fused backend" in printed.err
    assert "some GPU" in printed.out
    result = json.loads((tmp_path / "new" / "gpu-profile.json").read_text())
    assert [call["loss"] for call in result["calls"]] == ["nkd"] * 4
    assert result["environment"] == {"gpu": "some GPU"}
    assert result["calls"][0]["kernels"][0][SHARE] == 0.445


def test_one_that_fails_does_not_take_the_others_along(machine, tmp_path):
    machine[0].outputs = [OUTPUT, "==ERROR== out of memory", OUTPUT]
    assert profile.main([str(tmp_path), "--loss", "nkd"]) == 1
    result = json.loads((tmp_path / "gpu-profile.json").read_text())
    assert len(result["calls"]) == 3
    assert result["failed"] == {"nkd 8192x1000": "out of memory"}


def test_says_why_it_cannot_run(machine, tmp_path, capsys, monkeypatch):
    said, facts = machine
    said.outputs = [DENIED]
    assert profile.main([str(tmp_path)]) == profile.NOT_READABLE
    assert "counters cannot be read here: ERR_NVGPUCTRPERM - The user does not have" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    said.outputs, said.stderr = ["==PROF== Connected"], "Traceback\nRuntimeError: out of memory"
    assert profile.main([str(tmp_path)]) == profile.NOT_READABLE
    assert "RuntimeError: out of memory" in capsys.readouterr().err
    monkeypatch.setattr(profile, "find_ncu", lambda: None)
    for reason, arguments in (
        ("ncu not found", []),
        ("finds no GPU", []),
        ("expected names among nkd, uskd", ["--loss", "hinge"]),
    ):
        with pytest.raises(SystemExit):
            profile.main([str(tmp_path), *arguments])
        assert reason in capsys.readouterr().err
        facts["gpu"] = None


def test_what_is_profiled_runs(capsys):
    """Runs the driver of the profiler and of the sanitizer on the CPU."""
    assert drive.main(["--device", "cpu", "--loss", "nkd", "--rows", "4", "--classes", "20"]) == 0
    assert drive.main(["--device", "cpu", "--loss", "tf_kd", "--rows", "4", "--classes", "20"]) == 0
    with pytest.raises(SystemExit):
        drive.main(["--device", "cpu", "--loss", "nkd", "--backend", "magic"])
    assert "expected a backend among" in capsys.readouterr().err
    cases = list(drive.small_cases("cpu"))
    assert {case.dtype for _, case in cases} >= {torch.bfloat16, torch.float16, torch.float64}
    for backend, case in cases:
        if backend == "native" and case.rows < 10:
            drive.run(backend, case, "cpu", 2.0)
