"""Recipes: complete run specifications, one TOML file each, validated on load.

The folder ``training/recipes`` is the registry: a recipe's name is its file's name. Some tables may be
left out, but a table must have all its keys; an unknown, missing or ill-typed key is an error that names
the file and the key.
"""

import hashlib
import json
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from training.errors import ExplainedError

RECIPES = Path(__file__).parent / "recipes"

LARGEST = 3.4e38  # about the largest float32

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0, le=LARGEST)]
NonNegative = Annotated[float, Field(ge=0, le=LARGEST)]
Spread = Annotated[float, Field(gt=0, le=1)]
Count = Annotated[int, Field(ge=1, lt=2**63)]
Amp = Literal["off", "fp16", "bf16"]
Border = Literal["black", "reflect"]
Views = Literal["none", "flip", "flip_shift"]


class RecipeError(ExplainedError):
    """A recipe that cannot be used; the message names the file and each offending key."""


class Part(BaseModel):
    """A table of a recipe, immutable and strict: no unknown keys, and no value of another type.

    But a whole number may stand for a float.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Report(Part):
    """The published claim that a recipe reproduces."""

    id: str
    system: str
    accuracy: Fraction
    measured: str


class Data(Part):
    """Normalisation (of pixels in 0..1) and the share of the training images held out as ``val``."""

    mean: tuple[Fraction, Fraction, Fraction]
    std: tuple[Spread, Spread, Spread]
    validation: Annotated[float, Field(ge=0, lt=1)]


# -- networks ---------------------------------------------------------------------------------------


class BasicCNN(Part):
    """The two-convolution network of the PyTorch tutorial."""

    kind: Literal["basic_cnn"]


class BasicBlock(Part):
    """Two 3x3 convolutions."""

    kind: Literal["basic"]


class Bottleneck(Part):
    """1x1, 3x3 and 1x1 convolutions; the inner ones are ``reduction`` times narrower than the stage.

    With more than one group in the 3x3 convolution (``groups``), it is ResNeXt's block.
    """

    kind: Literal["bottleneck"]
    reduction: Count
    groups: Count


Block = Annotated[BasicBlock | Bottleneck, Field(discriminator="kind")]


class SqueezeExcitation(Part):
    """Each residual's channels are scaled, by weights from a layer ``reduction`` times narrower."""

    reduction: Count


class ResNet(Part):
    """3x3 stem, stages of residual blocks (stride 2 from the second stage on), average pool, head."""

    kind: Literal["resnet"]
    block: Block
    blocks: Annotated[tuple[Count, ...], Field(min_length=1)]
    widths: Annotated[tuple[Count, ...], Field(min_length=1)]
    activation: Literal["relu", "leaky_relu"]
    dropout: Annotated[float, Field(ge=0, lt=1)]
    init: Literal["default", "kaiming_fan_out"]
    squeeze_excitation: SqueezeExcitation | None = None

    @model_validator(mode="after")
    def _one_width_a_stage(self) -> Self:
        if len(self.blocks) != len(self.widths):
            raise ValueError(f"{len(self.blocks)} stages in blocks but {len(self.widths)} in widths")
        _check_reduction(self.squeeze_excitation, self.widths)
        for width in self.widths:
            if isinstance(self.block, Bottleneck) and width % (self.block.reduction * self.block.groups):
                raise ValueError(f"widths: {width} is not a multiple of block.reduction * block.groups")
        return self


class WhitenedResNet(Part):
    """Whitening stem, stages of conv-pool plus a residual branch of ``depths`` convolutions."""

    kind: Literal["whitened_resnet"]
    widths: Annotated[tuple[Count, ...], Field(min_length=1)]
    depths: Annotated[tuple[Count, ...], Field(min_length=1)]
    squeeze_excitation: SqueezeExcitation | None = None

    @model_validator(mode="after")
    def _one_depth_a_stage(self) -> Self:
        if len(self.depths) != len(self.widths):
            raise ValueError(f"{len(self.depths)} stages in depths but {len(self.widths)} in widths")
        _check_reduction(self.squeeze_excitation, self.widths)
        return self


