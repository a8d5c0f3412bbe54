"""`mpl doctor`: what this machine and installation can do."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import click
import torch

from pipeline.data.manifest import list_manifests
from pipeline.storage.runs import versions


@click.command()
@click.option("--data", type=click.Path(path_type=Path), envvar="MPL_DATA", show_envvar=True, help="Data folder.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on standard output.")
def command(data: Path | None, as_json: bool) -> None:
    """Check the installation, the devices, the disk and the data folder; exit 1 where something is wrong."""
    facts = examine(data)
    if as_json:
        click.echo(json.dumps(facts))
    else:
        for name, value in facts.items():
            click.echo(f"{name:<12} {value}")
    if facts["problems"]:
        raise SystemExit(1)


def examine(data: Path | None) -> dict[str, Any]:
    """Facts, and `problems` in words."""
    problems = []
    packages = versions()
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 8):
        problems.append(f"torch {torch.__version__} is older than 2.8")
    problems += [f"{name} is not installed" for name, version in packages.items() if version == "absent"]
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    if free < 1:
        problems.append(f"only {free:.2f} GiB are free on this disk")
    if data is not None and not data.is_dir():
        problems.append(f"the data folder {data} is not a directory")
    return {
        "versions": packages,
        "cores": os.cpu_count(),
        "devices": devices or ["cpu"],
        "free_gib": round(free, 1),
        "data": str(data) if data else None,
        "data sets": [manifest.name for manifest in list_manifests(data if data and data.is_dir() else None)],
        "problems": problems,
    }
