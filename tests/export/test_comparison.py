import json
import os
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import numpy_helper

from export import comparison, graph, metadata, temperature
from export.__main__ import main
from export.ensemble import Ensemble
from export.graph import GraphError
from export.member import Member, load
from export.provider import CPU
from export.temperature import TemperatureError
from tests.export.conftest import BUNDLED, Bundled, Train, described
from training import checkpoint, data
from training.data import Images


def test_figures_of_a_comparison() -> None:
    expected: NDArray[np.float32] = np.zeros((1000, 10), np.float32)
    expected[:, 3] = 8
    actual = expected.copy()
    actual[:3, 4] = 10  # the class of three images changes
    labels = torch.full((1000,), 3)
    labels[0] = 4  # which is right for one of them
    images = Images(torch.zeros(1000, 32, 32, 3, dtype=torch.uint8), labels)
    found = comparison.TestImages(images, "sample").compare(expected, actual, "fp32", "CPU")
    assert (found.images, found.top1_agreement) == (1000, 0.997)
    assert found.max_scaled_difference == 10 / 8
    assert (found.accuracy, found.accuracy_loss) == (0.998, 0.001)


class Rounding:
    """A provider that computes in a shorter type."""

    name = "RoundingExecutionProvider"

    def logits(self, content: bytes, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        return CPU.logits(content, pixels) * np.float32(1.002)


def test_other_providers_are_measured_by_limits_of_their_own(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("export.comparison.others", lambda content: iter([Rounding()]))
    out = tmp_path / "model.onnx"
    assert main(["write", str(train("A1")), str(out)]) == 0
    (other,) = json.loads(described(out)["providers"])
    assert (other["provider"], other["reference"]) == (Rounding.name, CPU.name)
    assert other["max_scaled_difference"] == pytest.approx(0.002, rel=0.1)


def test_accuracy_on_the_sample_is_that_of_its_own_images(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = data.load_sample().test
    few = comparison.TestImages(images.first(50), "cifar10")
    with monkeypatch.context() as patch:
        patch.setattr(comparison.TestImages, "load", lambda: few)
        out = tmp_path / "model.onnx"
        assert main(["write", str(train("A1")), str(out)]) == 0
    values = described(out)
    logits = CPU.logits(out.read_bytes(), images.pixels.numpy())
    sample = comparison.TestImages(images, "sample").accuracy(logits)
    assert float(values["sample_accuracy"]) == sample != few.accuracy(logits[:50])
    # Without the data set, the sample's images are run, and compared with the accuracy on the sample.
    monkeypatch.setenv(data.ROOT_VARIABLE, str(data.SAMPLE))
    assert main(["verify", str(out)]) == 0


def test_logits_that_are_no_numbers(
    files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = onnx.load(files["fp32"])
    (head,) = [t for t in model.graph.initializer if t.name.endswith("head.weight")]
    head.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(head) * np.float32("nan"), head.name))
    (version,) = [entry for entry in model.metadata_props if entry.key == "version"]
    version.value = metadata.version(model)
    onnx.save(model, tmp_path / "diverged.onnx")
    assert main(["verify", str(tmp_path / "diverged.onnx")]) == 1
    assert "error: the model file gives logits that are no finite" in capsys.readouterr().err


def test_a_trial_of_other_images_gives_no_temperature(trained: Path, bundled: Bundled) -> None:
    mine, trial = load(trained, None), load(bundled(0.2), None)
    for changed, said in (({"limit": 400}, "--limit"), ({"data": "cifar10"}, "data set")):
        run = {**trial.checkpoint.run, **changed}
        state = trial.checkpoint.model_copy(update={"run": run})
        with pytest.raises(TemperatureError, match=f"another recipe than .*: {said} differ"):
            temperature.of([mine], [Member(state, trial.digest, trial.recipe)])


def test_commit_of_a_member_is_of_all_that_trained_it(train: Train) -> None:
    state = checkpoint.load(train("A1"))
    (own,) = state.sessions
    sessions = [{**own, "commit": "abc"}, {**own, "commit": "def"}]
    member = Member(state.model_copy(update={"sessions": sessions}), "0" * 64, state.parsed_recipe())
    assert member.facts()["commit"] == "abc + def"


def test_all_are_on_the_disk_before_the_first_takes_its_place(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_sync: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda file: at_sync.append(len(list(tmp_path.glob("*.onnx")))))
    assert main(["write", str(train("A1")), str(tmp_path / "model.onnx"), "--precision", "all"]) == 0
    assert at_sync[:3] == [0, 0, 0]


def test_shape_that_cannot_be_inferred(train: Train) -> None:
    model = graph.build(Ensemble([load(train("A1"), None).classifier()]))
    *others, last = model.graph.node
    model.graph.initializer.append(numpy_helper.from_array(np.array([-2]), "two"))
    negative = onnx.helper.make_node("Neg", ["two"], ["axes"], name="Neg")
    loose = onnx.helper.make_node("Squeeze", [last.input[0], "axes"], ["loose"], name="Squeeze")
    last = onnx.helper.make_node("Gemm", ["loose", *last.input[1:]], ["logits"], name="Gemm", transB=1)
    del model.graph.node[:]
    model.graph.node.extend([*others, negative, loose, last])
    with pytest.raises(GraphError, match="the shape of what Squeeze"):
        graph.check(model)


def test_the_bundled_file_is_what_its_weights_give_still(files: dict[str, Path]) -> None:
    pixels = data.load_sample().test.pixels[:50].numpy()
    temperature = float(described(BUNDLED)["temperature"])
    expected, found = (CPU.logits(path.read_bytes(), pixels) for path in (BUNDLED, files["fp32"]))
    np.testing.assert_allclose(found / temperature, expected, atol=1)
    assert (found.argmax(1) == expected.argmax(1)).mean() > 0.95
