"""Recipes: every number that a run depends on, typed, frozen, and kept with the run.

A recipe is a YAML file whose top-level keys follow the stages. Unknown keys are errors with a suggestion;
`--set a.b=value` changes one value. This module imports no torch.
"""

import copy
import difflib
import importlib.resources
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    SerializeAsAny,
    ValidationError,
    model_validator,
)

from pipeline.errors import RecipeError
from pipeline.methods import Method, parse_method
from pipeline.yaml_text import parse_yaml

Rule = Literal["sgd", "nesterov", "rmsprop", "rmsprop_tf", "adamw"]
TeacherKind = Literal["calibrator", "fixed", "none"]
FeedbackKind = Literal["soft", "hard", "none"]
Reading = Literal["memory", "stream"]


class Settings(BaseModel):
    """Base of all settings: frozen, and strict about keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelSettings(Settings):
    """A network by its timm name (or wrn_28_2 and relatives from `pipeline.networks`)."""

    name: str
    stem: Literal["auto", "standard", "small"] = "auto"  # small: no early downsampling, for images up to 64 px
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)  # before the prediction layer
    drop_path: float = Field(default=0.0, ge=0.0, lt=1.0)  # stochastic depth
    batch_norm_momentum: float | None = Field(default=None, gt=0.0, le=1.0)  # torch's sense: weight of the new
    options: dict[str, Any] = Field(default_factory=dict)  # further arguments of timm.create_model
    pretrained: bool = Field(default=False, exclude_if=lambda value: not value)  # begin with published weights
    weights: str | None = Field(default=None, exclude_if=lambda value: value is None)
    """Of `pretrained`, a file, or packaged:efficientnet-lite0; null: the Hub's, from its cache if they are there."""

    @model_validator(mode="after")
    def _weights_are_used(self) -> "ModelSettings":
        if self.weights is not None and not self.pretrained:
            raise ValueError("weights are loaded with pretrained: true; set it, or leave weights away")
        if self.pretrained and self.stem == "small":
            raise ValueError("stem: small is not the stem that the pretrained weights are of; leave it away")
        return self


Operation = Literal[
    "identity",
    "autocontrast",
    "equalize",
    "invert",
    "posterize",
    "solarize",
    "brightness",
    "color",
    "contrast",
    "sharpness",
    "rotate",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
]
OPERATIONS: tuple[Operation, ...] = get_args(Operation)


class AugmentSettings(Settings):
    """What is done at random to the images of a batch; the defaults leave them as they are.

    Applied in this order: flip and padded crop; random resized crop, rotation and translation (one
    interpolation); RandAugment; cutout.
    """

    flip: bool = False
    """Mirror every other image, left to right, at random."""
    crop_padding: Annotated[int, Field(ge=0, le=64)] = 0
    """Shift by up to so many whole pixels in either direction: pad, then crop at random."""
    random_resized_crop: Annotated[float, Field(gt=0, le=1)] | None = None
    """Smallest part of the image's area that a random crop shows (0.08 for ImageNet); null is off."""
    rotate: Annotated[float, Field(ge=0, le=180)] = 0.0
    """Turn by a uniform angle of at most so many degrees either way."""
    translate: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Shift by a uniform part of the side, at most this, in both directions."""
    border: Literal["reflect", "zero"] = "reflect"
    """What the four shifts and turns above find outside the image. (RandAugment and cutout find grey.)"""
    randaugment_layers: Annotated[int, Field(ge=0, le=16)] = 0
    """Operations per image and step, one after another; 0 is off. The papers use 2."""
    randaugment_magnitude: Annotated[float, Field(ge=0, le=10)] = 9.0
    """Strength of each operation, from 0 (none) to 10."""
    randaugment_probability: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Chance of each layer to act on an image."""
    randaugment_operations: Annotated[tuple[Operation, ...], Field(min_length=1)] = OPERATIONS
    """The operations drawn from: the RandAugment paper's fourteen, and NoisyStudent's `invert`."""
    cutout: Annotated[int, Field(ge=0)] = 0
    """Side, in pixels, of a grey square put at a random place; it may hang over the edge."""


class OptimizerSettings(Settings):
    """Optimiser. `alpha` and `eps` speak torch's language: alpha weights the old average."""

    rule: Rule = "sgd"
    lr: PositiveFloat = 0.1
    momentum: float = Field(default=0.9, ge=0.0, lt=1.0)
    weight_decay: NonNegativeFloat = 0.0
    decay_norm: bool = False  # also decay biases and normalisation
    alpha: float = Field(default=0.9, ge=0.0, lt=1.0)
    eps: PositiveFloat = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    clip_norm: PositiveFloat | None = None


