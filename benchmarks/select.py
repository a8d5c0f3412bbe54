"""The streaming selection against numpy, torch, Polars, DuckDB and heapq on the same rows, and against reading them.

    python -m benchmarks.select              (about ten minutes on two cores)
    python -m benchmarks.select --quick

Scores are float32 log-odds, drawn anew for every chunk: prepared blocks turned by some rows, plus an offset of each
row. Making them is outside the clock, and some chunks lie between the making and the reading, so that they come
from memory. Reading is np.max of the same chunks. Memory is the peak of a process for each size, all of it.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.record import write_table
from pipeline.pool.select.top_k import Selection, TopK

Scores = NDArray[np.float32]
Chunks = Iterator[tuple[NDArray[np.int64], Scores]]
OURS = "select_top_k"
FIRST = ("reading", OURS)  # in the table
RISE = 64.0  # nats from chunk to chunk where each beats all before


@dataclass(frozen=True)
class Case:
    """Classes, K, rows of a chunk and of the stream, rounds of ours, and rows for each rival (0: left out)."""

    classes: int
    k: int
    chunk: int
    rows: int
    rounds: int
    fewer: dict[str, int]


CASES = [
    Case(
        10,
        50_000,
        1 << 18,
        1 << 25,
        3,
        {
            "argpartition, merged chunk by chunk": 1 << 25,
            "torch.topk, merged chunk by chunk": 1 << 23,
            "argpartition, all in memory": 1 << 25,
            "Polars top_k_by": 1 << 23,
            "Polars sort and head": 1 << 25,
            "DuckDB arg_max(n)": 1 << 22,
            "DuckDB window, QUALIFY": 1 << 20,
            "heapq.nlargest": 1 << 18,
        },
    ),
    Case(
        1000,
        12_800,
        1 << 16,
        1 << 24,
        1,
        {
            "argpartition, merged chunk by chunk": 1 << 21,
            "torch.topk, merged chunk by chunk": 1 << 17,
            "argpartition, all in memory": 1 << 18,
            "Polars top_k_by": 1 << 16,
            "Polars sort and head": 1 << 16,
            "DuckDB arg_max(n)": 1 << 15,
            "DuckDB window, QUALIFY": 1 << 15,
            "heapq.nlargest": 0,
        },
    ),
]
QUICK = [
    Case(10, 500, 1 << 14, 1 << 18, 2, dict.fromkeys(CASES[0].fewer, 1 << 15)),
    Case(100, 128, 1 << 12, 1 << 16, 2, dict.fromkeys(CASES[0].fewer, 1 << 12)),
]
# Classes, k, rows of a chunk, rows of the streams whose memory is measured, rows of the rising one
STREAMS = [
    (10, 50_000, 1 << 16, [1_000_000, 3_000_000, 10_000_000, 30_000_000, 100_000_000], 10_000_000),
    (1000, 12_800, 1 << 13, [500_000, 1_000_000, 2_000_000, 5_000_000, 20_000_000], 500_000),
]
QUICK_STREAMS = [(10, 500, 1 << 12, [100_000, 400_000], 100_000), (100, 128, 1 << 10, [20_000, 80_000], 20_000)]


def log_odds(classes: int, chunk: int, blocks: int) -> list[Scores]:
    """Blocks of scores; every class has its own mean and spread."""
    random = np.random.default_rng(0)
    mean, spread = random.uniform(-8, -2, classes), random.uniform(1.5, 3, classes)
    shape = (chunk, classes)
    return [random.standard_normal(shape, np.float32) * np.float32(spread) + np.float32(mean) for _ in range(blocks)]


def stream(blocks: list[Scores], rows: int, between: int, rise: float = 0.0) -> Chunks:
    """`rows` rows in chunks, the same at every call; `between` chunks are made after one before it is read."""
    chunk = len(blocks[0])
    free = deque(np.empty_like(blocks[0]) for _ in range(between + 1))
    made: deque[tuple[NDArray[np.int64], Scores]] = deque()
    for number, start in enumerate(range(0, rows, chunk)):
        random = np.random.default_rng([1, number])
        offset = random.standard_normal((chunk, 1), np.float32) + np.float32(rise * number)
        block, turn, scores = blocks[number % len(blocks)], int(random.integers(chunk)), free.popleft()
        np.add(block[turn:], offset[turn:], out=scores[: chunk - turn])
        np.add(block[:turn], offset[:turn], out=scores[chunk - turn :])
        count = min(chunk, rows - start)
        made.append((np.arange(start, start + count), scores[:count]))
        if len(made) > between:
            yield made[0]
            free.append(made.popleft()[1].base)
    yield from made


class Clock:
    """Seconds spent by who takes the chunks, without those of who makes them."""

    def __init__(self) -> None:
        self.making = 0.0

    def around(self, chunks: Chunks) -> Chunks:
        """The chunks; the time to make them is counted apart."""
        while True:
            began = time.perf_counter()
            item = next(chunks, None)
            self.making += time.perf_counter() - began
            if item is None:
                return
            yield item


def seconds(work: Callable[[Chunks], Any], chunks: Chunks) -> tuple[float, Any]:
    """What `work` takes on its own, and its result."""
    clock, began = Clock(), time.perf_counter()
    result = work(clock.around(chunks))
    return time.perf_counter() - began - clock.making, result


def selected(chunks: Chunks, k: int, threads: int) -> Selection:
    """`select_top_k` with a number of threads."""
    state: TopK | None = None
    for rows, scores in chunks:
        state = state or TopK(k, scores.shape[1], threads=threads)
        state.add(rows, scores)
    assert state is not None
    return state.selection()


def read(chunks: Chunks, threads: int) -> float:
    """The highest score: as little as can be done with every byte."""
    highest = -math.inf
    with ThreadPoolExecutor(threads) as pool:
        for _, scores in chunks:
            edges = [len(scores) * i // threads for i in range(threads + 1)]
            blocks = [scores[a:b].reshape(-1) for a, b in pairwise(edges)]
            highest = max(highest, *(map(np.max, blocks) if threads == 1 else pool.map(np.max, blocks)))
    return highest


def agreement(result: list[NDArray[np.int64]], truth: Selection) -> str:
    """How far a rival's rows are the selection's; anything but ties is an error."""
    if all(np.array_equal(a, b) for a, b in zip(result, truth.rows, strict=True)):
        return "same rows and order"
    for rows, right, scores in zip(result, truth.rows, truth.scores, strict=True):
        sure = right[scores > scores[-1]]
        if len(rows) != len(right) or not np.isin(sure, rows).all():
            raise AssertionError("a rival keeps other rows")
    return "same but for ties"


class Contest:
    """One case: the best time of every contender, and how its result compares."""

    def __init__(self, case: Case, threads: int) -> None:
        self.case, self.threads, self.counts = case, threads, sorted({1, threads})
        self.between = max(1, (1 << 27) // (case.chunk * case.classes * 4))
        self.blocks = log_odds(case.classes, case.chunk, 4)
        self.best: dict[tuple[str, int, int], float] = {}
        self.agreements: dict[str, str] = {}
        self.truths: dict[int, Selection] = {}

    def round(self) -> None:
        """Every contender once."""
        from benchmarks.rivals import IN_MEMORY, STREAMED

        case = self.case
        for count in self.counts:
            self._run("reading", count, case.rows, partial(read, threads=count))
        for rows in sorted({case.rows, *case.fewer.values()} - {0}):  # ours on as few as the rivals, too
            for count in self.counts:
                self._run(OURS, count, rows, partial(selected, k=case.k, threads=count))
        for name, rival in STREAMED.items():
            for count in self.counts:
                self._check(name, self._run(name, count, case.fewer[name], partial(rival, k=case.k, threads=count)))
        for name, (prepare, rival) in IN_MEMORY.items():
            if not (rows := case.fewer[name]):
                continue
            ready = prepare(np.concatenate([scores.copy() for _, scores in stream(self.blocks, rows, 0)]))
            for count in self.counts if name.startswith("argpartition") else [self.threads]:
                work = partial(rival, ready, case.k, count)
                self._check(name, self._run(name, count, rows, lambda _, work=work: work()))

    def table(self) -> list[list[object]]:
        """Rates; what they are of the selection's on as many threads, on the same rows and on all; and of reading's."""
        rate = {key: key[2] / spent for key, spent in self.best.items()}
        rows_of_table: list[list[object]] = []
        for (name, count, rows), speed in sorted(rate.items(), key=lambda item: (item[0][0] not in FIRST, -item[1])):
            ours = [rate[OURS, count, size] / speed for size in (rows, self.case.rows)]
            rows_of_table.append(
                [
                    f"C = {self.case.classes}, K = {self.case.k:,}",
                    name,
                    count,
                    f"{rows:,}",
                    f"{speed / 1e6:.4g} M",
                    *(["", ""] if name in FIRST else [f"{ratio:.1f}×" for ratio in ours]),
                    f"{speed / rate['reading', count, self.case.rows]:.1%}",
                    self.agreements.get(name, ""),
                ]
            )
        return rows_of_table

    def _run(self, name: str, count: int, rows: int, work: Callable[[Chunks], Any]) -> Any:
        spent, result = seconds(work, stream(self.blocks, rows, self.between))
        key = name, count, rows
        self.best[key] = min(self.best.get(key, math.inf), spent)
        sys.stderr.write(f"C = {self.case.classes}: {name}, {count} threads, {rows:,} rows: {spent:.2f} s\n")
        return rows, result

    def _check(self, name: str, outcome: tuple[int, list[NDArray[np.int64]]]) -> None:
        rows, result = outcome
        if rows not in self.truths:
            self.truths[rows] = selected(stream(self.blocks, rows, 0), self.case.k, self.threads)
        self.agreements[name] = agreement(result, self.truths[rows])


def compared(case: Case, threads: int) -> list[list[object]]:
    """A row of the table for every contender."""
    contest = Contest(case, threads)
    for _ in range(case.rounds):
        contest.round()
    return contest.table()


def streamed(classes: int, k: int, chunk: int, rows: int, rise: float, threads: int) -> dict[str, float]:
    """Seconds and peak memory (MiB) of a stream; call it in a fresh process."""
    before = peak_memory()
    blocks = log_odds(classes, chunk, 2)
    spent, _ = seconds(lambda chunks: selected(chunks, k, threads), stream(blocks, rows, 0, rise))
    return {"seconds": spent, "peak": peak_memory(), "imports": before}


def peak_memory() -> float:
    """MiB of this process since it began; ru_maxrss would begin with its parent's."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 1024


