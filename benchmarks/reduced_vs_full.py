"""One step of Reduced MPL against one of full MPL, with the same student: peak memory and time.

    python -m benchmarks.reduced_vs_full                  (CPU, float32, minutes)
    python -m benchmarks.reduced_vs_full --models wrn_28_2 --batches 128 --uda 7 --rounds 3
    python -m benchmarks.reduced_vs_full --device cuda --precision bf16 --batches 128 512

Reduced MPL has a calibrator for a teacher, and stored distributions; full MPL a second network like the student, that
learns by UDA. A step has B pool images for the student and B labelled ones for the feedback; full MPL also has B
labelled images and uda × B pool images in two views for its teacher (with uda = 1 they are the student's, else others).
Images are made up and lie on the device: it is the networks' work that is measured.

Times are medians of ratios of interleaved rounds; of the processor with one thread on a CPU, so that others on the
machine do not count, else by the wall. Peak memory is of a process of its own per method, over two steps,
beyond what stood before its networks were made: weights, optimiser state, images and activations.
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

import timm
import torch
from torch import Tensor, nn

from benchmarks.record import write_table
from benchmarks.step import resident_kib, synchronise
from pipeline.batches import Batch, Labelled, TargetBatch, ViewBatch
from pipeline.config import (
    CalibratorSettings,
    FeedbackSettings,
    ModelSettings,
    MplFeedbackSettings,
    OptimizerSettings,
)
from pipeline.distributed.placement import Placement
from pipeline.methods import Views
from pipeline.methods.uda import Uda
from pipeline.networks.network import resolve
from pipeline.optim import build_optimizer
from pipeline.student import Student
from pipeline.teacher_network import TeacherNetwork, TeacherRule
from pipeline.teachers import Calibrator, Teacher
from pipeline.training import train_step

SIDES = {"wrn_28_2": 32, "resnet18": 32, "efficientnet_b0": 64}  # pixels
METHODS = ("reduced", "soft", "hard")
CLASSES = 10
OPTIMIZER = OptimizerSettings(rule="nesterov", lr=0.01, momentum=0.9, weight_decay=5e-4)


def make(method: str, model: str, batch: int, uda: int, device: str, precision: str) -> Callable[[], None]:
    """A step of one method, as a function."""
    torch.manual_seed(0)
    autocast = torch.bfloat16 if precision == "bf16" else None
    placement = Placement(torch.device(device), autocast)
    learner = network(model, device)
    student = Student(learner, build_optimizer(learner, OPTIMIZER), autocast=autocast)
    labels = torch.randint(0, CLASSES, (batch,), device=device)
    labelled = Labelled(pixels(batch, model, device), labels, distributions(batch, device))
    images, every = pixels(batch, model, device), torch.ones(batch, dtype=torch.bool, device=device)
    teacher: Teacher[Any, Any]
    seen: Batch
    if method == "reduced":
        seen = TargetBatch(images, distributions(batch, device), every)
        teacher = Calibrator(CLASSES, CalibratorSettings(), FeedbackSettings(), placement)
    else:
        views = Views(
            step=0,
            labelled=pixels(batch, model, device),
            targets=torch.eye(CLASSES, device=device)[labels],
            partner=None,
            uniform=torch.rand(batch, device=device),
            pool=images if uda == 1 else pixels(uda * batch, model, device),
            pool_weak=pixels(uda * batch, model, device),
        )
        seen = ViewBatch(images, views)
        taught = network(model, device)
        rule = TeacherRule(Uda(), method, MplFeedbackSettings(), lambda step: OPTIMIZER.lr)  # type: ignore[arg-type]
        teacher = TeacherNetwork(taught, build_optimizer(taught, OPTIMIZER), rule, placement)
    wish = teacher.wish(0)

    def step() -> None:
        train_step(student, teacher, seen, labelled, wish)

    return step


def network(model: str, device: str) -> nn.Module:
    """A fresh one in training mode, channels last."""
    name, arguments = resolve(ModelSettings(name=model), SIDES[model])
    made = timm.create_model(name, num_classes=CLASSES, **arguments)
    return made.to(device=device, memory_format=torch.channels_last).train()  # type: ignore[no-any-return]


def pixels(count: int, model: str, device: str) -> Tensor:
    """Made-up images, (count, 3, S, S)."""
    side = SIDES[model]
    return torch.randn(count, 3, side, side, device=device).contiguous(memory_format=torch.channels_last)


def distributions(count: int, device: str) -> Tensor:
    """Made-up distributions, (count, C)."""
    return torch.randn(count, CLASSES, device=device).softmax(1)


def peak_memory(method: str, model: str, batch: int, uda: int, device: str, precision: str) -> float:
    """MiB of two steps, networks and images included, measured here (call it in a fresh process)."""
    warm = make(method, model, 2, 1, device, precision)
    warm()  # code is loaded and compiled
    del warm
    gc.collect()
    if device != "cpu":
        torch.cuda.synchronize()
        base = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    else:
        base = resident_kib("VmRSS")
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # reset the peak
    step = make(method, model, batch, uda, device, precision)
    for _ in range(2):
        step()
    if device != "cpu":
        return (torch.cuda.max_memory_allocated() - base) / 2**20
    return (resident_kib("VmHWM") - base) / 1024


def in_fresh_process(arguments: list[Any]) -> float:
    """Peak memory of one method; freed memory goes back at once, so that the peak is of what lives."""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    command = [sys.executable, "-m", "benchmarks.reduced_vs_full", "--memory-of", json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return float(done.stdout.splitlines()[-1])


def interleaved(
    steps: dict[str, Callable[[], None]], rounds: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Seconds of each step in each round; a first round warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(rounds + 1):
        for name, step in steps.items():
            began = clock()
            step()
            if round_:
                seconds[name].append(clock() - began)
    return seconds


def passes(method: str, uda: int) -> int:
    """Forward passes of B images that a step is worth, where a backward pass is two and a JVP is three."""
    student_and_feedback = {"reduced": 3 + 3 + 3, "soft": 3 + 3 + 3, "hard": 3 + 2}[method]
    if method == "reduced":
        return student_and_feedback
    also = 0 if uda == 1 else 1  # the student's images, where the teacher's lesson does not hold them
    return student_and_feedback + uda + 3 * (1 + uda + also)  # weak view; labelled, strong view, student's


def main() -> None:
    """Measure every case and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(SIDES), default=list(SIDES))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=["float32", "bf16"], default="float32")
    parser.add_argument("--batches", type=int, nargs="+", default=[64], help="B")
    parser.add_argument("--uda", type=int, nargs="+", default=[1], help="pool images of the teacher for each labelled")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    if a.memory_of:
        sys.stdout.write(f"{peak_memory(*json.loads(a.memory_of))}\n")
        return
    by_processor = a.device == "cpu" and a.threads == 1

    def clock() -> float:
        synchronise(a.device)
        return time.process_time() if by_processor else time.perf_counter()

    rows = []
    for model, batch, uda in ((m, b, u) for u in a.uda for b in a.batches for m in a.models):
        case = (model, batch, uda, a.device, a.precision)
        memory = {method: in_fresh_process([method, *case]) for method in METHODS}
        seconds = interleaved({method: make(method, *case) for method in METHODS}, a.rounds, clock)
        rows.append(
            [
                f"{model}, {SIDES[model]} px, B = {batch}, uda = {uda}",
                f"{1000 * statistics.median(seconds['reduced']):,.0f} ms",
                *(against(seconds, method) for method in METHODS[1:]),
                *(f"{passes('reduced', uda) / passes(method, uda):.2f}×" for method in METHODS[1:]),
                f"{memory['reduced']:,.0f} MiB",
                *(f"{memory['reduced'] / memory[method]:.2f}×" for method in METHODS[1:]),
            ]
        )
    columns = ["against full, soft", "against full, hard"]
    write_table(
        f"reduced-vs-full-{a.device.split(':')[0]}-{a.precision}",
        ["", "Reduced MPL, a step", *columns, "by passes, soft", "by passes, hard", "peak memory", *columns],
        rows,
        f"python -m benchmarks.reduced_vs_full --models {' '.join(a.models)} --device {a.device} --precision "
        f"{a.precision} --batches {' '.join(map(str, a.batches))} --uda {' '.join(map(str, a.uda))} "
        f"--rounds {a.rounds} --threads {a.threads}",
        f"SGD with Nesterov momentum; {'processor' if by_processor else 'wall'} time, n = {a.rounds} interleaved "
        "rounds, medians of ratios (least–most); peaks from separate processes, weights and "
        "optimiser state included.",
    )


def against(seconds: dict[str, list[float]], method: str) -> str:
    """Median ratio of Reduced MPL's time to a method's in the same round, with least and most."""
    ratios = [reduced / other for reduced, other in zip(seconds["reduced"], seconds[method], strict=True)]
    return f"{statistics.median(ratios):.2f}× ({min(ratios):.2f}–{max(ratios):.2f})"


if __name__ == "__main__":
    main()
