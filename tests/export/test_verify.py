import hashlib
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, StringStringEntryProto, TensorProto, helper, numpy_helper

from export import calibration, metadata
from export.__main__ import main
from export.graph import GraphError
from export.verify import read
from tests.cifar10 import CIFAR10, needs_cifar10
from tests.export.conftest import BUNDLED, TEST, Bundled, Train
from training import data
from training.model import CLASSES


def saved(model: ModelProto, path: Path) -> str:
    onnx.save(model, path)
    return str(path)


def entry(model: ModelProto, key: str) -> StringStringEntryProto:
    found: StringStringEntryProto
    (found,) = [entry for entry in model.metadata_props if entry.key == key]
    return found


def test_the_bundled_file_keeps_its_version() -> None:
    model = onnx.load(BUNDLED)
    assert metadata.version(model) == metadata.read(model).version == "1f7d52410d62"


def test_classes_in_another_order(
    files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = onnx.load(files["fp32"])
    classes = entry(model, "classes")
    classes.value = json.dumps([CLASSES[1], CLASSES[0], *CLASSES[2:]])
    assert main(["verify", saved(model, tmp_path / "swapped.onnx")]) == 1
    error = capsys.readouterr().err
    assert f"classes {classes.value} in the metadata; right would be {json.dumps(CLASSES)}" in error


def test_another_calibration_than_when_it_was_written(
    bundled: Bundled,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(calibration, "SPREAD", 100.0)  # so that a few images may ask for an exponent
    path, out = str(bundled(0.2)), tmp_path / "calibrated.onnx"
    assert main(["write", path, str(out)]) == 0
    assert main(["verify", str(out), "--checkpoint", path]) == 0
    model = onnx.load(out)
    assert [node.op_type for node in model.graph.node[-3:]] == ["Div", "Pow", "Neg"]
    for node, key in zip(model.graph.node[-3:], ("temperature", "exponent"), strict=False):
        (constant,) = [tensor for tensor in model.graph.initializer if tensor.name == node.input[1]]
        value = numpy_helper.to_array(constant)
        assert value == pytest.approx(float(entry(model, key).value))
    constant.CopyFrom(numpy_helper.from_array(value / 3, constant.name))
    assert main(["verify", saved(model, tmp_path / "surer.onnx")]) == 1
    error = capsys.readouterr().err
    assert f"version {entry(model, 'version').value} in the metadata, but that of the graph is" in error


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_good_file_and_what_it_is(
    precision: str, files: dict[str, Path], trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(files[precision]), "--checkpoint", str(trained)]) == 0
    shown = capsys.readouterr().out
    assert precision in shown
    assert "accurate" in shown
    assert "CPU against PyTorch" in shown
    assert "is good" in shown


@needs_cifar10
def test_a_file_of_the_samples_accuracy_where_the_data_set_is(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(data.ROOT_VARIABLE, str(data.SAMPLE))
    out = tmp_path / "model.onnx"
    assert main(["write", str(train("A1")), str(out)]) == 0
    monkeypatch.setenv(data.ROOT_VARIABLE, CIFAR10)
    assert main(["verify", str(out)]) == 0
    assert f"{out} is good\n" in capsys.readouterr().out


def test_a_file_written_with_other_images_than_are_here(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, other = tmp_path / "model.onnx", tmp_path / "other.npz"
    with np.load(data.SAMPLE) as sample:
        labels = (sample["test_labels"] + 1) % 10  # all others, so that the accuracy is another
        np.savez(other, **dict(sample) | {"test_labels": labels}, allow_pickle=False)
    for written_with, verified_with in ((other, data.SAMPLE), (data.SAMPLE, other)):
        monkeypatch.setenv(data.ROOT_VARIABLE, str(written_with))
        assert main(["write", str(train("fast")), str(out)]) == 0
        monkeypatch.setenv(data.ROOT_VARIABLE, str(verified_with))
        assert main(["verify", str(out)]) == 0


def test_other_weights_than_the_metadata_says(
    files: dict[str, Path], trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = onnx.load(files["fp32"])
    (head,) = [t for t in model.graph.initializer if t.name.endswith("head.weight")]
    weights = numpy_helper.to_array(head)
    noise = np.random.default_rng(0).normal(size=weights.shape, scale=weights.std())
    head.CopyFrom(numpy_helper.from_array((weights + 20 * noise).astype(np.float32), head.name))
    entry(model, "version").value = metadata.version(model)
    file = saved(model, tmp_path / "noisy.onnx")
    assert main(["verify", file]) == 1
    assert "accuracy on the test images of sample" in capsys.readouterr().err

    # With so little noise the accuracy is the same; only the comparison with PyTorch shows it.
    head.CopyFrom(numpy_helper.from_array((weights + noise / 500).astype(np.float32), head.name))
    entry(model, "version").value = metadata.version(model)
    file = saved(model, tmp_path / "hardly.onnx")
    assert main(["verify", file]) == 0
    assert main(["verify", file, "--checkpoint", str(trained)]) == 1
    assert "scaled difference of logits" in capsys.readouterr().err


def test_logits_that_are_no_numbers(
    files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = onnx.load(files["fp32"])
    (head,) = [t for t in model.graph.initializer if t.name.endswith("head.weight")]
    weights = numpy_helper.to_array(head).copy()
    weights[0] = np.nan  # the others' logits are numbers
    head.CopyFrom(numpy_helper.from_array(weights, head.name))
    entry(model, "version").value = metadata.version(model)
    assert main(["verify", saved(model, tmp_path / "diverged.onnx")]) == 1
    assert "error: the model file gives logits that are no finite" in capsys.readouterr().err


def test_a_file_that_cannot_be_run(
    files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """To the logits it adds a row of a table that ends before the brightest pixels."""
    model = onnx.load(files["fp32"])
    model.graph.node[-1].output[0] = "right"
    model.graph.node.extend(
        [
            helper.make_node("Cast", ["images"], ["integers"], to=TensorProto.INT64),
            helper.make_node("ReduceMax", ["integers", "axes"], ["brightest"], keepdims=0),
            helper.make_node("Gather", ["table", "brightest"], ["added"]),
            helper.make_node("Add", ["right", "added"], ["logits"]),
        ]
    )
    for name, values in (("axes", np.array([1, 2, 3])), ("table", np.zeros((128, 10), np.float32))):
        model.graph.initializer.append(numpy_helper.from_array(values, name))
    entry(model, "version").value = metadata.version(model)
    assert main(["verify", saved(model, tmp_path / "edited.onnx")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: CPUExecutionProvider does not run the model: ")


def test_another_provider_computes_something_else(
    files: dict[str, Path], off_by_one: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(files["fp32"])]) == 1
    captured = capsys.readouterr()
    assert "OffByOne against CPU" in captured.out
    assert f"top-1 agreement on {off_by_one} 0.00 %" in captured.err


def test_another_checkpoint(
    files: dict[str, Path], train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(files["fp32"]), "--checkpoint", str(train("A1"))]) == 1
    assert "made from the checkpoints" in capsys.readouterr().err


def test_an_ensemble_is_compared_with_all_its_members(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths, out = [str(train("A1")), str(train("A1", seed=1))], str(tmp_path / "both.onnx")
    assert main(["write", *paths, out, "--tta", "flip"]) == 0
    assert main(["verify", out, "--checkpoint", *paths]) == 0
    assert "A1+A1" in capsys.readouterr().out
    assert main(["verify", out, "--checkpoint", paths[0]]) == 1
    assert main(["verify", out, "--checkpoint", *reversed(paths)]) == 1
    capsys.readouterr()
    assert main(["verify", out, "--checkpoint", *paths, paths[0]]) == 1
    assert "made from 2 checkpoints, and 3 are given" in capsys.readouterr().err


def test_what_is_no_file_of_ours(
    files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def error(path: Path | str) -> str:
        assert main(["verify", str(path)]) == 1
        return capsys.readouterr().err

    assert "no model file at" in error(tmp_path / "none.onnx")
    assert "not an ONNX file" in error(Path(__file__))
    model = onnx.load(files["fp32"])
    kept = [entry for entry in model.metadata_props if entry.key not in ("classes", "parity")]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    bare = error(saved(model, tmp_path / "bare.onnx"))
    assert "classes: Field required" in bare
    assert "parity: Field required" in bare
    model.metadata_props.add(key="classes", value="[]")
    model.metadata_props.add(key="parity", value="100 %")
    assert "parity: Invalid JSON" in error(saved(model, tmp_path / "text.onnx"))
    entry(model, "parity").value = "100"
    assert "parity: Input should be a valid dictionary" in error(saved(model, tmp_path / "number.onnx"))
    model.opset_import[0].version = 21
    assert "operator sets" in error(saved(model, tmp_path / "newer.onnx"))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("parity", "{}", "parity.images: Field required"),
        ("calibration", "{}", "calibration.origin: Field required"),
        ("members", "[1]", "members.0: Input should be a valid dictionary"),
        ("name", "", "name: String should have at least 1 character"),
        ("sample_accuracy", "none", "sample_accuracy: Input should be a valid number"),
        ("temperature", "nan", "temperature: Input should be a finite number"),
        ("exponent", "0", "exponent: Input should be greater than 0"),
        ("checkpoint_sha256", None, "members.0.checkpoint_sha256: Field required"),
        ("checkpoint_sha256", "f" * 63, "members.0.checkpoint_sha256: String should match pattern"),
        ("members", "[]", "members: Value should have at least 1 item"),
        ("contract", "2", "contract: Input should be '1', got 2"),
        ("version", None, "version: Field required"),
        ("precision", "fp64", "precision: Input should be 'fp32', 'fp16' or 'int8', got fp64"),
    ],
)
def test_metadata_that_say_something_else(key: str, value: str | None, message: str) -> None:
    model = onnx.load(BUNDLED)
    if value is None:
        model.metadata_props.remove(entry(model, key))
    else:
        values = {each.key: each.value for each in model.metadata_props} | {key: value}
        onnx.helper.set_model_props(model, values)
    with pytest.raises(GraphError) as raised:
        metadata.read(model)
    assert message in str(raised.value)


@pytest.mark.parametrize(("images", "code"), [(-2, 1), (-1, 0), (1, 0), (2, 1)])
def test_an_accuracy_may_be_another_by_the_limit_for_other_providers(
    images: int, code: int, files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = onnx.load(files["fp32"])
    parity = json.loads(entry(model, "parity").value)
    parity["accuracy"] = round(parity["accuracy"] * TEST - images) / TEST
    entry(model, "parity").value = json.dumps(parity)
    assert main(["verify", saved(model, tmp_path / "elsewhere.onnx")]) == code
    assert ("accuracy on the test images of sample" in capsys.readouterr().err) == bool(code)


def test_a_calibration_error_that_is_not_the_files(
    files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = onnx.load(files["fp32"])
    calibration = json.loads(entry(model, "calibration").value)
    better = calibration | {"test_ece_after": calibration["test_ece_after"] / 2}
    entry(model, "calibration").value = json.dumps(better)
    path = saved(model, tmp_path / "edited.onnx")
    assert main(["verify", path]) == 1
    assert "expected calibration error" in capsys.readouterr().err

    worse = calibration | {"test_ece_before": calibration["test_ece_before"] * 2}
    entry(model, "calibration").value = json.dumps(worse)
    assert main(["verify", saved(model, Path(path))]) == 1
    assert "the same without calibration" in capsys.readouterr().err

    # The error on other images cannot be compared.
    entry(model, "calibration").value = json.dumps(better)
    parity = json.loads(entry(model, "parity").value)
    entry(model, "parity").value = json.dumps(parity | {"source": "cifar10"})
    assert main(["verify", saved(model, Path(path))]) == 0


@pytest.mark.parametrize("key", ["temperature", "exponent"])
def test_metadata_with_another_calibration_than_the_graph(
    key: str, files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = onnx.load(files["fp32"])
    entry(model, key).value = "2"
    assert main(["verify", saved(model, tmp_path / "edited.onnx")]) == 1
    assert "the same without calibration" in capsys.readouterr().err


def test_metadata_that_contradict_themselves(
    files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = onnx.load(files["fp32"])
    calibration = json.loads(entry(model, "calibration").value)
    entry(model, "calibration").value = json.dumps(calibration | {"test_images": 77})
    assert main(["verify", saved(model, tmp_path / "edited.onnx")]) == 1
    told = f"calibration.test_images 77 in the metadata, and parity.images {TEST}"
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("precision", "said"), [("fp32", "int8"), ("fp32", "fp16"), ("fp16", "int8"), ("int8", "fp32")]
)
def test_another_precision_than_the_graph_s(
    precision: str, said: str, files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = onnx.load(files[precision])
    entry(model, "precision").value = said
    assert main(["verify", saved(model, tmp_path / "edited.onnx")]) == 1
    told = f"precision {said} in the metadata, but that of the graph is {precision}"
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("part", [b"images", b"airplane", b"parity"])
def test_a_bit_flipped_in_a_text(
    part: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = bytearray(BUNDLED.read_bytes())
    content[content.rindex(part)] ^= 0x80
    path = tmp_path / "flipped.onnx"
    path.write_bytes(content)
    assert main(["verify", str(path)]) == 1
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize("suffix", [".json", ".textproto", ".onnxtxt"])
def test_a_model_file_by_another_name_is_read_as_what_it_is(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"model{suffix}"
    path.write_bytes(BUNDLED.read_bytes())
    assert metadata.version(read(path)) == "1f7d52410d62"
    path.write_text("{")
    with pytest.raises(GraphError, match="not an ONNX file"):
        read(path)


def test_a_digest_is_shown_whole_on_a_narrow_terminal(
    files: dict[str, Path],
    trained: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    assert main(["verify", str(files["fp32"])]) == 0
    shown = capsys.readouterr().out
    cells = "".join(line.split("\u2502")[2].strip() for line in shown.splitlines() if "\u2502" in line)
    assert hashlib.sha256(trained.read_bytes()).hexdigest() in cells
