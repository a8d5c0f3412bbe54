"""`mpl reproduce sweep`: when does feedback pay?

Three things go wrong, one at a time, from one common origin: the pool holds more and more images that are of no
class, the teacher's labels are wrong in a systematic way, the pool's classes are less and less even. Methods come in
pairs that differ in the feedback alone.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.errors import UsageError
from pipeline.report.experiments.sweep import Axis, Contrast, Level, Results, Sweep
from pipeline.report.experiments.sweep_figure import draw
from stages.execution import Stage
from stages.options import Context
from stages.reproduce.chains import Chain, Step, run_chains
from stages.reproduce.commands import comparison_basis, results_of, seeds_text
from stages.reproduce.pool_variants import PoolVariant, write_variant

SIZE = 320  # images of every pool: with 16 times as many of one digit as of another, no digit runs out
TITLE = "When does feedback pay?"


@dataclass(frozen=True)
class Point:
    """One setting of what goes wrong."""

    outside: float = 0.0  # share of the pool
    noise: float = 0.0  # share of the teacher's labels that say the next class
    imbalance: float = 1.0  # of the pool's classes

    @property
    def name(self) -> str:
        """Folder of its runs."""
        parts = (("outside", self.outside), ("noise", self.noise), ("imbalance", self.imbalance))
        return "-".join(f"{key}-{value:g}" for key, value in parts if value != getattr(Point(), key)) or "origin"


@dataclass(frozen=True)
class Method:
    """What trains a student: a label for people, the stage, and its changes of the recipe."""

    label: str
    stage: str
    changes: tuple[str, ...]


ORIGIN = Point()
AXES = (  # title, short title, levels as (text, point)
    (
        "Out-of-domain share of the pool",
        "out of domain",
        (("0%", ORIGIN), ("30%", Point(outside=0.3)), ("60%", Point(outside=0.6))),
    ),
    (
        "Wrong labels of the teacher",
        "wrong labels",
        (("0%", ORIGIN), ("20%", Point(noise=0.2)), ("40%", Point(noise=0.4))),
    ),
    (
        "Imbalance of the pool's classes",
        "imbalance",
        (("1 : 1", ORIGIN), ("4 : 1", Point(imbalance=4)), ("16 : 1", Point(imbalance=16))),
    ),
)
NOISY, FIXED, REDUCED_OFF, REDUCED = "noisystudent", "noisystudent-pool", "reduced-mpl-off", "reduced-mpl"
MPL_OFF, MPL, SUPERVISED = "mpl-off", "mpl", "supervised"
POOL = ("train_reduced.student_data=pool", "train_reduced.feedback.held_out=0")
CALIBRATED = (
    "train_reduced.teacher=calibrator",
    *POOL,
    "train_reduced.calibrator.supervised_weight=0",
    "train_reduced.feedback.control=none",
)
METHODS = {
    NOISY: Method(
        "NoisyStudent, pool and labels",
        "train_reduced",
        ("train_reduced.teacher=fixed", "train_reduced.student_data=pool+labelled",
         "train_reduced.labelled_target=label"),
    ),
    FIXED: Method("NoisyStudent, pool alone", "train_reduced", ("train_reduced.teacher=fixed", *POOL)),
    REDUCED_OFF: Method(
        "Reduced MPL, no feedback", "train_reduced", (*CALIBRATED, "train_reduced.feedback.weight=0")
    ),
    REDUCED: Method("Reduced MPL", "train_reduced", (*CALIBRATED, "train_reduced.feedback.weight=1")),
    MPL_OFF: Method("full MPL, no feedback", "train_mpl", ("train_mpl.alone=false", "train_mpl.feedback=none")),
    MPL: Method("full MPL", "train_mpl", ("train_mpl.alone=false", "train_mpl.feedback=soft")),
}  # fmt: skip
CONTRASTS = (  # each a pair that differs in the feedback alone
    Contrast("Reduced MPL", REDUCED, REDUCED_OFF),
    Contrast("full MPL", MPL, MPL_OFF),
)
OTHERS = (
    Contrast("Reduced MPL against NoisyStudent, pool alone", REDUCED, FIXED),
    Contrast("Reduced MPL against NoisyStudent", REDUCED, NOISY),
    Contrast("full MPL against NoisyStudent", MPL, NOISY),
)


def plan(context: Context, seeds: range, jobs: int | None, steps: int) -> Stage:
    """Plan the sweep as one stage.

    Raises:
        UsageError: the recipe is of another data set, or has no train_mpl section.
    """
    if context.recipe.data.manifest != "digits" or context.data is not None:
        raise UsageError("the sweep makes its pools from the embedded digits; leave out --data, or --recipe digits")
    if context.recipe.train_mpl is None:
        raise UsageError(f"recipe {context.recipe.name} has no train_mpl section, which full MPL needs")
    outputs = [context.run / f"sweep.{suffix}" for suffix in ("md", "csv", "json", "png")]
    points = {point.name: vars(point) for *_, levels in AXES for _, point in levels}
    methods = {name: [method.stage, *method.changes] for name, method in METHODS.items()}
    return Stage(
        name="sweep",
        basis=comparison_basis(context, seeds) | {"size": SIZE, "steps": steps, "points": points, "methods": methods},
        outputs=outputs,
        work=lambda: work(context, seeds, jobs, steps),
        summary=lambda result: f"{result['students']} students; {outputs[0]}",
        replaces=outputs,
        cheap=frozenset({"seeds", "points", "methods"}),
    )


def work(context: Context, seeds: range, jobs: int | None, steps: int) -> dict[str, Any]:
    """The teachers, then a chain for each point and seed; then tables and figure."""
    points = list(dict.fromkeys(point for *_, levels in AXES for _, point in levels))
    noises = list(dict.fromkeys(point.noise for point in points))
    folder = context.run / "pools"
    folder.mkdir(exist_ok=True)
    teachers = [(noise, seed) for noise in noises for seed in seeds]
    taught = run_chains(context, dict(enumerate(_teacher_chain(context, *one, steps) for one in teachers)), jobs)
    students = [(point, seed) for point in points for seed in seeds]
    for point, seed in students:
        write_variant(folder, pool_of(point, seed))
    chains = dict(enumerate(_chain(context, point, seed, steps) for point, seed in students))
    done = run_chains(replace(context, data=folder.resolve()), chains, jobs)
    results: dict[str, dict[str, Results]] = {point.name: {name: [] for name in METHODS} for point in points}
    for i, (point, _) in enumerate(students):
        for place, name in enumerate(METHODS):
            results[point.name][name].append(results_of(done[i][2 + 2 * place : 4 + 2 * place]))
    supervised = [results_of(taught[i][1:3]) for i, (noise, _) in enumerate(teachers) if noise == ORIGIN.noise]
    by_noise = {noise: [taught[i][0] for i, one in enumerate(teachers) if one[0] == noise] for noise in noises}
    sweep = _sweep(context, seeds, steps, results, supervised, by_noise)
    sweep.write(context.run.root, "sweep")
    draw(sweep, context.run.root / "sweep.png")
    return {"students": len(students) * len(METHODS) + len(supervised)}


def pool_of(point: Point, seed: int) -> PoolVariant:
    """The pool of one run: every seed has a draw of its own."""
    return PoolVariant(SIZE, outside=point.outside, imbalance=point.imbalance, draw=seed)


def _teacher_chain(context: Context, noise: float, seed: int, steps: int) -> Chain:
    """The large teacher; for the first level of noise also the student that sees labels alone."""
    run = _teacher_run(context, noise, seed)
    chain = [Step("pretrain", run, (f"pretrain.label_noise={noise}",), seed=seed)]
    if noise == ORIGIN.noise:
        changes = (f"train_reduced.steps={steps}", "train_reduced.teacher=none")
        chain += _student(run, Method("", "train_reduced", changes), SUPERVISED, (), seed)
    return chain


def _teacher_run(context: Context, noise: float, seed: int) -> Path:
    return context.run / f"teacher-noise-{noise:g}-seed-{seed}"


def _chain(context: Context, point: Point, seed: int, steps: int) -> Chain:
    """The pool, whole, with the teacher's distributions; then every student."""
    run = context.run / f"{point.name}-seed-{seed}"
    changes = (
        f"data.manifest={pool_of(point, seed).name}",
        f"filter.k={SIZE}", "filter.assign=argmax", "filter.min_probability=0", "filter.upsample=false",
        f"train_reduced.steps={steps}", f"train_mpl.steps={steps}", f"train_mpl.teacher.label_noise={point.noise}",
    )  # fmt: skip
    teacher = (_teacher_run(context, point.noise, seed) / "teacher").resolve()
    chain = [Step("filter", run, changes, (("teacher", teacher),), seed), Step("precompute", run, changes, (), seed)]
    for name, method in METHODS.items():
        chain += _student(run, method, name, changes, seed)
    return chain


