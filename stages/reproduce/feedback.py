"""`mpl reproduce feedback`: settings of Reduced MPL's feedback against one another, on three teachers.

Here settings are chosen, so everything is judged on the validation split, over seeds that no table uses. The pools are
those of the sweep, whole; the student sees them alone. What is compared differs in the calibrator and its feedback.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.errors import UsageError
from pipeline.networks.folders import save_network
from pipeline.networks.loading import load_network
from pipeline.report.experiments.ablation import Ablation, Group
from pipeline.report.experiments.report import About
from pipeline.report.experiments.results import Contrast
from pipeline.seeds import permutation
from stages.execution import Stage
from stages.options import Context
from stages.reproduce.chains import Chain, Step, run_chains
from stages.reproduce.experiment import SeedRuns
from stages.reproduce.methods import POOL, RAW, SCALED
from stages.reproduce.pool_variants import DIGITS, PoolVariant, write_variant
from stages.reproduce.swapped_teacher import last_linear
from stages.reproduce.variants import Variant, results_of

SIZE = 320  # images of a pool
STEPS = 400  # of a student
SEEDS = 6
NOISE, TAIL = 0.4, 50  # share of wrong labels; the most frequent class to the rarest
TERM = "train_reduced.calibrator.supervised_weight=1"


@dataclass(frozen=True)
class GivenTeacher:
    """A kind of teacher.

    Attributes:
        name: of its runs' folders.
        label: for people.
        noise: share of wrong labels that it learned from.
        tail: the most frequent class to the rarest, of the shares that it expects; 1: as it learned them.
    """

    name: str
    label: str
    noise: float = 0.0
    tail: float = 1.0


TEACHERS = (
    GivenTeacher("clean", "Nothing wrong"),
    GivenTeacher("wrong", f"{NOISE:.0%} wrong labels", noise=NOISE),
    GivenTeacher("tail", f"Expects a tail, {TAIL} : 1", tail=TAIL),
)


def _adapts(name: str, label: str, *changes: str) -> Variant:
    own = ("train_reduced.teacher=calibrator", *POOL, "train_reduced.calibrator.supervised_weight=0", *changes)
    return Variant(name, label, "train_reduced", own, split="validation")


REFERENCE = _adapts("scaled", "scaled by B/η, with L2", *SCALED)
VARIANTS = (
    Variant("fixed", "fixed teacher", "train_reduced", ("train_reduced.teacher=fixed", *POOL), split="validation"),
    REFERENCE,
    _adapts("scaled-no-decay", "scaled by B/η, no L2", *SCALED, "train_reduced.calibrator.weight_decay=0"),
    _adapts("raw-decay", "raw, with L2", *RAW, "train_reduced.calibrator.weight_decay=1.0e-4"),
    _adapts("raw", "raw, no L2", *RAW),
    _adapts("raw-scaling", "raw, an exponent and shares alone", *RAW, "train_reduced.calibrator.kind=scaling",
            "train_reduced.calibrator.lr=0.03"),
    _adapts("raw-weights", "raw, with image weights", *RAW, "train_reduced.calibrator.image_weights=true"),
    _adapts("both", "raw, and the supervised term", *RAW, TERM),
    _adapts("term", "supervised term alone", *RAW, TERM, "train_reduced.feedback.weight=0"),
    _adapts("flipped", "raw, sign flipped", *RAW, "train_reduced.feedback.control=flipped"),
)  # fmt: skip
TESTED = ("raw", "both", "raw-scaling")  # against the reference, on each teacher


@dataclass(frozen=True)
class Study:
    """Which teachers, and which students are trained of each."""

    teachers: tuple[GivenTeacher, ...]
    variants: tuple[Variant, ...]

    @classmethod
    def of(cls, teachers: Sequence[str], methods: Sequence[str]) -> "Study":
        """By names; none: all. What the others are compared with is always there.

        Raises:
            UsageError: a method that there is not.
        """
        known = [variant.name for variant in VARIANTS]
        if unknown := [name for name in methods if name not in known]:
            raise UsageError(f"--method {unknown[0]}: there are {', '.join(known)}")
        if not set(methods) - {REFERENCE.name}:
            methods = known
        return cls(
            tuple(teacher for teacher in TEACHERS if not teachers or teacher.name in teachers),
            tuple(variant for variant in VARIANTS if variant.name in (*methods, REFERENCE.name)),
        )

    @property
    def contrasts(self) -> tuple[Contrast, ...]:
        """Each variant against the reference; what is about the scale first."""
        others = sorted((v for v in self.variants if v is not REFERENCE), key=lambda v: v.name != "raw")
        return tuple(Contrast(v.label, v.name, REFERENCE.name, v.name in TESTED) for v in others)


def plan(runs: SeedRuns, teachers: Sequence[str] = (), methods: Sequence[str] = ()) -> Stage:
    """Plan the comparison as one stage.

    Args:
        runs: the draws.
        teachers, methods: names; none: all.

    Raises:
        UsageError: the recipe is of another data set; a method that there is not.
    """
    study = Study.of(teachers, methods)
    context = runs.context
    if context.recipe.data.manifest != DIGITS or context.data is not None:
        raise UsageError("feedback makes its pools from the embedded digits; leave out --data, or --recipe digits")
    return runs.stage(
        "feedback",
        runs.basis()
        | {
            "teachers": {teacher.name: vars(teacher) for teacher in study.teachers},
            "variants": {variant.name: variant.changes for variant in study.variants},
            "steps": STEPS,
        },
        lambda: work(runs, study, _options(teachers, methods)),
        lambda result: f"{result['students']} students;",
        cheap=frozenset({"seeds", "teachers", "variants"}),
    )


def _options(teachers: Sequence[str], methods: Sequence[str]) -> list[str]:
    return [*(f"--teacher {name}" for name in teachers), *(f"--method {name}" for name in methods)]


def work(runs: SeedRuns, study: Study, options: Sequence[str]) -> dict[str, Any]:
    """The teachers, then a chain for each of them and each seed; then table and figure."""
    context, seeds = runs.context, runs.seeds
    noises = sorted({teacher.noise for teacher in study.teachers})
    run_chains(
        context,
        {
            (noise, seed): Chain(_teacher_run(context, noise, seed), seed, (Step("pretrain", (_noise(noise),)),))
            for noise in noises
            for seed in seeds
        },
        runs.jobs,
    )
    pools = context.run / "pools"
    pools.mkdir(exist_ok=True)
    for seed in seeds:
        write_variant(pools, PoolVariant(SIZE, draw=seed))
    students = run_chains(
        replace(context, data=pools.resolve()),
        {
            (teacher.name, seed): _chain(context, teacher, study.variants, seed)
            for teacher in study.teachers
            for seed in seeds
        },
        runs.jobs,
    )
    results = {
        teacher.name: results_of(study.variants, {seed: students[teacher.name, seed] for seed in seeds})
        for teacher in study.teachers
    }
    groups = tuple(Group(teacher.label, results[teacher.name], study.contrasts) for teacher in study.teachers)
    Ablation(_about(runs, options), groups, split="validation").write(context.run.root)
    return {"students": len(study.teachers) * len(seeds) * len(study.variants)}


def _noise(share: float) -> str:
    return f"pretrain.label_noise={share}"


def _teacher_run(context: Context, noise: float, seed: int) -> Path:
    return context.run / f"teacher-noise-{noise:g}-seed-{seed}"


def _chain(context: Context, teacher: GivenTeacher, variants: Sequence[Variant], seed: int) -> Chain:
    """The pool, whole, with the teacher's distributions; then every student."""
    run = context.run / f"{teacher.name}-seed-{seed}"
    folder = (_teacher_run(context, teacher.noise, seed) / "teacher").resolve()
    if teacher.tail > 1:
        folder = _with_a_tail(folder, folder.with_name("teacher-tail"), teacher.tail, seed)
    changes = (
        f"data.manifest={PoolVariant(SIZE, draw=seed).name}", f"filter.k={SIZE}", "filter.assign=argmax",
        "filter.min_probability=0", "filter.upsample=false", f"train_reduced.steps={STEPS}",
    )  # fmt: skip
    students = [step for variant in variants for step in variant.steps(run, changes)]
    return Chain(run, seed, (Step("filter", changes, {"teacher": folder}), Step("precompute", changes), *students))


