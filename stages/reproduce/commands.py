"""`mpl reproduce`: the stages over seeds, into one table."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from stages.options import Context, stage_options

if TYPE_CHECKING:
    from stages.execution import Stage
    from stages.reproduce.experiment import SeedRuns


@click.group()
def group() -> None:
    """Reproduce a table of the paper, or an experiment of this project, over seeds.

    With --force the stages whose inputs or settings changed are made again, and only those.
    """


def seeds_option(default: str, what: str = "seeds", items: str = "Seeds") -> Any:
    """--seeds and --jobs."""

    def add(function: Any) -> Any:
        at_a_time = f"{items} at a time. [default: one per core]"
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
    from stages.reproduce.table2 import plan

    _reproduce(context, "table2", seeds, jobs, plan)


@group.command("swapped-teacher")
@stage_options
@seeds_option("the recipe's")
def swapped_teacher(context: Context, seeds: int | None, jobs: int | None) -> None:
    """Does the feedback act? A teacher with two pairs of classes swapped, and controls.

    Writes swapped-teacher.md, .csv, .json and .png into the run. [default run: runs/swapped-teacher-RECIPE]
    """
    from stages.reproduce.swapped_teacher import plan

    _reproduce(context, "swapped-teacher", seeds, jobs, plan)


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

    _reproduce(context, "sweep", seeds, jobs, lambda runs: plan(runs, steps))


@group.command()
@stage_options
@seeds_option("6")
@click.option("--teacher", "teachers", type=click.Choice(["clean", "wrong", "tail"]), multiple=True,
              help="Which teachers; repeatable. [default: all three]")  # fmt: skip
@click.option("--method", "methods", multiple=True, metavar="NAME",
              help="Which settings; repeatable. [default: all]")  # fmt: skip
def feedback(
    context: Context, seeds: int | None, jobs: int | None, teachers: tuple[str, ...], methods: tuple[str, ...]
) -> None:
    """Which feedback? Its scale, decay and calibrator on three teachers; judged on validation; digits alone.

    With --seed 1000 its seeds are not those of the tables.
    Writes feedback.md, .csv, .json and .png into the run. [default run: runs/feedback-digits]
    """
    from stages.reproduce.feedback import SEEDS, plan

    _reproduce(context, "feedback", seeds or SEEDS, jobs, lambda runs: plan(runs, teachers, methods))


@group.command()
@stage_options
@seeds_option("the recipe's")
def table1(context: Context, seeds: int | None, jobs: int | None) -> None:
    """Eight methods alone, six of them also with MPL on top (tables 1 and 10 of arXiv:2003.10580).

    Writes table1.md, .csv, .json and .png into the run. [default run: runs/table1-RECIPE]
    """
    from stages.reproduce.table1 import plan

    _reproduce(context, "table1", seeds, jobs, plan)


@group.command()
@stage_options
@seeds_option("the recipe's")
@click.option(
    "--share",
    "shares",
    type=float,
    multiple=True,
    help="Share of the labelled images, above 0 to 1; repeatable. [default: 0.2, 0.4, 0.8 and 1]",
)
def labels(context: Context, seeds: int | None, jobs: int | None, shares: tuple[float, ...]) -> None:
    """Supervised, RandAugment, UDA and UDA + MPL on fewer and more labels (figure 7 of arXiv:2003.10580v1).

    Each seed draws its own labelled images. Writes labels.md, .csv, .json and .png into the run.
    [default run: runs/labels-RECIPE]
    """
    from stages.reproduce.labels import SHARES, plan

    _reproduce(context, "labels", seeds, jobs, lambda runs: plan(runs, shares or SHARES))


@group.command()
@stage_options
@seeds_option("the recipe's", "draws")
@click.option("--teacher", "cells", type=click.Choice(["zero-shot", "long-tailed", "clean"]), multiple=True,
              help="Which teachers; repeatable. [default: all three]")  # fmt: skip
@click.option("--method", "methods", multiple=True, metavar="NAME",
              help="Which students; repeatable. [default: all of the teacher's]")  # fmt: skip
@click.option("--rivals/--no-rivals", default=True, show_default=True, help="UDA and FixMatch, without a teacher.")
def correction(
    context: Context,
    seeds: int | None,
    jobs: int | None,
    cells: tuple[str, ...],
    methods: tuple[str, ...],
    rivals: bool,
) -> None:
    """What a few labels make of a teacher that is wrong: by a fit, by feedback, by both; draws of the labels.

    For recipes with a foreign teacher (filter.teacher, filter.predictions), such as cifar10-correction. Writes
    correction.md, .csv, .json and .png into the run. [default run: runs/correction-RECIPE]
    """
    from stages.reproduce.correction import plan

    _reproduce(context, "correction", seeds, jobs, lambda runs: plan(runs, cells, rivals, methods))


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
    from stages.reproduce.ablation import SEEDS, Choice, plan

    choice = Choice(feedback, reduced)
    _reproduce(context, choice.stem, seeds or SEEDS, jobs, lambda runs: plan(runs, choice))


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
    from stages.reproduce.two_moons import DRAWS, plan

    _reproduce(
        context, "two-moons", seeds or DRAWS, jobs, lambda runs: plan(runs, variant, steps), Path("runs/two-moons")
    )


def _reproduce(
    context: Context, stem: str, seeds: int | None, jobs: int | None, plan: "Callable[[SeedRuns], Stage]",
    own: Path | None = None,
) -> None:  # fmt: skip
    """Choose the run directory (its own where no other was asked for) and the seeds, run, and show the table."""
    from stages.execution import execute
    from stages.reproduce.experiment import SeedRuns

    context = _own_run(context, own or Path("runs") / f"{stem}-{context.recipe.name}")
    chosen = range(context.seed, context.seed + (seeds or context.recipe.reproduce.seeds))
    execute(context, lambda c: plan(SeedRuns(c, chosen, jobs)))
    if not context.dry_run and not context.as_json:
        click.echo((context.run / f"{stem}.md").read_text())


def _own_run(context: Context, run: Path) -> Context:
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
