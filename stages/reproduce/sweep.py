"""`mpl reproduce sweep`: when does feedback pay?

Three things go wrong, one at a time, from one common origin: the pool holds more and more images that are of no
class, the teacher's labels are wrong in a systematic way, the pool's classes are less and less even. Methods come in
pairs that differ in the feedback alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.errors import UsageError
from pipeline.report.experiments.axes import Axis, Level
from pipeline.report.experiments.report import About
from pipeline.report.experiments.results import Contrast, Results
from pipeline.report.experiments.sweep import Sweep
from stages.execution import Stage
from stages.options import Context
from stages.reproduce.chains import Chain, Records, Step, run_chains
from stages.reproduce.experiment import SeedRuns, teacher_top1
from stages.reproduce.methods import POOL
from stages.reproduce.pool_variants import DIGITS, PoolVariant, write_variant
from stages.reproduce.variants import Variant, results_of


@dataclass(frozen=True)
class Point:
    """One setting of what goes wrong."""

    outside: float = 0.0  # share of the pool
    noise: float = 0.0  # share of the teacher's labels that say the next class
    imbalance: float = 1.0  # of the pool's classes

    @property
    def name(self) -> str:
        """Folder of its runs."""
        changed = {key: value for key, value in vars(self).items() if value != getattr(Point, key)}
        return "-".join(f"{key}-{value:g}" for key, value in changed.items()) or "origin"


ORIGIN = Point()
NOISY, FIXED, REDUCED_OFF, REDUCED = "noisystudent", "noisystudent-pool", "reduced-mpl-off", "reduced-mpl"
MPL_OFF, MPL = "mpl-off", "mpl"
CALIBRATED = (
    "train_reduced.teacher=calibrator",
    *POOL,
    "train_reduced.calibrator.supervised_weight=0",
    "train_reduced.feedback.control=none",
)


@dataclass(frozen=True)
class Study:
    """All of a sweep.

    Attributes:
        size: images of every pool.
        points: all of them.
        axes: whose levels are points, by name.
        methods: trained at every point.
        contrasts: the tested ones are pairs that differ in the feedback alone.
    """

    size: int
    points: tuple[Point, ...]
    axes: tuple[Axis, ...]
    methods: tuple[Variant, ...]
    contrasts: tuple[Contrast, ...]


STUDY = Study(
    size=320,  # with 16 times as many of one digit as of another, no digit runs out
    points=(
        ORIGIN, Point(outside=0.3), Point(outside=0.6), Point(noise=0.2), Point(noise=0.4), Point(imbalance=4),
        Point(imbalance=16),
    ),
    axes=(
        Axis("Out-of-domain share of the pool", "out of domain",
             (Level("0%", "origin"), Level("30%", "outside-0.3"), Level("60%", "outside-0.6"))),
        Axis("Wrong labels of the teacher", "wrong labels",
             (Level("0%", "origin"), Level("20%", "noise-0.2"), Level("40%", "noise-0.4"))),
        Axis("Imbalance of the pool's classes", "imbalance",
             (Level("1 : 1", "origin"), Level("4 : 1", "imbalance-4"), Level("16 : 1", "imbalance-16"))),
    ),
    methods=(
        Variant(NOISY, "NoisyStudent, pool and labels", "train_reduced",
                ("train_reduced.teacher=fixed", "train_reduced.student_data=pool+labelled",
                 "train_reduced.labelled_target=label")),
        Variant(FIXED, "NoisyStudent, pool alone", "train_reduced", ("train_reduced.teacher=fixed", *POOL)),
        Variant(REDUCED_OFF, "Reduced MPL, no feedback", "train_reduced",
                (*CALIBRATED, "train_reduced.feedback.weight=0")),
        Variant(REDUCED, "Reduced MPL", "train_reduced", (*CALIBRATED, "train_reduced.feedback.weight=1")),
        Variant(MPL_OFF, "full MPL, no feedback", "train_mpl", ("train_mpl.alone=false", "train_mpl.feedback=none")),
        Variant(MPL, "full MPL", "train_mpl", ("train_mpl.alone=false", "train_mpl.feedback=soft")),
    ),
    contrasts=(
        Contrast("Reduced MPL", REDUCED, REDUCED_OFF, tested=True),
        Contrast("full MPL", MPL, MPL_OFF, tested=True),
        Contrast("Reduced MPL against NoisyStudent, pool alone", REDUCED, FIXED),
        Contrast("Reduced MPL against NoisyStudent", REDUCED, NOISY),
        Contrast("full MPL against NoisyStudent", MPL, NOISY),
    ),
)  # fmt: skip
SUPERVISED = Variant("supervised", "Supervised, labels alone", "train_reduced", ("train_reduced.teacher=none",))


def plan(runs: SeedRuns, steps: int) -> Stage:
    """Plan the sweep as one stage; `steps` are of every student.

    Raises:
        UsageError: the recipe is of another data set, or has no train_mpl section.
    """
    context = runs.context
    if context.recipe.data.manifest != DIGITS or context.data is not None:
        raise UsageError("the sweep makes its pools from the embedded digits; leave out --data, or --recipe digits")
    if context.recipe.train_mpl is None:
        raise UsageError(f"recipe {context.recipe.name} has no train_mpl section, which full MPL needs")
    points = {point.name: vars(point) for point in STUDY.points}
    methods = {method.name: [method.module, *method.changes] for method in STUDY.methods}
    return runs.stage(
        "sweep",
        runs.basis() | {"size": STUDY.size, "steps": steps, "points": points, "methods": methods},
        lambda: work(runs, steps),
        lambda result: f"{result['students']} students;",
        cheap=frozenset({"seeds", "points", "methods"}),
    )


def work(runs: SeedRuns, steps: int) -> dict[str, Any]:
    """The teachers, then a chain for each point and seed; then tables and figure."""
    context, seeds = runs.context, runs.seeds
    folder = context.run / "pools"
    folder.mkdir(exist_ok=True)
    noises = dict.fromkeys(point.noise for point in STUDY.points)
    chains = {(noise, seed): teacher_chain(context, noise, seed, steps) for noise in noises for seed in seeds}
    records = run_chains(context, chains, runs.jobs)
    teachers = {noise: {seed: records[noise, seed] for seed in seeds} for noise in noises}
    places = [(point, seed) for point in STUDY.points for seed in seeds]
    for point, seed in places:
        write_variant(folder, pool_of(point, seed))
    students = run_chains(
        replace(context, data=folder.resolve()),
        {(point, seed): point_chain(context, point, seed, steps) for point, seed in places},
        runs.jobs,
    )
    results = {
        point.name: results_of(STUDY.methods, {seed: students[point, seed] for seed in seeds}) for point in STUDY.points
    }
    report_of(runs, steps, results, teachers).write(context.run.root)
    return {"students": len(places) * len(STUDY.methods) + len(seeds)}


def pool_of(point: Point, seed: int) -> PoolVariant:
    """The pool of one run: every seed has a draw of its own."""
    return PoolVariant(STUDY.size, outside=point.outside, imbalance=point.imbalance, draw=seed)


def teacher_chain(context: Context, noise: float, seed: int, steps: int) -> Chain:
    """The large teacher; for the first level of noise also the student that sees labels alone."""
    run = _teacher_run(context, noise, seed)
    chain = [Step("pretrain", (f"pretrain.label_noise={noise}",))]
    if noise == ORIGIN.noise:
        chain += SUPERVISED.steps(run, (f"train_reduced.steps={steps}",))
    return Chain(run, seed, tuple(chain))


def _teacher_run(context: Context, noise: float, seed: int) -> Path:
    return context.run / f"teacher-noise-{noise:g}-seed-{seed}"


def point_chain(context: Context, point: Point, seed: int, steps: int) -> Chain:
    """The pool, whole, with the teacher's distributions; then every student."""
    run = context.run / f"{point.name}-seed-{seed}"
    changes = (
        f"data.manifest={pool_of(point, seed).name}",
        f"filter.k={STUDY.size}", "filter.assign=argmax", "filter.min_probability=0", "filter.upsample=false",
        f"train_reduced.steps={steps}", f"train_mpl.steps={steps}", f"train_mpl.teacher.label_noise={point.noise}",
    )  # fmt: skip
    teacher = (_teacher_run(context, point.noise, seed) / "teacher").resolve()
    students = [step for method in STUDY.methods for step in method.steps(run, changes)]
    return Chain(run, seed, (Step("filter", changes, {"teacher": teacher}), Step("precompute", changes), *students))


