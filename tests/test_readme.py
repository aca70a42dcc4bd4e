"""The README's tables, commands and answers are those of the program."""

import json
import re
import subprocess
from statistics import median
from types import ModuleType

import onnx
import pytest
from httpx import Client

from benchmarks import inference, serving, soak, training
from benchmarks.stored import FOLDER, read
from export.parity import LIMITS
from serving.errors import RequestError
from serving.settings import BUNDLED_MODEL, PREFIX, Settings
from tests import ROOT
from tests.transcripts import assert_as_shown, transcripts
from training import results
from training.tables import markdown_table, percent, table_rows

README = (ROOT / "README.md").read_text(encoding="utf-8")
FIGURES = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
PROSE = README.replace("\n", " ")  # so that line breaks do not matter
CARD = (ROOT / "models" / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def metadata() -> dict[str, str]:
    return {entry.key: entry.value for entry in onnx.load(BUNDLED_MODEL).metadata_props}


@pytest.fixture(scope="module")
def row(metadata: dict[str, str]) -> results.Result:
    """The row of the bundled model's run in results.csv."""
    (row,) = [
        row
        for row in results.read()
        if (row.recipe, row.commit) == (metadata["name"], metadata["commit"])
        and row.seed == int(metadata["seed"])
    ]
    return row


def test_results_are_the_table_of_the_runs() -> None:
    assert markdown_table(table_rows()) in README


def test_linked_page_is_of_the_run_of_the_bundled_model(
    metadata: dict[str, str], row: results.Result
) -> None:
    link = re.search(r"\[!\[The page about the bundled model's run\]\(.+?\)\]\((.+?)\)", README)
    assert link
    page = (ROOT / link[1]).read_text(encoding="utf-8")
    assert f"<dd>{metadata['commit']}</dd>" in page
    assert f"<b>{percent(row.accuracy)}</b> test accuracy" in page
    assert f"run <b>{metadata['name']}-seed{metadata['seed']}</b>" in page


def test_unfinished_run_is_as_its_page_has_it() -> None:
    told = re.search(
        r"\*\*(\w+)\*\* has done (\d+) of its (\d+) epochs [^:]+: (\S+ %) of the held-out images are "
        r"right\. \[Its page\]\((.+?)\)",
        PROSE,
    )
    assert told
    name, done, epochs, accuracy, link = told.groups()
    page = (ROOT / link).read_text(encoding="utf-8")
    assert f"recipe <b>{name}</b>" in page
    assert f"Unfinished: {done} of {epochs} epochs are done" in page
    assert f"<b>{accuracy}</b> val accuracy" in page


def test_runs_on_a_gpu_are_as_told() -> None:
    rows = [row for row in results.read() if row.precision.endswith(", compiled")]
    fast = [row for row in rows if row.recipe == "fast"]
    (eager,) = [
        row
        for row in results.read()
        if (row.recipe, row.precision) == ("fast", "bfloat16") and "NVIDIA" in row.device
    ]
    seconds, accuracies = (
        f"{', '.join(each[:2])} and {each[2]}"
        for each in (
            [f"{row.seconds:.1f}" for row in fast],
            [percent(row.accuracy).removesuffix(" %") for row in fast],
        )
    )
    assert f"`fast` took {seconds} s for {accuracies} % (seeds 0 to 2, beside other runs)" in PROSE
    assert f"and {eager.seconds} s for {percent(eager.accuracy)} (seed 0) without" in PROSE
    longer = [row for row in rows if row.recipe == "accurate"]
    summary = results.summary(longer, longer[0].recipe_digest)
    slowest = max(row.seconds for row in longer)
    assert (
        f"of 100 epochs, took {slowest:g} s at most, all three at once, and reached {summary}" in PROSE
    )
    lines = (FOLDER / "results" / "A3-h200.jsonl").read_text().splitlines()
    assert f"got through {len(lines)} of its" in PROSE
    assert f"epochs, in {json.loads(lines[-1])['seconds']:g} s" in PROSE


@pytest.mark.parametrize("recipe", ["fast", "seresnet", "distilled"])
def test_runs_on_a_cpu_in_bfloat16_are_as_told(recipe: str) -> None:
    (row,) = [
        row
        for row in results.read()
        if (row.recipe, row.precision, row.device) == (recipe, "bfloat16", "AMD EPYC, 2 threads")
    ]
    told = rf"{percent(row.accuracy)} (in |with AVX512-BF16 \(){row.seconds / 60:.1f} minutes"
    assert re.search(told, PROSE)


def test_layouts_of_a_gpu_are_as_told() -> None:
    content = json.loads((FOLDER / "results" / "cuda-layout.json").read_text())
    half = [part["images_per_second"] for part in content["rates"] if part["precision"] == "fp16"]
    first, last, _ = ([f"{rate:,}" for rate in rates[1:]] for rates in half)
    text = FIGURES.replace("\n", " ")
    assert (
        f"fp16 gave {last[0]} images/s in batches of 128, rather than {first[0]}, and {last[1]} rather "
        f"than {first[1]} in batches of 512" in text
    )


def test_suggested_rate_is_that_of_the_plot() -> None:
    suggested = re.search(r"Here it suggests (\S+), a third of that \(\[plot\]\((.+?)\)", PROSE)
    assert suggested
    others = re.findall(
        r"suggested learning rate (\S+)", (FOLDER / "results" / "A3-lr-h200.txt").read_text()
    )
    shown = ", ".join(f"{float(rate):.4g}" for rate in others[:2]) + f" and {float(others[2]):.4g}"
    assert f"Seeds 1 to 3 suggest {shown} on a GPU" in PROSE
    plot = (ROOT / suggested[2]).read_text(encoding="utf-8")
    assert f"<!-- suggestion {suggested[1]} -->" in plot
    assert "<!-- recipe 0.1122 -->" in plot


@pytest.mark.parametrize("benchmark", [training, inference, serving])
def test_pace_is_the_tables_of_the_benchmark(benchmark: ModuleType) -> None:
    assert benchmark.markdown(read(benchmark.Figures)) in README
    others = list(FOLDER.glob(f"{benchmark.Figures.benchmark}-*.json"))
    assert others
    for file in others:
        assert benchmark.markdown(read(benchmark.Figures, file)) in FIGURES


def test_soak_is_the_table_of_its_figures() -> None:
    assert soak.markdown(read(soak.Figures)) in FIGURES


def test_time_of_a_submission_is_the_benchmarks() -> None:
    measured = [read(inference.Figures, FOLDER / f"inference{place}.json") for place in ("", "-avx2")]
    here, slow = (
        f"{median(found.submit):.1f} s"
        for figures in measured
        for found in figures.submissions
        if found.precision == "int8"
    )
    told = f"labels 10,000 images in {here} on two cores with VNNI, and in {slow} with AVX2 alone"
    assert told in PROSE


def test_every_setting_is_in_the_table_with_its_default() -> None:
    rows = re.findall(r"^\| `(SERVING_\w+)` \| (.+?) \|", README, re.MULTILINE)
    assert [name for name, _ in rows] == [PREFIX + name.upper() for name in Settings.model_fields]
    for name, shown in rows:
        default = Settings.model_fields[name.removeprefix(PREFIX).lower()].default
        if isinstance(default, int | float | str):
            assert shown == f"`{str(default).lower()}`"


def test_limits_of_export_are_as_told() -> None:
    rows = re.findall(
        r"^\| `(fp32|fp16|int8)` \|.*\| (?:at least )?(.+?) \| (?:at most )?(.+?) \|$", README, re.M
    )
    assert rows == [
        (precision, percent(limits.top1_agreement), percent(limits.accuracy_loss))
        for precision, limits in LIMITS.items()
    ]
    assert f"within {LIMITS['fp32'].max_scaled_difference:.0e} of the largest" in README


def test_make_targets_that_are_named_exist() -> None:
    named = set(re.findall(r"^make (\w+)", README, re.MULTILINE))
    assert {"serve", "test", "train", "export"} <= named
    for target in named:
        subprocess.run(["make", "--dry-run", target], cwd=ROOT, check=True, capture_output=True)


def test_classify_answers_as_shown(client: Client) -> None:
    found = re.search(r"^curl -F image=@(\S+) -F top_k=(\d+) localhost:3000/classify\n```", README, re.M)
    assert found
    shown = json.loads(README[found.end() :].split("```json\n")[1].split("```")[0])
    with (ROOT / found[1]).open("rb") as image:
        answer = client.post("/classify", files={"image": image}, data={"top_k": found[2]}).json()
    assert answer["model"] == shown["model"]
    assert [p["label"] for p in answer["predictions"]] == [p["label"] for p in shown["predictions"]]
    for actual, expected in zip(answer["predictions"], shown["predictions"], strict=True):
        # Rounding differs between processors.
        assert actual["probability"] == pytest.approx(expected["probability"], abs=1e-3)


@pytest.mark.parametrize(
    "code",
    [
        *("bad_request", "bad_image", "bad_pickle", "not_found", "method_not_allowed", "too_large"),
        *("unsupported_media_type", "invalid_field"),
    ],
)
def test_errors_are_answered_as_shown(url: str, code: str) -> None:
    """The errors of a service with other settings, or in another state, are tested in tests/serving."""
    assert_as_shown(code, url)


def test_every_error_is_in_the_table_and_shown() -> None:
    rows = re.findall(r"^\| (\d+) \| `(\w+)` \|", README, re.MULTILINE)
    kinds = {(str(kind.status.value), kind.code) for kind in errors_of(RequestError)}
    assert set(rows) == kinds | {("405", "method_not_allowed")}
    assert sorted(transcripts()) == sorted(code for _, code in rows)


def errors_of(kind: type[RequestError]) -> set[type[RequestError]]:
    return {kind}.union(*(errors_of(lower) for lower in kind.__subclasses__()))


def test_python_code_runs_as_shown(
    url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    blocks = [part.split("```")[0] for part in README.split("```python\n")[1:]]
    assert [code.count("localhost:3000") for code in blocks] == [1, 1]
    monkeypatch.chdir(ROOT)
    for code in blocks:
        exec(code.replace("localhost:3000", url.removeprefix("http://")), {})
        assert "cat" in capsys.readouterr().out


def test_links_lead_somewhere() -> None:
    texts = ((README, ROOT), (FIGURES, ROOT / "benchmarks"), (CARD, ROOT / "models"))
    for text, folder in texts:
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
            assert (folder / link).exists(), link


def test_card_describes_the_bundled_model(metadata: dict[str, str], row: results.Result) -> None:
    in_pytorch = json.loads(metadata["pytorch_parity"])["accuracy"]
    assert f"`{metadata['version']}`" in CARD
    for accuracy in (in_pytorch, row.accuracy, row.single_view_accuracy):
        assert percent(accuracy) in CARD
        assert percent(accuracy) in README
    assert f"{int(metadata['parameters']):,}" in CARD
    for report in (
        json.loads(metadata["pytorch_parity"]),
        json.loads(metadata["parity"]),
        *json.loads(metadata["providers"]),
    ):
        assert report["images"] == 10000
        agreement = f"| {percent(report['top1_agreement'])} (limit"
        difference = f"| {report['max_scaled_difference']:.1e}"
        assert any(agreement in line and difference in line for line in CARD.splitlines())
    assert f"**{percent(json.loads(metadata['parity'])['accuracy'])}**" in CARD
    assert f"{BUNDLED_MODEL.stat().st_size:,} bytes" in CARD


def test_card_says_how_reliable_the_probabilities_are(metadata: dict[str, str]) -> None:
    calibration = json.loads(metadata["calibration"])
    for images, text in (("val", CARD), ("test", CARD), ("test", README)):
        assert percent(calibration[f"{images}_ece_before"]) in text
        assert percent(calibration[f"{images}_ece_after"]) in text
    assert metadata["temperature"] in CARD


def test_texts_say_what_the_reliability_plot_shows() -> None:
    plot = (ROOT / "docs" / "reliability.svg").read_text()

    def points(color: str) -> list[tuple[float, float]]:
        (path,) = re.findall(rf'd="([^"]+)" clip-path="[^"]+" style="[^"]*stroke: {color};', plot)
        return [(float(x), float(y)) for x, y in re.findall(r"([\d.]+) ([\d.]+)", path)]

    (left, bottom), (right, top) = points("#444444")  # from 0, 0 to 1, 1
    shown = {
        f"{(x - left) / (right - left):.2f}": f"{100 * (bottom - y) / (bottom - top):.1f}"
        for x, y in points("#1f6feb")
    }
    assert "around 0.90 are right in 81 % only" in PROSE
    assert "of those above 0.93 98.7 % are right" in CARD.replace("\n", " ")
    assert "around 0.90 81 % are right, around 0.70 62 %" in CARD.replace("\n", " ")
    assert (shown["0.90"], shown["0.70"], shown["0.99"]) == ("81.4", "62.3", "98.7")


def test_bundled_model_is_of_a_recorded_run(metadata: dict[str, str], row: results.Result) -> None:
    in_pytorch = json.loads(metadata["pytorch_parity"])["accuracy"]
    # The row has the run's accuracies with six views and with one; the bundled file has two views.
    assert (metadata["views"], row.views) == ("flip", "flip_shift")
    assert in_pytorch == pytest.approx(row.accuracy, abs=0.005)
    assert json.loads(metadata["parity"])["accuracy"] >= 0.94
    assert BUNDLED_MODEL.stat().st_size <= 20_000_000


def test_trials_that_decided_are_as_told() -> None:
    header = (ROOT / "training" / "recipes" / "fast.toml").read_text()
    told = re.findall(r"\(([\d.]+ %)[^(]*?(trials/\S+\.jsonl)\)", header.replace("\n# ", " "))
    assert len(told) == len(list((ROOT / "training" / "trials").iterdir())) == 3
    for accuracy, name in told:
        last = json.loads((ROOT / "training" / name).read_text().splitlines()[-1])
        assert accuracy == f"{100 * last['val_accuracy']:.2f} %"
