"""What `mpl plan` predicts against what is measured: peak memory and time of a step, on this machine.

    python -m benchmarks.plan
    python -m benchmarks.plan --device cuda --batch 128

Memory is of a process of its own: on a CPU, tensors alive at a time as torch's allocator reports them to its profiler,
and the peak resident memory beyond what stood before the networks were built; on CUDA the allocator's peak. Time is the
median of a few steps against the operations that the plan counts, at the rate that a plain step reaches in the same
process.
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.record import write_table
from pipeline.config import CalibratorSettings, ModelSettings, OptimizerSettings
from pipeline.methods import parse_method
from pipeline.plan.calibrate import measured_flops
from pipeline.plan.footprint import Images
from pipeline.plan.needs import Needs
from pipeline.plan.predict import Layout, Prediction
from pipeline.plan.step import PlannedMethod, Step, StepSettings, TeacherSettings

CASES = [("wrn_28_2", 32), ("resnet18", 32), ("efficientnet_b0", 64), ("vit_tiny_patch16_224", 64)]
VARIANTS: dict[str, tuple[PlannedMethod, Layout]] = {
    "reduced": ("reduced", Layout(1, 1)),
    "reduced, 4 micro-batches": ("reduced", Layout(1, 1, micro_batches=4)),
    "full, soft": ("mpl-soft", Layout(1, 1)),
    "full, soft, 4 micro-batches": ("mpl-soft", Layout(1, 1, micro_batches=4)),
    "full, hard": ("mpl-hard", Layout(1, 1)),
    "full, hard, checkpointing": ("mpl-hard", Layout(1, 1, checkpointing=True)),
}
CLASSES, STEPS = 10, 2
OPTIMIZER = OptimizerSettings(rule="rmsprop_tf", lr=1e-4)


def needs_of(variant: str, case: tuple[str, int], batch: int, precision: str) -> Needs:
    """As many images for feedback as pool images, half as many labelled ones for a teacher."""
    method, model = VARIANTS[variant][0], ModelSettings(name=case[0])
    reduced = method == "reduced"
    teacher = CalibratorSettings() if reduced else TeacherSettings(model, OPTIMIZER, parse_method("uda"))
    dtype = torch.bfloat16 if precision == "bf16" else None
    settings = StepSettings(method, model, OPTIMIZER, case[1], CLASSES, dtype, teacher)
    return Needs(settings, Images(batch, batch, 0 if reduced else batch // 2, settings.lesson_pool), STEPS)


def make(variant: str, case: tuple[str, int], batch: int, device: str, precision: str) -> Callable[[], None]:
    """One whole step of a variant, on real data."""
    torch.manual_seed(0)
    needs, layout = needs_of(variant, case, batch, precision), VARIANTS[variant][1]
    step = Step(needs.settings, checkpointing=layout.checkpointing, micro_batches=layout.micro_batches, device=device)
    seen, labelled = step.batch(needs.images, device)
    return lambda: step.take(seen, labelled)


def measure(variant: str, case: tuple[str, int], batch: int, device: str, precision: str, rounds: int) -> list[float]:
    """[peak of tensors, peak of the process (both MiB, beyond the start), seconds a step, FLOP/s of a plain step].

    Call it in a fresh process.
    """
    if rounds:
        step = make(variant, case, batch, device, precision)
        seconds = [_seconds(step, device) for _ in range(rounds + 1)]
        settings = needs_of(variant, case, batch, precision).settings
        rate = measured_flops(settings, torch.device(device), images=batch, steps=rounds)
        return [0.0, 0.0, statistics.median(seconds[1:]), rate]
    make("reduced", ("wrn_10_1", 16), 4, device, precision)()  # libraries and their threads are there before the start
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        base = torch.cuda.memory_allocated()
        _steps(make(variant, case, batch, device, precision))
        peak = (torch.cuda.max_memory_allocated() - base) / 2**20
        return [peak, peak, 0.0, 0.0]
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # reset the peak
    base = _resident("VmRSS")
    _steps(make(variant, case, batch, device, precision))
    resident = (_resident("VmHWM") - base) / 1024
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        _steps(make(variant, case, batch, device, precision))
    return [_allocated(profile) / 2**20, resident, 0.0, 0.0]


def _steps(step: Callable[[], None]) -> None:
    for _ in range(STEPS):
        step()


def _allocated(profile: Any) -> float:
    """Peak of the bytes that torch's CPU allocator had given out within the profile."""
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def _resident(key: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key))


def _seconds(step: Callable[[], Any], device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize()
    began = time.perf_counter()
    step()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def in_fresh_process(arguments: list[Any], threads: int) -> list[float]:
    """`measure` in a process of its own; freed memory goes back at once, so that the peak is of what lives."""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    command = [sys.executable, "-m", "benchmarks.plan", "--threads", str(threads), "--measure", json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Predict and measure every case and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=["float32", "bf16"], default="float32")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    if a.measure:
        variant, case, *rest = json.loads(a.measure)
        sys.stdout.write(json.dumps(measure(variant, tuple(case), *rest)) + "\n")
        return
    rows = []
    for case in CASES:
        for variant in a.variants:
            step = Prediction(needs_of(variant, case, a.batch, a.precision), VARIANTS[variant][1])
            predicted = step.peak.total / 2**20
            arguments = [variant, case, a.batch, a.device, a.precision]
            tensors, resident, *_ = in_fresh_process([*arguments, 0], a.threads)
            *_, seconds, rate = in_fresh_process([*arguments, a.rounds], a.threads)
            rows.append(
                [
                    f"{case[0]}, {case[1]} px, {variant}",
                    f"{predicted:.0f} MiB",
                    f"{predicted / tensors:.3f}",
                    f"{predicted / resident:.2f}",
                    f"{1000 * step.flops() / rate:.0f} ms",
                    f"{step.flops() / rate / seconds:.2f}",
                ]
            )
            sys.stderr.write(" | ".join(rows[-1]) + "\n")
    name = a.device.split(":")[0]
    write_table(
        f"plan-{name}-{a.precision}-{a.batch}",
        ["", "memory, predicted", "/ tensors", "/ process", "step, predicted", "/ measured"],
        rows,
        f"python -m benchmarks.plan --device {a.device} --precision {a.precision} --batch {a.batch} "
        f"--rounds {a.rounds} --threads {a.threads}",
        f"Predicted over measured; batch {a.batch}, as many labelled images for feedback, half for the teacher. "
        f"Times are medians of {a.rounds} steps, predicted from the operations and a plain step's rate.",
    )


if __name__ == "__main__":
    main()
