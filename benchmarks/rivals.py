"""The best K rows of every class by means that are at hand: numpy, torch, Polars, DuckDB, heapq.

Each as fast as it could be made without leaving the library. A rival over a stream takes chunks of (row ids (n,),
scores (n, C)); one in memory takes what `prepare` makes of all rows, in its own format and outside the clock. All
give row ids per class, best first where they can order them.
"""

import heapq
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import duckdb
import numpy as np
import polars
import pyarrow as pa
import torch
from numpy.typing import NDArray

Chunks = Iterable[tuple[NDArray[np.int64], NDArray[np.float32]]]
Rows = list[NDArray[np.int64]]


def merged_argpartition(chunks: Chunks, k: int, threads: int) -> Rows:
    """np.argpartition of the k best so far and a transposed chunk, class by class, classes spread over threads."""
    scores: list[Any] = []
    rows: list[Any] = []

    def take(classes: range, ids: Any, chunk: Any) -> None:
        columns = np.ascontiguousarray(chunk[:, classes.start : classes.stop].T)  # (c, n)
        for c, column in zip(classes, columns, strict=True):
            s, r = np.concatenate([scores[c], column]), np.concatenate([rows[c], ids])
            if s.size > k:
                i = np.argpartition(s, s.size - k)[s.size - k :]
                s, r = s[i], r[i]
            scores[c], rows[c] = s, r

    with ThreadPoolExecutor(threads) as pool:
        for ids, chunk in chunks:
            count = chunk.shape[1]
            if not scores:
                scores, rows = [np.empty(0, np.float32)] * count, [np.empty(0, np.int64)] * count
            edges = [count * i // threads for i in range(threads + 1)]
            runs = [range(a, b) for a, b in pairwise(edges)]
            list(pool.map(take, runs, [ids] * threads, [chunk] * threads))
    return [r[np.lexsort((r, -s))] for s, r in zip(scores, rows, strict=True)]


def merged_topk(chunks: Chunks, k: int, threads: int) -> Rows:
    """torch.topk of the k best so far and a chunk, all classes at once."""
    torch.set_num_threads(threads)
    scores = rows = None
    for ids, chunk in chunks:
        columns = torch.from_numpy(chunk).T  # (C, n)
        numbers = torch.from_numpy(ids).expand(columns.shape)
        if scores is not None:
            columns, numbers = torch.cat([scores, columns], 1), torch.cat([rows, numbers], 1)
        scores, places = columns.topk(min(k, columns.shape[1]), 1, sorted=False)
        rows = numbers.gather(1, places)
    places = scores.sort(dim=1, descending=True).indices
    return list(rows.gather(1, places).numpy())


def columns_of(scores: NDArray[np.float32]) -> NDArray[np.float32]:
    """Scores (C, n), contiguous."""
    return np.ascontiguousarray(scores.T)


def argpartition(columns: NDArray[np.float32], k: int, threads: int) -> Rows:
    """np.argpartition of every class's column, all in memory, columns spread over threads."""

    def best_rows(column: NDArray[np.float32]) -> NDArray[np.int64]:
        places = np.argpartition(column, column.size - k)[column.size - k :]
        return places[np.lexsort((places, -column[places]))]

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(best_rows, columns))


def frame_of(scores: NDArray[np.float32]) -> polars.DataFrame:
    """Polars: a column of row ids, and one of scores for each class."""
    columns = columns_of(scores)
    return polars.DataFrame({"row": np.arange(len(scores))} | {f"c{c}": column for c, column in enumerate(columns)})


def polars_top_k_by(frame: polars.DataFrame, k: int, threads: int) -> Rows:
    """Expression.top_k_by, one for each class, run side by side by Polars."""
    chosen = [polars.col("row").top_k_by(f"c{c}", k).alias(f"{c}") for c in range(frame.width - 1)]
    return [column.to_numpy() for column in frame.select(chosen)]


def polars_sort(frame: polars.DataFrame, k: int, threads: int) -> Rows:
    """Expression.sort_by and head, one for each class."""
    chosen = [polars.col("row").sort_by(f"c{c}", descending=True).head(k).alias(f"{c}") for c in range(frame.width - 1)]
    return [column.to_numpy() for column in frame.select(chosen)]


def wide_table(scores: NDArray[np.float32]) -> duckdb.DuckDBPyConnection:
    """DuckDB, in memory: a row with its id and a score of every class."""
    columns = {"row": np.arange(len(scores))} | {f"c{c}": column for c, column in enumerate(columns_of(scores))}
    connection = duckdb.connect()
    connection.register("given", pa.table(columns))
    connection.execute("CREATE TABLE scores AS SELECT * FROM given")
    return connection


def duckdb_arg_max(connection: duckdb.DuckDBPyConnection, k: int, threads: int) -> Rows:
    """arg_max(row, score, k) of every class in one query."""
    connection.execute(f"SET threads = {threads}")
    count = len(connection.execute("DESCRIBE scores").fetchall()) - 1
    chosen = ", ".join(f"arg_max(row, c{c}, {k})" for c in range(count))
    table = connection.sql(f"SELECT {chosen} FROM scores").to_arrow_table()
    return [column.chunk(0).values.to_numpy() for column in table.columns]


def long_table(scores: NDArray[np.float32]) -> duckdb.DuckDBPyConnection:
    """DuckDB, in memory: a row for each image and class."""
    rows, classes = scores.shape
    columns = {
        "class": np.tile(np.arange(classes, dtype=np.int16), rows),
        "row": np.repeat(np.arange(rows), classes),
        "score": scores.reshape(-1),
    }
    connection = duckdb.connect()
    connection.register("given", pa.table(columns))
    connection.execute("CREATE TABLE scores AS SELECT * FROM given")
    return connection


def duckdb_window(connection: duckdb.DuckDBPyConnection, k: int, threads: int) -> Rows:
    """row_number() over a window with QUALIFY: the one query that can state the rule for ties."""
    connection.execute(f"SET threads = {threads}")
    rows = connection.execute(
        'SELECT class, row, row_number() OVER (PARTITION BY class ORDER BY score DESC, "row") AS place '
        f"FROM scores QUALIFY place <= {k} ORDER BY class, place"
    ).fetchnumpy()
    edges = np.flatnonzero(np.diff(rows["class"])) + 1
    return np.split(rows["row"], edges)


def heaps(columns: NDArray[np.float32], k: int, threads: int) -> Rows:
    """heapq.nlargest of every class."""
    classes = []
    for column in columns:
        pairs = heapq.nlargest(k, zip(column.tolist(), range(0, -column.size, -1), strict=True))
        classes.append(-np.array([row for _, row in pairs]))
    return classes


STREAMED: dict[str, Callable[[Chunks, int, int], Rows]] = {
    "argpartition, merged chunk by chunk": merged_argpartition,
    "torch.topk, merged chunk by chunk": merged_topk,
}
IN_MEMORY: dict[str, tuple[Callable[[NDArray[np.float32]], Any], Callable[[Any, int, int], Rows]]] = {
    "argpartition, all in memory": (columns_of, argpartition),
    "Polars top_k_by": (frame_of, polars_top_k_by),
    "Polars sort and head": (frame_of, polars_sort),
    "DuckDB arg_max(n)": (wide_table, duckdb_arg_max),
    "DuckDB window, QUALIFY": (long_table, duckdb_window),
    "heapq.nlargest": (columns_of, heaps),
}