def _student(run: Path, method: Method, name: str, changes: tuple[str, ...], seed: int) -> list[Step]:
    """Train one student and judge it on the test split."""
    changes, named = (*changes, *method.changes), (("name", name),)
    return [
        Step(method.stage, run, changes, named, seed),
        Step("evaluate", run, (*changes, "evaluate.split=test"), named, seed),
    ]


def _sweep(
    context: Context, seeds: range, steps: int, results: dict[str, dict[str, Results]],
    supervised: Results, taught: dict[float, list[dict[str, Any]]],
) -> Sweep:  # fmt: skip
    """Results with their sentences."""
    recipe = context.recipe
    teachers = {noise: _mean([record["result"]["validation"]["top1"] for record in of]) for noise, of in taught.items()}
    return Sweep(
        title=TITLE,
        seeds=list(seeds),
        axes=tuple(
            Axis(title, short, tuple(Level(text, point.name) for text, point in levels))
            for title, short, levels in AXES
        ),
        methods={name: method.label for name, method in METHODS.items()},
        results=results,
        contrasts=CONTRASTS,
        others=OTHERS,
        reference=("Supervised, labels alone", supervised),
        notes=[*_notes(context, steps, taught[ORIGIN.noise][0]["result"]["labelled_images"], teachers), _cost(results)],
        command=f"mpl reproduce sweep --recipe {recipe.name} {seeds_text(seeds)} --steps {steps}",
        extra={"teacher_validation_top1": {f"{noise:g}": mean for noise, mean in teachers.items()}},
    )


