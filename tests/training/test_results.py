import multiprocessing
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest

from tests.disk import room_for
from training import results
from training.results import Result, ResultsError


def result(recipe: str, seed: int, accuracy: float, val_accuracy: float | None = None) -> Result:
    return Result(
        date="2026-01-01T00:00:00+00:00",
        recipe=recipe,
        recipe_digest=recipe.lower(),
        seed=seed,
        accuracy=accuracy,
        single_view_accuracy=accuracy,
        val_accuracy=val_accuracy,
        views="none",
        test_images=10000,
        train_images=50000,
        parameters=1,
        epochs=2,
        seconds=3.5,
        device="a processor, 2 threads",
        precision="float32",
        python="3.11.0",
        torch="2",
        commit="abc",
    )


def test_rows_are_added_and_read_back(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    assert results.read(path) == []
    rows = [result("A1", 0, 0.5), result("A1", 1, 0.6, 0.61)]
    for row in rows:
        results.record(row, path)
    assert results.read(path) == rows
    assert path.read_text().count("\n") == 3
    assert [file.name for file in tmp_path.iterdir()] == ["results.csv"]


def _record_many(seeds: range, path: Path, together: Barrier) -> None:
    together.wait()
    for seed in seeds:
        results.record(result("A1", seed, 0.5), path)


def test_runs_that_end_together_all_get_their_rows(tmp_path: Path) -> None:
    path, context = tmp_path / "results.csv", multiprocessing.get_context("spawn")
    together = context.Barrier(2)
    seeds = [range(30), range(30, 60)]
    processes = [context.Process(target=_record_many, args=(part, path, together)) for part in seeds]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    assert sorted(row.seed for row in results.read(path)) == list(range(60))
    assert [file.name for file in tmp_path.iterdir()] == ["results.csv"]


def test_a_run_has_one_row_however_often_it_is_evaluated(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    row = result("A1", 0, 0.5, 0.51)
    results.record(row, path)
    again = {"date": "2026-01-02T00:00:00+00:00", "accuracy": 0.5001, "single_view_accuracy": 0.4999,
             "device": "a processor + a GPU", "precision": "float32 + bfloat16",
             "python": "3.11.0 + 3.12.0", "torch": "2 + 3"}  # fmt: skip
    results.record(row.model_copy(update=again), path)
    assert results.read(path) == [row]
    others = [row.model_copy(update={key: value}) for key, value in
              (("seed", 1), ("commit", "def"), ("recipe_digest", "b"), ("seconds", 3.6))]  # fmt: skip
    for other in others:
        results.record(other, path)
    assert results.read(path) == [row, *others]


def test_a_full_disk_leaves_the_rows_that_are_there(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    results.record(result("A1", 0, 0.5), path)
    with room_for(100), pytest.raises(OSError, match="File too large"):
        results.record(result("A1", 1, 0.6), path)
    assert results.read(path) == [result("A1", 0, 0.5)]


@pytest.mark.parametrize(
    ("accuracies", "text"),
    [
        ([], "not run yet"),
        ([0.9412], "94.12 % (n=1)"),
        ([0.94, 0.95, 0.96], "95.00 ± 1.00 % (n=3)"),
    ],
)
def test_summary(accuracies: list[float], text: str) -> None:
    rows = [result("fast", seed, accuracy) for seed, accuracy in enumerate(accuracies)]
    assert results.summary([*rows, result("A1", 0, 0.1)], "fast") == text


def test_a_run_that_was_made_again_is_no_further_evidence() -> None:
    rows = [result("fast", 0, 0.94), result("fast", 0, 0.94), result("fast", 1, 0.94)]
    assert results.summary(rows, "fast") == "94.00 ± 0.00 % (n=2)"
    elsewhere = result("fast", 0, 0.95)  # a machine that rounds otherwise has another result for a seed
    assert results.summary([rows[0], elsewhere], "fast") == "94.50 ± 0.71 % (n=2)"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("<<<<<<< HEAD", "line 3: not a row: "),
        (",".join("x" * 18), "line 3: not a row: seed: Input should be a valid integer"),
        (",".join("1" * 19), "line 3: not a row: "),
        ("1" * 200_000, "results.csv: not CSV in UTF-8: field larger than field limit"),
        ("\udcff", "results.csv: not CSV in UTF-8: .* byte 0xff"),
    ],
)
def test_a_line_that_is_no_row_is_refused(line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    results.record(result("A1", 0, 0.5), path)
    with path.open("ab") as file:
        file.write(f"{line}\n".encode(errors="surrogateescape"))
    content = path.read_bytes()
    with pytest.raises(ResultsError, match=message):
        results.read(path)
    with pytest.raises(ResultsError, match=message):
        results.record(result("A1", 1, 0.5), path)
    assert path.read_bytes() == content


def test_a_byte_order_mark_is_no_part_of_the_header(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    results.record(result("A1", 0, 0.5), path)
    path.write_text(path.read_text(), encoding="utf-8-sig")
    results.record(result("A1", 1, 0.6), path)
    assert results.read(path) == [result("A1", 0, 0.5), result("A1", 1, 0.6)]


@pytest.mark.parametrize(("old", "new"), [(",", ";"), ("date,", ""), ("date,", "date,day,")])
def test_a_header_of_other_columns_is_refused(old: str, new: str, tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    results.record(result("A1", 0, 0.5), path)
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(ResultsError, match=r"line 1: the columns are '.*'; right would be date,recipe,"):
        results.read(path)


@pytest.mark.parametrize("accuracy", ["93.88", "nan"])
def test_an_accuracy_that_is_no_fraction_is_refused(accuracy: str, tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    results.record(result("A1", 0, 0.5), path)
    path.write_text(path.read_text().replace("0.5", accuracy, 1))
    with pytest.raises(ResultsError, match="line 2: not a row: accuracy: Input should be "):
        results.read(path)


def test_committed_results_are_readable() -> None:
    assert all(0 < row.accuracy <= 1 and row.test_images == 10000 for row in results.read())
