"""The benchmark of serving runs; what it measures depends on the machine."""

import json
import math
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from benchmarks import serving as benchmark
from benchmarks.load import requests
from benchmarks.server import ServerError
from benchmarks.serving import Load, Server
from benchmarks.stored import read
from tests import ROOT
from tests.listener import listening, refusing

# The servers whose packages `make test` installs.
HERE = ["the service", "BentoML"]


BROKEN = Server("Broken", "json", ("-c", "raise SystemExit('no model')"), "fp32", "plain")


def test_figures_are_written_and_become_a_table_without_a_peer_that_does_not_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(benchmark, "SERVERS", [BROKEN, *benchmark.SERVERS])
    figures_file, results = tmp_path / "serving.json", tmp_path / "results" / "serving.jsonl"
    small = ["--network", "A1", "--connections", "1", "3", "--seconds", "0.5", "--rounds", "1"]
    chosen = ["--servers", BROKEN.name, *HERE]
    assert benchmark.main([*chosen, *small, "--figures", str(figures_file)]) == 0
    said = capsys.readouterr()
    printed = said.out
    assert f"{BROKEN.label} is left out: " in said.err

    figures = read(benchmark.Figures, figures_file)
    assert figures.skipped == {BROKEN.label: "it did not start"}
    assert list(figures.servers) == [
        *("the service, int8", "the service, fp32"),
        *("BentoML, as documented, fp32", "BentoML, with our engine, int8"),
    ]
    for loads in figures.servers.values():
        assert list(loads) == [1, 3]
        for (found,) in loads.values():
            assert found.errors == 0
            assert 0 < found.p50 <= found.p99
            assert found.rate > 0
            assert 10 < found.memory < 10_000
            assert found.cpu > 0
    assert figures.batches["int8"][0] > 0
    assert figures.engine["int8"][0] > 0
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    assert [line["connections"] for line in lines[:3]] == [1, 3, benchmark.BATCH_CONNECTIONS]
    assert lines[0]["statuses"] == {"200": lines[0]["answers"]}

    assert benchmark.main(["--markdown", "--figures", str(figures_file)]) == 0
    assert capsys.readouterr().out == printed


def test_the_table_has_medians() -> None:
    def loads(*rates: float) -> list[Load]:
        same = {"p50": 9.6, "p99": 20.0, "memory": 250.0, "cpu": 1.0, "client_cpu": 0.1}
        return [Load(rate=rate, errors=2, **same) for rate in rates]

    figures = benchmark.Figures(
        date="2026-01-02T03:04:05+00:00",
        commit="0123456789abcdef",
        device="a processor",
        python="3.11",
        packages={"bentoml": "1"},
        network="B1",
        n=3,
        seconds=2,
        servers={"ours": {1: loads(100, 10, 2000)}},
        start_seconds={"ours": [3.0, 4.0, 60.0]},
        batches={"int8": [90.0, 80.0, 70.0]},
        engine={"int8": [100.0, 100.0, 7.0]},
        skipped={"Ray Serve": "it did not start"},
    )
    table = benchmark.markdown(figures).replace("\n", " ")
    assert "| ours | 100/s, 9.6 and 20 ms, 6 errors | 250 | 4.0 |" in table
    assert "gives 80 images/s (int8), 80 % of the engine's own 100." in table
    assert "n=3 loads of 2 s" in table
    assert "Ray Serve was left out: it did not start." in table


def test_a_load_without_an_answer_is_read_as_it_was_written() -> None:
    nothing = Load(rate=0, p50=math.nan, p99=math.nan, errors=3, memory=250.0, cpu=1.0, client_cpu=0.1)
    again = Load.model_validate_json(nothing.model_dump_json())
    assert math.isnan(again.p50)
    assert math.isnan(again.p99)
    assert again.errors == 3