def _check_reduction(config: SqueezeExcitation | None, widths: tuple[int, ...]) -> None:
    if config is not None and config.reduction > min(widths):
        raise ValueError(f"squeeze_excitation.reduction {config.reduction} exceeds width {min(widths)}")


Model = Annotated[BasicCNN | ResNet | WhitenedResNet, Field(discriminator="kind")]

# -- augmentations, applied in the order of the file ------------------------------------------------


class RandomCrop(Part):
    """Shift by up to ``padding`` pixels each way; the border is black or mirrored."""

    op: Literal["random_crop"]
    padding: Annotated[int, Field(ge=1, le=31)]
    border: Border


class HorizontalFlip(Part):
    """Mirror each image with probability ``p``."""

    op: Literal["horizontal_flip"]
    p: Fraction


class AlternatingFlip(Part):
    """Mirror a random half of the images in even epochs and the other half in odd ones."""

    op: Literal["alternating_flip"]


class ColorJitter(Part):
    """Random brightness, contrast and saturation factors in 1 +- x, and a hue shift in +- hue turns."""

    op: Literal["color_jitter"]
    brightness: NonNegative
    contrast: NonNegative
    saturation: NonNegative
    hue: Annotated[float, Field(ge=0, le=0.5)]


class Rotation(Part):
    """Rotate by a random angle in +- ``degrees``; nearest pixel, black corners."""

    op: Literal["rotation"]
    degrees: NonNegative


class Translate(Part):
    """Shift along each axis by up to ``fraction`` of its length; black border."""

    op: Literal["translate"]
    fraction: Fraction


class Sharpness(Part):
    """Adjust sharpness by ``factor`` (1 leaves the image as it is) with probability ``p``."""

    op: Literal["sharpness"]
    factor: NonNegative
    p: Fraction


class AutoAugment(Part):
    """AutoAugment with its CIFAR-10 policy (Cubuk et al., 2019)."""

    op: Literal["auto_augment"]


class RandomErasing(Part):
    """Overwrite a rectangle of the normalised image (Zhong et al., 2017)."""

    op: Literal["random_erasing"]
    p: Fraction
    scale: tuple[Fraction, Fraction]
    ratio: tuple[Positive, Positive]
    value: Annotated[float, Field(ge=-LARGEST, le=LARGEST)]

    @model_validator(mode="after")
    def _ranges_ascend(self) -> Self:
        for name, (low, high) in (("scale", self.scale), ("ratio", self.ratio)):
            if low > high:
                raise ValueError(
                    f"{name}: from {low:g} to {high:g} is no range; the lower number is first"
                )
        return self


class Cutout(Part):
    """Set a square of the normalised image to 0, the mean (DeVries & Taylor, 2017)."""

    op: Literal["cutout"]
    size: Annotated[int, Field(ge=1, le=32)]
    p: Fraction


ON_NORMALISED = ("random_erasing", "cutout")  # work on normalised images, all others on pixels

Augmentation = Annotated[
    RandomCrop
    | HorizontalFlip
    | AlternatingFlip
    | ColorJitter
    | Rotation
    | Translate
    | Sharpness
    | AutoAugment
    | RandomErasing
    | Cutout,
    Field(discriminator="op"),
]

# -- optimizers and schedules -----------------------------------------------------------------------


class SGD(Part):
    """Stochastic gradient descent; weight decay on all parameters."""

    kind: Literal["sgd"]
    lr: Positive
    momentum: Annotated[float, Field(ge=0, lt=1)]
    nesterov: bool
    weight_decay: NonNegative


class Adam(Part):
    """Adam with L2 weight decay in the gradient (not AdamW)."""

    kind: Literal["adam"]
    lr: Positive
    weight_decay: NonNegative


