"""Scoring a pool against the bare forward pass of the same network on the same images, in one run.

The bare forward has its images decoded and normalised in memory. Scoring reads a shard, decodes, classifies, looks
for copies among 14,000 evaluation images, and writes a part. On a CPU decoding and comparing use the cores that the
network needs, so what they cost is seen in full.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from benchmarks.images import write_tar
from benchmarks.record import write_table
from pipeline.config import ModelSettings
from pipeline.data.readers.webdataset import TarShard
from pipeline.networks.network import build_network
from pipeline.pool.copies.index import CopyIndex
from pipeline.pool.infer import Scorer, decode_batch
from pipeline.pool.score import score_shard


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def bare(scorer: Scorer, batches: list[torch.Tensor], lanes: int) -> Callable[[], None]:
    """The network over prepared batches: one batch on all cores, or a batch on each core."""

    def forward(images: torch.Tensor) -> None:
        with torch.inference_mode():
            scorer.model(images)

    def run() -> None:
        if lanes == 1:
            for images in batches:
                forward(images)
            return
        with ThreadPoolExecutor(lanes, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            list(pool.map(forward, batches))

    return run


def measure(scorer: Scorer, shard: TarShard, index: CopyIndex, folder: Path, rounds: int) -> list[str]:
    """One row of the table: medians of ratios over interleaved rounds; a first one warms up."""
    samples, cores = list(shard.read()), len(os.sched_getaffinity(0))
    batches = [
        torch.from_numpy(decode_batch(samples[i : i + scorer.batch], scorer.size).pixels).permute(0, 3, 1, 2).float()
        for i in range(0, len(samples), scorer.batch)
    ]
    rounds_taken: list[dict[str, float]] = []
    for number in range(rounds + 1):
        torch.set_num_threads(cores)
        on_all_cores, on_each_core = (seconds(bare(scorer, batches, lanes)) for lanes in (1, cores))
        plain = score_shard(shard, scorer, folder / f"plain-{number}", fingerprint="f")
        whole = score_shard(shard, scorer, folder / f"whole-{number}", fingerprint="f", copies=index)
        times = {"bare": min(on_all_cores, on_each_core), "plain": plain.seconds, "whole": whole.seconds}
        rounds_taken.append(times | {"waiting": whole.waiting / whole.seconds})
    rounds_taken = rounds_taken[1:]

    def median(value: Callable[[dict[str, float]], float]) -> float:
        return statistics.median(value(times) for times in rounds_taken)

    return [
        f"{len(samples) / median(lambda t: t['bare']):,.0f}",
        f"{len(samples) / median(lambda t: t['whole']):,.0f}",
        f"{100 * (median(lambda t: t['plain'] / t['bare']) - 1):+.1f}%",
        f"{100 * (median(lambda t: t['whole'] / t['bare']) - 1):+.1f}%",
        f"{100 * median(lambda t: t['waiting']):.1f}%",
    ]


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--models", nargs="+", default=["wrn_28_2", "resnet18"])
    parser.add_argument("--size", type=int, default=32)
    arguments = parser.parse_args()
    half, rows = (0.5, 0.5, 0.5), []
    pixels = np.random.default_rng(0).integers(0, 256, (14_000, arguments.size, arguments.size, 3), np.uint8)
    index = CopyIndex(pixels, [str(i) for i in range(len(pixels))])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shard = TarShard("pool-00000", write_tar(folder / "pool-00000.tar", arguments.images, arguments.size))
        for model in arguments.models:
            network = build_network(ModelSettings(name=model), [str(c) for c in range(10)], arguments.size, half, half)
            network.model.to(memory_format=torch.channels_last).eval()
            scorer = Scorer(network.model, tuple(network.class_names), arguments.size, half, half)
            rows.append([model, *measure(scorer, shard, index, folder / model, arguments.rounds)])
    write_table(
        "score",
        ["network", "bare forward, images/s", "scoring, images/s", "overhead without copies", "overhead", "waiting"],
        rows,
        f"python -m benchmarks.score --images {arguments.images} --rounds {arguments.rounds} --size {arguments.size} "
        f"--models {' '.join(arguments.models)}",
        f"{arguments.size} px, n = {arguments.rounds} interleaved rounds, medians; overhead against the bare forward's "
        "better arrangement (a batch on all cores, or one on each)",
    )


if __name__ == "__main__":
    main()
