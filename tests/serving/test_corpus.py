"""Every hostile file of the corpus, sent to a real service."""

import tomllib
from pathlib import Path

import httpx
import numpy as np
import numpy.typing as npt
import psutil
import pytest

from tests import ROOT
from tests.serving.corpus.make import COMMAND
from tests.serving.samples import encoded
from tests.serving.server import serving

CORPUS = Path(__file__).parent / "corpus"
EXPECTED = tomllib.loads((CORPUS / "expected.toml").read_text())
ENDPOINTS = {"pickles": ("/submission", "file"), "images": ("/classify", "image")}
GROWTH = 32 * 2**20  # bytes; less than any single bomb would take


def send(client: httpx.Client, folder: str, name: str) -> httpx.Response:
    path, field = ENDPOINTS[folder]
    return client.post(path, files={field: (name, (CORPUS / folder / name).read_bytes())})


def test_every_file_has_its_answer() -> None:
    for folder in ENDPOINTS:
        assert {path.name for path in (CORPUS / folder).iterdir()} == set(EXPECTED[folder])


@pytest.mark.parametrize(
    ("folder", "name", "status", "code"),
    [(folder, name, *answer) for folder in ENDPOINTS for name, answer in EXPECTED[folder].items()],
)
def test_answer(client: httpx.Client, folder: str, name: str, status: int, code: str) -> None:
    response = send(client, folder, name)
    assert response.status_code == status
    if status == 200:
        assert code == "ok"
        return
    assert set(response.json()) == {"error"}
    error = response.json()["error"]
    assert error["code"] == code
    assert 10 < len(error["message"]) < 400
    assert not any(word in error["message"] for word in ("Traceback", "site-packages", str(ROOT)))
    assert not (ROOT / COMMAND.split()[1]).exists(), "the pickle ran"
    assert client.get("/readyz").status_code == 200


def test_memory_comes_back(tmp_path: Path, images: npt.NDArray[np.uint8]) -> None:
    others = set(psutil.Process().children(recursive=True))
    with serving(tmp_path) as url, httpx.Client(base_url=url, timeout=60) as client:
        service = set(psutil.Process().children(recursive=True)) - others

        def everything() -> tuple[object, int]:
            for folder in ENDPOINTS:
                for name in EXPECTED[folder]:
                    send(client, folder, name)
            good = client.post("/classify", files={"image": ("good.png", encoded(images[0]))})
            return good.json()["predictions"], sum(part.memory_info().rss for part in service)

        answer, settled = everything()  # what decoders and the engine load on first use stays in memory
        for _ in range(3):
            again, memory = everything()
            assert again == answer
        assert memory - settled < GROWTH
