"""The soak runs, and its figures become a table."""

from pathlib import Path

import pytest

from benchmarks import soak
from benchmarks.stored import read
from tests.benchmarks.stopping import assert_ends_with_all_it_started


def test_seconds_of_it_with_an_answer_that_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls, wrong = soak.calls, soak.Call("GET /healthz", 20, 404, {})
    monkeypatch.setattr(soak, "calls", lambda model: [*calls(model), wrong])
    monkeypatch.setattr(soak, "ROWS", 20)  # the load ends only when its last submission is answered
    path = tmp_path / "soak.json"
    assert soak.main(["--seconds", "4", "--clients", "3", "--figures", str(path)]) == 1
    printed = capsys.readouterr().out

    figures = read(soak.Figures, path)
    assert figures.unexpected == {"GET /healthz": {"200": figures.counts["GET /healthz"]["200"]}}
    assert figures.n == sum(sum(counts.values()) for counts in figures.counts.values()) > 0
    assert {status for counts in figures.counts.values() for status in counts} >= {"200", "400"}
    assert len(figures.memory) == soak.SAMPLES
    assert all(100 < memory < 10_000 for memory in figures.memory)
    assert min(*figures.descriptors, *figures.threads) > 0
    assert f"rises by {figures.slope:.2f} MiB" in printed.replace("\n", " ")
    assert [file.name for file in tmp_path.iterdir()] == ["soak.json"]

    assert soak.main(["--markdown", "--figures", str(path)]) == 0
    assert capsys.readouterr().out == printed


def test_the_server_ends_with_a_soak_that_is_stopped(tmp_path: Path) -> None:
    assert_ends_with_all_it_started(
        *("benchmarks.soak", "--seconds", "600", "--figures", str(tmp_path / "soak.json")),
        begun=lambda member: "bentoml" in " ".join(member.cmdline()),
    )


FINE = soak.Figures(
    date="2026-01-02T03:04:05+00:00",
    commit="0123456789abcdef",
    device="a processor",
    python="3.11",
    packages={},
    seconds=600,
    clients=1,
    n=100,
    counts={"GET /": {"200": 98, "503": 2}},
    unexpected={},
    memory=[100.0] * soak.SAMPLES,
    worker=80.0,
    descriptors=(9, 9),
    threads=(1, 1),
)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({}, ""),
        ({"unexpected": {"GET /": {"500": 1}}}, "answers that were not as they should be"),
        ({"counts": {"GET /": {"503": 50, "200": 50}}}, "50 of 100 requests were shed"),
        ({"descriptors": (9, 10)}, "file descriptors leak: 9 became 10"),
        ({"memory": [float(n) for n in range(soak.SAMPLES)]}, "memory grows by 12.00 MiB per minute"),
        ({"memory": [float(n) for n in range(soak.SAMPLES)], "seconds": 60.0}, ""),
    ],
)
def test_what_fails_a_soak(change: dict[str, object], complaint: str) -> None:
    said = soak.failed(FINE.model_copy(update=change))
    assert said.startswith(complaint)
    assert bool(said) == bool(complaint)


def test_slope_is_that_after_the_warm_up() -> None:
    def slope(memory: list[float]) -> float:
        return FINE.model_copy(update={"memory": memory}).slope

    half = soak.SAMPLES // 2
    assert slope([*map(float, range(half)), *[100.0] * half]) == pytest.approx(0, abs=1e-9)
    minutes = [10 * n / soak.SAMPLES for n in range(soak.SAMPLES)]
    assert slope([50 + 3 * minute for minute in minutes]) == pytest.approx(3)


def test_only_shedding_may_come_instead_of_an_answer() -> None:
    tally = soak.Tally()
    call = soak.Call("GET /", 1, 200, {})
    for status in ("200", "503", soak.LEFT, "500", "404", "500"):
        tally.add(call, status)
    assert tally.n == 6
    assert tally.unexpected == {"GET /": {"500": 2, "404": 1}}


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf", "ten"])
def test_seconds_that_measure_nothing(seconds: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        soak.main([f"--seconds={seconds}"])
    assert f"'{seconds}' is not a number of seconds above 0" in capsys.readouterr().err


def test_arguments_that_measure_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures = str(tmp_path / "soak.json")
    assert soak.main(["--clients", "0", "--figures", figures]) == 1
    assert "has to be at least 1" in capsys.readouterr().err
    assert soak.main(["--markdown", "--figures", figures]) == 1
    assert f"no figures at {figures}: run python -m benchmarks.soak" in capsys.readouterr().err
