"""The page at /, where people try out the endpoints in a browser."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import Locator, Page, Response

from tests import ROOT
from tests.browser import open_page
from tests.serving.samples import pickled
from tests.serving.server import serving

CAT = ROOT / "docs" / "cat.png"
KEY = "a key"


@pytest.fixture
def page() -> Iterator[Page]:
    with open_page() as page:
        yield page


def tried_out(page: Page, operation: str, *files: Path, tag: str = "Service_APIs") -> Locator:
    """Open an operation of the page to try it out, as filled in by the page except for the files."""
    block = page.locator(f"#operations-{tag}-{operation}")
    block.locator(".opblock-summary").click()
    block.get_by_role("button", name="Try it out").click()
    for number, file in enumerate(files):
        if operation == "classify_batch":
            block.get_by_role("button", name="Add").click()
        block.locator("input[type=file]").nth(number).set_input_files(file)
    return block


def executed(page: Page, block: Locator, path: str) -> Response:
    with page.expect_response(lambda response: path in response.url) as waiting:
        block.get_by_role("button", name="Execute").click()
    return waiting.value


def test_everything_can_be_tried_out(url: str, page: Page, tmp_path: Path) -> None:
    file = tmp_path / "test.pkl"
    file.write_bytes(pickled({"data": np.zeros((3, 32, 32, 3), np.uint8)}))
    requested: list[str] = []
    page.on("request", lambda request: requested.append(request.url))
    page.goto(url)
    page.get_by_role("heading", name="CIFAR-10 classifier").wait_for()
    assert page.get_by_role("button", name="Authorize").count() == 0

    classify = tried_out(page, "classify", CAT)
    answer = executed(page, classify, "/classify")
    assert answer.status == 200
    labels = [prediction["label"] for prediction in answer.json()["predictions"]]
    assert (len(labels), labels[0]) == (5, "cat")
    assert '"label": "cat"' in classify.locator(".live-responses-table").inner_text()

    batch = executed(page, tried_out(page, "classify_batch", CAT, CAT), "/classify_batch")
    assert [one["predictions"][0]["label"] for one in batch.json()] == ["cat", "cat"]
    submission = executed(page, tried_out(page, "submission", file), "/submission")
    assert submission.text().startswith("ID,Labels\n0,")
    assert executed(page, tried_out(page, "model"), "/model").json()["name"] == "accurate"
    assert all(address.startswith((f"{url}/", "data:", "blob:")) for address in requested)


def test_the_example_of_an_inference_lacks_no_more_than_it_says(url: str, page: Page) -> None:
    page.goto(url)
    block = tried_out(page, "v2_model_infer", tag="Open_Inference_Protocol")
    block.get_by_placeholder("name").fill("accurate")
    short = executed(page, block, "/infer")
    assert (short.status, "3072" in short.text()) == (422, True)
    body = block.locator("textarea")
    example = json.loads(body.input_value())
    example["inputs"][0]["data"] *= 3072
    body.fill(json.dumps(example))
    answer = executed(page, block, "/infer")
    assert (answer.status, len(answer.json()["outputs"][0]["data"])) == (200, 5)


def test_the_key_can_be_given(page: Page, tmp_path: Path) -> None:
    with serving(tmp_path, SERVING_PROVIDER="cpu", SERVING_API_KEY=KEY) as url:
        page.goto(url)
        classify = tried_out(page, "classify", CAT)
        assert executed(page, classify, "/classify").status == 401
        page.get_by_role("button", name="Authorize").click()
        form = page.locator(".auth-container")
        form.locator("input").fill(KEY)
        form.get_by_role("button", name="Apply credentials").click()
        form.get_by_role("button", name="Close").click()
        assert executed(page, classify, "/classify").status == 200
