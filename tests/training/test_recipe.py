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
    "seresnet": 2580612,
    "resnext": 884362,
    "distilled": 645792,
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


A_ERASING = "random_erasing 0.5 (0.02, 0.33) (0.3, 3.3) 0.0"
A_AUGMENT = ["random_crop 4 black", "horizontal_flip 0.5", A_ERASING]
A_STD, B_STD = (0.2470, 0.2435, 0.2616), (0.2023, 0.1994, 0.2010)
B_AUGMENT = [
    *("random_crop 4 black", "horizontal_flip 0.5", "color_jitter 0.3 0.3 0.3 0.1"),
    *("rotation 20.0", "translate 0.1"),
]
# Epochs, batch size, precision; optimizer; schedule; std and held-out share; augmentation. The header of
# a recipe says what its report leaves open.
REPORTS = {
    "A1": ((100, 128, "off"), "adam 0.001 0.0", "constant", (A_STD, 0.0), A_AUGMENT),
    "A2": ((100, 128, "fp16"), "sgd 0.01 0.9 False 0.0005", "cosine 0.0001", (A_STD, 0.0), A_AUGMENT),
    "A3": (
        (200, 512, "fp16"),
        "sgd 0.112202 0.9 False 0.0005",
        "cosine 0.0001",
        (A_STD, 0.0),
        A_AUGMENT,
    ),
    "B1": ((75, 128, "off"), "adam 0.001 0.0001", "plateau 0.1 5", (B_STD, 0.1), B_AUGMENT),
    "B2": ((75, 128, "off"), "adam 0.001 0.0001", "plateau 0.1 5", (B_STD, 0.1), B_AUGMENT),
    "C1": (
        (75, 256, "bf16"),
        "sgd 0.1 0.9 False 0.0001",
        "multi_step (30, 40, 60, 80) 0.1",
        ((0.247, 0.243, 0.261), 0.0),
        [
            *("rotation 10.0", "color_jitter 0.1 0.1 0.1 0.0", "horizontal_flip 0.5"),
            *("sharpness 2.0 0.2", "random_crop 4 black"),
            "random_erasing 0.2 (0.02, 0.1) (0.3, 3.3) 1.0",
        ],
    ),
    "D1": (
        (40, 64, "bf16"),
        "sgd 0.01 0.9 False 0.0005",
        "step 10 0.1",
        ((0.5, 0.5, 0.5), 0.2),
        [
            *("random_crop 4 black", "horizontal_flip 0.5", "color_jitter 0.2 0.2 0.2 0.0"),
            *("rotation 15.0", "random_erasing 0.5 (0.02, 0.2) (0.3, 3.3) 0.0"),
        ],
    ),
    "E1": (
        (50, 128, "off"),
        "adamw 0.01 0.001",
        "shifted_warmup_cosine 5 1e-05",
        ((0.2471, 0.2435, 0.2616), 0.0),
        [
            *("horizontal_flip 0.5", "random_crop 4 black", "color_jitter 0.2 0.2 0.2 0.0"),
            *("auto_augment", "rotation 15.0"),
        ],
    ),
}


MUON = (
    "{kind = 'muon', lr = 0.1, momentum = 0.6, bias_lr = 1.0, head_lr = 1.0, sgd_momentum = 0.9, "
    "weight_decay = 0.0}"
)


