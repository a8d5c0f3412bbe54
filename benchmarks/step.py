"""The student's step with exact feedback against a plain step and against double backward: time and peak memory.

    python -m benchmarks.step                        (CPU, float32)
    python -m benchmarks.step --device cuda --precision bf16 --batches 128 256 512 1024

Feedback at every step, on a labelled batch as large as the training batch. Times are medians of ratios of
interleaved runs in one process. Peak memory is of a process of its own per variant: on a CPU the peak resident
memory beyond what stood before the first step, on CUDA the allocator's peak.
"""

import argparse
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
import torch.nn.functional as F
from timm.optim import RMSpropTF
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.record import write_table
from pipeline.config import ModelSettings
from pipeline.networks.network import resolve
from pipeline.student import Student

CASES = [("resnet18", 32), ("efficientnet_b0", 64), ("vit_tiny_patch16_224", 64)]  # the ViT gets patches of 8
VARIANTS = ("plain", "exact", "double")
SLOW_ROUNDS = 3  # of double backward, many times slower than the others
CLASSES = 10


def make(name: str, size: int, batch: int, device: str, precision: str) -> dict[str, Callable[[], None]]:
    """The variants of one step, on one model and batch."""
    torch.manual_seed(0)
    name, arguments = resolve(ModelSettings(name=name), size)
    model = timm.create_model(name, num_classes=CLASSES, **arguments)
    model.to(device=device, memory_format=torch.channels_last).train()
    optimizer = RMSpropTF(model.parameters(), lr=1e-4, momentum=0.9, eps=1e-3)
    autocast = torch.bfloat16 if precision == "bf16" else None
    student = Student(model, optimizer, autocast=autocast)
    images, labelled = (
        torch.randn(batch, 3, size, size, device=device).contiguous(memory_format=torch.channels_last) for _ in range(2)
    )
    targets = torch.randn(batch, CLASSES, device=device).softmax(1)
    labels = torch.randint(0, CLASSES, (batch,), device=device)

    def plain() -> None:
        student.learn(images, targets, replay=False)

    def exact() -> None:
        student.learn(images, targets).target_gradient(labelled, labels)

    def double() -> None:
        """Autograd through the update, then the plain optimiser step."""
        q = targets.clone().requires_grad_()
        parameters = dict(model.named_parameters())
        with sdpa_kernel(SDPBackend.MATH), torch.autocast(device, autocast, enabled=autocast is not None):
            loss = -(q * F.log_softmax(model(images).float(), 1)).sum(1).mean()
            gradients = torch.autograd.grad(loss, list(parameters.values()), create_graph=True)
            group, after = optimizer.param_groups[0], {}
            for (key, p), g in zip(parameters.items(), gradients, strict=True):
                square = optimizer.state[p]["square_avg"]
                square = square + (1 - group["alpha"]) * (g**2 - square)
                moved = group["momentum"] * optimizer.state[p]["momentum_buffer"]
                after[key] = p - moved - group["lr"] * g / (square + group["eps"]).sqrt()
            buffers = {key: b.clone() for key, b in model.named_buffers()}
            feedback = F.cross_entropy(functional_call(model, after | buffers, (labelled,)).float(), labels)
            torch.autograd.grad(feedback, q)
        for p, g in zip(parameters.values(), gradients, strict=True):
            p.grad = g.detach()
        optimizer.step()

    plain()  # the optimiser's state comes into being
    return {"plain": plain, "exact": exact, "double": double}


def synchronise(device: str) -> None:
    """Wait for the accelerator."""
    if device != "cpu":
        torch.cuda.synchronize()


def timed(steps: dict[str, Callable[[], None]], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of each variant, interleaved; of the slow one the first few rounds."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(rounds + 1):
        for name, step in steps.items():
            if name == "double" and round_ > SLOW_ROUNDS:
                continue
            synchronise(device)
            began = time.perf_counter()
            step()
            synchronise(device)
            if round_:  # the first round warms up
                seconds[name].append(time.perf_counter() - began)
    return seconds


def peak_memory(variant: str, case: tuple[str, int], batch: int, device: str, precision: str) -> float:
    """MiB beyond what stood before the first step, measured here (call it in a fresh process)."""
    step = make(*case, batch, device, precision)[variant]
    if device != "cpu":
        torch.cuda.synchronize()
        base = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        for _ in range(2):
            step()
        return (torch.cuda.max_memory_allocated() - base) / 2**20
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # reset the peak
    base = resident_kib("VmRSS")
    for _ in range(2):
        step()
    return (resident_kib("VmHWM") - base) / 1024


def resident_kib(key: str) -> int:
    """VmRSS or VmHWM (its peak) of this process, KiB."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key))


def in_fresh_process(arguments: list[Any]) -> float:
    """Peak memory of one variant; freed memory goes back at once, so that the peak is of what lives."""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    command = [sys.executable, "-m", "benchmarks.step", "--memory-of", json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return float(done.stdout.splitlines()[-1])


def main() -> None:
    """Measure every case and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=["float32", "bf16"], default="float32")
    parser.add_argument("--batches", type=int, nargs="+", default=[64])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    if a.memory_of:
        variant, case, batch, device, precision = json.loads(a.memory_of)
        sys.stdout.write(f"{peak_memory(variant, tuple(case), batch, device, precision)}\n")
        return
    rows = []
    for case in CASES:
        for batch in a.batches:
            seconds = timed(make(*case, batch, a.device, a.precision), a.rounds, a.device)
            memory = {v: in_fresh_process([v, case, batch, a.device, a.precision]) for v in VARIANTS}
            plain = seconds["plain"]
            ratio = {v: statistics.median(t / p for t, p in zip(seconds[v], plain, strict=False)) for v in VARIANTS}
            rows.append(
                [
                    f"{case[0]}, {case[1]} px, batch {batch}",
                    f"{1000 * statistics.median(plain):.0f} ms",
                    *(f"{ratio[v]:.2f}×" for v in VARIANTS[1:]),
                    f"{memory['plain']:.0f} MiB",
                    *(f"{memory[v] / memory['plain']:.2f}×" for v in VARIANTS[1:]),
                ]
            )
    head = [
        "",
        "plain step",
        "exact feedback",
        "double backward",
        "plain peak",
        "exact feedback",
        "double backward",
    ]
    batches = " ".join(map(str, a.batches))
    write_table(
        f"step-{a.device.split(':')[0]}-{a.precision}",
        head,
        rows,
        f"python -m benchmarks.step --device {a.device} --precision {a.precision} --batches {batches} "
        f"--rounds {a.rounds} --threads {a.threads}",
        f"RMSprop as TensorFlow has it; n = {a.rounds} interleaved rounds (double backward: "
        f"{min(a.rounds, SLOW_ROUNDS)}), medians of ratios; peaks from separate processes.",
    )


if __name__ == "__main__":
    main()
