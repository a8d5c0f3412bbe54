"""What all experiments share: the seeds' runs, what a result depends on, the stage that an experiment is."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from stages.execution import Stage
from stages.filter import rules
from stages.options import Context
from stages.reproduce.chains import Chain, Records, Step, run_chains
from stages.reproduce.variants import Variant

UPSTREAM = (Step("pretrain"), Step("filter"), Step("precompute"))  # what the students of a seed share
SEEDS_CHANGE = (  # a manifest's splits are runs of rows: no seed is in them
    "Seeds change initial weights, order and augmentation; labels, pool and test images are the same."
)


def seed_run(context: Context, seed: int) -> Path:
    """Run directory of one seed."""
    return context.run / f"seed-{seed}"


def run_students(
    context: Context, seeds: range, jobs: int | None, variants: Sequence[Variant], shared: Sequence[Step] = UPSTREAM
) -> dict[int, Records]:
    """For every seed the shared stages, then all variants; returns the records by seed."""
    chains = {}
    for seed in seeds:
        run = seed_run(context, seed)
        chains[seed] = Chain(run, seed, (*shared, *(step for variant in variants for step in variant.steps(run))))
    return run_chains(context, chains, jobs)


def teacher_top1(records: Iterable[Records]) -> list[float]:
    """Accuracy of the large teachers on validation, percent."""
    return [of_seed["pretrain"]["result"]["validation"]["top1"] for of_seed in records]


def comparison_basis(context: Context, seeds: range) -> dict[str, Any]:
    """All that a comparison depends on."""
    return {
        "recipe": context.recipe.model_dump(mode="json", exclude={"description", "source", "differs", "reach"}),
        "splits": {
            name: context.data_set.split(name).fingerprint() for name in sorted(context.data_set.manifest.splits)
        },
        "copies": rules(context).copy_threshold,
        "precision": context.precision,
        "seeds": list(seeds),
    }


def report_files(context: Context, stem: str, *others: str) -> list[Path]:
    """Files of a report in the run; `others` are names of further figures."""
    return [context.run / name for name in (*(f"{stem}.{suffix}" for suffix in ("md", "csv", "json", "png")), *others)]


def comparison_stage(
    name: str,
    basis: dict[str, Any],
    files: list[Path],
    work: Callable[[], dict[str, Any]],
    summary: Callable[[dict[str, Any]], str] = lambda result: "",
    cheap: frozenset[str] = frozenset(),
) -> Stage:
    """An experiment as one stage.

    Args:
        name: of the stage.
        basis: equal basis, equal result.
        files: that it writes; the first is for people.
        work: runs it.
        summary: says in a line what came out.
        cheap: keys of the basis, beside the seeds, that may change without being refused.
    """
    return Stage(
        name=name,
        basis=basis,
        outputs=files,
        work=work,
        summary=lambda result: f"{summary(result)} {files[0]}".lstrip(),
        replaces=files,
        cheap=cheap | {"seeds"},
    )


def seeds_options(seeds: Sequence[int]) -> str:
    """The options of the command that choose these seeds."""
    return f"--seeds {len(seeds)}" + (f" --seed {seeds[0]}" if seeds[0] else "")


def command_of(context: Context, experiment: str, seeds: Sequence[int], *options: str) -> str:
    """The command that makes a report."""
    words = [f"mpl reproduce {experiment} --recipe {context.recipe.name}", seeds_options(seeds), *options]
    return " ".join(words + ["--data DATA"] * (context.data is not None))