@pytest.mark.parametrize("name", REPORTED)
def test_recipes_are_what_the_reports_say(name: str) -> None:
    def text(part: recipe.Part) -> str:
        return " ".join(str(value) for _, value in part)

    found = recipe.load(name)
    (epochs, batch_size, amp), optimizer, schedule, (std, validation), augment = REPORTS[name]
    assert (found.epochs, found.batch_size, found.amp) == (epochs, batch_size, amp)
    assert (found.drop_last, found.label_smoothing, found.views) == (False, 0.0, "none")
    assert text(found.optimizer) == optimizer
    assert text(found.schedule) == schedule
    mean = (0.5, 0.5, 0.5) if name == "D1" else (0.4914, 0.4822, 0.4465)
    assert (found.data.mean, found.data.std, found.data.validation) == (mean, std, validation)
    assert [text(part) for part in found.augment] == augment
    assert found.resolution == ()
    assert (found.mixing, found.averaging, found.distillation, found.selection) == (None,) * 4


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
        (
            'kind = "resnet"',
            'kind = "resnext"',
            "key model.kind: right would be one of 'basic_cnn', 'resnet', 'whitened_resnet', got",
        ),
        ('kind = "resnet"\n', "", "missing key model.kind"),
        ("padding = 4", "padding = 4.5", "key augment.0.padding: Input should be a valid integer"),
        ('op = "random_crop"', 'op = "crop"', "key augment.0.op: right would be one of"),
        ("blocks = [3, 4, 6, 3]", "blocks = [3, 4]", "key model: 2 stages in blocks but 4 in widths"),
        ("lr = 0.112202", "lr = nan", "key optimizer.lr"),
        (
            "[schedule]",
            '[mixing]\nkind = "mixup"\nalpha = 1.0\np = 1.0\nepochs = [3, 3]\n\n[schedule]',
            "key mixing: epochs: there are none from 3 to before 3",
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


def test_digest_changes_with_what_a_run_does_only(tmp_path: Path) -> None:
    a3 = recipe.load("A3")
    assert recipe.load(edited(tmp_path, 'title = "', 'title = "Another ')).digest() == a3.digest()
    assert recipe.load("A3", ["augment.1.p=0.4"]).digest() != a3.digest()


def test_unknown_name_lists_the_registry() -> None:
    with pytest.raises(RecipeError, match="no recipe 'A9'; there are: A1, A2"):
        recipe.load("A9")


def test_a_file_of_another_ending_is_no_recipe(tmp_path: Path) -> None:
    path = tmp_path / "own"
    path.write_text(recipe.load("A3").to_toml())
    with pytest.raises(RecipeError, match=r"; and \.toml files"):
        recipe.load(path)


def test_a_byte_order_mark_is_no_part_of_a_recipe(tmp_path: Path) -> None:
    path = tmp_path / "own.toml"
    path.write_text(recipe.load("A3").to_toml(), encoding="utf-8-sig")
    assert recipe.load(path) == recipe.load("A3")


@pytest.mark.parametrize("value", ["[" * 2000, "1" * 5000, "1" * 20])
def test_absurd_values_are_refused(tmp_path: Path, value: str) -> None:
    path = edited(tmp_path, "epochs = 200", f"epochs = {value}")
    with pytest.raises(RecipeError, match=r"edited\.toml: "):
        recipe.load(path)
    with pytest.raises(RecipeError, match="key epochs: "):
        recipe.load("A3", [f"epochs={value}"])


@pytest.mark.parametrize("value", ["0x" + "f" * 5000, f"{{x{'.x' * 5000} = 1}}"])
def test_what_is_too_long_or_deep_for_json_is_refused(tmp_path: Path, value: str) -> None:
    path = edited(tmp_path, "epochs = 200", f"epochs = {value}")
    with pytest.raises(RecipeError, match=r"edited\.toml: "):
        recipe.load(path)
    with pytest.raises(RecipeError, match=r"A3\.toml with --set epochs=.{,100}: "):
        recipe.load("A3", [f"epochs={value}"])


def test_overrides_are_typed_and_validated() -> None:
    changed = recipe.load(
        "A3", ["optimizer.lr = 0.2", "amp = bf16", "augment.0.padding=2", "model.widths=[8, 8, 8, 8]"]
    )
    assert isinstance(changed.optimizer, recipe.SGD)
    assert changed.optimizer.lr == 0.2
    assert changed.amp == "bf16"
    assert changed.augment[0] == recipe.RandomCrop(op="random_crop", padding=2, border="black")
    assert isinstance(changed.model, recipe.ResNet)
    assert changed.model.widths == (8, 8, 8, 8)


def test_an_override_adds_a_table_and_another_removes_it() -> None:
    averaged = recipe.load("A3", ["averaging={decay=0.9}", "averaging.decay=0.8"])
    assert averaged.averaging == recipe.Averaging(decay=0.8)
    assert recipe.load("A3", ["averaging={decay=0.9}", "averaging="]) == recipe.load("A3")
    assert recipe.load("A3", ["augment.0="]).augment == recipe.load("A3").augment[1:]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.rate=0.2", "A3.toml with --set optimizer.rate=0.2: unknown key optimizer.rate"),
        ("data.mean=[0.5,0.5]", "missing key data.mean.2"),
        ("data.std=[0.2,0.0,0.2]", "key data.std.1: Input should be greater than 0, got 0.0"),
        ("data.mean=[125.3,123.0,113.9]", "key data.mean.0: Input should be less than or equal to 1"),
        ("data.std=[63.0,62.1,66.7]", "key data.std.0: Input should be less than or equal to 1"),
        ("title=2026-01-02", "key title: Input should be a valid string, got ['2026-01-02']"),
        ("epochs=many", "key epochs: Input should be a valid integer, got 'many'"),
        ("epochs", "write key=value"),
        ("augment.9.padding=2", "the recipe has no '9' there"),
        ("data.mean.x=2", "the recipe has no 'x' there"),
        ("mixing.alpha=2", "no 'mixing' there (a table is added whole, as in averaging={decay=0.9})"),
        ("mixing=", "the recipe has no 'mixing' there"),
        ("epochs=", "missing key epochs"),
        ("epochs.x=2", "epochs has no keys"),
        ("model.kind=basic_cnn", "unknown key model.blocks"),
        ("optimizer.weight_decay=1e39", "key optimizer.weight_decay: Input should be less than"),
        ("augment.2.value=-1e39", "key augment.2.value: Input should be greater than"),
        ("augment.2.ratio=[3.3,0.3]", "augment.2: ratio: from 3.3 to 0.3 is no range"),
        (
            "optimizer={kind='sgd', lr=0.1, momentum=0.0, nesterov=true, weight_decay=0.0}",
            "optimizer: nesterov needs a momentum above 0",
        ),
        (
            "schedule={kind='plateau', factor=0.1, patience=5}",
            "schedule: plateau needs held-out images: data.validation above 0",
        ),
        (
            "model={kind='whitened_resnet', depths=[1, 1], widths=[8]}",
            "key model: 2 stages in depths but 1 in widths",
        ),
        (f"optimizer={MUON}", "optimizer: the rates of muon are defined for a whitened_resnet only"),
        (
            f"selection={{share = 0.5, model = {{kind = 'basic_cnn'}}, optimizer = {MUON}}}",
            "selection.optimizer: the rates of muon are defined for a whitened_resnet only, and "
            "selection.model is a basic_cnn",
        ),
    ],
)
def test_wrong_override_names_the_key(override: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe.load("A3", [override])
    assert message in str(caught.value)