class ScheduleSettings(Settings):
    """Learning rate over the steps: linear warm-up, then constant, cosine, or exponential in stairs."""

    kind: Literal["constant", "cosine", "exponential"] = "cosine"
    warmup_steps: NonNegativeInt = 0
    final_fraction: float = Field(default=0.0, ge=0.0, le=1.0)  # of the base rate, at the end of cosine
    decay_rate: float = Field(default=0.97, gt=0.0, le=1.0)
    decay_every: PositiveInt = 1000  # steps


class TrainSettings(Settings):
    """What every training stage shares."""

    steps: PositiveInt
    batch: PositiveInt = 128  # images per student step
    optimizer: OptimizerSettings = OptimizerSettings()
    schedule: ScheduleSettings = ScheduleSettings()
    augment: AugmentSettings = AugmentSettings()
    label_smoothing: float = Field(default=0.0, ge=0.0, lt=1.0)
    ema_decay: float = Field(default=0.999, ge=0.0, lt=1.0)  # the network that a stage leaves is this average
    log_every: PositiveInt = 50  # steps
    evaluate_every: NonNegativeInt = 0  # steps between looks at the validation split; 0 = at the end only
    checkpoint_every: PositiveInt = 1000  # steps
    checkpoint_seconds: PositiveFloat = 300.0

    @property
    def wait(self) -> int:
        """Steps that a teacher learns alone, before the student's first."""
        return 0

    @property
    def schedules(self) -> list[ScheduleSettings]:
        """Those of all that is trained."""
        return [self.schedule]

    @property
    def open_ended(self) -> bool:
        """Whether a step is the same however many follow, so that a finished training can be made longer."""
        return all(schedule.kind != "cosine" for schedule in self.schedules)

    @model_validator(mode="after")
    def _warmup_fits(self) -> "TrainSettings":
        if self.schedule.warmup_steps >= self.steps:
            raise ValueError(
                f"schedule.warmup_steps (={self.schedule.warmup_steps}) must be below steps (={self.steps}); "
                f"change one of them: --set SECTION.schedule.warmup_steps={self.steps // 10}"
            )
        return self


LabelNoise = Annotated[float, Field(ge=0.0, lt=1.0)]  # share of each class's labels that say the next class


class PretrainSettings(TrainSettings):
    """The large teacher, trained on the labelled images."""

    model: ModelSettings
    label_noise: LabelNoise = 0.0  # for experiments: a teacher that is wrong in a systematic way
    folds: Annotated[int, Field(ge=0, le=100)] = 0  # cross-fitting: networks that answer for labelled images held out

    @model_validator(mode="after")
    def _folds_are_several(self) -> "PretrainSettings":
        if self.folds == 1:
            raise ValueError("folds (=1) leaves nothing to train on: 0 for none, or at least 2")
        return self


class FinetuneSettings(TrainSettings):
    """The student after `train-reduced` or `train-mpl`, on labelled images alone."""


class CopySettings(Settings):
    """When a pool image counts as a copy of an evaluation image. See `pipeline.pool.copies.calibration`."""

    enabled: bool = True
    threshold: float | None = None  # of the similarity; None = calibrated on the data set's own images
    honest: float = Field(default=0.001, gt=0.0, le=0.1)  # share of others that may be taken for copies
    keep: bool = False  # count copies, and leave them in the pool


CorrectionKind = Literal["auto", "identity", "map", "scaling", "fit"]
# Those that also need the pool's answers, which there are when it has been selected
StoredCorrectionKind = Literal[CorrectionKind, "prior-em", "prior-bbse"]


class FilterSettings(Settings):
    """Which pool images are kept."""

    k: Annotated[int, Field(ge=1, le=10**9)]  # images per class
    assign: Literal["any", "argmax"] = "any"
    min_probability: float = Field(default=0.0, ge=0.0, lt=1.0)
    upsample: bool = False  # classes short of k get a repeat count
    batch: PositiveInt = 256
    copies: CopySettings = CopySettings()
    teacher: str | None = None  # a network in the place of the run's own: a folder, a file of weights, a packaged one
    predictions: tuple[str, ...] = ()  # files of answers in the place of a network; of several teachers, averaged
    predictions_as: Literal["probabilities", "logits", "labels", "top-k", "votes"] | None = None  # none: as recognised
    predictions_classes: str | None = None  # a file of their class names, where they do not state them
    predictions_in_order: bool = False  # numbers that nobody names are the data set's classes, in its order
    correction: CorrectionKind = "auto"  # of a teacher with classes of its own
    class_map: str | None = None  # a file, or one that is embedded: for each class of the data set the teacher's
    seen_labels: bool = False  # the teacher was trained on the labelled images: its answers there are no evidence