class AdamW(Part):
    """Adam with decoupled weight decay."""

    kind: Literal["adamw"]
    lr: Positive
    weight_decay: NonNegative


class Muon(Part):
    """Muon for hidden layers' weights, Nesterov SGD for biases and head; see ``training.optimizer``."""

    kind: Literal["muon"]
    lr: Positive
    momentum: Annotated[float, Field(ge=0, lt=1)]
    bias_lr: Positive
    head_lr: Positive
    sgd_momentum: Annotated[float, Field(gt=0, lt=1)]
    weight_decay: NonNegative


Optimizer = Annotated[SGD | Adam | AdamW | Muon, Field(discriminator="kind")]


class Constant(Part):
    """The same learning rate throughout."""

    kind: Literal["constant"]


class Linear(Part):
    """Falls with every step, from the optimizer's rate to 0 after the last one."""

    kind: Literal["linear"]


class Cosine(Part):
    """Cosine annealing per epoch from the optimizer's rate to ``min_lr`` after the last epoch."""

    kind: Literal["cosine"]
    min_lr: NonNegative


class ShiftedWarmupCosine(Part):
    """E1's warm-up, which starts at 2 / ``warmup_epochs``, then a cosine shifted by one epoch."""

    kind: Literal["shifted_warmup_cosine"]
    warmup_epochs: Count
    min_lr: NonNegative


class Step(Part):
    """Multiply by ``gamma`` every ``step_epochs`` epochs."""

    kind: Literal["step"]
    step_epochs: Count
    gamma: Positive


class MultiStep(Part):
    """Multiply by ``gamma`` at each epoch in ``milestones``."""

    kind: Literal["multi_step"]
    milestones: tuple[Count, ...]
    gamma: Positive


class Plateau(Part):
    """Multiply by ``factor`` after more than ``patience`` epochs without a clearly lower ``val`` loss.

    That is one lower than the best by more than 0.01 %.
    """

    kind: Literal["plateau"]
    factor: Annotated[float, Field(gt=0, lt=1)]
    patience: Annotated[int, Field(ge=0)]


Schedule = Annotated[
    Constant | Linear | Cosine | ShiftedWarmupCosine | Step | MultiStep | Plateau,
    Field(discriminator="kind"),
]


class Resolution(Part):
    """From epoch ``from_epoch`` (0 is the first) on, training images are scaled to ``size`` pixels."""

    from_epoch: Annotated[int, Field(ge=0)]
    size: Annotated[int, Field(ge=8, le=32)]


# -- what a recipe may leave out ----------------------------------------------------------------------


class Mix(Part):
    """Mix each batch with probability ``p``, by a share of its own from Beta(alpha, alpha).

    This is done from epoch ``epochs[0]`` (0 is the first) until before ``epochs[1]``: it helps to end on
    unmixed images (He et al., 2019, arXiv:1909.09148).
    """

    alpha: Positive
    p: Fraction
    epochs: tuple[Annotated[int, Field(ge=0)], Count]

    @model_validator(mode="after")
    def _some_epochs(self) -> Self:
        first, end = self.epochs
        if first >= end:
            raise ValueError(f"epochs: there are none from {first} to before {end}")
        return self


class MixUp(Mix):
    """Blend each image and its label with another's (Zhang et al., 2018)."""

    kind: Literal["mixup"]


class CutMix(Mix):
    """Paste a box of another image, and mix the labels by its area (Yun et al., 2019)."""

    kind: Literal["cutmix"]


Mixing = Annotated[MixUp | CutMix, Field(discriminator="kind")]


class Averaging(Part):
    """Make an exponential moving average of weights and statistics over the steps the result.

    A step's share in it is ``1 - decay``, and more in the first steps (about ``9 / (1 - decay)``).
    """

    decay: Annotated[float, Field(gt=0, lt=1)]


