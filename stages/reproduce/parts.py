"""Parts of a chain that belong together, such as one student's training and judging; results by name."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.options import Context
from stages.reproduce.chains import Chain, Step, run_chains
from stages.reproduce.commands import results_of

Records = list[dict[str, Any]]


@dataclass(frozen=True)
class Part:
    """Consecutive steps of a chain."""

    name: str
    steps: tuple[Step, ...]


def run_parts(context: Context, parts: dict[int, list[Part]], jobs: int | None) -> dict[str, list[Records]]:
    """Run every seed's parts, in order; returns name → by seed → records of the part's steps."""
    chains: dict[int, Chain] = {seed: [step for part in of for step in part.steps] for seed, of in parts.items()}
    done = run_chains(context, chains, jobs)
    found: dict[str, list[Records]] = {}
    for seed, of in parts.items():
        begin = 0
        for part in of:
            found.setdefault(part.name, []).append(done[seed][begin : begin + len(part.steps)])
            begin += len(part.steps)
    return found


def trained(stage: str, run: Path, name: str, changes: tuple[str, ...]) -> Part:
    """Train one student and judge it on the test split."""
    named = (("name", name),)
    return Part(name, (Step(stage, run, changes, named), _judged(run, name, changes)))


def finetuned(stage: str, run: Path, name: str, changes: tuple[str, ...]) -> Part:
    """Train one student, finetune it, and judge it on the test split as trained and finetuned."""
    named = (("name", name),)
    before = (("network", run / f"student-{name}"), ("name", f"{name}-trained"))
    return Part(
        name,
        (
            Step(stage, run, changes, named),
            Step("evaluate", run, (*changes, "evaluate.split=test"), before),
            Step("finetune", run, changes, named),
            _judged(run, name, changes),
        ),
    )


def _judged(run: Path, name: str, changes: tuple[str, ...]) -> Step:
    return Step("evaluate", run, (*changes, "evaluate.split=test"), (("name", name),))


def results(records: list[Records]) -> list[dict[str, float]]:
    """Figures by seed; `trained_top1` is before finetuning, where there was any."""
    return [_results(of) for of in records]


def _results(records: Records) -> dict[str, float]:
    if len(records) == 2:
        figures = results_of(records)
        return figures | {"trained_top1": figures["top1"]}
    train, before, tuned, judged = records
    figures = results_of([train, judged])
    figures["seconds"] += tuned["result"]["train_seconds"]
    figures["validation_top1"] = tuned["result"]["validation"]["top1"]
    return figures | {"trained_top1": before["result"]["top1"]}
