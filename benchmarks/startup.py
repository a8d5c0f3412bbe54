"""Seconds that `mpl --help` takes: the median of 20 runs.

python -m benchmarks.startup
"""

import statistics
import subprocess
import sys
import time

from benchmarks.record import write_table

RUNS = 20


def main() -> None:
    """Measure and write the table."""
    seconds = []
    for _ in range(RUNS):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-m", "stages", "--help"], check=True, capture_output=True)
        seconds.append(time.perf_counter() - began)
    rows = [["mpl --help", f"{statistics.median(seconds):.3f}", f"{min(seconds):.3f}", f"{max(seconds):.3f}"]]
    write_table("startup", ["", "median, s", "least", "most"], rows, "python -m benchmarks.startup")


if __name__ == "__main__":
    main()