class Distillation(Part):
    """Learn from a trained network's probabilities too (Hinton et al., 2015, arXiv:1503.02531).

    ``teacher`` is that network's checkpoint file, and ``weight`` its share of the loss.
    """

    teacher: str
    temperature: Positive
    weight: Fraction


class Selection(Part):
    """Learn only from the ``share`` of each batch that a small network, trained beside, finds hardest.

    After airbench96 (K. Jordan, arXiv:2404.00498). ``model`` and ``optimizer`` are those of the small
    network, which learns from the same images, at rates that follow the recipe's schedule.
    """

    share: Annotated[float, Field(gt=0, lt=1)]
    model: Model
    optimizer: Optimizer

    def count(self, images: int) -> int:
        """How many are chosen from a batch of ``images``."""
        return max(1, round(self.share * images))


class Recipe(Part):
    """A complete run specification: network, data, augmentation, optimizer and schedule.

    ``amp`` is the precision of training if the device computes it natively (``off`` is fp32); ``views``
    are the views averaged for a prediction (``flip``: the image and its mirror image; ``flip_shift``:
    these two, and each shifted by a pixel towards two opposite corners).
    """

    title: str
    report: Report | None = None
    epochs: Count
    batch_size: Count
    drop_last: bool
    label_smoothing: Annotated[float, Field(ge=0, lt=1)]
    amp: Amp
    views: Views
    data: Data
    model: Model
    optimizer: Optimizer
    schedule: Schedule
    augment: tuple[Augmentation, ...] = ()
    resolution: tuple[Resolution, ...] = ()
    mixing: Mixing | None = None
    averaging: Averaging | None = None
    distillation: Distillation | None = None
    selection: Selection | None = None

    @model_validator(mode="after")
    def _parts_fit_together(self) -> Self:
        on_normalised = [part.op in ON_NORMALISED for part in self.augment]
        if on_normalised != sorted(on_normalised):
            raise ValueError(
                f"augment: {' and '.join(ON_NORMALISED)} work on normalised pixels and come last"
            )
        if self.schedule.kind == "plateau" and self.data.validation == 0:
            raise ValueError("schedule: plateau needs held-out images: data.validation above 0")
        networks = [("", self.model, self.optimizer)]
        if self.selection is not None:
            networks.append(("selection.", self.selection.model, self.selection.optimizer))
        for place, model, optimizer in networks:
            if optimizer.kind == "muon" and model.kind != "whitened_resnet":
                raise ValueError(
                    f"{place}optimizer: the rates of muon are defined for a whitened_resnet only, and "
                    f"{place}model is a {model.kind}"
                )
        several_rates = self.optimizer.kind == "muon" or self.selection is not None
        if self.schedule.kind == "shifted_warmup_cosine" and several_rates:
            raise ValueError("schedule: shifted_warmup_cosine is defined for one learning rate")
        if isinstance(self.optimizer, SGD) and self.optimizer.nesterov and not self.optimizer.momentum:
            raise ValueError("optimizer: nesterov needs a momentum above 0")
        return self

    def digest(self) -> str:
        """Twelve hex digits that depend on all that a run does, but not on ``title`` and ``report``."""
        values = self.model_dump(mode="json", exclude={"title", "report"}, exclude_none=True)
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]

    def to_toml(self) -> str:
        """The recipe as a TOML document that loads to an equal recipe."""
        return tomli_w.dumps(self.model_dump(mode="json", exclude_none=True))


def names() -> list[str]:
    """The names of all recipes in the registry, sorted."""
    return sorted(path.stem for path in RECIPES.glob("*.toml"))


