from pathlib import Path

import pytest

from training import recipe
from training.model import build, parameter_count
from training.recipe import RecipeError

REPORTED = {
    "A1": 62006,
    "A2": 11173962,
    "A3": 21282122,
    "B1": 4697162,
    "B2": 2777674,
    "C1": 4697162,
    "D1": 4662098,
    "E1": 4918602,
}
OURS = {
    "accurate": 4636768,
    "fast": 2563104,
    "seresnet": 4733610,
    "resnext": 4124186,
    "distilled": 2777674,
}


def test_registry_holds_the_reports_and_ours() -> None:
    assert set(recipe.names()) == REPORTED.keys() | OURS.keys()


@pytest.mark.parametrize(("name", "count"), (REPORTED | OURS).items())
def test_parameter_count(name: str, count: int) -> None:
    assert parameter_count(build(recipe.load(name).model)) == count


@pytest.mark.parametrize("name", recipe.names())
def test_resolved_recipe_loads_to_the_same(name: str, tmp_path: Path) -> None:
    loaded = recipe.load(name)
    resolved = tmp_path / "recipe.toml"
    resolved.write_text(loaded.to_toml())
    assert recipe.load(resolved) == loaded


@pytest.mark.parametrize("name", recipe.names())
def test_header_names_the_command(name: str) -> None:
    text = (recipe.RECIPES / f"{name}.toml").read_text()
    assert f"# Command: python -m training run {name}\n" in text
    report = recipe.load(name).report
    assert report is None or report.id == name


def test_a3_is_what_the_report_says() -> None:
    a3 = recipe.load("A3")
    assert (a3.epochs, a3.batch_size, a3.drop_last, a3.amp) == (200, 512, False, "fp16")
    assert a3.optimizer == recipe.SGD(
        kind="sgd", lr=0.112202, momentum=0.9, nesterov=False, weight_decay=5e-4
    )
    assert a3.schedule == recipe.Cosine(kind="cosine", min_lr=1e-4)
    assert [part.op for part in a3.augment] == ["random_crop", "horizontal_flip", "random_erasing"]


def edited(tmp_path: Path, old: str, new: str) -> Path:
    text = (recipe.RECIPES / "A3.toml").read_text()
    assert old in text
    path = tmp_path / "edited.toml"
    path.write_text(text.replace(old, new, 1))
    return path


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("epochs = 200\n", "", "missing key epochs"),
        ("batch_size = 512", "batch_sise = 512", "unknown key batch_sise"),
        (
            "batch_size = 512",
            'batch_size = "512"',
            "key batch_size: Input should be a valid integer",
        ),
        ("batch_size = 512", "batch_size = 0", "key batch_size: Input should be greater than"),
        ("momentum = 0.9", "momentun = 0.9", "unknown key optimizer.momentun"),
        ("momentum = 0.9", "", "missing key optimizer.momentum"),
        ('kind = "resnet"', 'kind = "resnext"', "key model: Input tag 'resnext'"),
        ("padding = 4", "padding = 4.5", "key augment.0.padding: Input should be a valid integer"),
        ('op = "random_crop"', 'op = "crop"', "key augment.0: Input tag 'crop'"),
        ("blocks = [3, 4, 6, 3]", "blocks = [3, 4]", "2 stages in blocks but 4 in widths"),
        ("lr = 0.112202", "lr = nan", "key optimizer.lr"),
        (
            "[schedule]",
            '[mixing]\nkind = "mixup"\nalpha = 1.0\np = 1.0\nepochs = [3, 3]\n\n[schedule]',
            "key mixing: Value error, epochs: from 3 to before 3 are none",
        ),
        ("epochs = 200", "epochs = 200\nepochs = 2", "not a TOML file"),
    ],
)
def test_wrong_recipe_names_file_and_key(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = edited(tmp_path, old, new)
    with pytest.raises(RecipeError) as caught:
        recipe.load(path)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)


def test_erasing_before_another_operation_is_refused(tmp_path: Path) -> None:
    path = edited(tmp_path, 'op = "random_crop"\npadding = 4\nborder = "black"',
                  'op = "random_erasing"\np = 0.5\n'
                  "scale = [0.1, 0.2]\nratio = [0.3, 3.3]\nvalue = 0.0")  # fmt: skip
    with pytest.raises(RecipeError, match="random_erasing and cutout work on normalised pixels"):
        recipe.load(path)


def test_digest_changes_with_what_a_run_does_only(tmp_path: Path) -> None:
    a3 = recipe.load("A3")
    assert recipe.load(edited(tmp_path, 'title = "', 'title = "Another ')).digest() == a3.digest()
    assert recipe.load("A3", ["augment.1.p=0.4"]).digest() != a3.digest()


def test_unknown_name_lists_the_registry() -> None:
    with pytest.raises(RecipeError, match="no recipe 'A9'; there are: A1, A2"):
        recipe.load("A9")


def test_overrides_are_typed_and_validated() -> None:
    changed = recipe.load(
        "A3", ["optimizer.lr=0.2", "amp=bf16", "augment.0.padding=2", "model.widths=[8, 8, 8, 8]"]
    )
    assert isinstance(changed.optimizer, recipe.SGD)
    assert changed.optimizer.lr == 0.2
    assert changed.amp == "bf16"
    assert changed.augment[0] == recipe.RandomCrop(op="random_crop", padding=2, border="black")
    assert isinstance(changed.model, recipe.ResNet)
    assert changed.model.widths == (8, 8, 8, 8)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.rate=0.2", "unknown key optimizer.rate"),
        ("epochs=many", "key epochs: Input should be a valid integer, got 'many'"),
        ("epochs", "write key=value"),
        ("augment.9.padding=2", "the recipe has no '9' there"),
        ("data.mean.x=2", "the recipe has no 'x' there"),
        ("epochs.x=2", "epochs has no keys"),
        ("model.kind=basic_cnn", "unknown key model.blocks"),
    ],
)
def test_wrong_override_names_the_key(override: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe.load("A3", [override])
    assert message in str(caught.value)
