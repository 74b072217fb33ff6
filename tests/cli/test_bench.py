"""`diffkern bench`: tables, pictures and comparisons of canned rows, its errors, and one small benchmark for real."""

from __future__ import annotations

import json
import subprocess

import pytest
import torch

import diffkern
from benchmarks import plots, readme, report, rows
from benchmarks.timing import Timing, interleave
from diffkern.cli import bench, main
from tests.conftest import ROOT

RUNS = sorted((ROOT / "benchmarks" / "results" / "cpu-epyc-2-threads").glob("*run*.json"))


def row(case="8×128×32×32", *, op="group_norm", baseline="eager", ours=100e-6, theirs=250e-6, bytes_moved=8_000_000):
    """As a run makes it: three rounds of each side around a median, copying at 40 GB/s."""
    times = [Timing(0.9 * t, t, 1.2 * t, (0.9 * t, t, 1.2 * t)) for t in (theirs, ours)]
    subject = rows.subject(op, case, baseline, "cpu", headline=True) | {"backend": "native; not triton: none"}
    return subject | rows.figures(*times, bytes_moved, 40e9)


def skipped(case="4×4"):
    return rows.subject("q_sample", case, "torch.compile", "cpu", headline=False) | {"skipped": "no | compiler"}


def test_a_rows_figures():
    found = row()
    assert found["ratio"] == pytest.approx(2.5)
    assert found["ratio_p20_p80"] == pytest.approx([2.5, 2.5])  # both sides slow down together
    assert found["baseline_us"] == pytest.approx([225, 250, 300])
    assert found["gb_per_s"] == pytest.approx(80)
    assert found["share_of_copy"] == pytest.approx(2)
    assert "bytes" not in row(bytes_moved=None)


def test_the_table_has_every_row_and_says_why_one_is_missing():
    header, rule, first, second, third = report.table([row(), skipped(), row(bytes_moved=None)]).splitlines()
    assert {line.replace("\\|", "").count("|") for line in (header, rule, first, second, third)} == {10}
    assert first.endswith("| eager | native | 250 | 100 (90–120) | 2.50 | 80.0 | 200% |")
    assert "skipped: no \\| compiler" in second
    assert third.endswith("| 2.50 | — | — |")


def test_a_comparison_flags_what_has_become_slower_and_nothing_else():
    then = [row("a"), row("b"), row("c"), row("gone"), skipped("s")]
    now = [row("a", ours=130e-6), row("b", ours=120e-6), row("c", ours=50e-6), row("new"), row("s", op="q_sample")]
    text = report.comparison(then, now)
    flagged = [line for line in text.splitlines() if "slower" in line]
    assert len(flagged) == 1
    assert flagged[0].startswith("| group_norm | a | eager | 100 | 130 | 0.77 | slower than 1.25 times")
    assert "| group_norm | c | eager | 100 | 50 | 2.00 |  |" in text
    assert "1 of 3 rows take more than 1.25 times as long" in text
    assert "only now: group_norm, new, eager" in text
    assert "only now: q_sample, s, eager" in text
    assert "only then: group_norm, gone, eager" in text