def test_the_service_is_told_as_multiples_of_the_best_peers() -> None:
    def loads(rate: float) -> dict[int, list[Load]]:
        same = {"p50": 9.6, "p99": 20.0, "errors": 0, "memory": 250.0, "cpu": 1.0, "client_cpu": 0.1}
        return {benchmark.BUSY: [Load(rate=each, **same) for each in (rate, 2 * rate, 9 * rate)]}

    rates = {
        **{"the service, int8": 500, "the service, fp32": 80},
        **{"BentoML, as documented, fp32": 50, "FastAPI, as documented, fp32": 100},
        **{"BentoML, batchable, with our engine, int8": 400, "FastAPI, with our engine, int8": 300},
    }
    figures = benchmark.Figures(
        date="2026-01-02T03:04:05+00:00",
        commit="0123456789abcdef",
        device="a processor",
        python="3.11",
        packages={},
        network="B1",
        n=3,
        seconds=2,
        servers={label: loads(rate) for label, rate in rates.items()},
        start_seconds={label: [3.0] for label in rates},
        batches={},
        engine={},
        skipped={},
    )
    told = benchmark.markdown(figures).replace("\n", " ")
    assert (
        "With 32 connections the service answers 5.0 (int8) and 0.8 (fp32) times as many requests as "
        "the best peer set up as documented (FastAPI, fp32); 1.2 (int8) times as many requests as the "
        "best peer with our engine (BentoML, batchable, int8)."
    ) in told


def test_a_peer_without_its_packages_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    absent = Server("Absent", "a_package_that_is_not_there", ("-c", "pass"), "fp32", "plain")
    monkeypatch.setattr(benchmark, "SERVERS", [absent])
    assert benchmark.main([]) == 1
    said = capsys.readouterr().err
    assert f"Absent is left out: it is not installed: {benchmark.INSTALL}" in said
    assert "error: none of the servers is installed" in said


def test_a_server_that_ends_is_an_error_with_its_last_words(tmp_path: Path) -> None:
    with (
        pytest.raises(ServerError, match=r"Broken.* does not answer: no model"),
        benchmark.running(BROKEN, tmp_path / "model.onnx"),
    ):
        pass


def test_the_client_counts_answers_by_status_and_errors(url: str) -> None:
    def load(path: str, *options: str) -> dict[str, Any]:
        return benchmark.load(f"{url}{path}", 3, 1, *options)

    good = load("/classify")
    assert good["statuses"] == {"200": good["answers"]}
    assert good["answers"] > good["errors"] == 0
    bad = load("/classify", "--field", "picture")
    assert list(bad["statuses"]) == ["422"]
    assert load("/classify_batch", "--field", "images", "--images", "4")["statuses"].keys() == {"200"}


def test_answers_that_come_when_the_time_is_over_count_as_slow_ones() -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            time.sleep(1)  # a slow server
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

    with listening(Handler) as address:
        found = benchmark.load(f"{address}/classify", 2, 0.3)
    assert (found["answers"], found["in_time"], found["errors"]) == (2, 0, 0)
    assert found["milliseconds"]["50"] >= 1000


def test_a_server_that_is_not_there_is_errors_only() -> None:
    with refusing() as address:
        command = [sys.executable, "-m", "benchmarks.load", f"{address}/classify", "--seconds", "0.3"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["answers"] == 0
    assert found["errors"] >= 1


def test_requests_hold_as_many_images_as_asked_for() -> None:
    (first, *_) = requests("http://127.0.0.1:1/classify_batch", "images", 3)
    assert first.count(b"\x89PNG") == first.count(b'name="images"') == 3
    assert first.startswith(b"POST /classify_batch HTTP/1.1\r\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "0"], "--rounds and --connections have to be at least 1"),
        (["--markdown", "--figures", "nowhere.json"], "no figures at nowhere.json"),
    ],
)
def test_wrong_arguments_are_one_clear_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert benchmark.main(arguments) == 1
    assert message in capsys.readouterr().err
