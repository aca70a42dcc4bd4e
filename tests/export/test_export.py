import hashlib
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray

from export import graph, metadata, parity
from export.__main__ import main
from tests.export.conftest import Train
from training import checkpoint, data, recipe
from training.evaluate import Classifier
from training.model import CLASSES, parameter_count


@pytest.fixture(autouse=True)
def _sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(data.ROOT_VARIABLE, str(data.SAMPLE))


@pytest.fixture(scope="module")
def exported(train: Train, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "model.onnx"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(data.ROOT_VARIABLE, str(data.SAMPLE))
        assert main([str(train("fast")), str(out)]) == 0
    return out


# One of each kind of network, and of each way to predict.
@pytest.mark.parametrize("name", ["A1", "D1", "fast"])
def test_graph_keeps_the_contract(name: str, train: Train) -> None:
    state = checkpoint.load(train(name))
    model = graph.build(Classifier(state.network(), state.parsed_recipe()))
    (image,), (logits,) = model.graph.input, model.graph.output
    assert (image.name, logits.name) == ("images", "logits")
    assert image.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert logits.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    shapes = [value.type.tensor_type.shape.dim for value in (image, logits)]
    assert [d.dim_param or d.dim_value for d in shapes[0]] == ["N", 32, 32, 3]
    assert [d.dim_param or d.dim_value for d in shapes[1]] == ["N", 10]
    assert {opset.domain for opset in model.opset_import} == {""}
    assert str(Path(__file__).parents[2]) not in str(model), "a path of this machine is in the file"


def test_metadata_says_what_the_file_is(exported: Path, train: Train) -> None:
    state = checkpoint.load(train("fast"))
    values = {entry.key: entry.value for entry in onnx.load(exported).metadata_props}
    digest = hashlib.sha256(train("fast").read_bytes()).hexdigest()
    assert values["contract"] == metadata.CONTRACT
    assert (values["name"], values["version"]) == ("fast", digest[:12])
    assert values["checkpoint_sha256"] == digest
    assert json.loads(values["classes"]) == list(CLASSES)
    assert int(values["parameters"]) == parameter_count(state.network())
    assert (values["views"], values["precision"]) == ("flip", "fp32")
    assert state.result is not None
    assert float(values["test_accuracy"]) == state.result["accuracy"]
    assert int(values["test_images"]) == 1000
    assert values["commit"] == state.run["commit"]
    report = json.loads(values["parity"])
    assert (report["images"], report["source"], report["top1_agreement"]) == (1000, "sample", 1.0)
    assert report["max_scaled_difference"] <= 1e-4


def test_recipe_in_the_metadata_is_the_resolved_one(
    exported: Path, train: Train, tmp_path: Path
) -> None:
    values = {entry.key: entry.value for entry in onnx.load(exported).metadata_props}
    path = tmp_path / "recipe.toml"
    path.write_text(values["recipe"])
    assert recipe.load(path) == checkpoint.load(train("fast")).parsed_recipe()


def test_same_checkpoint_gives_the_same_bytes(exported: Path, train: Train, tmp_path: Path) -> None:
    assert main([str(train("fast")), str(tmp_path / "again.onnx")]) == 0
    assert (tmp_path / "again.onnx").read_bytes() == exported.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["again.onnx"]


def test_views_average_the_image_and_its_mirror_image(exported: Path, train: Train) -> None:
    pixels = data.load_sample().test.pixels[:50].numpy()
    mirrored: NDArray[np.uint8] = np.ascontiguousarray(pixels[:, :, ::-1])
    logits = parity.run(exported, pixels)
    np.testing.assert_allclose(parity.run(exported, mirrored), logits, rtol=1e-4, atol=1e-5)

    state = checkpoint.load(train("fast"))
    single = Classifier(state.network(), state.parsed_recipe().model_copy(update={"views": "none"}))
    with torch.no_grad():
        both = [single.eval()(torch.from_numpy(view)).numpy() for view in (pixels, mirrored)]
    np.testing.assert_allclose(logits, (both[0] + both[1]) / 2, rtol=1e-4, atol=1e-5)


def test_any_batch_size_gives_the_same_logits(exported: Path) -> None:
    pixels = data.load_sample().test.pixels[:7].numpy()
    one_by_one = np.concatenate([parity.run(exported, pixels[i : i + 1]) for i in range(7)])
    np.testing.assert_allclose(parity.run(exported, pixels), one_by_one, rtol=1e-4, atol=1e-5)


def test_broken_parity_leaves_no_file(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # A graph of other weights than the checkpoint's, as a defect of the exporter would make it.
    build = graph.build

    def broken(classifier: Classifier) -> onnx.ModelProto:
        head = classifier.model.head
        assert isinstance(head, torch.nn.Linear)
        weight = head.weight.data.clone()
        head.weight.data += 0.01 * weight.std() * torch.randn_like(weight)
        try:
            return build(classifier)
        finally:
            head.weight.data = weight

    monkeypatch.setattr(graph, "build", broken)
    out = tmp_path / "model.onnx"
    assert main([str(train("fast")), str(out)]) == 1
    assert "the model file differs from PyTorch" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []

    out.write_bytes(b"the last good one")
    assert main([str(train("fast")), str(out)]) == 1
    assert out.read_bytes() == b"the last good one"
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


@pytest.mark.parametrize(
    ("difference", "agreement", "good"),
    [
        (1e-6, 1.0, True),
        (2e-4, 1.0, False),
        (1e-6, 0.999, False),
        (float("nan"), 1.0, False),
    ],
)
def test_limits_of_parity(difference: float, agreement: float, good: bool) -> None:
    report = parity.Parity(1000, "sample", difference, agreement, 0.9, "CPU", "1")
    if good:
        report.check()
    else:
        with pytest.raises(parity.ParityError, match="limit"):
            report.check()


def test_not_a_checkpoint_is_a_clear_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    foreign = tmp_path / "foreign.pt"
    foreign.write_bytes(b"foreign")
    assert main([str(foreign), str(tmp_path / "out.onnx")]) == 1
    assert "error: " in capsys.readouterr().err
    assert not (tmp_path / "out.onnx").exists()
