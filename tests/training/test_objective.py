from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tests.training.runs import ONE_BLOCK
from training import checkpoint, data, recipe, train
from training.__main__ import main
from training.augment import Normalize
from training.checkpoint import CheckpointError
from training.evaluate import Classifier
from training.learner import TrainingError
from training.objective import Objective

CPU = torch.device("cpu")
MIXUP = "mixing={kind='mixup', alpha=0.4, p=1.0, epochs=[0, 1]}"
CUTMIX = "mixing={kind='cutmix', alpha=1.0, p=1.0, epochs=[0, 1]}"


def batch(count: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    train, a1 = data.load_sample().train.first(count), recipe.load("A1")
    normalize = Normalize(a1.data.mean, a1.data.std)
    return normalize(train.pixels.permute(0, 3, 1, 2)), train.labels


def test_plain_recipe_is_cross_entropy_with_smoothing() -> None:
    images, labels = batch()
    objective = Objective(recipe.load("A1", ["label_smoothing=0.2"]), Path("none"), CPU)
    inputs, targets = objective.mix(images, labels, 0)
    assert inputs is images
    assert targets is labels
    logits = torch.randn(16, 10)
    smooth = 0.8 * F.one_hot(labels, 10) + 0.02
    expected = -(smooth * logits.log_softmax(1)).sum()
    torch.testing.assert_close(objective.loss(logits, targets, inputs), expected)


def test_mixup_blends_images_and_labels_alike() -> None:
    images, labels = batch()
    torch.manual_seed(3)
    inputs, targets = Objective(recipe.load("A1", [MIXUP]), Path("none"), CPU).mix(images, labels, 0)
    partner = labels.roll(1)
    different = labels != partner
    shares = targets[different, labels[different]]
    share = shares[0]
    assert 0 < share < 1
    torch.testing.assert_close(shares, share.expand_as(shares))
    torch.testing.assert_close(inputs, share * images + (1 - share) * images.roll(1, 0))
    torch.testing.assert_close(targets.sum(1), torch.ones(16))


def test_cutmix_pastes_a_box_and_mixes_labels_by_its_area() -> None:
    images, labels = batch()
    torch.manual_seed(4)
    inputs, targets = Objective(recipe.load("A1", [CUTMIX]), Path("none"), CPU).mix(images, labels, 0)
    pasted = (inputs != images).any(1).any(0)  # the pixels that changed in any image
    rows, columns = pasted.any(1).nonzero().flatten(), pasted.any(0).nonzero().flatten()
    box = (slice(None), slice(None), slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
    assert torch.equal(inputs[box], images.roll(1, 0)[box])
    share = 1 - inputs[box][0, 0].numel() / 1024
    different = labels != labels.roll(1)
    expected = torch.full((int(different.sum()),), share)
    torch.testing.assert_close(targets[different, labels[different]], expected)


def test_mixing_comes_from_the_seed() -> None:
    images, labels = batch()
    objective = Objective(recipe.load("A1", [CUTMIX]), Path("none"), CPU)
    mixed = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        mixed.append(objective.mix(images, labels, 0)[0])
    assert torch.equal(mixed[0], mixed[1])
    assert not torch.equal(mixed[0], mixed[2])


def test_mixing_keeps_to_its_epochs_and_share_of_batches() -> None:
    images, labels = batch()
    half = "mixing={kind='mixup', alpha=1.0, p=0.5, epochs=[2, 4]}"
    objective = Objective(recipe.load("A1", [half]), Path("none"), CPU)
    for epoch in (0, 1, 4, 71):
        before = torch.get_rng_state()
        inputs, targets = objective.mix(images, labels, epoch)
        assert inputs is images
        assert targets is labels
        # Nothing was drawn: epochs without mixing are those of a recipe without it.
        assert torch.equal(torch.get_rng_state(), before)
    mixed = 0
    for seed in range(200):
        torch.manual_seed(seed)
        mixed += objective.mix(images, labels, 2 + seed % 2)[1].is_floating_point()
    assert 70 < mixed < 130  # half of 200, within four standard deviations


@pytest.fixture(scope="module")
def teacher(uninterrupted: Path) -> Path:
    return uninterrupted / "checkpoint.pt"


def test_teacher_sees_images_in_its_own_normalisation(teacher: Path) -> None:
    """The student's mean and std are others; the loss is the textbook's, with the temperature."""
    sample = data.load_sample().train.first(16)
    settings = f"distillation={{teacher='{teacher}', temperature=2.0, weight=0.7}}"
    student = recipe.load("D1", [settings])
    normalize = Normalize(student.data.mean, student.data.std)
    images = normalize(sample.pixels.permute(0, 3, 1, 2))
    logits = torch.randn(16, 10)
    state = checkpoint.load(teacher)
    with torch.no_grad():
        taught = Classifier(state.network().eval(), state.parsed_recipe())(sample.pixels)
    p, q = (taught / 2).softmax(1), (logits / 2).softmax(1)
    divergence = (p * (p.log() - q.log())).sum() * 4
    expected = 0.3 * F.cross_entropy(logits, sample.labels, reduction="sum") + 0.7 * divergence
    objective = Objective(student, teacher, CPU)
    torch.testing.assert_close(objective.loss(logits, sample.labels, images), expected)


def test_distillation_copies_its_teacher_and_learns_from_it(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(data.ROOT_VARIABLE, str(data.SAMPLE))
    settings = [f"distillation={{teacher='{teacher}', temperature=2.0, weight=1.0}}", "epochs=1"]
    out = tmp_path / "run"
    assert main(["run", "A1", "--out", str(out), "--set", *settings]) == 0
    assert (out / "teacher.pt").read_bytes() == teacher.read_bytes()
    # Only the divergence counts, and it is small for a teacher that has hardly learned anything.
    assert 0 < checkpoint.load(out / "checkpoint.pt").history[0]["train_loss"] < 0.5


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("resolution=[{from_epoch=0, size=16}]", "does not take images of 16 x 16 pixels"),
        ("data.validation=0.1", "its data.validation is 0; right would be at least 0.1"),
    ],
)
def test_a_teacher_that_does_not_fit_is_an_error_before_the_run(
    setting: str,
    message: str,
    teacher: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(data.ROOT_VARIABLE, str(data.SAMPLE))
    settings = [f"distillation={{teacher='{teacher}', temperature=2.0, weight=1.0}}", setting]
    arguments = ["A1", "--out", str(tmp_path), "--set", *settings, f"model={ONE_BLOCK}"]
    assert main(["run", *arguments]) == 1
    error = capsys.readouterr().err
    assert str(teacher) in error
    assert message in error
    assert not (tmp_path / "checkpoint.pt").exists()
    if "pixels" in message:  # lr-find must not begin either
        arguments[2] = str(tmp_path / "lr.svg")
        assert main(["lr-find", *arguments]) == 1
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("change", [{"complete": False}, {"data": "cifar10"}])
def test_a_complete_run_learns_from_a_complete_run_on_its_data_set(
    change: dict[str, object], teacher: Path, tmp_path: Path
) -> None:
    state, other = checkpoint.load(teacher), tmp_path / "other.pt"
    checkpoint.save(state.model_copy(update={"run": {**state.run, **change}}), other)
    settings = f"distillation={{teacher='{other}', temperature=2.0, weight=1.0}}"
    student = recipe.load("A1", [settings])
    with pytest.raises(TrainingError, match="is of a trial, or of other images"):
        train.create(tmp_path / "run", student, "A1", 0, data.load_sample())
    train.create(tmp_path / "run", student, "A1", 0, data.load_sample(), unchanged=False)


def test_a_teacher_of_another_data_set_may_have_seen_what_would_be_held_out(
    teacher: Path, tmp_path: Path
) -> None:
    state, other = checkpoint.load(teacher), tmp_path / "other.pt"
    images = {**state.recipe["data"], "validation": 0.1}
    change = {"run": {**state.run, "data": "cifar10"}, "recipe": {**state.recipe, "data": images}}
    checkpoint.save(state.model_copy(update=change), other)
    distillation = f"distillation={{teacher='{other}', temperature=2.0, weight=1.0}}"
    student = recipe.load("A1", [distillation, "data.validation=0.1"])
    with pytest.raises(
        TrainingError, match=r"other\.pt was trained on other images \(cifar10, not sample\)"
    ):
        train.create(tmp_path / "run", student, "A1", 0, data.load_sample(), unchanged=False)


def test_teachers_that_cannot_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(data.ROOT_VARIABLE, str(data.SAMPLE))
    absent = tmp_path / "absent.pt"
    settings = f"distillation={{teacher='{absent}', temperature=2.0, weight=1.0}}"
    assert main(["run", "A1", "--out", str(tmp_path / "run"), "--set", settings]) == 1
    assert f"no teacher at {absent}: train one, or name its" in capsys.readouterr().err

    begun = tmp_path / "begun"
    assert main(["run", "A1", "--out", str(begun), "--max-seconds", "1"]) == 75
    settings = f"distillation={{teacher='{begun / 'checkpoint.pt'}', temperature=2.0, weight=1.0}}"
    assert main(["run", "A1", "--out", str(tmp_path / "run"), "--set", settings]) == 1
    error = capsys.readouterr().err
    unfinished = f"{begun / 'checkpoint.pt'}: not finished: epoch 0 of 100; go on with: "
    assert unfinished in error
    assert main(["lr-find", "A1", "--out", str(tmp_path / "lr.svg"), "--set", settings]) == 1
    assert unfinished in capsys.readouterr().err
    absent.write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="damaged or not a checkpoint"):
        Objective(recipe.load("A1", [settings]), absent, CPU)
