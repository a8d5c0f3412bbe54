"""`mpl`: a lazy group in pipeline order. Showing help imports neither torch nor any stage."""

import difflib
import importlib
import importlib.util
import os
import select
import shlex
import sys
import warnings
from pathlib import Path

import click

from stages.terminal import say, sign_of_life

COMMANDS = {  # name: (module:attribute, one line of help), in the order in which a person uses them
    "pretrain": ("stages.pretrain:command", "labelled images → the large teacher"),
    "filter": ("stages.filter:command", "teacher + pool → scores and the K best images per class"),
    "precompute": (
        "stages.precompute:command",
        "teacher + selection → images with the teacher's distributions",
    ),
    "calibrate": ("stages.calibrate:command", "the teacher before and after a correction, on validation"),
    "train-reduced": ("stages.train_reduced:command", "targets + labelled images → student and calibrator"),
    "train-mpl": ("stages.train_mpl:command", "labelled images + pool → student: full MPL, or a baseline"),
    "finetune": ("stages.finetune:command", "student + labelled images → finetuned student"),
    "evaluate": ("stages.evaluate:command", "a network + a split → top-1, top-5, NLL, ECE, per class"),
    "predict": ("stages.predict:command", "a network + any images → a table of key and distribution"),
    "reproduce": ("stages.reproduce.commands:group", "all of the above, over seeds, into one table"),
    "plan": ("stages.plan:command", "a recipe + a cluster → memory, layout and time, before training"),
    "report": ("stages.report:command", "a run → report.html: what was kept, what just missed, copies"),
    "next": ("stages.next_labels:command", "a run → the pool images whose labels would tell most, and a page"),
    "suspects": ("stages.suspects:command", "a run → labelled images whose label is likely wrong"),
    "status": ("stages.status:command", "where a run stands"),
    "doctor": ("stages.doctor:command", "what this machine and installation can do"),
    "data": ("stages.data:group", "list, fetch, check and import data sets"),
}


class LazyGroup(click.Group):
    """Imports a command's module when that command is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, attribute = COMMANDS[cmd_name][0].split(":")
        if "torch" not in sys.modules:  # which takes its time
            ctx.call_on_close(sign_of_life(f"mpl {cmd_name}: loading …"))
        return getattr(importlib.import_module(module), attribute)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> object:
        """Run the command. click takes every broken pipe for a reader of its output that has gone (`| head`)."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError as error:
            if _reader_has_gone():
                raise
            from pipeline.errors import RunError

            ended = RunError("a process that this one had started has ended, or was ended")
            ended.resumable = True
            raise ended from error

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            close = difflib.get_close_matches(args[0], COMMANDS, n=1)
            ctx.fail(f"no command {args[0]!r}" + (f"; did you mean {close[0]!r}?" if close else ""))
        return super().resolve_command(ctx, args)


@click.command(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="The whole chain on the embedded digits: mpl pretrain && mpl filter --k 12800 && mpl precompute "
    "&& mpl train-reduced && mpl evaluate",
)
@click.version_option(package_name="reduced-mpl", prog_name="mpl")
def mpl() -> None:
    """Reduced Meta Pseudo Labels: few labels and a large unlabelled pool → a better classifier."""


def main() -> None:
    """Run the command line and exit: 0 done, 1 failed, 2 wrong use, 130 interrupted.

    `pipeline` is imported only after the check that it is ours.
    """
    _refuse_shadowed_package()
    silence_torch()
    try:
        status = mpl.main(standalone_mode=False)
    except click.exceptions.Exit as exit_:
        status = exit_.exit_code
    except click.ClickException as error:
        error.show()
        status = 2
    except (KeyboardInterrupt, click.Abort) as error:
        _say(f"Interrupted: {error}" if str(error) else "Interrupted", resume=True)
        status = 130
    except MemoryError as error:
        _say(f"Error: there is not enough memory ({error or 'out of memory'}); free some, or use less", resume=True)
        status = 1
    except OSError as error:
        from pipeline.storage.files import is_storage_error

        if error.errno is None and not is_storage_error(error):
            raise
        place = "object storage cannot be reached: " if is_storage_error(error) else ""
        _say(f"Error: {place}{error}", resume=True)
        status = 1
    except ValueError as error:
        from pipeline.errors import UsageError, UserError

        if not isinstance(error, UserError):
            raise
        usage = isinstance(error, UsageError)
        if not (error.shared and int(os.environ.get("RANK", "0"))):  # the first process prints it for all
            _say(f"Error: {error}", resume=error.resumable)
        status = 2 if usage else 1
    sys.exit(status if isinstance(status, int) else 0)


def _reader_has_gone() -> bool:
    """Whether nobody reads standard output, or errors, any more."""
    streams = select.poll()
    for handle in (1, 2):
        streams.register(handle, select.POLLOUT)
    return any(event & (select.POLLERR | select.POLLNVAL) for _, event in streams.poll(0))


def silence_torch() -> None:
    """torch's forward-mode rules call its own deprecated torch.jit.script, which nothing here can change."""
    warnings.filterwarnings("ignore", message="`torch.jit.script", category=FutureWarning)
    warnings.filterwarnings("ignore", message="`torch.jit.script", category=DeprecationWarning)


def command_line() -> str:
    """The command as the person typed it, without the --force that would discard what has been done since."""
    return shlex.join(["mpl", *(word for word in sys.argv[1:] if word != "--force")])


def _say(text: str, *, resume: bool) -> None:
    say(text)
    if resume:
        say(f"Resume with: {command_line()}")


def _refuse_shadowed_package() -> None:
    """`pipeline` is a common name: make sure that the one Python finds is ours."""
    spec = importlib.util.find_spec("pipeline")
    ours = Path(__file__).resolve().parent.parent / "pipeline" / "__init__.py"
    origin = getattr(spec, "origin", None)
    if origin is None or Path(origin).resolve() != ours:
        sys.exit(
            f"mpl: Python finds another package named 'pipeline', {origin}, before ours, {ours}. "
            "Run from another directory, or uninstall the other package"
        )
