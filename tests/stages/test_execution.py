"""Who may overwrite what when torchrun starts again, what bad inputs leave behind, who says what one rank met."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipeline.distributed import ALONE, Ranks
from pipeline.errors import DataError, RunError
from stages import execution
from stages.console import Console
from stages.execution import Stage, execute
from stages.options import Context, Options, make_context
from tests.distributed.worlds import in_ranks

pytestmark = pytest.mark.xdist_group("distributed")


def stage_of(context: Context, work: Callable[[Path], None], size: int = 1) -> Stage:
    """A stage that trains `student/`."""
    folder = context.run / "student"

    def run() -> dict[str, int]:
        work(folder)
        (folder / "model").write_text("whole")
        return {"size": size}

    return Stage(
        name="train", basis={"size": size}, outputs=[folder / "model"], work=run, summary=str,
        replaces=[folder / name for name in ("model", "old", *(f"part-{n}" for n in range(5)))], together=True,
    )  # fmt: skip


def adds(folder: Path) -> None:
    """One more file each time it runs."""
    folder.mkdir(exist_ok=True)
    (folder / f"part-{len(list(folder.iterdir()))}").touch()


def is_cut_short(folder: Path) -> None:
    adds(folder)
    raise RunError("no space left")


def attempt(run: Path, work: Callable[[Path], None], size: int = 1, *, force: bool = False) -> None:
    context = make_context(Options(run, "digits", device="cpu", force=force), console=Console(quiet=True))
    execute(context, lambda c: stage_of(c, work, size))


def launched(patch: pytest.MonkeyPatch, name: str, restarts: int) -> None:
    """As the first of several processes that a launch of torchrun started."""

    @contextmanager
    def joined(*arguments: object) -> Iterator[Ranks]:
        yield Ranks(0, 1, launch=name)

    patch.setenv("WORLD_SIZE", "2")
    patch.setenv("TORCHELASTIC_RESTART_COUNT", str(restarts))
    patch.setattr(execution, "joined", joined)


def files(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "student").iterdir())


@pytest.mark.parametrize("restarts", [0, 1])  # each agent counts for itself
def test_force_removes_what_was_there_before_the_launch_once(monkeypatch, tmp_path, restarts: int) -> None:
    attempt(tmp_path, adds)
    (tmp_path / "student/old").touch()
    launched(monkeypatch, "a", restarts)
    with pytest.raises(RunError):
        attempt(tmp_path, is_cut_short, force=True)
    assert files(tmp_path) == ["part-0"]  # not taken for done, though a count of restarts may be above 0
    attempt(tmp_path, adds, force=True)
    assert files(tmp_path) == ["model", "part-0", "part-1"]  # goes on
    attempt(tmp_path, adds, force=True)
    assert files(tmp_path) == ["model", "part-0", "part-1"]  # is done
    launched(monkeypatch, "b", restarts)
    attempt(tmp_path, adds, force=True)
    assert files(tmp_path) == ["model", "part-0"]


def test_a_launch_refuses_other_settings(monkeypatch, tmp_path) -> None:
    attempt(tmp_path, adds)
    launched(monkeypatch, "a", 0)
    with pytest.raises(RunError, match="was done with other inputs or settings"):
        attempt(tmp_path, adds, size=2)
    assert files(tmp_path) == ["model", "part-0"]


def refuses(folder: Path) -> None:
    raise DataError("batch (=5,000) is more than the 90 images there are")


def test_after_bad_inputs_others_are_welcome(tmp_path: Path) -> None:
    with pytest.raises(DataError):
        attempt(tmp_path, refuses, size=5000)
    assert not (tmp_path / "train").exists()
    attempt(tmp_path, adds, size=16)
    with pytest.raises(RunError, match="was done with other inputs or settings"):
        attempt(tmp_path, adds, size=17)


def test_what_took_time_is_not_given_up_for_bad_inputs(tmp_path: Path) -> None:
    with pytest.raises(RunError):
        attempt(tmp_path, is_cut_short, size=16)
    with pytest.raises(DataError):
        attempt(tmp_path, refuses, size=16)
    with pytest.raises(RunError, match="was begun with other inputs or settings"):
        attempt(tmp_path, adds, size=17)


def test_what_an_experiment_has_made_elsewhere_in_the_run_is_not_given_up(tmp_path: Path) -> None:
    """Its outputs are its report; the runs of its seeds stand beside. A run directory without run.json is nobody's."""

    def refuses_late(folder: Path) -> None:
        (folder.parent / "seed-0").mkdir(exist_ok=True)
        refuses(folder)

    with pytest.raises(DataError):
        attempt(tmp_path, refuses_late)
    attempt(tmp_path, adds)
    assert (tmp_path / "seed-0").is_dir()


def one_rank_cannot_write(ranks: Ranks, run: Path) -> None:
    """In its work rank 1 meets a full disk; rank 0 waits for it in a collective."""

    @contextmanager
    def joined(*arguments: object) -> Iterator[Ranks]:
        yield ranks

    def work(folder: Path) -> None:
        if not ranks.first:
            raise RunError("cannot write model.safetensors: No space left on device")
        ranks.barrier("the last checkpoint")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(execution, "joined", joined)
        attempt(run, work)


def test_what_one_rank_meets_in_its_work_is_said_at_once(tmp_path: Path) -> None:
    first, second = in_ranks(2, one_rank_cannot_write, tmp_path)
    assert (type(first), type(second)) == (RunError, RunError)
    assert str(first) == "rank 1: cannot write model.safetensors: No space left on device"
    assert str(second) == "cannot write model.safetensors: No space left on device"


def test_alone_is_of_no_launch(tmp_path: Path) -> None:
    attempt(tmp_path, adds)
    assert (ALONE.launch, make_context(Options(tmp_path)).run.launch_of("train")) == ("", "")
    assert make_context(Options(tmp_path)).run.launch_of("other") is None