def _with_a_tail(source: Path, folder: Path, tail: float, seed: int) -> Path:
    """Save a copy of a network that expects the classes in shares from 1 to 1/tail, in an order of the seed's.

    Its log-odds are moved by the logarithms of the shares, as Bayes' rule does with a classifier of even classes when
    their shares change.
    """
    network = load_network(source)
    linear = last_linear(network)
    shares = np.empty(linear.out_features)
    shares[permutation(len(shares), seed, "feedback", "tail")] = -np.log(tail) * np.linspace(0, 1, len(shares))
    with torch.no_grad():
        linear.bias.add_(torch.from_numpy(shares).to(linear.bias.dtype))
    save_network(folder, network, network.model.state_dict())
    return folder.resolve()


def _about(runs: SeedRuns, options: Sequence[str]) -> About:
    """Title and notes."""
    context = runs.context
    settings = context.recipe.train_reduced
    return About(
        stem="feedback",
        title="Which feedback? Settings of Reduced MPL on three teachers",
        command=runs.command("feedback", *options),
        notes=[
            f"Teachers: {context.recipe.pretrain.model.name}, trained on the labelled images of a draw; with "
            f"{NOISE:.0%} of each class's labels saying the next class; with its log-odds moved to classes of which "
            f"the most frequent is {TAIL} times as frequent as the rarest, in an order of each seed's own. The "
            "supervised term sees what they say of labelled images that they were trained on.",
            f"Students: {settings.model.name}, {STEPS} steps on batches of {settings.batch} of {SIZE} pool images, "
            "not filtered; the last step's moving average, not finetuned. Each seed draws its own 50 labelled images, "
            "stratified by class, and its own pool of the others. Judged on the validation split: this is where "
            "settings are chosen. The sign flipped is a control: it must hurt.",
        ],
        extra={"settings": settings.model_dump(mode="json")},
    )
