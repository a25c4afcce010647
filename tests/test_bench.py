"""The bench: its statistics are right, its table is well formed, and it times nothing that computes something else."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import measure  # noqa: E402
import run  # noqa: E402


def test_a_ratio_is_the_median_of_paired_ratios():
    """A slow round slows both sides: the ratio of medians would be 2, every pair says 1/2."""
    ours, theirs = [1.0, 10.0, 20.0, 1.0, 20.0], [2.0, 20.0, 40.0, 2.0, 40.0]
    row = measure.Row("x", "x", ours, theirs, "peer").as_dict()
    assert row["ratio"] == 0.5 and row["interval"] == (0.5, 0.5)
    unpaired = measure.Row("x", "x", [1.0, 2.0, 9.0], [2.0, 1.0, 3.0], "peer").as_dict()
    assert unpaired["ratio"] == 2.0 and unpaired["minipar"] == 2.0 and unpaired["peer"] == 2.0


def test_an_interval_covers_the_true_median_as_often_as_it_says():
    draw = np.random.default_rng(0)
    edges = [measure.interval(draw.normal(1.0, 0.1, 31)) for _ in range(100)]
    assert 88 <= sum(low <= 1.0 <= high for low, high in edges) <= 100
    assert 0.05 < np.mean([high - low for low, high in edges]) < 0.13  # 4 x 1.253 x 0.1 / sqrt(31) is 0.09


@pytest.mark.parametrize(
    ("ours", "mark", "met"),
    [([0.9] * 5, 1.0, True), ([1.1] * 5, 1.0, False), ([0.9, 0.9, 1.1, 1.1, 1.1], 1.0, True), ([0.9] * 5, None, None)],
)
def test_a_mark_is_met_when_the_interval_reaches_it(ours, mark, met):
    assert measure.Row("x", "x", ours, [1.0] * 5, "peer", most_ratio=mark).met is met
    assert measure.Row("x", "x", ours, most_seconds=mark).met is met


def test_seconds_have_three_digits_and_a_unit():
    assert [measure.seconds(s) for s in (12.34, 0.01234, 0.000123)] == ["12.3 s", "12.3 ms", "123 µs"]


@pytest.mark.parametrize("change", ["scaled", "one entry", "left out"])
def test_sides_that_compute_something_else_are_refused(change):
    expected = {"a": torch.arange(100.0), "b": torch.ones(3) * 0.1}
    got = {name: g.clone() for name, g in expected.items()}
    run.agree("right", got, expected)
    if change == "scaled":
        got["b"] *= 1.002
    elif change == "one entry":
        got["a"][3] += 0.01
    else:
        del got["b"]
    with pytest.raises(run.Wrong, match="gradient"):
        run.agree("wrong", got, expected)


def test_a_small_run_compares_equal_sides_and_writes_its_table(tmp_path):
    """Every comparison: minipar, torch's own and one process compute equal gradients, else the run fails."""
    (tmp_path / "README.md").write_text(f"above\n{run.BEGIN}old\n{run.END}below\n")
    names = [*run.sides.COMPARISONS, "run"]
    options = ["--small", "--pairs", "3", "--only", ",".join(names), "--out", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "run.py"), *options], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    *compared, empty = results
    assert [r["name"] for r in results] == [*names[:-1], "empty run"]
    for r in compared:
        assert r["minipar"] > 0 and r["floor"] > 0 and r["rounds"] == 3 and r["memory"] > 0
        if r["peer"] is None:
            assert (
                r["name"] == "ring" and "context_parallel does not run here" in r["note"] and r["note"] in done.stdout
            )
            continue
        assert r["peer"] > 0 and r["peer_memory"] > 0 and r["note"] is None
        low, high = r["interval"]
        assert low <= r["ratio"] <= high
        assert r["met"] is (None if r["mark_ratio"] is None else low <= r["mark_ratio"])
        assert r["unwatched_interval"][0] <= r["unwatched_ratio"] <= r["unwatched_interval"][1]
    assert empty["peer"] is None and empty["ratio"] is None and empty["memory"] is None
    lines = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(results) and len({line.count("|") for line in lines}) == 1
    readme = (tmp_path / "README.md").read_text()
    assert readme.startswith("above") and readme.endswith("below\n") and "old" not in readme
    assert all(line in readme for line in lines)


def test_peak_memory_is_of_a_step_and_of_what_stays_between_steps(monkeypatch):
    """1000 bytes stay, 500 and 300 come and go in a step one after the other, 9000 only while the side is made."""

    class Known:
        def __init__(self, setting):
            torch.empty(9000, dtype=torch.uint8)
            self.stays = torch.empty(1000, dtype=torch.uint8)

        def step(self):
            torch.empty(500, dtype=torch.uint8)
            torch.empty(300, dtype=torch.uint8)

    known = run.sides.Comparison("known", Known, {}, Known)
    monkeypatch.setitem(run.sides.COMPARISONS, "known", known)
    assert run.sides.peak_memory("known", "minipar", run.sides.SMALL) == 1500


@pytest.mark.parametrize("stages", [1, 4])
def test_the_parts_of_a_pipeline_are_the_whole_model(stages):
    setting = run.sides.SMALL
    parts = [run.sides.Part(setting.model(), stage, stages) for stage in range(stages)]
    x = tokens = setting.batch()[0]
    for part in parts:
        x = part(x)
    assert x.equal(setting.model()(tokens))
    names = [name for part in parts for name, _ in part.named_parameters()]
    assert sorted(names) == sorted(name for name, _ in setting.model().named_parameters())


def test_an_unknown_section_is_named(capsys):
    with pytest.raises(SystemExit):
        run.main(["--only", "speed"])
    assert "no section speed; there are data, tensor" in capsys.readouterr().err