class PrecomputeSettings(Settings):
    """How distributions are stored."""

    format: Literal["parquet", "webdataset"] = "parquet"  # webdataset: tars, distributions in files beside them
    dtype: Literal["float16", "float32"] = "float16"
    shard_rows: PositiveInt = 20_000
    batch: PositiveInt = 256
    embedding: PositiveInt | None = Field(default=None, le=4096)  # numbers of each image, stored for the calibrator


class CalibratorSettings(Settings):
    """q_Ψ: a five-layer perceptron from the stored distribution to the one that the student learns."""

    kind: Literal["residual", "perceptron", "scaling"] = "residual"  # residual, scaling: start near the identity
    hidden: PositiveInt = 128  # paper: 128 (CIFAR-10, SVHN), 512 (ImageNet)
    layers: int = Field(default=5, ge=2)
    floor: float = Field(default=0.1, gt=0.0, lt=1.0)  # share of the start that is uniform: (1 − floor)·q + floor/C
    lr: PositiveFloat = 3e-4  # docs/results/swapped-teacher.md
    schedule: Literal["constant", "student"] = "constant"  # student: lr falls as the student's does
    betas: tuple[float, float] = (0.9, 0.999)
    eps: PositiveFloat = 1e-7
    weight_decay: NonNegativeFloat = 0.0  # L2, coupled; the paper's 1e-4 pulls as hard as the feedback does
    clip_norm: PositiveFloat | None = None  # of its gradient's global norm; Adam adds L2 after it
    supervised_weight: NonNegativeFloat = 0.0  # of CE(y, q_Ψ(q_large(x_l)))
    embedding: bool = True  # sees the images' embeddings, where precompute.embedding has stored some
    image_weights: bool = False  # also a weight of each image in the student's loss, between 0 and 2, at first 1

    @model_validator(mode="after")
    def _scaling_sees_classes_alone(self) -> "CalibratorSettings":
        if self.kind == "scaling" and self.image_weights:
            raise ValueError("kind: scaling has an exponent and a shift of each class; image_weights need a perceptron")
        return self


# Of the feedback. raw: as it stands, dR/dq or ∇ E[R]. per_image: raw · B/η. paper: raw, but raw / B of hard labels, the
# mean over the batch.
FeedbackScale = Literal["raw", "per_image", "paper"]


class FeedbackSettings(Settings):
    """The labelled loss after the student's step, sent back to the calibrator."""

    every: PositiveInt = 1  # student steps between feedbacks
    batch: PositiveInt = 128  # labelled images per feedback
    engine: Literal["exact", "central", "one_sided"] = "exact"
    scale: FeedbackScale = "raw"  # docs/results/feedback.md
    weight: NonNegativeFloat = 1.0
    control: Literal["none", "flipped", "shuffled"] = "none"  # ablations: wrong sign, rows permuted
    held_out: float = Field(default=0.0, ge=0.0, lt=1.0)  # share of the labelled images used for feedback only
    augment: AugmentSettings = AugmentSettings()


class TrainReducedSettings(TrainSettings):
    """The student, under a teacher that adapts, is fixed, or is absent."""

    model: ModelSettings
    teacher: TeacherKind = "calibrator"
    student_data: Literal["auto", "pool", "pool+labelled"] = "auto"
    labelled_target: Literal["auto", "label", "teacher"] = "auto"
    labelled_share: float = Field(default=0.25, gt=0.0, lt=1.0)  # of the batch, with pool+labelled
    reading: Literal["auto"] | Reading = "auto"  # of the pool; auto: memory up to data.memory_gib
    workers: NonNegativeInt | None = None  # threads that decode a streamed pool; none: as suits the image size
    correction: StoredCorrectionKind = "auto"  # of the stored targets; auto: as they were selected
    calibrator: CalibratorSettings = CalibratorSettings()
    feedback: FeedbackSettings = FeedbackSettings()


