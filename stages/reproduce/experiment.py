"""What all experiments share: a run for each seed, what a result depends on, the stage that an experiment is."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.execution import Stage
from stages.filter import rules
from stages.options import Context
from stages.reproduce.chains import Chain, Records, Step, run_chains
from stages.reproduce.variants import Variant

UPSTREAM = (Step("pretrain"), Step("filter"), Step("precompute"))  # what the students of a seed share


@dataclass(frozen=True)
class SeedRuns:
    """An experiment over seeds.

    Attributes:
        context: recipe, data and device of all runs; the run that they lie in.
        seeds: all of them.
        jobs: seeds at a time; None: one per core.
    """

    context: Context
    seeds: range
    jobs: int | None

    def folder(self, seed: int) -> Path:
        """Run directory of one seed."""
        return self.context.run / f"seed-{seed}"

    def train(self, variants: Sequence[Variant], shared: Sequence[Step] = UPSTREAM) -> dict[int, Records]:
        """For every seed the shared stages, then all variants; returns the records by seed."""
        chains = {}
        for seed in self.seeds:
            run = self.folder(seed)
            chains[seed] = Chain(run, seed, (*shared, *(step for variant in variants for step in variant.steps(run))))
        return run_chains(self.context, chains, self.jobs)

    def basis(self) -> dict[str, Any]:
        """All that a comparison depends on."""
        context = self.context
        return {
            "recipe": context.recipe.model_dump(mode="json", exclude={"description", "source", "differs", "reach"}),
            "splits": {
                name: context.data_set.split(name).fingerprint() for name in sorted(context.data_set.manifest.splits)
            },
            "copies": rules(context).copy_threshold,
            "precision": context.precision,
            "seeds": list(self.seeds),
        }

    def stage(
        self,
        name: str,
        basis: dict[str, Any],
        work: Callable[[], dict[str, Any]],
        summary: Callable[[dict[str, Any]], str] = lambda result: "",
        figures: Sequence[str] = (),
        cheap: frozenset[str] = frozenset({"seeds"}),
    ) -> Stage:
        """The experiment as one stage.

        Args:
            name: of the stage, and of its report's files.
            basis: equal basis, equal result.
            work: runs it and writes the report.
            summary: says in a line what came out.
            figures: names of further files.
            cheap: keys of the basis that may change without being refused.
        """
        files = [self.context.run / f"{name}.{suffix}" for suffix in ("md", "csv", "json", "png")]
        files += [self.context.run / figure for figure in figures]
        return Stage(
            name=name,
            basis=basis,
            outputs=files,
            work=work,
            summary=lambda result: f"{summary(result)} {files[0]}".lstrip(),
            cheap=cheap,
        )

    def command(self, experiment: str, *options: str) -> str:
        """What makes the report."""
        words = [f"mpl reproduce {experiment}", *self.context.given, seeds_options(self.seeds), *options]
        return " ".join(words + ["--data DATA"] * (self.context.data is not None))


def what_seeds_change(context: Context) -> str:
    """In a sentence. A manifest's splits are runs of rows: no seed is in them, unless labels are drawn."""
    few = context.data_set.drawn
    if few is None:
        return "Seeds change initial weights, order and augmentation; labels, pool and test images are the same."
    pool = context.data_set.manifest.splits.get("unlabelled")
    rest = ", and the pool has the others" if pool is not None and pool.without else "; the pool is the same"
    return (
        f"Each seed draws its own {few:,} labelled images, stratified by class{rest}, and changes initial weights, "
        "order and augmentation; test images are the same."
    )


def seeds_options(seeds: range) -> str:
    """The options that choose these seeds."""
    return f"--seeds {len(seeds)}" + (f" --seed {seeds.start}" if seeds.start else "")


def teacher_top1(records: Iterable[Records]) -> list[float]:
    """Accuracy of the large teachers on validation, percent."""
    return [of_seed["pretrain"]["result"]["validation"]["top1"] for of_seed in records]
