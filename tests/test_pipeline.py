"""End to end on real images: recipe, checkpoint, model file, a real server process, CSV."""

import csv
import io
import os
import pickle
import subprocess
import sys
from pathlib import Path

import httpx
import numpy as np

from tests import ROOT
from tests.serving.server import serving
from training import data, recipe


def command(*arguments: str) -> None:
    environment = os.environ | {data.ROOT_VARIABLE: str(data.SAMPLE)}
    subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, env=environment, check=True)


def test_from_recipe_to_submission(tmp_path: Path) -> None:
    run, model_file = tmp_path / "run", tmp_path / "model.onnx"
    # With 500 images our recipe has too few steps to learn something, so this one has a few more.
    settings = ["batch_size=50", "epochs=10", "optimizer.bias_lr=2.65", "optimizer.head_lr=33.5",
                "optimizer.lr=0.05", "resolution=[{from_epoch = 0, size = 16}]",
                "model.widths=[16,32,64]"]  # fmt: skip
    (tmp_path / "small.toml").write_text(recipe.load("fast", settings).to_toml())
    command("training", "run", str(tmp_path / "small.toml"), "--out", str(run))
    command("export", "write", str(run / "checkpoint.pt"), str(model_file))

    test = data.load_sample().test
    order = np.random.default_rng(0).permutation(len(test))
    ids = 7000 + order
    pickled = tmp_path / "cifar_test_nolabel.pkl"
    pickled.write_bytes(pickle.dumps({b"data": test.pixels.numpy()[order], b"ids": ids}, protocol=4))
    with serving(tmp_path, SERVING_MODEL=str(model_file), SERVING_PROVIDER="cpu") as url:
        served = httpx.get(f"{url}/model", timeout=60).json()
        with pickled.open("rb") as file:
            answer = httpx.post(f"{url}/submission", files={"file": file}, timeout=120)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/csv")
    assert (served["name"], served["parity"]["top1_agreement"]) == ("small", 1.0)

    rows = list(csv.DictReader(io.StringIO(answer.text)))
    assert [int(row["ID"]) for row in rows] == ids.tolist()
    labels = np.array([int(row["Labels"]) for row in rows])
    accuracy = float((labels == test.labels.numpy()[order]).mean())
    # As the run measured in PyTorch on the same images, and well above the 0.1 of guessing.
    assert accuracy == served["test_accuracy"] == served["parity"]["accuracy"]
    assert accuracy > 0.2