class MplFeedbackSettings(FeedbackSettings):
    """The same for a teacher network, which has losses of its own: there the paper's scale is right as it is."""

    scale: FeedbackScale = "paper"
    baseline: float = Field(default=0.0, ge=0.0, lt=1.0)  # hard: decay of the moving average taken off h; 0 = none
    credit: Literal["batch", "row"] = "batch"  # hard: one h for all rows, or what each row's label did, by dR/dq


class MplTeacherSettings(Settings):
    """The teacher network of full Meta Pseudo Labels."""

    model: ModelSettings | None = None  # none: the student's
    start: Literal["scratch", "pretrain"] = "scratch"  # pretrain: the network of `mpl pretrain`
    optimizer: OptimizerSettings | None = None  # none: the student's
    schedule: ScheduleSettings | None = None  # none: the student's
    label_noise: LabelNoise = 0.0  # in its own labelled loss, never in the feedback; for experiments


class TrainMplSettings(TrainSettings):
    """Full Meta Pseudo Labels, or with `alone` the method that trains its teacher, by itself.

    `batch` counts pool images; `augment` is the strong view, which the student learns from.
    """

    model: ModelSettings  # the student
    method: SerializeAsAny[Annotated[Method, BeforeValidator(parse_method)]]
    alone: bool = False  # the baseline: one network, trained by the method, without a student
    labelled_batch: PositiveInt = 64  # labelled images per step of the method
    weak: AugmentSettings = AugmentSettings()  # view of the labelled images, and the method's second one of the pool
    feedback: FeedbackKind = "soft"
    feedback_options: MplFeedbackSettings = MplFeedbackSettings()
    student_wait: NonNegativeInt = 0  # steps that the teacher learns alone, before the student's first
    teacher: MplTeacherSettings = MplTeacherSettings()

    @property
    def wait(self) -> int:
        return 0 if self.alone else self.student_wait

    @property
    def schedules(self) -> list[ScheduleSettings]:
        return [self.schedule, *([self.teacher.schedule] if self.teacher.schedule and not self.alone else [])]

    @model_validator(mode="after")
    def _student_begins(self) -> "TrainMplSettings":
        if self.student_wait + self.schedule.warmup_steps >= self.steps:
            raise ValueError(
                f"student_wait (={self.student_wait}) and schedule.warmup_steps (={self.schedule.warmup_steps}) "
                f"together must be below steps (={self.steps}); change one of them: --set SECTION.student_wait=0 "
                f"--set SECTION.schedule.warmup_steps={self.steps // 10}"
            )
        return self


class EvaluateSettings(Settings):
    """How a network is judged."""

    split: Literal["test", "validation", "labelled"] = "test"
    batch: PositiveInt = 512
    bins: PositiveInt = 15  # of the expected calibration error


class DataSettings(Settings):
    """Which images, and how they enter a network."""

    manifest: str
    image_size: PositiveInt  # pixels, square
    labelled: PositiveInt | None = None  # use only so many labelled images, drawn from the seed, stratified by class
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = (0.5, 0.5, 0.5)
    memory_gib: PositiveFloat = 4.0  # of a node; splits beyond lie decoded in a file in the run, pools are streamed


class DistributedSettings(Settings):
    """Several processes, started by torchrun, and memory: how a training lies on its devices (docs/cluster.md)."""

    layout: Literal["replicated", "sharded", "hybrid"] = "replicated"  # DDP; FSDP2; FSDP2 inside groups, copies between
    shard_size: PositiveInt = 1  # hybrid: processes that share one copy
    sync_batch_norm: bool = False  # batch statistics over all processes
    checkpoint_activations: bool = False  # run blocks again in the backward pass instead of keeping activations
    micro_batches: PositiveInt = 1  # parts in which each process takes its share of a batch
    timeout_seconds: PositiveFloat = 600.0  # that a process waits for the others


class ReproduceSettings(Settings):
    """`mpl reproduce`."""

    seeds: PositiveInt = 5
    methods: tuple[SerializeAsAny[Annotated[Method, BeforeValidator(parse_method)]], ...] = ()  # table1: their settings


