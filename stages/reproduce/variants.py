"""A variant of an experiment: one way to train a student, and what it scored."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.report.experiments.results import Figures, Results
from stages.reproduce.chains import Records, Step
from stages.students import stage_name


@dataclass(frozen=True)
class Variant:
    """One way to train a student.

    Attributes:
        name: of the student: student-NAME/, evaluation-NAME.json.
        label: for people.
        module: of `stages`, that trains it.
        changes: `a.b=value` changes of the recipe.
        finetuned: whether it is finetuned on the labelled images, and judged before it as well.
        split: that it is judged on; validation where settings are chosen.
    """

    name: str
    label: str
    module: str
    changes: tuple[str, ...] = ()
    finetuned: bool = False
    split: str = "test"

    def steps(self, run: Path, common: tuple[str, ...] = ()) -> list[Step]:
        """Train the student and judge it; `common` changes of the recipe come before its own."""
        changes, named = (*common, *self.changes), {"name": self.name}
        judged = (*changes, f"evaluate.split={self.split}")
        steps = [Step(self.module, changes, named)]
        if self.finetuned:
            before = {"network": run / f"student-{self.name}", "name": f"{self.name}-trained"}
            steps += [Step("evaluate", judged, before), Step("finetune", changes, named)]
        return [*steps, Step("evaluate", judged, named)]

    def figures(self, records: Records) -> Figures:
        """What the student of one chain scored, percent and nats, and what it took; `trained_top1`: untuned."""
        trained = records[stage_name(self.module.replace("_", "-"), self.name)]["result"]
        judged = records[stage_name("evaluate", self.name)]["result"]
        figures = {figure: judged[figure] for figure in ("top1", "top5", "nll", "ece")} | {
            "seconds": trained["train_seconds"],
            "memory_mib": trained["train_peak_memory_mib"],
            "validation_top1": trained["validation"]["top1"],
            "trained_top1": judged["top1"],
        }
        if self.finetuned:
            tuned = records[stage_name("finetune", self.name)]["result"]
            figures["seconds"] += tuned["train_seconds"]
            figures["validation_top1"] = tuned["validation"]["top1"]
            figures["trained_top1"] = records[stage_name("evaluate", f"{self.name}-trained")]["result"]["top1"]
        return figures


def results_of(variants: Sequence[Variant], records: Mapping[int, Records]) -> Results:
    """Figures of all variants, from the records of each seed."""
    return Results(
        {variant.name: variant.label for variant in variants},
        {variant.name: {seed: variant.figures(of_seed) for seed, of_seed in records.items()} for variant in variants},
        frozenset(variant.name for variant in variants if variant.finetuned),
    )