def report_of(
    runs: SeedRuns, steps: int, results: dict[str, Results], teachers: Mapping[float, Mapping[int, Records]]
) -> Sweep:
    """Results with their sentences; `teachers` by noise and seed."""
    clean = teachers[ORIGIN.noise]
    top1 = {noise: _mean(teacher_top1(records.values())) for noise, records in teachers.items()}
    labelled = clean[runs.seeds[0]]["pretrain"]["result"]["labelled_images"]
    about = About(
        stem="sweep",
        title="When does feedback pay?",
        command=runs.command("sweep", f"--steps {steps}"),
        notes=[*_notes(runs.context, steps, labelled, top1), _cost(results)],
        extra={"teacher_validation_top1": {f"{noise:g}": mean for noise, mean in top1.items()}},
    )
    return Sweep(about, STUDY.axes, results, STUDY.contrasts, results_of([SUPERVISED], clean))


def _notes(context: Context, steps: int, labelled: int, teachers: dict[float, float]) -> list[str]:
    """What was done, in sentences."""
    reduced, mpl = context.recipe.train_reduced, context.recipe.train_mpl
    assert mpl is not None
    accuracies = ", ".join(f"{top1:.1f}% with {100 * noise:g}% wrong" for noise, top1 in teachers.items())
    return [
        f"Pools: {STUDY.size} images, always; one thing changes along an axis. They are not filtered: every image "
        "reaches every student. Out of domain are pieces of photographs that have the grey levels of digits. "
        "Imbalance: from the most frequent digit to the rarest, the others in a geometric row between them. Each seed "
        "has its own sample of the pool and order of the digits, and neighbouring levels share the images that they "
        "can. Each seed draws its own labelled images, stratified by class; test images are the same for all.",
        f"Labels: {labelled} images. Wrong ones (that share of each class says the next class) enter the labelled loss "
        "of the teacher alone; the feedback and NoisyStudent's labelled images have the true ones.",
        f"Students: {reduced.model.name}, {steps:,} steps on batches of {reduced.batch}, for full MPL "
        f"{mpl.batch} pool images a step; from the same initial weights for all methods of a seed; the last step's "
        "moving average, not finetuned, judged once on the test split. Nothing was tuned for any level.",
        f"Teachers: of NoisyStudent and Reduced MPL a fixed {context.recipe.pretrain.model.name} that the labels "
        f"trained (on validation {accuracies}); of full MPL a {(mpl.teacher.model or mpl.model).name} that learns "
        f"with the student, by {mpl.method.name}.",
    ]


def _cost(results: dict[str, Results]) -> str:
    """Seconds of training by method."""
    seconds = {
        method.label: [value for of_point in results.values() for value in of_point.values(method.name, "seconds")]
        for method in STUDY.methods
    }
    each = ", ".join(f"{label} {_mean(values):.0f}" for label, values in seconds.items())
    count, total = sum(map(len, seconds.values())), sum(map(sum, seconds.values()))
    return (
        f"Budget: seconds of training per run, one core each: {each}. In all {count} runs and {total / 60:.0f} minutes."
    )


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
