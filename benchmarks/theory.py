"""Time the theory lab: closed forms, Monte Carlo against drawing its numbers, all claims.

    python benchmarks/theory.py [--device cpu] [--claims]

Asked for: closed forms of 10,000 settings in under 1 s; Monte Carlo in at most 1.5 times the time
of drawing its random numbers (processor time of one thread; on a GPU wall time); all claims at
default precision in at most 60 s on 2 cores.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch

from keepshot.progress import Silent
from keepshot.theory import exact, optima
from keepshot.theory.document import DEFAULT_CLAIMS, TheorySpec
from keepshot.theory.experiments import run_claims
from keepshot.theory.lab import Lab
from keepshot.theory.linear_attention import Attention, World
from keepshot.theory.simulate import CHUNK_NUMBERS, RandomTasks, sampled_errors, stack

NUM_SETTINGS = 10_000
REPEATS = 5
NUMBERS_PER_ROW = 2_000_000
SHOTS = (0, 1, 2, 5, 10, 20, 50, 100)


def main() -> None:
    parser = argparse.ArgumentParser(description="time the theory lab")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--claims", action="store_true", help="time all claims as well")
    arguments = parser.parse_args()
    device = arguments.device
    print(f"device {device}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    time_closed_forms(device)
    time_sampling(device)
    if arguments.claims:
        for claim in DEFAULT_CLAIMS:
            spec = TheorySpec(claims=(claim,), device=device)
            took = seconds(partial(run_claims, spec, Silent()), device, 1)
            print(f"claim {claim}: {took:.1f} s")


def time_closed_forms(device: str) -> None:
    for d in (5, 16):
        time_closed_forms_at(d, device)


def time_closed_forms_at(d: int, device: str) -> None:
    """General and special closed forms, each of 10,000 settings at once."""
    draws = torch.Generator(device=device).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, device=device, generator=draws)

    roots = normal(NUM_SETTINGS, d, d)
    eye = torch.eye(d, dtype=torch.float64, device=device)
    world = World(roots @ roots.mT / d + 0.1 * eye, normal(NUM_SETTINGS) ** 2)
    theta, shots = normal(NUM_SETTINGS, d), torch.arange(NUM_SETTINGS, device=device) % 101
    head = Attention(normal(NUM_SETTINGS, d + 2), normal(NUM_SETTINGS, d + 2, d + 2))
    calls = {
        "any v, Q, covariance": lambda: exact.error(head, world, theta, shots),
        "Q11 = S^-1": lambda: optima.products(world, theta, head.v1, head.w).error(shots),
        "value-only optimum of any Q": lambda: optima.value_only(head, world, theta),
    }
    for name, call in calls.items():
        print(f"{name}; d = {d}: {NUM_SETTINGS} in {seconds(call, device, 3):.4f} s")


def time_sampling(device: str) -> None:
    """Monte Carlo beside the drawing of its own numbers, in the same chunks, a line per row."""
    lab = Lab.of(TheorySpec(device=device))
    heads = [lab.pretrained(), optima.full_limit(lab.pretrained(), lab.world, lab.theta)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # drawing has one thread in any case
    for num_heads in (1, 2):
        for task in ("target", "unseen"):
            totals = [0.0, 0.0]
            for shots in SHOTS:
                row = time_row(lab, heads[:num_heads], task, shots)
                totals = [total + part for total, part in zip(totals, row, strict=True)]
            print(f"{name_of(num_heads, task)}, all: {totals[0] / totals[1]:.2f} times drawing")
    torch.set_num_threads(threads)


def name_of(num_heads: int, task: str) -> str:
    return f"Monte Carlo, {num_heads} head(s), {task}"


def time_row(lab: Lab, heads: list[Attention], task: str, shots: int) -> tuple[float, float]:
    """Time sampling and drawing at one number of shots in turn, and print their ratio."""
    numbers = shots * (lab.d + 1) + lab.d * (1 if task == "target" else 2)
    num_prompts, draws = NUMBERS_PER_ROW // numbers, lab.generator(1)
    where = lab.theta if task == "target" else RandomTasks(1.0)
    stacked, device = stack(heads), lab.spec.device

    def sample() -> None:
        sampled_errors(stacked, lab.world, where, shots, num_prompts, draws)

    pairs = [
        (
            seconds(sample, device, 1, processor=True),
            seconds(lambda: draw(num_prompts * numbers, device, draws), device, 1, processor=True),
        )
        for _ in range(REPEATS + 1)
    ][1:]  # the first warms up
    sampling, drawing = (statistics.median(column) for column in zip(*pairs, strict=True))
    print(
        f"{name_of(len(heads), task)}, n = {shots}: {sampling / drawing:.2f} times drawing "
        f"({num_prompts} prompts, {sampling:.4f} s of {drawing:.4f} s)"
    )
    return sampling, drawing


def draw(count: int, device: str, draws: torch.Generator) -> None:
    buffer = torch.empty(CHUNK_NUMBERS, dtype=torch.float64, device=device)
    for _ in range(math.ceil(count / CHUNK_NUMBERS)):
        buffer.normal_(generator=draws)


def seconds(
    call: Callable[[], object], device: str, repeats: int = REPEATS, *, processor: bool = False
) -> float:
    """Median time of a call, after one to warm up where it is repeated.

    Wall time, or with `processor` processor time, which other programs disturb less; on a GPU
    always wall time.
    """
    clock = time.process_time if processor and device == "cpu" else time.perf_counter
    if repeats > 1:
        call()
    found: list[float] = []
    for _ in range(repeats):
        synchronise(device)
        began = clock()
        call()
        synchronise(device)
        found.append(clock() - began)
    return statistics.median(found)


def synchronise(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