def test_a_result_survives_its_file(tmp_path):
    path, found = tmp_path / "deep" / "bench.json", [row(), skipped()]
    rows.save(path, {"cpu": "a CPU"}, found, tests={"passed": 3})
    assert rows.load(path) == {"machine": {"cpu": "a CPU"}, "rows": found, "tests": {"passed": 3}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no such file"),
        ("not json", "not a result of `diffkern bench`: Expecting value"),
        ('{"benchmarks": []}', "not a result of `diffkern bench`: no 'rows'"),
        ('{"machine": {}, "rows": [{"op": "q_sample"}]}', "a row has no 'baseline'"),
        ('{"machine": {}, "rows": 3}', "not a result of `diffkern bench`"),
        ("[1, 2]", "not a result of `diffkern bench`"),
        ('{"rows": []}', "not a result of `diffkern bench`: no 'machine'"),
    ],
)
def test_a_file_to_compare_with_is_read_before_anything_runs(content, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("a benchmark was started"))
    path = tmp_path / "then.json"
    if content is not None:
        path.write_text(content)
    assert main(["bench", "--compare", str(path), "--out", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"diffkern bench: error: {path}: ")
    assert message in error
    assert "Traceback" not in error


def test_errors_are_one_message(tmp_path, capsys, monkeypatch):
    assert main(["bench", "--rounds", "0"]) == 1
    assert "--rounds 0: it must be 1 or more" in capsys.readouterr().err
    monkeypatch.setattr(bench, "_measure", lambda *_: 5)
    assert main(["bench", "--filter", "nothing", "--out", str(tmp_path)]) == 1
    assert "--filter 'nothing': it matches no benchmark" in capsys.readouterr().err
    monkeypatch.setattr(bench, "_measure", lambda *_: 4)
    assert main(["bench", "--out", str(tmp_path)]) == 1
    assert "pytest ended with status 4 before anything was measured" in capsys.readouterr().err
    monkeypatch.setattr(bench, "_CHECKOUT", tmp_path)
    assert main(["bench"]) == 1
    assert "in a checkout of diffkern's sources" in capsys.readouterr().err


def test_pictures(tmp_path):
    found = [row(), row("small", ours=300e-6, bytes_moved=4000), skipped(), row("step", op="U-Net", bytes_moved=None)]
    written = plots.draw(tmp_path, {"cpu": "a CPU", "threads": 2}, found)
    assert [path.name for path in written] == ["roofline.png", "ratios.png"]
    for path in written:
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size > 10_000
    only_steps = plots.draw(tmp_path, {}, [row(bytes_moved=None)])
    assert [path.name for path in only_steps] == ["ratios.png"]
    assert plots.draw(tmp_path, {}, [skipped()]) == []


def test_readmes_table_is_the_median_time_and_the_range_of_ratios():
    runs = [[row(ours=t * 1e-6, theirs=14.25e-3), skipped(), row(f"{t}")] for t in (3000, 3500, 3410)]
    assert readme.table(runs).splitlines()[2:] == [
        "| `group_norm` | 8×128×32² | eager | 14.2 ms | 3.41 ms | 4.07–4.75 |"
    ]
    not_shown = [row(), row("other") | {"headline": False}]
    assert readme.table([not_shown]).splitlines()[2:] == [
        "| `group_norm` | 8×128×32² | eager | 0.25 ms | 0.10 ms | 2.50 |"
    ]


@pytest.mark.skipif(not RUNS, reason="no saved runs")
def test_saved_runs_make_a_table():
    lines = readme.table([rows.load(path)["rows"] for path in RUNS]).splitlines()
    assert len(lines) > 10
    assert {line.count("|") for line in lines} == {7}


def test_the_table_goes_between_the_markers():
    text = f"# a\n\n{readme.BEGIN}\nold\n{readme.END}\n\nrest\n"
    assert readme.insert(text, "new") == text.replace("old", "new")
    for broken in ("# a", text * 2, f"{readme.END}\n{readme.BEGIN}"):
        with pytest.raises(ValueError, match="once each, in this order"):
            readme.insert(broken, "new")
    readme.insert((ROOT / "README.md").read_text(encoding="utf-8"), "new")


def test_variants_take_turns():
    seen = []
    times = interleave({name: lambda name=name: seen.append(name) for name in "ab"}, rounds=3, calls=2, warmup=1)
    assert seen == list("bbaaaabb" * 2)
    assert [len(times[name].rounds) for name in "ab"] == [3, 3]


def test_one_benchmark_for_real(tmp_path, capfd, monkeypatch):
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # a benchmark is not measured beside others
    out, then = tmp_path / "out", tmp_path / "then.json"
    rows.save(then, {}, [row()])
    name = "test_group_norm_recording_a_graph and contiguous"
    flags = ["--filter", name, "--rounds", "2", "--out", str(out), "--compare", str(then)]
    assert main(["bench", *flags]) == 0
    said = capfd.readouterr().out
    result = json.loads((out / "bench.json").read_text())
    (found,) = result["rows"]
    assert found["case"] == "SiLU, 2×32×4×4, contiguous, forward, requires grad"
    assert found["ratio"] == pytest.approx(found["baseline_us"][1] / found["diffkern_us"][1])
    assert sorted(found["diffkern_us"]) == found["diffkern_us"]
    assert found["bytes"] == 2 * 4 * 1024
    assert found["share_of_copy"] == pytest.approx(found["gb_per_s"] / found["copy_gb_per_s"])
    assert found["torch"] == torch.__version__
    assert found["diffkern"] == diffkern.__version__
    assert found["device"] == "cpu"
    assert found["machine"]
    assert {"threads", "commit", "backend"} <= found.keys()
    assert result["machine"]["command"] == f"diffkern bench {' '.join(flags)}"
    assert found["case"] in (out / "bench.md").read_text()
    assert {path.name for path in out.iterdir()} == {"bench.json", "bench.md", "roofline.png", "ratios.png"}
    assert "only then: group_norm, 8×128×32×32, eager" in said
