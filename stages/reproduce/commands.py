"""`mpl reproduce`: the stages over seeds, into one table."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from stages.options import Context, stage_options

if TYPE_CHECKING:
    from pipeline.report.experiments.table import Comparison, MethodRuns
    from stages.execution import Stage
    from stages.reproduce.chains import Chain, Step

SUPERVISED, NOISY, NOISY_SAME, REDUCED = "supervised", "noisystudent", "noisystudent-same-data", "reduced-mpl"
LABELS = {
    SUPERVISED: "Supervised",
    NOISY: "NoisyStudent",
    NOISY_SAME: "NoisyStudent, on Reduced MPL's data",
    REDUCED: "Reduced MPL",
}
SEEDS_CHANGE = (  # a manifest's splits are runs of rows: no seed is in them
    "Seeds change initial weights, order and augmentation; labels, pool and test images are the same."
)


@click.group()
def group() -> None:
    """Reproduce a table of the paper, or an experiment of this project, over seeds.

    With --force the stages whose inputs or settings changed are made again, and only those.
    """


def seeds_option(default: str, what: str = "seeds", parts: str = "Seeds") -> Any:
    """--seeds and --jobs."""

    def add(function: Any) -> Any:
        at_a_time = f"{parts} at a time. [default: one per core]"
        function = click.option("--jobs", type=click.IntRange(1), help=at_a_time)(function)
        number = f"Number of {what}, from --seed on. [default: {default}]"
        return click.option("--seeds", type=click.IntRange(1), help=number)(function)

    return add


@group.command()
@stage_options
@seeds_option("the recipe's")
def table2(context: Context, seeds: int | None, jobs: int | None) -> None:
    """Supervised, NoisyStudent and Reduced MPL side by side (table 2 of arXiv:2003.10580v1).

    Equal student steps and batches for all; the last, averaged student is judged once on the test split.
    Writes table2.md, .csv, .json and .png into the run. [default run: runs/table2-RECIPE]
    """
    _reproduce(context, "table2", seeds, lambda c, n: plan_table2(c, n, jobs))


@group.command("swapped-teacher")
@stage_options
@seeds_option("the recipe's")
def swapped_teacher(context: Context, seeds: int | None, jobs: int | None) -> None:
    """Does the feedback act? A teacher with two pairs of classes swapped, and controls.

    Writes swapped-teacher.md, .csv, .json and .png into the run. [default run: runs/swapped-teacher-RECIPE]
    """
    from stages.reproduce.swapped_teacher import plan

    _reproduce(context, "swapped-teacher", seeds, lambda c, n: plan(c, n, jobs))


@group.command()
@stage_options
@seeds_option("the recipe's")
@click.option("--steps", type=click.IntRange(1), default=400, show_default=True, help="Steps of every student.")
def sweep(context: Context, seeds: int | None, jobs: int | None, steps: int) -> None:
    """When does feedback pay? Pools out of domain, teachers wrong, classes uneven; digits alone.

    Reduced and full MPL, each with and without feedback, and NoisyStudent. Begun again, it goes on.
    Writes sweep.md, .csv, .json and .png into the run. [default run: runs/sweep-digits]
    """
    from stages.reproduce.sweep import plan

    _reproduce(context, "sweep", seeds, lambda c, n: plan(c, n, jobs, steps))


@group.command()
@stage_options
@seeds_option("the recipe's")
def table1(context: Context, seeds: int | None, jobs: int | None) -> None:
    """Eight methods alone, six of them also with MPL on top (tables 1 and 10 of arXiv:2003.10580).

    Writes table1.md, .csv, .json and .png into the run. [default run: runs/table1-RECIPE]
    """
    from stages.reproduce.table1 import plan

    _reproduce(context, "table1", seeds, lambda c, n: plan(c, n, jobs))


@group.command()
@stage_options
@seeds_option("10")
@click.option("--feedback", type=click.Choice(["soft", "hard"]), default="soft", show_default=True,
              help="Kind of pseudo labels and of feedback.")  # fmt: skip
@click.option("--reduced/--no-reduced", default=True, show_default=True, help="Reduced MPL as well.")
def ablation(context: Context, seeds: int | None, jobs: int | None, feedback: str, reduced: bool) -> None:
    """Does the feedback help? Identical runs with it on, off, its sign flipped, its rows shuffled; 10 seeds.

    Writes ablation.md, .csv, .json and .png, and figures 9 and 10 of the paper as ablation-training.png and
    ablation-calibration.png. [default run: runs/ablation-RECIPE; with hard feedback all are named ablation-hard]
    """
    from stages.reproduce.ablation import SEEDS, plan

    what = "ablation" if feedback == "soft" else f"ablation-{feedback}"
    _reproduce(context, what, seeds or SEEDS, lambda c, n: plan(c, n, jobs, what, feedback, reduced))


@group.command("two-moons")
@stage_options
@seeds_option("20", "draws", "Cells of the table")
@click.option("--variant", type=click.Choice(["paper", "working"]), help="One of the two alone. [default: the study]")
@click.option("--steps", type=click.IntRange(1), help="Of every network. [default: 10,000, and 4,000 at lr 1]")
def two_moons(context: Context, seeds: int | None, jobs: int | None, variant: Any, steps: int | None) -> None:
    """Supervised, Pseudo Labels and MPL on two moons with six labels; what separates them; 20 draws.

    Figures 1 and 8 of arXiv:2003.10580v1. A seed is a draw; no recipe and no data are used.
    Writes two-moons.md, .csv, .json and .png into the run. [default run: runs/two-moons]
    """
    from stages.reproduce.two_moons import reproduce

    reproduce(context, seeds, jobs, variant, steps)


def _reproduce(context: Context, what: str, seeds: int | None, plan: Any) -> None:
    """Choose the run directory and the number of seeds, run, and show the table."""
    from stages.execution import execute

    context = own_run(context, Path("runs") / f"{what}-{context.recipe.name}")
    all_seeds = range(context.seed, context.seed + (seeds or context.recipe.reproduce.seeds))
    execute(context, lambda c: plan(c, all_seeds))
    if not context.dry_run and not context.as_json:
        click.echo((context.run / f"{what}.md").read_text())


def own_run(context: Context, run: Path) -> Context:
    """A comparison has many runs: a directory of its own where no other was asked for; with its own first seed."""
    from stages.options import DEFAULT_RUN, Options, make_context

    if context.run.root != DEFAULT_RUN:
        return context
    first = click.get_current_context().params["seed"]
    options = Options(
        run, data=context.data, seed=first, device=context.device_name, precision=context.precision,
        dry_run=context.dry_run, force=context.force, as_json=context.as_json,
    )  # fmt: skip
    return make_context(options, parsed=context.recipe)


def plan_table2(context: Context, seeds: range, jobs: int | None) -> "Stage":
    """Plan the whole table as one stage."""
    from stages.execution import Stage

    methods = table2_methods(context)
    outputs = [context.run / f"table2.{suffix}" for suffix in ("md", "csv", "json", "png")]
    outputs += [seed_run(context, s) / f"evaluation-{m}.json" for s in seeds for m in methods]
    return Stage(
        name="table2",
        basis=comparison_basis(context, seeds),
        outputs=outputs,
        work=lambda: work_table2(context, seeds, jobs),
        summary=lambda result: f"{context.run / 'table2.md'}",
        replaces=list(outputs[:4]),
        cheap=frozenset({"seeds"}),
    )


def comparison_basis(context: Context, seeds: range) -> dict[str, Any]:
    """All that a comparison depends on."""
    from stages.filter import rules
    from stages.learning import manifest_of, split_of

    return {
        "recipe": context.recipe.model_dump(mode="json", exclude={"description", "source", "differs", "reach"}),
        "splits": {name: split_of(context, name).fingerprint() for name in sorted(manifest_of(context).splits)},
        "copies": rules(context).copy_threshold,
        "precision": context.precision,
        "seeds": list(seeds),
    }


def seeds_text(seeds: range) -> str:
    """The options of the command that choose these seeds."""
    return f"--seeds {len(seeds)}" + (f" --seed {seeds.start}" if seeds.start else "")


def seed_run(context: Context, seed: int) -> Path:
    """Run directory of one seed."""
    return context.run / f"seed-{seed}"


def table2_methods(context: Context) -> dict[str, tuple[str, ...]]:
    """Changes of the recipe that make each method; the second NoisyStudent only where the data differ."""
    from pipeline.batches import mixture

    settings = context.recipe.train_reduced
    methods: dict[str, tuple[str, ...]] = {SUPERVISED: ("train_reduced.teacher=none",)}
    paper = (
        "train_reduced.teacher=fixed",
        "train_reduced.student_data=auto",
        "train_reduced.labelled_target=auto",
    )
    methods[NOISY] = paper
    auto = settings.model_copy(update={"student_data": "auto", "labelled_target": "auto"})
    reduced = mixture(settings, "calibrator")
    if reduced != mixture(auto, "fixed"):
        data = "pool" if not reduced.labelled else "pool+labelled"
        target = "label" if reduced.true_labels else "teacher"
        methods[NOISY_SAME] = (
            "train_reduced.teacher=fixed",
            f"train_reduced.student_data={data}",
            f"train_reduced.labelled_target={target}",
        )
    methods[REDUCED] = ("train_reduced.teacher=calibrator",)
    return methods


def upstream(run: Path) -> "list[Step]":
    """What all methods of a seed share."""
    from stages.reproduce.chains import Step

    return [Step("pretrain", run), Step("filter", run), Step("precompute", run)]


def student_steps(run: Path, name: str, changes: tuple[str, ...]) -> "list[Step]":
    """Train one student and judge it on the test split."""
    from stages.reproduce.chains import Step

    named = (("name", name),)
    return [
        Step("train_reduced", run, changes, named),
        Step("evaluate", run, (*changes, "evaluate.split=test"), named),
    ]


def results_of(records: list[dict[str, Any]]) -> dict[str, float]:
    """Figures of one student from its two records: training, evaluation."""
    train, judged = records
    return {key: judged["result"][key] for key in ("top1", "top5", "nll", "ece")} | {
        "seconds": train["result"]["train_seconds"],
        "memory_mib": train["result"]["train_peak_memory_mib"],
        "validation_top1": train["result"]["validation"]["top1"],
    }


def work_table2(context: Context, seeds: range, jobs: int | None) -> dict[str, Any]:
    """Run all chains, then write the table."""
    from pipeline.report.experiments.table import MethodRuns
    from stages.reproduce.chains import run_chains

    methods = table2_methods(context)
    chains: dict[int, Chain] = {
        seed: [
            *upstream(seed_run(context, seed)),
            *(step for name, changes in methods.items()
              for step in student_steps(seed_run(context, seed), name, changes)),
        ]
        for seed in seeds
    }  # fmt: skip
    records = run_chains(context, chains, jobs)
    rows = []
    for place, name in enumerate(methods):
        begin = 3 + 2 * place
        results = [results_of(records[seed][begin : begin + 2]) for seed in seeds]
        rows.append(MethodRuns(LABELS[name], results, paper_figure(context, name)))
    comparison = table2_comparison(context, seeds, rows, [records[seed][:3] for seed in seeds])
    comparison.write(context.run.root, "table2")
    return {"methods": {row.name: vars(row.summary("top1")) for row in rows}}


def paper_figure(context: Context, method: str) -> str:
    """The paper's figure for this data set, from its manifest."""
    from stages.learning import manifest_of

    paper = manifest_of(context).paper or {}
    key = method.replace("noisystudent", "noisy_student").replace("-", "_")
    value = paper.get(key)
    if value is None:
        return "–"
    deviation = (paper.get("std") or {}).get(key)
    return f"{value}" + (f" ± {deviation}" if deviation is not None else "")