def in_fresh_process(arguments: list[Any]) -> dict[str, float]:
    """`streamed` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.select", "--stream", json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    figures: dict[str, float] = json.loads(done.stdout)
    sys.stderr.write(f"{arguments}: {figures}\n")
    return figures


def memory(streams: list[Any], threads: int) -> tuple[list[list[object]], list[str]]:
    """Rows of the table, and the exponents of time against rows."""
    table: list[list[object]] = []
    exponents = []
    for classes, k, chunk, sizes, rising in streams:
        times = []
        for rows, rise in [*((size, 0.0) for size in sizes), (rising, RISE)]:
            figures = in_fresh_process([classes, k, chunk, rows, rise, threads])
            if not rise:
                times.append(figures["seconds"])
            table.append(
                [
                    f"C = {classes}, K = {k:,}",
                    "each chunk beats all before" if rise else "random",
                    f"{rows:,}",
                    f"{figures['seconds']:.2f} s",
                    f"{rows / figures['seconds'] / 1e6:.3g} M",
                    f"{figures['peak']:.0f} MiB",
                    f"{figures['imports']:.0f} MiB",
                ]
            )
        slope = np.polyfit(np.log(sizes), np.log(times), 1)[0]
        exponents.append(f"C = {classes}: {slope:.2f}")
    return table, exponents


def main() -> None:
    """Measure, and write the two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rows", type=int, nargs=2, help="of the compared streams, C = 10 and C = 1000")
    parser.add_argument("--only", choices=["speed", "memory"])
    parser.add_argument("--quick", action="store_true", help="small, to see that it runs")
    parser.add_argument("--stream", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.stream:
        sys.stdout.write(json.dumps(streamed(*json.loads(a.stream))))
        return
    os.environ["POLARS_MAX_THREADS"] = str(a.threads)  # before it is imported
    command = " ".join(["python -m benchmarks.select", f"--threads {a.threads}", *(["--quick"] * a.quick)])
    ending = "-quick" if a.quick else ""
    cases = QUICK if a.quick else CASES
    if a.rows:
        cases = [replace(c, rows=rows) for c, rows in zip(cases, a.rows, strict=True)]
        command += f" --rows {a.rows[0]} {a.rows[1]}"
    if a.only != "memory":
        table = [row for case in cases for row in compared(case, a.threads)]
        head = [
            "",
            "",
            "threads",
            "rows",
            "rows/s",
            "select, same rows",
            "select, whole stream",
            "of reading",
            "result",
        ]
        note = (
            "Rivals that are too slow have fewer rows: how much faster select_top_k is on as many, and on the whole "
            "stream. In memory, a rival's own format is made outside the clock. reading is np.max of the same chunks. "
            "C = 10: the best of three interleaved rounds; C = 1000: single runs."
        )
        write_table(f"select{ending}", head, table, command, note)
    if a.only != "speed":
        table, exponents = memory(QUICK_STREAMS if a.quick else STREAMS, a.threads)
        head = ["", "order", "rows", "time", "rows/s", "peak memory", "of it before the first row"]
        note = f"Exponent of time against rows (random order): {'; '.join(exponents)}. A process for each line."
        write_table(f"select-memory{ending}", head, table, command, note)


if __name__ == "__main__":
    main()