class Recipe(Settings):
    """All settings of a run."""

    name: str
    description: str = ""
    source: str = ""
    differs: str = ""  # from the paper, in a plain sentence
    reach: dict[str, Any] = Field(default_factory=dict)  # figures that the recipe should reach, for people
    data: DataSettings
    pretrain: PretrainSettings
    filter: FilterSettings
    precompute: PrecomputeSettings = PrecomputeSettings()
    train_reduced: TrainReducedSettings
    train_mpl: TrainMplSettings | None = None
    finetune: FinetuneSettings
    evaluate: EvaluateSettings = EvaluateSettings()
    distributed: DistributedSettings = DistributedSettings()
    reproduce: ReproduceSettings = ReproduceSettings()


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package."""
    folder = importlib.resources.files("pipeline") / "recipes"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_recipe(name_or_file: str, changes: Sequence[str] = ()) -> Recipe:
    """Read a recipe by name or file and apply `a.b=value` changes (values are YAML).

    Raises:
        RecipeError: no such recipe, or a key or value in it is wrong; says which, and suggests.
    """
    text, origin = _read(name_or_file)
    try:
        tree = parse_yaml(text)
    except ValueError as error:
        raise RecipeError(f"recipe {origin} is not YAML: {error}") from error
    if not isinstance(tree, dict):
        raise RecipeError(f"recipe {origin} must be a mapping of settings, found {type(tree).__name__}")
    return parse_recipe(apply_changes(tree, changes), origin)


def apply_changes(tree: dict[str, Any], changes: Sequence[str]) -> dict[str, Any]:
    """A copy of a tree of settings with `a.b=value` changes made (values are YAML).

    Raises:
        RecipeError: a change is not of that form, or goes through a value.
    """
    tree = copy.deepcopy(tree)
    for change in changes:
        _apply(tree, change)
    return tree


def parse_recipe(tree: dict[str, Any], origin: str) -> Recipe:
    """Validate a tree of settings; `origin` is named in errors."""
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise RecipeError("\n".join(_explain(item, origin) for item in error.errors())) from error


def _read(name_or_file: str) -> tuple[str, str]:
    path = Path(name_or_file)
    if path.suffix in {".yaml", ".yml"} or path.is_file():
        try:
            if path.exists() and not path.is_file():
                raise OSError("it is no plain file")  # a pipe would be waited for
            return path.read_text(encoding="utf-8"), str(path)
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"cannot read recipe {path}: {error}") from error
    names = recipe_names()
    if name_or_file not in names:
        raise RecipeError(
            f"no recipe {name_or_file!r}{_suggest(name_or_file, names)} "
            f"There are: {', '.join(names)}; or give a .yaml file"
        )
    resource = importlib.resources.files("pipeline") / "recipes" / f"{name_or_file}.yaml"
    return resource.read_text(encoding="utf-8"), f"{name_or_file}.yaml"


def _apply(tree: dict[str, Any], change: str) -> None:
    """Set one value in place; `change` is 'a.b.c=value'."""
    key, equals, text = change.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise RecipeError(f"--set {change!r}: expected section.key=value, for example filter.k=500")
    try:
        value = parse_yaml(text)
    except ValueError as error:
        raise RecipeError(f"--set {change!r}: the value is not YAML: {error}") from error
    node = tree
    for part in parts[:-1]:
        child = node.setdefault(part, {})
        if not isinstance(child, dict):
            raise RecipeError(f"--set {change!r}: {part!r} is a value, not a section")
        node = child
    node[parts[-1]] = _number(value)


def _number(value: Any) -> Any:
    """YAML 1.1 reads 1e-3 as text; people mean the number."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _explain(item: Any, origin: str) -> str:
    """One pydantic error as a sentence for a person."""
    location = [str(part) for part in item["loc"]]
    key = ".".join(location)
    if item["type"] == "extra_forbidden":
        return f"recipe {origin}: {key} is not a setting{_suggest(key, _siblings(location))}".rstrip()
    if item["type"] == "missing":
        return f"recipe {origin}: {key} is missing"
    message = item["msg"].removeprefix("Value error, ").replace("SECTION", key)
    given = "" if isinstance(item["input"], dict | BaseModel) else f", found {item['input']!r}"
    return f"recipe {origin}: {key or 'recipe'}: {message}{given}"


def _siblings(location: list[str]) -> list[str]:
    """Full names of the settings that stand beside `location`."""
    section: Any = Recipe
    for part in location[:-1]:
        field = section.model_fields.get(part)
        candidates = [] if field is None else [field.annotation, *get_args(field.annotation)]
        section = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)
        if section is None:
            return []
    return [".".join([*location[:-1], name]) for name in section.model_fields]


def _suggest(wrong: str, known: Sequence[str]) -> str:
    """'; did you mean X?' or an empty end of sentence."""
    close = difflib.get_close_matches(wrong, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else "."