def table2_comparison(
    context: Context, seeds: range, rows: "list[MethodRuns]", shared: list[list[dict[str, Any]]]
) -> "Comparison":
    """The table with its sentences."""
    from pipeline.report.experiments.table import Comparison, compare
    from stages.learning import manifest_of

    by_name = {row.name: row for row in rows}
    reduced, noisy = by_name[LABELS[REDUCED]], by_name[LABELS[NOISY]]
    differences = [compare("Reduced MPL − NoisyStudent", reduced, noisy)]
    if LABELS[NOISY_SAME] in by_name:
        same = by_name[LABELS[NOISY_SAME]]
        differences.append(compare("Reduced MPL − NoisyStudent on the same data", reduced, same))
    differences.append(compare("NoisyStudent − Supervised", noisy, by_name[LABELS[SUPERVISED]]))
    settings, recipe = context.recipe.train_reduced, context.recipe
    teacher = [records[0]["result"]["validation"]["top1"] for records in shared]
    kept = [records[1]["result"]["kept"] for records in shared]
    notes = [
        f"Every student: {settings.model.name}, {settings.steps:,} steps on batches of {settings.batch}, from the same "
        "initial weights for all methods of a seed. Checkpoint: the last step's moving average, fixed in advance. "
        f"Split: test ({manifest_of(context).title}). Nothing was chosen on it.",
        f"Teacher: {recipe.pretrain.model.name}, {sum(teacher) / len(teacher):.2f}% on validation; the filter kept "
        f"{min(kept):,} to {max(kept):,} pool images (K = {recipe.filter.k:,}).",
    ]
    source = (manifest_of(context).paper or {}).get("source")
    if source:
        notes.append(f"The paper's figures ({source}) come from another scale. What differs here: {recipe.differs}")
    elif recipe.differs:
        notes.append(f"What differs from the paper's table 2: {recipe.differs}")
    command = f"mpl reproduce table2 --recipe {recipe.name} {seeds_text(seeds)}"
    if context.data is not None:
        command += " --data DATA"
    title = f"Table 2 on {manifest_of(context).name}"
    extra = {"teacher_validation_top1": teacher, "kept": kept}
    return Comparison(title, list(seeds), rows, differences, notes, command, extra)
