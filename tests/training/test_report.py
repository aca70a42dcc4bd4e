"""Report pages of real runs on the bundled sample, written by the command line and read as XML."""

import base64
import io
import itertools
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.browser import open_page
from training import checkpoint, data, recipe, train
from training.__main__ import main
from training.checkpoint import Checkpoint
from training.data import DataSet, Images
from training.initial import initial_network
from training.model import CLASSES
from training.report import charts, layers, pages, pictures

NONE = "\N{EN DASH}"
pytestmark = pytest.mark.usefixtures("sample")


@pytest.fixture(scope="module")
def trial(sample: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a trial of ``fast`` with held-out images, views, image sizes, fixed parameters."""
    folder = tmp_path_factory.mktemp("trial") / "trial"
    settings = ["batch_size=25", "data.validation=0.2", "resolution.1.from_epoch=1"]
    arguments = ["run", "fast", "--out", str(folder), "--epochs", "2", "--limit", "50"]
    assert main([*arguments, "--set", *settings]) == 0
    return folder


def read(page: Path) -> Element:
    """Parse a page, which must be well-formed; names are without namespaces."""
    root = ElementTree.fromstring(page.read_text(encoding="utf-8"))
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
    return root


def text(element: Element | None) -> str:
    assert element is not None
    return " ".join("".join(element.itertext()).split())


def report(folder: Path, out: Path) -> Element:
    assert main(["report", str(folder), "--out", str(out)]) == 0
    return read(out / f"{folder.name}.html")


def facts(page: Element) -> dict[str, str]:
    return {text(part.find("dt")): text(part.find("dd")) for part in page.findall(".//dl/div")}


def pixels(image: Element) -> Tensor:
    head, _, code = image.attrib["src"].partition(",")
    assert head == "data:image/png;base64"
    with Image.open(io.BytesIO(base64.b64decode(code))) as picture:
        return torch.from_numpy(np.array(picture))


def confusion(page: Element) -> list[list[int]]:
    (table,) = page.findall(".//table[@class='confusion']")
    return [[int(text(cell)) for cell in row.findall("td")] for row in table.findall("tbody/tr")]


def class_accuracies(page: Element) -> dict[str, str]:
    (chart,) = page.findall(".//section[@id='predictions']//svg")
    _, _, said = chart.attrib["aria-label"].partition(": ")
    shown = {text(part) for part in chart.iter("text")}
    pairs = dict(part.split(" ", 1) for part in said.split(", "))
    assert {*pairs, *pairs.values()} <= shown
    return pairs


def probabilities(state: Checkpoint, images: Images) -> Tensor:
    """Predicted probabilities, computed without the modules that training and reports use."""
    chosen = state.parsed_recipe()
    network = state.network().eval()
    mean, std = (torch.tensor(value)[:, None, None] for value in (chosen.data.mean, chosen.data.std))
    outputs = []
    with torch.no_grad():
        for image in images.pixels:
            x = (image.movedim(2, 0) / 255 - mean) / std
            views = [x, x.flip(2)] if chosen.views == "flip" else [x]
            outputs.append(torch.stack([network(view[None])[0] for view in views]).mean(0))
    return torch.stack(outputs).softmax(1)


def check_predictions(page: Element, state: Checkpoint, images: Images) -> None:
    expected = probabilities(state, images)
    predicted, labels = expected.argmax(1).tolist(), images.labels.tolist()
    counted = Counter(zip(labels, predicted, strict=True))
    rows = confusion(page)
    assert rows == [[counted[true, guess] for guess in range(10)] for true in range(10)]
    assert sum(map(sum, rows)) == len(images)
    assert class_accuracies(page) == {
        CLASSES[true]: f"{100 * counted[true, true] / labels.count(true):.2f} %" for true in set(labels)
    }

    mistakes = page.findall(".//ul[@class='mistakes']/li/figure")
    wrong = [place for place in range(len(labels)) if predicted[place] != labels[place]]
    assert len(mistakes) == min(24, len(wrong))
    shown = []
    for mistake in mistakes:
        image, caption = mistake.find("img"), mistake.find("figcaption")
        assert image is not None
        found = re.fullmatch(r"(\w+) (\d+\.\d\d) % is (\w+) (test|val) image (\d+)", text(caption))
        assert found is not None
        guess, percent, true, _, place = found.groups()
        assert guess == CLASSES[predicted[int(place)]] != true == CLASSES[labels[int(place)]]
        assert float(percent) == pytest.approx(100 * float(expected[int(place)].max()), abs=0.006)
        assert torch.equal(pixels(image), images.pixels[int(place)])
        assert true in image.attrib["alt"]
        shown.append(int(place))
    assert len(set(shown)) == len(shown)
    surest = expected.max(1).values
    least = min(float(surest[place]) for place in shown)
    assert all(surest[place] <= least + 1e-5 for place in wrong if place not in shown)


def test_finished_run_shows_its_result_and_the_test_images(
    uninterrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted, folder)
    capsys.readouterr()
    assert main(["report", str(folder)]) == 0
    assert capsys.readouterr().out == f"{folder / 'report.html'}\n"
    page = read(folder / "report.html")
    state = checkpoint.load(folder / "checkpoint.pt")
    assert state.result is not None
    accuracy = f"{100 * state.result.accuracy:.2f} %"
    assert text(page.find(".//li[@class='first']")) == f"{accuracy} test accuracy on 1,000 images"
    assert text(page.find("head/title")) == f"run: {state.recipe['title']}"

    shown = facts(page)
    assert (shown["seed"], shown["train images"], shown["test images"]) == ("7", "500", "1,000")
    assert (shown["torch"], shown["commit"]) == (torch.__version__, state.run["commit"])
    assert shown["system"] == state.sessions[0]["system"]
    figures = text(page)
    assert "62,006 parameters" in figures
    assert "0.25 MB of parameters" in figures  # 248,024 bytes
    assert "0.05 MB forward and backward" in figures  # 52,144
    assert "67.35 % reported by Angeles, Basic CNN" in figures
    for line in state.history:
        assert f"{100 * line['train_accuracy']:.2f} %" in figures
    titles = [text(figure.find("figcaption")) for figure in page.findall(".//figure[svg]")]
    assert titles[:4] == ["Accuracy", "Loss", "Learning rate", "Time of an epoch, seconds"]
    assert {f"test {accuracy}", "reported 67.35 %"} <= {text(part) for part in page.iter("text")}
    assert state.parsed_recipe().to_toml() in "".join(page.itertext())

    check_predictions(page, state, data.load_sample().test)
    assert sum(row[i] for i, row in enumerate(confusion(page))) == round(1000 * state.result.accuracy)


def test_page_is_one_file_that_refers_to_nothing(uninterrupted: Path, tmp_path: Path) -> None:
    page = report(uninterrupted, tmp_path)
    assert (tmp_path / "run.html").stat().st_size < 1_500_000
    names = {element.tag for element in page.iter()}
    assert not names & {"script", "link", "iframe", "object", "embed", "base", "form", "a"}
    identities = [element.attrib["id"] for element in page.iter() if "id" in element.attrib]
    assert len(set(identities)) == len(identities)
    for element in page.iter():
        for name, value in element.attrib.items():
            if name.rpartition("}")[2] in ("src", "href"):
                assert value.startswith("data:image/png;base64,") or value[1:] in identities
            assert not name.startswith("on")
            assert all(place[1:] in identities for place in re.findall(r"url\((.*?)\)", value) if place)
    sheet = text(page.find("head/style"))
    assert "url(" not in sheet
    assert "@import" not in sheet
    assert "prefers-color-scheme: dark" in sheet
    # Every colour of a chart is from the style sheet.
    used = set(re.findall(r"var\(--([\w-]+)\)", ElementTree.tostring(page, "unicode")))
    assert used <= set(re.findall(r"--([\w-]+):", sheet)) | {"share"}
    drawn = "".join(part.get("style", "") for chart in page.iter("svg") for part in chart.iter())
    assert not re.findall(r"#[0-9a-f]{6}", drawn)
    assert all(image.get("alt") for image in page.iter("img"))
    assert all(chart.get("aria-label") for chart in page.iter("svg"))
    assert all(table.find("caption") is not None for table in page.iter("table"))


@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_shows_all_of_it(uninterrupted: Path, trial: Path, tmp_path: Path, width: int) -> None:
    assert main(["report", str(uninterrupted), str(trial), "--out", str(tmp_path)]) == 0
    said: list[str] = []
    with open_page(width) as shown:
        shown.on("console", lambda message: said.append(message.text))
        shown.goto((tmp_path / "comparison.html").as_uri())
        for name in ("comparison", "run", "trial"):
            if name != "comparison":
                shown.get_by_role("link", name=name, exact=True).click()
            assert shown.url == (tmp_path / f"{name}.html").as_uri()
            assert shown.evaluate("document.documentElement.scrollWidth") == width  # nothing is cut off
            charts = shown.locator("svg[aria-label]")
            assert charts.count() >= 2
            for chart in charts.all():
                box = chart.bounding_box()
                assert box is not None
                assert min(box["width"], box["height"]) > 50
            broken = "[...document.images].filter(image => !image.naturalWidth).length"
            assert (shown.evaluate(broken), said) == (0, [])
            if name != "comparison":
                assert shown.evaluate("document.images.length") > 10
                shown.go_back()


def test_same_run_same_bytes(uninterrupted: Path, trial: Path, tmp_path: Path) -> None:
    runs = [str(uninterrupted), str(trial)]
    for name in ("one", "other"):
        assert main(["report", *runs, "--out", str(tmp_path / name)]) == 0
    for page in ("run.html", "trial.html", "comparison.html"):
        assert (tmp_path / "one" / page).read_bytes() == (tmp_path / "other" / page).read_bytes()


def without_test_images() -> DataSet:
    sample = data.load_sample()
    return DataSet(sample.train, sample.test.first(0), sample.source)


def test_trial_shows_its_held_out_images(
    trial: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = data.load_sample()
    monkeypatch.setattr(data, "load", without_test_images)
    page = report(trial, tmp_path)
    state = checkpoint.load(trial / "checkpoint.pt")
    accuracy = f"{100 * state.history[-1]['val_accuracy']:.2f} %"
    assert text(page.find(".//li[@class='first']")).startswith(f"{accuracy} val accuracy")
    assert text(page.find(".//p[@class='notice']")).startswith("Trained to its end, but not evaluated")
    section = page.find(".//section[@id='predictions']")
    assert section is not None
    assert text(section.find("h2")) == "Predictions on the val images"
    assert "of the 50 val images (training images that were held out)" in text(section)
    check_predictions(page, state, data.split(sample.train, 0.2)[1].first(50))
    assert any(text(part) == f"val {accuracy}" for part in page.iter("text"))
    # The image size changes with the second epoch, and the chart says so at that place.
    chart = page.findall(".//figure/svg")[0]
    across = {text(part): float(part.attrib["x"]) for part in chart.iter("text")}
    (line,) = [part for part in chart.iter("path") if "dasharray: 3,3" in part.get("style", "")]
    change = float(line.attrib["d"].split()[1])
    assert across["24 px"] < across["1"] < change < across["32 px"] < across["2"]


def edited(source: Path, folder: Path, **changes: Any) -> Path:
    """A copy of a run's checkpoint in another folder, with some of its fields changed."""
    folder.mkdir(parents=True)
    state = checkpoint.load(source / "checkpoint.pt")
    for name, value in changes.items():
        setattr(state, name, value)
    checkpoint.save(state, folder / "checkpoint.pt")
    return folder


def test_unfinished_run_without_held_out_images_shows_no_predictions(
    uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "load", without_test_images)
    history = [checkpoint.load(uninterrupted / "checkpoint.pt").history[0] | {"seconds": 150.0}]
    done = {"epoch": 1, "step": 4, "history": history, "seconds": 190.4, "result": None}
    page = report(edited(uninterrupted, tmp_path / "half", **done), tmp_path)
    assert "2 min 30 s for 1 epoch" in text(page)  # without the steps of the next
    chart = page.findall(".//figure/svg")[-1]
    assert chart.attrib["aria-label"] == "Time of an epoch, minutes; the median is 2.5"
    notice = text(page.find(".//p[@class='notice']"))
    assert notice == "Unfinished: 1 of 3 epochs are done, and 4 steps of the next."
    predictions = text(page.find(".//section[@id='predictions']"))
    assert "the run holds out no training images, and the test images are looked at once" in predictions
    assert page.find(".//table[@class='confusion']") is None
    assert page.find(".//ul[@class='mistakes']") is None
    assert page.find(".//table[@class='samples']") is not None
    assert "test accuracy" not in text(page)


def test_predictions_within_an_epoch_say_after_how_many_steps(trial: Path, tmp_path: Path) -> None:
    history = checkpoint.load(trial / "checkpoint.pt").history[:1]
    page = report(edited(trial, tmp_path / "half", epoch=1, step=1, history=history), tmp_path)
    assert "the network after 1 epoch and 1 step." in text(page.find(".//section[@id='predictions']"))


def test_run_that_was_only_created_has_a_page(tmp_path: Path) -> None:
    chosen = recipe.load("A1", ["data.validation=0.1"])
    train.create(tmp_path / "new", chosen, "A1", 0, data.load_sample())
    page = report(tmp_path / "new", tmp_path)
    assert text(page.find(".//p[@class='notice']")) == "Unfinished: 0 of 100 epochs are done."
    assert "No epoch is done yet." in text(page)
    assert sum(map(sum, confusion(page))) == 50


def test_runs_within_their_first_epoch_are_compared(trial: Path, tmp_path: Path) -> None:
    begun = {"epoch": 0, "step": 1, "history": [], "seconds": 4.5}
    runs = [edited(trial, tmp_path / name, **begun) for name in ("one", "other")]
    assert main(["report", *map(str, runs), "--out", str(tmp_path)]) == 0
    page = read(tmp_path / "comparison.html")
    columns = [text(cell) for cell in page.findall(".//thead/tr/th")]
    for row in page.findall(".//tbody/tr"):
        shown = dict(zip(columns, map(text, row), strict=True))
        assert (shown["epochs"], shown["seconds"]) == ("0 of 2", "0.0")
    assert page.find(".//svg") is None


def test_every_fact_of_the_checkpoint_is_shown(uninterrupted: Path, tmp_path: Path) -> None:
    state = checkpoint.load(uninterrupted / "checkpoint.pt")
    other = {**state.sessions[0], "device": "another device"}
    seconds = [10.0, 30.0, 45.5]
    history = [line | {"seconds": end} for line, end in zip(state.history, seconds, strict=True)]
    changes = {
        "history": history,
        "seconds": seconds[-1],
        "sessions": [*state.sessions, other],
    }
    page = report(edited(uninterrupted, tmp_path / "run", **changes), tmp_path)
    shown = facts(page)
    assert state.result is not None
    assert shown["device"] == state.result.device
    assert "45.5 s for 3 epochs" in text(page)
    table = page.findall(".//details//table")[0]
    assert text(table.find("caption")) == "Metrics by epoch"
    assert [text(row[-1]) for row in table.findall("tbody/tr")] == ["10.0", "20.0", "15.5"]
    history[-1]["seconds"] = 7500.0
    resumed = changes | {"result": None, "seconds": 7500.0}
    page = report(edited(uninterrupted, tmp_path / "resumed", **resumed), tmp_path)
    shown = facts(page)
    assert "2 h 5 min for 3 epochs" in text(page)
    assert shown["device"] == f"{state.sessions[0]['device']} + another device"
    assert shown["python"] == state.sessions[0]["python"]


def test_names_are_text(uninterrupted: Path, tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>&\"'$x_1$"
    state = checkpoint.load(uninterrupted / "checkpoint.pt")
    changed = {"recipe_name": evil, "recipe": state.recipe | {"title": f"</title>{evil}"}}
    runs = [edited(uninterrupted, tmp_path / name, **changed) for name in ("<b>&\"'$x_1$", "%20 #a?")]
    assert main(["report", *map(str, runs), "--out", str(tmp_path / "out")]) == 0
    page = read(tmp_path / "out" / f"{runs[0].name}.html")
    assert page.find(".//script") is None
    assert text(page.find("head/title")) == f"{runs[0].name}: </title>{evil}"
    assert text(page.find(".//h1")) == f"</title>{evil}"
    assert evil in text(page.find(".//p[@class='over']"))

    comparison = read(tmp_path / "out" / "comparison.html")
    assert comparison.find(".//script") is None
    links = [link.attrib["href"] for link in comparison.iter("a")]
    assert links == ["%3Cb%3E%26%22%27%24x_1%24.html", "%2520%20%23a%3F.html"]
    assert f"1 {runs[0].name}" in {text(part) for part in comparison.iter("text")}


def test_comparison_has_a_row_and_curves_for_each_run(
    uninterrupted: Path, trial: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [tmp_path / "runs" / "first", tmp_path / "runs" / "second"]
    for source, run in zip((uninterrupted, trial), runs, strict=True):
        shutil.copytree(source, run)
    new = tmp_path / "runs" / "new"
    train.create(new, recipe.load("A1"), "A1", 3, data.load_sample())
    capsys.readouterr()
    assert main(["report", *map(str, [*runs, new])]) == 0
    written = [Path(line) for line in capsys.readouterr().out.splitlines()]
    expected = [*(run / "report.html" for run in (*runs, new)), tmp_path / "runs" / "comparison.html"]
    assert written == expected

    page = read(expected[-1])
    columns = [text(cell) for cell in page.findall(".//thead/tr/th")]
    rows = [dict(zip(columns, map(text, row), strict=True)) for row in page.findall(".//tbody/tr")]
    states = [checkpoint.load(run / "checkpoint.pt") for run in runs]
    assert states[0].result is not None
    assert rows[0]["number"] == "1"
    assert rows[0]["run"] == "first"
    assert rows[0]["model"] == "basic cnn"
    assert rows[0]["recipe"] == "short Basic CNN of the PyTorch tutorial"
    assert rows[0]["test accuracy"] == f"{100 * states[0].result.accuracy:.2f} %"
    assert (rows[0]["val accuracy"], rows[0]["epochs"], rows[0]["lr"]) == (NONE, "3", "0.05")
    assert (rows[0]["parameters"], rows[0]["seed"]) == ("62,006", "7")
    assert rows[0]["device"] == states[0].result.device
    assert rows[0]["timestamp"].startswith(states[0].result.date[:10])
    assert rows[0]["commit"].startswith(states[0].run["commit"][:10])
    assert rows[1]["test accuracy"] == NONE
    assert rows[1]["val accuracy"] == f"{100 * states[1].history[-1]['val_accuracy']:.2f} %"
    assert rows[1]["device"] == states[1].sessions[0]["device"]
    assert (rows[2]["epochs"], rows[2]["timestamp"], rows[2]["device"]) == ("0 of 100", "", "")

    for link, run in zip(page.iter("a"), [*runs, new], strict=True):
        assert (expected[-1].parent / link.attrib["href"]).samefile(run / "report.html")
    drawn = list(page.iter("svg"))
    assert [chart.attrib["aria-label"].partition(";")[0] for chart in drawn] == ["Accuracy", "Loss"]
    for chart in drawn:
        assert {"1 first", "2 second"} <= {text(part) for part in chart.iter("text")}


def diamonds(chart: Element) -> int:
    """The kinds of markers that have corners."""
    shapes = [path.attrib["d"] for path in chart.findall(".//defs/path")]
    return sum("C" not in shape and shape.rstrip().endswith("z") for shape in shapes)


def test_only_the_test_accuracy_is_a_diamond(uninterrupted: Path, trial: Path, tmp_path: Path) -> None:
    history = checkpoint.load(trial / "checkpoint.pt").history[:1]
    short = edited(trial, tmp_path / "short", epoch=1, history=history)
    for run, expected in ((uninterrupted, [1, 0]), (trial, [0, 0])):
        assert main(["report", str(run), str(short), "--out", str(tmp_path)]) == 0
        drawn = read(tmp_path / "comparison.html").iter("svg")
        assert [diamonds(chart) for chart in drawn] == expected


def test_of_many_sessions_the_first_and_the_last_start_are_shown(
    uninterrupted: Path, trial: Path, tmp_path: Path
) -> None:
    (session,) = checkpoint.load(trial / "checkpoint.pt").sessions
    starts = [{**session, "started": f"2026-01-{day:02}T03:04:05+00:00"} for day in range(1, 26)]
    often = edited(trial, tmp_path / "often", sessions=starts)
    page = report(often, tmp_path)
    assert facts(page)["started"] == "2026-01-01 03:04 UTC to 2026-01-25 03:04 UTC, 25 sessions"
    assert main(["report", str(uninterrupted), str(often), "--out", str(tmp_path)]) == 0
    rows = read(tmp_path / "comparison.html").findall(".//tbody/tr")
    assert text(rows[1].findall("td")[1]) == "2026-01-01 03:04 UTC"


def test_the_best_accuracies_of_a_comparison_are_bold(uninterrupted: Path, tmp_path: Path) -> None:
    state, entries = checkpoint.load(uninterrupted / "checkpoint.pt"), []
    assert state.result is not None
    for name, test, val in (("a", 0.5, 0.75), ("b", 0.6, 0.7), ("c", None, None)):
        history = [state.history[-1] | ({"val_accuracy": val, "val_loss": 1.0} if val else {})]
        result = state.result.model_copy(update={"accuracy": test}) if test else None
        run = state.model_copy(update={"history": history, "result": result})
        entries.append(pages.Entry(name, tmp_path / name, run, run.parsed_recipe(), run.network()))
    path = tmp_path / pages.COMPARISON
    path.write_text(pages.comparison_page(entries, tmp_path), encoding="utf-8")
    bold = [
        [text(part) for part in row.findall("td/b")[1:]] for row in read(path).findall(".//tbody/tr")
    ]
    assert bold == [["75.00 %"], ["60.00 %"], []]


def test_all_commits_of_a_run_are_compared(uninterrupted: Path, tmp_path: Path) -> None:
    state, entries = checkpoint.load(uninterrupted / "checkpoint.pt"), []
    one, two = "0123456789" * 4, "abcdef0123" * 4
    for name, commits in (("a", [one, two]), ("b", [f"{one}-dirty", two]), ("c", [])):
        sessions = [{**state.sessions[0], "commit": commit} for commit in commits]
        facts = {**state.run, "commit": f"{two}-dirty"}
        run = state.model_copy(update={"sessions": sessions, "run": facts, "result": None})
        entries.append(pages.Entry(name, tmp_path / name, run, run.parsed_recipe(), run.network()))
    path = tmp_path / pages.COMPARISON
    path.write_text(pages.comparison_page(entries, tmp_path), encoding="utf-8")
    shown = [text(row.findall("td")[-1]) for row in read(path).findall(".//tbody/tr")]
    assert shown == ["0123456789 + abcdef0123", "0123456789-dirty + abcdef0123", "abcdef0123-dirty"]


def test_comparison_says_where_train_figures_are_of_different_losses(
    uninterrupted: Path, tmp_path: Path
) -> None:
    short = uninterrupted / "recipe.toml"
    settings = {
        "mixed": "mixing={kind='mixup', alpha=0.4, p=1.0, epochs=[0, 1]}",
        "alike": "batch_size=32",
    }
    for name, setting in settings.items():
        arguments = ["run", str(short), "--out", str(tmp_path / name), "--limit", "64"]
        assert main([*arguments, "--epochs", "1", "--set", setting]) == 0
        assert main(["report", str(uninterrupted), str(tmp_path / name), "--out", str(tmp_path)]) == 0
        said = "The runs do not minimise the same loss" in text(read(tmp_path / "comparison.html"))
        assert said == (name == "mixed")


def test_network_without_a_mistake_has_a_page(
    uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # If all images are of one class, two steps are enough to get them all right.
    arrays = dict(np.load(data.SAMPLE, allow_pickle=False))
    ships = {name: np.full_like(part, 8) if "labels" in name else part for name, part in arrays.items()}
    np.savez(tmp_path / "ships.npz", **ships, allow_pickle=False)
    monkeypatch.setenv(data.ROOT_VARIABLE, str(tmp_path / "ships.npz"))
    run = tmp_path / "run"
    assert main(["run", str(uninterrupted / "recipe.toml"), "--out", str(run)]) == 0
    page = report(run, tmp_path / "pages")
    matrix = confusion(page)
    assert sum(map(sum, matrix)) == matrix[8][8] == 1000
    assert page.findall(".//ul[@class='mistakes']") == []


def test_labels_beside_a_chart_keep_apart() -> None:
    close = [charts.Series(f"run {n}", [1, 2], [0.1, 0.9 + n / 1000], n) for n in range(12)]
    root = ElementTree.fromstring(charts.lines("Accuracy", close, percent=True))
    heights = [float(part.attrib["y"]) for part in root.iter() if (part.text or "").startswith("run ")]
    assert len(heights) == 12
    assert heights == sorted(heights, reverse=True)  # the highest value is on top
    assert all(below - above > 11 for below, above in itertools.pairwise(heights))


def test_samples_are_what_the_recipe_makes_of_the_images() -> None:
    images = data.load_sample().train
    places = torch.arange(20)
    originals = images.pixels[places]
    plain = recipe.load("fast", ["augment=[]", "resolution=[]"])
    for version in pictures.augmented(plain, 0, images, places, 3):
        assert torch.equal(version.pixels, originals), "normalisation is undone"

    flipping = recipe.load(
        "fast", ['augment=[{op="alternating_flip"}]', "epochs=4", "resolution.1.from_epoch=3"]
    )
    versions = pictures.augmented(flipping, 5, images, places, 4)
    assert [version.epoch for version in versions] == [0, 1, 2, 3]
    assert [version.pixels.shape[1:3] for version in versions] == [(24, 24)] * 3 + [(32, 32)]
    assert torch.equal(versions[2].pixels, versions[0].pixels)
    flipped = (versions[3].pixels != originals).flatten(1).any(1)
    assert 0 < flipped.sum() < 20
    assert torch.equal(versions[3].pixels[flipped].flip(2), originals[flipped])

    before = torch.random.get_rng_state()
    mixing = recipe.load("distilled", ["mixing.p=1.0"])
    versions = pictures.augmented(mixing, 0, images, places, 2)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(not torch.equal(version.pixels, originals) for version in versions)


def test_page_shows_the_originals_of_its_samples(trial: Path, tmp_path: Path) -> None:
    page = report(trial, tmp_path)
    rows = page.findall(".//table[@class='samples']/tbody/tr")
    training = data.split(data.load_sample().train, 0.2)[0].first(50)
    assert len(rows) == 6
    assert len({text(row.find("th")) for row in rows}) == 6
    for row in rows:
        original, *versions = row.findall("td/img")
        (same,) = (training.pixels == pixels(original)).all(3).all(2).all(1).nonzero()
        assert CLASSES[training.labels[same]] == text(row.find("th"))
        assert [len(pixels(version)) for version in versions] == [24] * 4 + [32] * 3


def test_layers_have_their_shapes_parameters_and_memory() -> None:
    chosen = recipe.load("A1")
    network = initial_network(chosen.model, chosen, 0, data.load_sample().train)
    summary = layers.summarize(network)
    assert [(layer.name, layer.shape, layer.parameters) for layer in summary.layers] == [
        ("conv1", (6, 28, 28), 456),
        ("conv2", (16, 10, 10), 2416),
        ("fc1", (120,), 48120),
        ("fc2", (84,), 10164),
        ("head", (10,), 850),
    ]
    assert (summary.parameters, summary.trainable, summary.parameter_bytes) == (62006, 62006, 248024)
    assert summary.activation_bytes == 8 * (6 * 28 * 28 + 16 * 10 * 10 + 120 + 84 + 10)

    chosen = recipe.load("fast")
    network = initial_network(chosen.model, chosen, 0, data.load_sample().train)
    summary = layers.summarize(network)
    assert summary.parameters == sum(layer.parameters for layer in summary.layers) == 2563104
    scales = sum(layer.shape[0] for layer in summary.layers if layer.kind == "BatchNorm2d")
    assert summary.parameters - summary.trainable == 24 * 3 * 2 * 2 + scales


def test_other_data_set_is_refused(
    uninterrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = checkpoint.load(uninterrupted / "checkpoint.pt")
    run = edited(uninterrupted, tmp_path / "run", run=state.run | {"data": "cifar10"})
    assert main(["report", str(run)]) == 1
    error = capsys.readouterr().err
    assert error.startswith(
        "error: run is a run on cifar10, but the data set at hand is sample: set CIF"
    )
    assert [path.name for path in run.iterdir()] == ["checkpoint.pt"]


def test_missing_data_set_is_named(
    uninterrupted: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(data.ROOT_VARIABLE, str(tmp_path / "nowhere"))
    assert main(["report", str(uninterrupted), "--out", str(tmp_path / "out")]) == 1
    assert "error: CIFAR-10 is not there" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_previous_checkpoint_gives_the_page_where_the_last_is_lost(
    uninterrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    (run / "checkpoint.pt").unlink()
    assert main(["report", str(run)]) == 0
    out = capsys.readouterr().out
    assert f"no checkpoint at {run / 'checkpoint.pt'}; going on from checkpoint.previous.pt" in out
    assert (run / "report.html").exists()


@pytest.mark.parametrize("damage", ["no run", "cut off", "same name", "file"])
def test_wrong_runs_are_one_clear_line(
    damage: str, uninterrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    if damage != "no run":
        shutil.copytree(uninterrupted, run)
    file = run / "checkpoint.pt"
    arguments = [str(run), "--out", str(tmp_path / "out")]
    match damage:
        case "no run":
            message = f"no checkpoint at {file}"
        case "cut off":
            for part in (file, checkpoint.previous(file)):
                part.write_bytes(part.read_bytes()[:1000])
            message = f"{file}: damaged"
        case "same name":
            arguments.insert(0, str(uninterrupted))
            message = f"{tmp_path / 'out' / 'run.html'} would be written twice: name other runs"
        case _:
            (tmp_path / "out").write_text("a file")
            message = "File exists"
    assert main(["report", *arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert len(error.splitlines()) == 1
