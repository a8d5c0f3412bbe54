"""Where benchmarks write: a Markdown table and JSON beside it, with command, versions and machine."""

import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.storage.files import write_json, write_text
from pipeline.storage.runs import machine, now, versions

RESULTS = Path(__file__).parent / "results"


def write_table(name: str, head: Sequence[str], rows: Sequence[Sequence[object]], command: str, note: str = "") -> None:
    """Print the table and write results/NAME.md and NAME.json."""
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in (head, ["---"] * len(head), *rows)]
    facts = versions() | {key: str(value) for key, value in machine().items()}
    made_on = ", ".join(f"{key} {facts[key]}" for key in ("torch", "timm", "processor", "cores"))
    text = "\n".join([*lines, "", *([note, ""] if note else []), f"Made by `{command}` ({made_on}).", ""])
    sys.stdout.write(text)
    write_text(RESULTS / f"{name}.md", text)
    write_json(
        RESULTS / f"{name}.json",
        {
            "command": command,
            "made": now(),
            "machine": facts,
            "head": list(head),
            "rows": [list(row) for row in rows],
        },
    )
