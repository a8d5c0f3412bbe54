"""The code and the commands in the documentation run."""

import re
import shlex
from pathlib import Path

import click
import numpy as np
import pytest
import torch

from pipeline.config import ModelSettings
from pipeline.networks.folders import save_network
from pipeline.networks.network import build_network
from pipeline.storage.metrics import read_metrics
from stages.cli import COMMANDS, LazyGroup

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


def test_the_loop_of_the_meta_gradient_page_runs() -> None:
    (code,) = blocks(ROOT / "docs/meta-gradient.md", "python")
    names: dict = {}
    exec(code, names)
    assert names["gradient"].shape == (32, 10)
    assert float(names["gradient"].abs().max()) > 0


def test_the_programs_of_the_library_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A selection with a teacher of ours, a full sort as oracle; a training with a teacher that nobody here wrote."""
    selecting, training = blocks(ROOT / "docs/library.md", "python")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    network = build_network(ModelSettings(name="wrn_10_1"), list("0123456789"), 8, (0.5,) * 3, (0.5,) * 3)
    save_network(tmp_path / "runs/default/teacher", network, network.model.state_dict())
    names: dict = {}
    exec(selecting, names)
    scores = np.concatenate([log_odds for _, log_odds in names["chunks"]()])
    for c, rows in enumerate(names["best"].rows):
        assert rows.tolist() == np.lexsort((np.arange(len(scores)), -scores[:, c]))[:20].tolist()
    names = {}
    exec(training, names)
    rows = read_metrics(tmp_path / "runs/library/metrics.csv")
    assert [row["step"] for row in rows] == ["5", "10", "15", "20"]
    assert {"loss", "labelled_loss", "trust"} < rows[0].keys()
    assert float(rows[-1]["trust"]) != float(rows[0]["trust"])


def commands() -> list[str]:
    joined = [block.replace("\\\n", " ") for page in PAGES for block in blocks(page, "sh")]
    lines = [line.split("#")[0].strip() for block in joined for line in block.splitlines()]
    lines = [line.partition(" -- ")[2] if line.startswith("torchrun ") else line for line in lines]
    return sorted({line for line in lines if line.startswith("mpl ")})


@pytest.mark.parametrize("line", commands())
def test_every_command_in_the_documentation_parses(line: str) -> None:
    """Names and options exist; what they do is tested in tests/stages."""
    for single in line.split("&&"):
        _, name, *arguments = shlex.split(single)
        assert name in COMMANDS
        context = click.Context(click.Command("mpl"))
        command = LazyGroup().get_command(context, name)
        while isinstance(command, click.Group):
            command, arguments = command.get_command(context, arguments[0]), arguments[1:]
        assert command is not None, line
        known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        assert {a for a in arguments if a.startswith("--")} <= known, line


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
