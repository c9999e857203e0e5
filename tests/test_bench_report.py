"""The results of the bench: their files, the table, the report and its plots."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from bench import compare, floors, plots, report, results, timing
from bench import run as bench_run
from bench.cases import SUITES

ERRORS = {"torchrnn": 1e-7, "torch.nn": 1e-7}


def a_time() -> timing.Stats:
    return timing.Stats(median=2.0, minimum=1.0, iqr=0.5, repeats=5, calls=3)


def a_row(name: str = "lstm-b1-t1-h8-fp32-infer", ratio: float = 2.0) -> results.Row:
    time = a_time()
    return results.Row(name, 1, time, {"torch.nn": time}, {"torch.nn": ratio}, 1.0, 0.1, 0.2, 0.3, ERRORS)


def a_step(
    situation: str,
    name: str = "torchrnn",
    threads: int = 2,
    median: float = 2.0,
    p99: float | None = 3.0,
    case: str = "lstm-b8-t128-h256-fp32-infer",
) -> results.Contention:
    time = dataclasses.replace(a_time(), median=median)
    return results.Contention(case, situation, name, threads, time, p99, maximum=9.0)


def a_result() -> results.Result:
    levels = [floors.Level("L1", 32768, False, 200.0), floors.Level("memory", None, True, 20.0)]
    run = results.Run(1, "avx2", floors.Floors(100.0, "fma loop, avx2", levels), [a_row()])
    name = "lstm-b1-t1-h8-fp32-train"
    peaks = results.Memory(name, 1, {"torchrnn": 1000}, {"torchrnn": 1.0})
    result = dataclasses.replace(
        results.describe({"quick": True}), runs=[run], memory=[peaks], contention=[a_step("alone")]
    )
    return dataclasses.replace(result, before={"commit": "0" * 40}, verdicts=compare.judge(result))


def test_result_survives_its_file(tmp_path: Path) -> None:
    result = a_result()
    path = results.save(result, tmp_path / "new")
    assert results.load(path) == result
    assert path.name.startswith(f"{result.date[:10]}T")
    assert ("-dirty" in path.name) == result.dirty


def test_committed_results_load() -> None:
    paths = sorted(results.FOLDER.glob("*.json"))
    assert paths
    for path in paths:
        result = results.load(path)
        assert result.suites
        assert all(row.group for row in result.rows)


def test_result_knows_its_suites() -> None:
    result = a_result()
    assert (result.suites, result.full) == ({"infer", "memory", "contention"}, False)
    assert dataclasses.replace(result, options={"quick": False, "filter": ""}).full


def test_step_beside_another_process_loads_from_an_older_file() -> None:
    time = dataclasses.asdict(a_time())
    older = {"id": "a", "name": "b", "threads": 2, "alone": time, "together": time | {"median": 4.0}}
    alone, same = results.contention(older | {"alone_maximum": 5.0, "together_maximum": 6.0})
    assert alone == results.Contention("a", results.ALONE, "b", 2, a_time(), None, 5.0)
    assert (same.situation, same.time.median, same.maximum) == (results.SAME, 4.0, 6.0)


def test_result_never_replaces_another(tmp_path: Path) -> None:
    result = a_result()
    first = results.save(result, tmp_path)
    content = first.read_bytes()
    second = results.save(result, tmp_path)
    assert second != first
    assert first.read_bytes() == content


def test_geometric_means_are_per_group() -> None:
    rows = [a_row("lstm-b1-t1-h8-fp32-infer", 4.0), a_row("gru-b1-t1-h8-fp32-train", 1.0)]
    means = results.geometric_means(rows, "torch.nn")
    assert means == pytest.approx({"all": 2, "inference": 4, "training": 1, "LSTM": 4, "GRU": 1})
    assert results.geometric_means(rows[:1], "torch.nn").keys() == {"all", "inference", "LSTM"}


def test_table_has_a_cell_for_each_column() -> None:
    table = bench_run.table([a_row(), dataclasses.replace(a_row(), peers={}, ratios={})])
    cells = {str(column.header): list(column.cells) for column in table.columns}
    assert cells["case"] == ["lstm-b1-t1-h8-fp32-infer"] * 2
    assert cells["torch.nn"] == ["2.00", ""]
    assert cells["of floor"] == ["30%", "30%"]


def saved(folder: Path, date: str, rows: list[results.Row], **changes: Any) -> Path:
    run = results.Run(1, "avx2", floors.Floors(100.0, "test", []), rows)
    result = dataclasses.replace(results.describe({"quick": False, "filter": ""}), date=date, dirty=False)
    return results.save(dataclasses.replace(result, **{"runs": [run], **changes}), folder)


def swept() -> list[results.Row]:
    return [
        dataclasses.replace(a_row(case.id), peers={}, ratios={}, suite="sweep", case=dataclasses.asdict(case))
        for case in SUITES["sweep"].cases
    ]


def test_report_takes_the_newest_full_result_of_each_suite(tmp_path: Path) -> None:
    train = a_row("lstm-b1-t1-h8-fp32-train")
    old = saved(tmp_path, "2026-01-01T00:00:00", [a_row(), train])
    new = saved(tmp_path, "2026-01-02T00:00:00", [a_row()])
    saved(tmp_path, "2026-01-03T00:00:00", [a_row()], dirty=True)
    part = saved(tmp_path, "2026-01-04T00:00:00", [a_row()], options={"quick": False, "filter": "lstm"})
    picked = report.pick(tmp_path.iterdir(), full=True, dirty=False)
    assert {suite: path for suite, (path, _) in picked.items()} == {"infer": new, "train": old}
    assert report.pick(tmp_path.iterdir(), full=False, dirty=False)["infer"][0] == part


def test_report_counts_rows_below_1(tmp_path: Path) -> None:
    rows = [a_row(ratio=4.0), a_row("lstm-b2-t1-h8-fp32-infer", 0.25), a_row("gru-b1-t1-h8-fp32-infer", 2.0)]
    picked = report.pick([saved(tmp_path, "2026-01-01T00:00:00", rows)], full=True, dirty=False)
    line = "| inference | torch.nn | **1.00** (0.25 to 4.00) | **2.00** (2.00 to 2.00) | 1 of 3 |"
    assert line in report.summary(picked)


def test_report_leaves_out_results_without_all_peers(tmp_path: Path) -> None:
    old = saved(tmp_path, "2026-01-01T00:00:00", [a_row()])
    saved(tmp_path, "2026-01-02T00:00:00", [a_row()], options={"peers": []})
    picked = report.pick(tmp_path.iterdir(), full=True, dirty=False)
    assert picked["infer"][0] == old


def test_report_compares_steps_alone_and_beside_the_same() -> None:
    steps = [
        a_step(results.ALONE),
        a_step(results.ALONE, threads=1),
        a_step("beside 1 multiplying", median=7.0),
        a_step(results.SAME, median=5.0),
        a_step(results.ALONE, case="gru-b1-t1-h256-fp32-infer"),
    ]
    lines = [line for line in report.contention(steps, cores=2) if line.startswith("| lstm")]
    assert lines == ["| lstm-b8-t128-h256-fp32-infer | 2.50, 4.5 |"]


def test_report_replaces_only_its_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cell = dataclasses.replace(a_row("sru-b1-t1-h8-fp32-train"), suite="tf")
    beside = dataclasses.replace(a_row(), ratios={"torch.nn": 2.0, "before": 9.99})
    rows = [beside, a_row("gru-b1-t1-h8-bf16-infer"), *swept(), cell]
    extra = {name: getattr(a_result(), name) for name in ("memory", "contention")}
    path = saved(tmp_path, "2026-01-01T00:00:00", rows, **extra)
    readme, images = tmp_path / "README.md", tmp_path / "docs"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    assert report.main([str(path), "--readme", str(readme), "--plots", str(images)]) == 0
    text = readme.read_text()
    assert text.startswith(f"before\n{report.BEGIN}\n")
    assert text.endswith(f"\n{report.END}\nafter\n")
    assert "old" not in text
    assert "9.99" not in text
    assert path.name in text
    assert "TensorFlow 1's cells under `dynamic_rnn` on 1 thread:" in text
    assert "| sru-b1-t1-h8-fp32-train | 2 | 2.00 | 30% |" in text
    for name in ("docs/speed.png", "docs/sweep.png"):
        assert f"({name})" in text
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_report_refuses_what_it_cannot_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = saved(tmp_path, "2026-01-01T00:00:00", [a_row()], dirty=True)
    readme = tmp_path / "README.md"
    readme.write_text("no markers")
    arguments = [str(path), "--readme", str(readme), "--plots", str(tmp_path)]
    assert report.main(arguments) == 2
    assert "committed" in capsys.readouterr().err
    assert report.main([*arguments, "--dirty"]) == 2
    assert report.BEGIN in capsys.readouterr().err
    assert readme.read_text() == "no markers"


def test_plot_labels_name_the_case() -> None:
    assert (
        plots.label(a_row("lstm-b2-t4-i8-h16-bi-l2-ragged-fp32-infer"))
        == "B 2  T 4  I 8  H 16  bi  L 2  ragged"
    )
    assert plots.label(a_row("gru-b1-t1-h8-bf16-infer")) == "B 1  T 1  H 8  bf16"


def compared(suite: str, against: str, *ours_over_theirs: float) -> results.Result:
    """Returns a result with rows in which our time is so many times that of another."""
    rows = [
        dataclasses.replace(a_row(f"row-{i}", 1 / ratio), suite=suite, ratios={against: 1 / ratio})
        for i, ratio in enumerate(ours_over_theirs)
    ]
    run = results.Run(1, None, floors.Floors(1.0, "test", []), rows)
    return dataclasses.replace(results.describe({"filter": ""}), runs=[run], dirty=False)


@pytest.mark.parametrize(
    ("suite", "against", "ratios", "met"),
    [
        ("infer", "before", [1.14, 0.95], True),
        ("infer", "before", [1.16, 0.5], False),  # A row.
        ("infer", "before", [1.1, 1.05], False),  # The mean.
        ("train", "before", [1.3, 0.8], True),
        ("train", "before", [1.1, 1.0], False),
        ("stream", "before", [1.15, 1.15], True),
        ("stream", "before", [1.16, 1.0], False),
        ("small", "before", [2.0, 0.8], True),
        ("small", "before", [1.4, 1.3], False),
        ("small", "torch.nn", [1.0, 0.1], True),
        ("small", "torch.nn", [1.01, 0.1], False),
        ("infer", "torch.nn", [9.0], None),
        ("infer", "onnxruntime", [9.0], "not judged"),
    ],
)
def test_bars_hold_or_not(suite: str, against: str, ratios: list[float], met: object) -> None:
    found = [verdict.met for verdict in compare.judge(compared(suite, against, *ratios))]
    assert found == ([] if met == "not judged" else [met])


def test_verdict_names_rows_above_the_bar_worst_first() -> None:
    (verdict,) = compare.judge(compared("infer", "before", 1.2, 1.1, 1.5, 0.5))
    assert verdict.above == pytest.approx({"row-2": 1.5, "row-0": 1.2})
    assert list(verdict.above) == ["row-2", "row-0"]
    assert (verdict.rows, verdict.worst, verdict.most) == (4, pytest.approx(1.5), 1.15)
    assert verdict.mean == pytest.approx((1.2 * 1.1 * 1.5 * 0.5) ** 0.25)
    (verdict,) = compare.judge(compared("infer", "torch.nn", 1.2, 1.0))  # Without a bar: above 1.
    assert verdict.above.keys() == {"row-0"}


SMALL_STEP = "lstm-b1-t1-h256-stream-fp32-infer"


def test_small_step_is_compared_with_one_thread_in_the_same_situation() -> None:
    steps = [
        *(a_step("quiet", threads=n, median=m, p99=p, case=SMALL_STEP) for n, m, p in ((2, 1, 2), (1, 1, 1))),
        *(a_step("busy", threads=n, median=m, p99=p, case=SMALL_STEP) for n, m, p in ((2, 9, 9), (1, 6, 2))),
        a_step("busy", "torch.nn", median=0.1, case=SMALL_STEP),
    ]
    median, p99 = compare.judge(dataclasses.replace(compared("infer", "before"), contention=steps))
    assert (median.suite, median.against, median.rows) == ("contention", compare.ONE_THREAD, 2)
    assert (median.worst, median.met) == (1.5, True)
    assert (p99.worst, p99.met) == (4.5, False)
    assert p99.above == {f"{SMALL_STEP}, busy": 4.5}


def test_large_step_is_compared_with_torch_in_the_same_situation() -> None:
    steps = [
        a_step("quiet", median=1.0),
        a_step("quiet", "torch.nn", median=1.0),
        a_step("busy", median=3.0),
        a_step("busy", "torch.nn", median=2.0),
        a_step("busy", threads=1, median=0.1),
    ]
    (verdict,) = compare.judge(dataclasses.replace(compared("infer", "before"), contention=steps))
    assert (verdict.against, verdict.rows) == (compare.TORCH_MEDIAN, 2)
    assert (verdict.worst, verdict.met) == (1.5, False)


def test_compare_takes_the_newest_and_fails_where_a_bar_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad, good = compared("train", "before", 1.1), compared("train", "before", 1.0)
    paths = [
        results.save(dataclasses.replace(result, date=date), tmp_path)
        for result, date in ((bad, "2026-01-01T00:00"), (good, "2026-01-02T00:00"))
    ]
    assert compare.main([str(path) for path in paths]) == 0
    assert compare.main([str(path) for path in paths[:1]]) == 1
    dirty = results.save(dataclasses.replace(bad, dirty=True), tmp_path)
    capsys.readouterr()
    assert compare.main([str(dirty)]) == 2
    assert "committed" in capsys.readouterr().err
    assert compare.main([str(dirty), "--dirty"]) == 1