def load(name_or_path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe by its registry name or its file's path; ``overrides`` are ``key=value`` texts.

    Without a value, an override removes the key.

    Raises:
        RecipeError: no such recipe, not TOML, or an unknown, missing or ill-typed key.
        OSError: the file cannot be read.
    """
    path = Path(name_or_path)
    if path.suffix == ".toml":
        if not path.is_file():
            raise RecipeError(f"no file {path}")
    else:
        path = RECIPES / f"{name_or_path}.toml"
        if not path.is_file():
            raise RecipeError(
                f"no recipe {str(name_or_path)!r}; there are: {', '.join(names())}; and .toml files"
            )
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8-sig"))  # some editors begin with a BOM
    except (ValueError, RecursionError) as error:  # not TOML, not UTF-8, or absurdly long or deep
        raise RecipeError(f"{path}: not a TOML file: {error}") from error
    source, changes = str(path), list(overrides)
    for override in changes:
        _override(data, override)
    if changes:  # the file may be sound without them
        source += f" with --set {' '.join(change[:100] for change in changes)}"
    return parse(data, source)


def parse(data: Mapping[str, Any], source: str) -> Recipe:
    """Validate a recipe's data; ``source`` (a file's name, say) begins every line of an error.

    Raises:
        RecipeError: an unknown, missing or ill-typed key.
    """
    try:
        # By way of JSON: pydantic's strict mode takes its arrays as tuples, but not Python's lists.
        text = json.dumps(data, default=lambda date: [str(date)])  # which is right for no key
        return Recipe.model_validate_json(text)
    except ValidationError as error:
        lines = [f"{source}: {_describe(details, data)}" for details in error.errors()]
        raise RecipeError("\n".join(lines)) from error
    except (ValueError, RecursionError) as error:  # of what is absurdly long or deep
        raise RecipeError(f"{source}: {error}") from error


def _override(data: dict[str, Any], override: str) -> None:
    key, separator, text = (part.strip() for part in override.partition("="))
    if not separator or not key:
        raise RecipeError(f"--set {override}: write key=value, for example optimizer.lr=0.1")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        value = text  # a bare word is a string: amp=bf16
    *parents, last = key.split(".")
    place: Any = data
    for name in parents:
        place = _child(place, name, override)
    if not isinstance(place, list | dict):
        raise RecipeError(f"--set {override}: {'.'.join(parents)} has no keys")
    if isinstance(place, list) or not text:
        _child(place, last, override)
    at = int(last) if isinstance(place, list) else last
    if text:
        place[at] = value  # an unknown key is rejected by the validation that follows
    else:
        del place[at]


def _child(place: Any, name: str, override: str) -> Any:
    if isinstance(place, dict) and name in place:
        return place[name]
    if isinstance(place, list) and name.isdecimal() and int(name) < len(place):
        return place[int(name)]
    raise RecipeError(
        f"--set {override}: the recipe has no {name!r} there (a table is added whole, as in "
        "averaging={decay=0.9})"
    )


def _describe(details: ErrorDetails, data: Any) -> str:
    keys: list[str] = []
    for name in details["loc"]:
        absent = details["type"] == "missing" and name == details["loc"][-1]
        if isinstance(data, dict) and name not in data and not absent:
            continue  # the tag of a union ("resnet"), which is not a key of the file
        if isinstance(data, list | dict) and not absent:
            data = data[int(name)] if isinstance(data, list) else data[str(name)]
        keys.append(str(name))
    key = ".".join(keys)
    context = details.get("ctx", {})
    tag = f"{key}.{context.get('discriminator', '')}".replace("'", "")  # as "model.kind"
    match details["type"]:
        case "missing":
            return f"missing key {key}"
        case "extra_forbidden":
            return f"unknown key {key}"
        case "union_tag_not_found":
            return f"missing key {tag}"
        case "union_tag_invalid":
            return f"key {tag}: right would be one of {context['expected_tags']}, got {context['tag']!r}"
        case "value_error":  # of a table, from one of our validators
            return f"key {key}: {context['error']}" if key else str(context["error"])
        case _ if key:
            return f"key {key}: {details['msg']}, got {details['input']!r}"
    return details["msg"]