def _notes(context: Context, steps: int, labelled: int, teachers: dict[float, float]) -> list[str]:
    """What was done, in sentences."""
    reduced, mpl = context.recipe.train_reduced, context.recipe.train_mpl
    assert mpl is not None
    accuracies = ", ".join(f"{top1:.1f}% with {100 * noise:g}% wrong" for noise, top1 in teachers.items())
    return [
        f"Pools: {SIZE} images, always; one thing changes along an axis. They are not filtered: every image reaches "
        "every student. Out of domain are pieces of photographs that have the grey levels of digits. Imbalance: from "
        "the most frequent digit to the rarest, the others in a geometric row between them. Each seed has its own "
        "sample of the pool and order of the digits, and neighbouring levels share the images that they can; labelled "
        "and test images are the same for all seeds.",
        f"Labels: {labelled} images. Wrong ones (that share of each class says the next class) enter the labelled loss "
        "of the teacher alone; the feedback and NoisyStudent's labelled images have the true ones.",
        f"Students: {reduced.model.name}, {steps:,} steps on batches of {reduced.batch}, for full MPL "
        f"{mpl.batch} pool images a step; from the same initial weights for all methods of a seed; the last step's "
        "moving average, not finetuned, judged once on the test split. Nothing was tuned for any level.",
        f"Teachers: of NoisyStudent and Reduced MPL a fixed {context.recipe.pretrain.model.name} that the labels "
        f"trained (on validation {accuracies}); of full MPL a {(mpl.teacher.model or mpl.model).name} that learns "
        f"with the student, by {mpl.method.name}.",
    ]


def _cost(results: dict[str, dict[str, Results]]) -> str:
    """Seconds of training by method."""
    seconds = {name: [r["seconds"] for point in results.values() for r in point[name]] for name in METHODS}
    each = ", ".join(f"{METHODS[name].label} {_mean(of):.0f}" for name, of in seconds.items())
    count, total = sum(map(len, seconds.values())), sum(map(sum, seconds.values()))
    return (
        f"Budget: seconds of training per run, one core each: {each}. In all {count} runs and {total / 60:.0f} minutes."
    )


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
