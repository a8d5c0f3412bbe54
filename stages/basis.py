"""What the result of a training stage depends on: the basis of its record."""

from collections.abc import Callable, Set
from pathlib import Path
from typing import Any

from pipeline.assembly import Output
from pipeline.checkpoints import CHECKPOINTS
from pipeline.config import DataSettings, FeedbackSettings, ModelSettings, TrainSettings
from pipeline.gradient.derivative import check_engine
from pipeline.networks.architectures import WEIGHTS
from pipeline.networks.folders import CONFIG
from pipeline.storage.files import fingerprint
from stages.execution import Stage
from stages.options import Context

INTERVALS = {"log_every", "evaluate_every", "checkpoint_every", "checkpoint_seconds"}  # change no result


def training_basis(
    context: Context, settings: TrainSettings, irrelevant: Set[str] = frozenset(), **inputs: Any
) -> dict[str, Any]:
    """Every setting of a training that changes its result, and its inputs."""
    distributed = context.recipe.distributed
    parts = {"micro_batches": distributed.micro_batches, "sync_batch_norm": distributed.sync_batch_norm}
    plain = parts == {"micro_batches": 1, "sync_batch_norm": False}  # statistics of a process's whole batch
    return {
        "settings": settings.model_dump(mode="json", exclude=INTERVALS | set(irrelevant)),
        "data": data_basis(context.recipe.data),
        "seed": context.seed,
        "precision": context.precision,
        **({} if plain else {"distributed": parts}),
        **inputs,
    }


def training_stage(
    settings: TrainSettings, folder: Path, basis: dict[str, Any], work: Callable[[Output], dict[str, Any]], **more: Any
) -> Stage:
    """The stage that trains a network into a folder; `more` are further fields.

    Checkpoints go when it is done, unless more steps can follow: then they belong to the training whatever its length.
    """
    checkpoints = [] if settings.open_ended else [folder / CHECKPOINTS]
    of_any_length = basis | {"settings": {**basis["settings"], "steps": None}}
    identity = fingerprint(of_any_length if settings.open_ended else basis)
    return Stage(
        basis=basis,
        work=lambda: work(Output(folder, identity)),
        replaces=[folder],
        leftovers=checkpoints,
        together=True,
        longer="goes on" if settings.open_ended else "is another training",
        **more,
    )


def data_basis(settings: DataSettings) -> dict[str, Any]:
    """The part of the data settings that changes results."""
    return settings.model_dump(mode="json", exclude={"memory_gib"})


def require_engine(context: Context, student: ModelSettings, settings: FeedbackSettings) -> None:
    """Refuse, before anything is loaded, feedback by an engine that cannot differentiate the student as it will lie.

    Raises:
        FeedbackError: says which can.
    """
    placement = context.placement
    sharded = placement.layout.shards(placement.ranks)
    check_engine(student.name, settings.engine, sharded=sharded, autocast=placement.autocast)


def network_outputs(folder: Path) -> list[Path]:
    """Files of a saved network."""
    return [folder / WEIGHTS, folder / CONFIG]
