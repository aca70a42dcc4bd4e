import hashlib
import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import ModelProto, numpy_helper

from export import calibration, comparison, graph, metadata, parity, quantize
from export.__main__ import main
from export.calibration import uncalibrated
from export.ensemble import Ensemble, half
from export.member import load
from export.provider import CPU
from tests.export.conftest import BUNDLED, TEST, WHOLE_SAMPLE, Bundled, Train, calibrated, described
from training import checkpoint, data, recipe
from training.evaluate import Classifier
from training.model import CLASSES, parameter_count
from training.tables import percent

LIMITS = dict(parity.LIMITS)  # the real limits, which are loosened while tests run
UNSEEN = 300  # images that no export in the tests has looked at


@pytest.fixture(scope="module")
def exported(train: Train, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "model.onnx"
    assert main(["write", str(train("fast")), str(out)]) == 0
    return out


def test_metadata_says_what_the_file_is(exported: Path, train: Train) -> None:
    state = checkpoint.load(train("fast"))
    values = described(exported)
    digest = hashlib.sha256(train("fast").read_bytes()).hexdigest()
    assert values["contract"] == metadata.CONTRACT
    assert values["name"] == "fast"
    assert re.fullmatch("[0-9a-f]{12}", values["version"])
    assert values["checkpoint_sha256"] == digest
    assert json.loads(values["classes"]) == list(CLASSES)
    assert int(values["parameters"]) == parameter_count(state.network())
    assert (values["views"], values["precision"]) == ("flip", "fp32")
    assert state.result is not None
    assert float(values["test_accuracy"]) == state.result.accuracy
    assert int(values["test_images"]) == TEST
    assert values["commit"] == state.run["commit"]
    report = json.loads(values["parity"])
    assert (report["images"], report["source"], report["reference"]) == (TEST, "sample", "PyTorch")
    assert (report["top1_agreement"], report["accuracy_loss"]) == (1.0, 0.0)
    assert report["max_scaled_difference"] <= 1e-4
    assert report["software"] == f"onnxruntime {onnxruntime.__version__}"
    assert float(values["sample_accuracy"]) == report["accuracy"]
    assert json.loads(values["calibration"])["origin"].startswith("not calibrated: all training images")


def test_recipe_in_the_metadata_is_the_resolved_one(
    exported: Path, train: Train, tmp_path: Path
) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(described(exported)["recipe"])
    assert recipe.load(path) == checkpoint.load(train("fast")).parsed_recipe()


def test_every_precision_comes_from_one_command_within_its_limits(
    files: dict[parity.Precision, Path],
) -> None:
    images, logits = data.load_sample(WHOLE_SAMPLE).test.first(TEST + UNSEEN), {}
    seen, all_of_them = (comparison.TestImages(part, "sample") for part in (images.first(TEST), images))
    for precision, path in files.items():  # fp32 first
        values = described(path)
        report = json.loads(values["parity"])
        assert values["precision"] == precision
        in_pytorch = json.loads(values["pytorch_parity"])
        assert (in_pytorch["reference"], in_pytorch["top1_agreement"]) == ("PyTorch", 1.0)
        assert report["reference"] == ("PyTorch" if precision == "fp32" else "fp32")
        logits[precision] = CPU.logits(path.read_bytes(), all_of_them.pixels)
        assert seen.accuracy(logits[precision][:TEST]) == report["accuracy"]
        assert all_of_them.accuracy(logits[precision]) > 0.93
        same = logits[precision].argmax(1) == logits["fp32"].argmax(1)
        assert same[TEST:].mean() >= LIMITS[precision].top1_agreement


def test_what_computes_something_else_is_another_version(
    files: dict[str, Path], trained: Path, tmp_path: Path
) -> None:
    single = tmp_path / "single.onnx"
    assert main(["write", str(trained), str(single), "--tta", "none"]) == 0
    versions = [described(path)["version"] for path in (*files.values(), single)]
    assert len(set(versions)) == len(versions) == 4


def test_same_checkpoint_gives_the_same_bytes(
    files: dict[str, Path], trained: Path, tmp_path: Path
) -> None:
    assert main(["write", str(trained), str(tmp_path / "model.onnx"), "--precision", "all"]) == 0
    again = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert again == {path.name: path.read_bytes() for path in files.values()}


def test_the_bundled_file_is_what_its_weights_give_still(files: dict[str, Path]) -> None:
    pixels = data.load_sample().test.pixels[:50].numpy()
    values = {"exponent": "1"} | described(BUNDLED)
    expected, found = (CPU.logits(path.read_bytes(), pixels) for path in (BUNDLED, files["fp32"]))
    undone = uncalibrated(expected, float(values["temperature"]), float(values["exponent"]))
    np.testing.assert_allclose(found - found.max(1, keepdims=True), undone, atol=1)
    assert (found.argmax(1) == expected.argmax(1)).mean() > 0.95


def test_tta_takes_the_place_of_the_recipes_views(train: Train, tmp_path: Path) -> None:
    out = tmp_path / "single.onnx"
    assert main(["write", str(train("fast")), str(out), "--tta", "none"]) == 0
    result = checkpoint.load(train("fast")).result
    assert result is not None
    values = described(out)
    assert values["views"] == "none"
    assert float(values["test_accuracy"]) == result.single_view_accuracy
    assert json.loads(values["parity"])["accuracy"] == result.single_view_accuracy

    # A run that was not evaluated with these views has no such accuracy, but the file's own is there.
    assert main(["write", str(train("A1")), str(out), "--tta", "flip"]) == 0
    values = described(out)
    assert values["views"] == "flip"
    assert "test_accuracy" not in values
    assert json.loads(values["parity"])["accuracy"] > 0


def test_several_checkpoints_are_one_file(train: Train, tmp_path: Path) -> None:
    paths, out = [train("A1"), train("A1", seed=1)], tmp_path / "both.onnx"
    assert main(["write", *map(str, paths), str(out)]) == 0
    values = described(out)
    members = json.loads(values["members"])
    assert values["name"] == "A1+A1"
    assert [member["checkpoint_sha256"] for member in members] == [
        hashlib.sha256(path.read_bytes()).hexdigest() for path in paths
    ]
    assert "recipe" not in values
    sizes = [parameter_count(checkpoint.load(path).network()) for path in paths]
    assert int(values["parameters"]) == sum(sizes)


def test_the_calibration_is_in_the_graph(
    trained: Path,
    bundled: Bundled,
    files: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(calibration, "SPREAD", 100.0)  # so that a few images may ask for an exponent
    out, plot, trial = tmp_path / "calibrated.onnx", tmp_path / "plot.svg", bundled(0.2)
    arguments = ["write", str(trained), str(out), "--calibration-from", str(trial), "--plot", str(plot)]
    assert main(arguments) == 0
    found = json.loads(described(out)["calibration"])
    temperature, exponent = (float(described(out)[key]) for key in ("temperature", "exponent"))
    assert 1 not in (temperature, exponent)
    assert hashlib.sha256(trial.read_bytes()).hexdigest()[:12] in found["origin"]
    assert found["val_images"] == 100
    pixels = data.load_sample().test.pixels[:50].numpy()
    plain, scaled = (CPU.logits(path.read_bytes(), pixels) for path in (files["fp32"], out))
    np.testing.assert_allclose(scaled, calibrated(plain, temperature, exponent), rtol=1e-4, atol=1e-5)
    before = json.loads(described(files["fp32"])["calibration"])["test_ece_after"]
    assert found["test_ece_before"] == pytest.approx(before, abs=1e-4)
    assert found["test_ece_after"] < found["test_ece_before"]
    shown = plot.read_text()
    assert shown.startswith("<?xml")
    for curve, error in (("without", "test_ece_before"), ("with", "test_ece_after")):
        assert f"<!-- {curve} calibration: error {percent(found[error])} -->" in shown


def test_views_are_those_of_the_trial_too(trained: Path, bundled: Bundled, tmp_path: Path) -> None:
    out, trial = tmp_path / "single.onnx", bundled(0.2)
    arguments = ["write", str(trained), str(out), "--tta", "none", "--calibration-from", str(trial)]
    assert main(arguments) == 0
    values = described(out)
    assert values["views"] == "none"
    assert json.loads(values["calibration"])["val_images"] == 100


def test_broken_parity_leaves_no_file(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # A graph with other weights than the checkpoint's, as a defect of the exporter could make it.
    build = graph.build

    def broken(ensemble: Ensemble) -> ModelProto:
        (member,) = ensemble.members
        assert isinstance(member, Classifier)
        head = member.model.head
        assert isinstance(head, torch.nn.Linear)
        weight = head.weight.data.clone()
        head.weight.data += 0.01 * weight.std() * torch.randn_like(weight)
        try:
            return build(ensemble)
        finally:
            head.weight.data = weight

    monkeypatch.setattr(graph, "build", broken)
    out = tmp_path / "model.onnx"
    assert main(["write", str(train("A1")), str(out)]) == 1
    assert "differs from PyTorch" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []

    out.write_bytes(b"the last good one")
    assert main(["write", str(train("A1")), str(out)]) == 1
    assert out.read_bytes() == b"the last good one"
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def test_a_broken_fp16_file_leaves_none_of_all_three(
    bundled: Bundled,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # The layers are right, also when rounded, but the last one is written wrongly.
    def broken(ensemble: Ensemble) -> Ensemble:
        ensemble = half(ensemble)
        weights = ensemble.state_dict()
        (head,) = [name for name in weights if name.endswith("head.weight")]
        weights[head].copy_(weights[head].roll(1, 0))
        return ensemble

    monkeypatch.setattr("export.write.half", broken)
    arguments = ["write", str(bundled(views="none")), str(tmp_path / "model.onnx")]
    assert main([*arguments, "--precision", "all"]) == 1
    error = capsys.readouterr().err
    assert f"{tmp_path / 'model.fp16.onnx'} in fp16: the model file on {CPU.name} differs from" in error
    assert error.endswith("; --precision fp32 or --precision int8 writes another precision alone\n")
    assert list(tmp_path.iterdir()) == []


def test_a_broken_int8_file_leaves_none_of_all_three(
    bundled: Bundled,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # One layer's activations at a tenth of their scale, as a bad calibration could leave it.
    int8 = quantize.int8

    def broken(model: ModelProto) -> ModelProto:
        model = int8(model)
        name = "members.0.model.stages.0/Gelu_2_scale"
        (scale,) = [tensor for tensor in model.graph.initializer if tensor.name == name]
        values = numpy_helper.to_array(scale) / 10
        scale.CopyFrom(numpy_helper.from_array(values, scale.name))
        return model

    monkeypatch.setattr(quantize, "int8", broken)
    arguments = ["write", str(bundled(views="none")), str(tmp_path / "model.onnx")]
    assert main([*arguments, "--precision", "all"]) == 1
    assert f"{tmp_path / 'model.int8.onnx'} in int8: the model file on" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_another_provider_that_computes_something_else_leaves_no_file(
    train: Train, off_by_one: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["write", str(train("A1")), str(tmp_path / "model.onnx")]) == 1
    error = capsys.readouterr().err
    assert f"the model file on {off_by_one} differs from CPUExecutionProvider" in error
    assert list(tmp_path.iterdir()) == []


def test_what_overflows_in_fp16_is_refused_and_found_again(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Infinite between two layers, though neither weights nor logits are; on a CPU nothing overflows."""
    state = checkpoint.load(train("A1"))
    first, second = [name for name in state.model if name.endswith("weight")][:2]
    for name in (first, first.replace("weight", "bias")):
        state.model[name] *= 1e5
    state.model[second] /= 1e5
    path, out = tmp_path / "checkpoint.pt", tmp_path / "model.onnx"
    checkpoint.save(state, path)
    assert main(["write", str(path), str(out)]) == 0
    out.unlink()
    assert main(["write", str(path), str(out), "--precision", "fp16"]) == 1
    error = capsys.readouterr().err
    assert "the model file on PyTorch, rounded differs from fp32" in error
    assert "scaled difference of logits nan" in error
    assert list(tmp_path.iterdir()) == [path]

    # As a program without this check would write it.
    with monkeypatch.context() as patch:
        patch.setattr("export.comparison.rounded", lambda ensemble: ensemble)
        assert main(["write", str(path), str(out), "--precision", "fp16"]) == 0
    assert main(["verify", str(out)]) == 0
    assert main(["verify", str(out), "--checkpoint", str(path)]) == 1
    assert "scaled difference of logits on PyTorch, rounded nan" in capsys.readouterr().err


def test_a_plot_of_no_known_kind_is_an_error_before_anything_is_written(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["write", str(train("A1")), str(tmp_path / "out.onnx"), "--plot", "plot.txt"]
    assert main(arguments) == 1
    assert "plot.txt" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_where_no_file_can_be_written_is_told_before_the_work(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(graph, "build", lambda ensemble: pytest.fail("the work has begun"))
    out, folder, file = tmp_path / "model.onnx", tmp_path / "model.int8.onnx", tmp_path / "file.png"
    folder.mkdir()
    file.touch()
    arguments = ["write", str(train("A1")), str(out)]
    assert main([*arguments, "--precision", "all"]) == 1
    assert f"not a file that can be replaced: '{folder}'" in capsys.readouterr().err
    assert main([*arguments[:2], str(file / "model.onnx")]) == 1
    assert str(file) in capsys.readouterr().err
    assert main([*arguments, "--plot", str(file / "plot.png")]) == 1
    assert str(file) in capsys.readouterr().err
    assert set(tmp_path.iterdir()) == {folder, file}


def test_all_are_on_the_disk_before_the_first_takes_its_place(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_sync: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda file: at_sync.append(len(list(tmp_path.glob("*.onnx")))))
    assert main(["write", str(train("A1")), str(tmp_path / "model.onnx"), "--precision", "all"]) == 0
    assert at_sync[:3] == [0, 0, 0]


def test_folders_that_lack_are_made_and_names_may_have_brackets(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, plot = tmp_path / "[red]" / "[b]:cat:.onnx", tmp_path / "plots" / "[b]" / "plot.svg"
    assert main(["write", str(train("A1")), str(out), "--plot", str(plot)]) == 0
    written = capsys.readouterr().out
    assert f"wrote {out} (" in written
    assert f"wrote {plot}\n" in written
    assert plot.is_file()
    assert main(["verify", str(out)]) == 0
    assert f"{out} is good" in capsys.readouterr().out


def test_a_checkpoint_twice_is_refused(
    train: Train, bundled: Bundled, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, other, trial = train("A1"), train("A1", seed=1), bundled(0.2)
    copy = tmp_path / "copy.pt"
    copy.write_bytes(path.read_bytes())
    arguments = ["write", str(path), str(other)]
    assert main([*arguments, str(copy), str(tmp_path / "out.onnx")]) == 1
    assert f"{load(path, None)} is given twice" in capsys.readouterr().err
    trials = ["--calibration-from", str(trial), str(trial)]
    assert main([*arguments, str(tmp_path / "out.onnx"), *trials]) == 1
    assert f"{load(trial, None)} is given twice" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [copy]


def test_ctrl_c_is_no_traceback(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(graph, "build", lambda ensemble: signal.raise_signal(signal.SIGINT))
    assert main(["write", str(train("A1")), str(tmp_path / "out.onnx")]) == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_in_the_place_of_the_file_is_left_alone(
    train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = train("A1"), train("A1", seed=1)
    content = second.read_bytes()
    for precision in ("fp32", "all"):
        assert main(["write", str(first), str(second), "--precision", precision]) == 1
        error = capsys.readouterr().err
        assert f"{second}: the model file comes last, and its name must end in .onnx" in error
    assert second.read_bytes() == content
    assert not second.with_name("checkpoint.fp16.pt").exists()


@pytest.mark.parametrize("name", ["model.onnx", "model.int8.onnx", "link.onnx"])
def test_a_checkpoint_whose_name_ends_as_a_model_file_s_is_left_alone(
    name: str, train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / name
    path.write_bytes(train("A1").read_bytes())
    out = tmp_path / "model.onnx"
    if name == "link.onnx":
        out.symlink_to(path)
    assert main(["write", str(path), str(out), "--precision", "all"]) == 1
    assert " is one of the checkpoints; right would be a file of another name" in capsys.readouterr().err
    trial = ["--calibration-from", str(path), "--precision", "all"]
    assert main(["write", str(train("A1", seed=1)), str(out), *trial]) == 1
    assert " is one of the checkpoints; right would be a file of another name" in capsys.readouterr().err
    assert path.read_bytes() == train("A1").read_bytes()


def test_an_unfinished_run_is_refused(
    trained: Path, bundled: Bundled, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unfinished = bundled(epoch=8, epochs=9)
    assert main(["write", str(trained), str(unfinished), str(tmp_path / "out.onnx")]) == 1
    assert f"{unfinished}: not finished: epoch 8 of 9" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_digest_is_of_the_checkpoint_that_was_loaded(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, torch_load = tmp_path / "checkpoint.pt", torch.load
    content = trained.read_bytes()
    path.write_bytes(content)

    def load_and_replace(*arguments: Any, **options: Any) -> Any:
        state = torch_load(*arguments, **options)
        path.write_bytes(b"the next checkpoint of a run that goes on")
        return state

    monkeypatch.setattr(torch, "load", load_and_replace)
    assert load(path, None).digest == hashlib.sha256(content).hexdigest()


def test_not_a_checkpoint_is_a_clear_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    foreign = tmp_path / "foreign.pt"
    foreign.write_bytes(b"foreign")
    assert main(["write", str(foreign), str(tmp_path / "out.onnx")]) == 1
    assert "error: " in capsys.readouterr().err
    assert not (tmp_path / "out.onnx").exists()
