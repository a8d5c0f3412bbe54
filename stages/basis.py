"""What the result of a training stage depends on: the basis of its record."""

from collections.abc import Callable, Set
from pathlib import Path
from typing import Any

from pipeline.assembly import Output
from pipeline.checkpoints import CHECKPOINTS, identity_of
from pipeline.config import DataSettings, FeedbackSettings, ModelSettings, TrainSettings
from pipeline.errors import CheckpointError
from pipeline.gradient.derivative import check_engine
from pipeline.networks.architectures import WEIGHTS
from pipeline.networks.folders import CONFIG
from pipeline.networks.pretrained import weights_digest
from pipeline.storage.files import discard, fingerprint, names_in, sha256_file, sync_folder
from pipeline.storage.ours import is_ours, remove_ours
from stages.execution import Stage
from stages.options import Context

PARTS = {CHECKPOINTS, "tensorboard", "teacher", "folds"}  # folders of a trained network's folder
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
        **_begun_with(settings),
        **inputs,
    }


def _begun_with(settings: TrainSettings) -> dict[str, Any]:
    """Digests of the published weights that its networks begin with; nothing where they are random."""
    teacher = getattr(getattr(settings, "teacher", None), "model", None)
    models = {"model": getattr(settings, "model", None), "teacher": teacher}
    found = {name: digest for name, model in models.items() if model and (digest := weights_digest(model))}
    return {"pretrained": found} if found else {}


def training_stage(
    context: Context,
    settings: TrainSettings,
    folder: Path,
    basis: dict[str, Any],
    work: Callable[[Output], dict[str, Any]],
    **more: Any,
) -> Stage:
    """The stage that trains a network into a folder; `more` are further fields.

    A network that is there already stays until the new one takes its place: that is made in a folder beside it.
    Checkpoints go when it is done, unless more steps can follow: then they belong to the training whatever its length.
    """
    beside = folder.with_name(f".{folder.name}.new")
    of_any_length = basis | {"settings": {**basis["settings"], "steps": None}}
    identity = fingerprint(of_any_length if settings.open_ended else basis)

    def keeps_old() -> bool:
        return _is_whole(folder) and identity_of(folder / CHECKPOINTS) != identity

    def train() -> dict[str, Any]:
        if context.first:
            finish_exchange(beside, folder)
        context.together.barrier("what an interrupted --force left")
        place = beside if keeps_old() else folder
        context.together.barrier("the choice of a folder")
        result = work(Output(place, identity))
        if place != folder and context.first:
            exchange(place, folder)
        return result

    return Stage(
        basis=basis,
        work=train,
        replaces=[folder / CHECKPOINTS, beside, _ready(beside)],
        kept=keeps_old,
        leftovers=[beside] if settings.open_ended else [folder / CHECKPOINTS, beside],
        together=True,
        trouble=lambda result: require_unchanged(folder, result),
        longer="goes on" if settings.open_ended else "is another training",
        **more,
    )


def exchange(new: Path, folder: Path) -> None:
    """Put the network in `new` in the place of the one in `folder`: what is ours there goes, then all is moved.

    What is in `folder` and not ours stays. Interrupted, `finish_exchange` goes on with it.
    """
    discard(folder / WEIGHTS)  # first: a folder without weights is one whose exchange has begun
    remove_ours(*(folder / name for name in names_in(folder) if name in PARTS or is_ours(folder / name)))
    ready = _ready(new)
    new.rename(ready)
    _move(ready, folder)
    sync_folder(folder)


def finish_exchange(new: Path, folder: Path) -> None:
    """Go on with an exchange that was interrupted; without one, nothing is done."""
    if (ready := _ready(new)).exists():
        _move(ready, folder)
        sync_folder(folder)
    elif _is_whole(new) and not (folder / WEIGHTS).exists():
        exchange(new, folder)


def _ready(new: Path) -> Path:
    """What a folder is renamed to when the place that its files go to has been cleared."""
    return new.with_suffix(".ready")


def _move(new: Path, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for path in new.iterdir():
        if path.is_dir():
            _move(path, folder / path.name)
        else:
            path.replace(folder / path.name)
    new.rmdir()


def _is_whole(folder: Path) -> bool:
    return all(path.exists() for path in network_outputs(folder))


def require_unchanged(folder: Path, result: dict[str, Any]) -> str:
    """Nothing, where a network is the one that its record is of.

    Raises:
        CheckpointError: its weights or its config.json were edited or damaged since.
    """
    for name, key in ((WEIGHTS, "weights_sha256"), (CONFIG, "config_sha256")):
        if key in result and sha256_file(folder / name) != result[key]:
            raise CheckpointError(
                f"{folder / name} is not the file that was made: it was edited or damaged since. Restore it, or train "
                "it again with --force; mpl evaluate --network FOLDER judges a copy of it as it is"
            )
    return ""


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
