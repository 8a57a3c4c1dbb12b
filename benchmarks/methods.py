"""Processor time of a training step, method by method, against full fine-tuning in the same run.

    python benchmarks/methods.py --methods full,value-only,bottom-frozen --steps 6 --rounds 3

Each round trains every method anew from the untuned model on the same batches; the first step of
each (buffers, optimiser state) is left out. Processor time of one thread, so that a busy machine
changes little; the ratio to full is what counts.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time

import torch

from keepshot.assets import AssetStore
from keepshot.jobs.target import load_target
from keepshot.models.loading import load
from keepshot.progress import Silent
from keepshot.tuning.adapters import detach_
from keepshot.tuning.method_specs import parse_method
from keepshot.tuning.recipe import Recipe
from keepshot.tuning.tokenised import Extra
from keepshot.tuning.train import train


class Clock(Silent):
    """Notes the processor time at the end of every step."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def update(self, done: int, total: int, detail: str = "") -> None:
        """Note the time."""
        self.ends.append(time.process_time())

    @property
    def steps(self) -> list[float]:
        """Seconds of each step but the first."""
        return [end - start for start, end in zip(self.ends[:-1], self.ends[1:], strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--data", default="support")
    parser.add_argument("--methods", default="full,value-only,bottom-frozen,lora,bias-only")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    store = AssetStore.from_environment(os.environ)
    target = load_target(asked.data, store)
    model = load(asked.model, store)
    untuned = {name: p.detach().clone() for name, p in model.module.named_parameters()}
    names = asked.methods.split(",")
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(asked.rounds):
        for name in names:
            recipe = Recipe(
                model=asked.model, data=asked.data, method=parse_method(name), steps=asked.steps
            )
            clock = Clock()
            extra = Extra(template=target.template)
            train(recipe, model, target.train, None, progress=clock, extra=extra)
            seconds[name] += clock.steps
            detach_(model.module, merge=False)
            with torch.no_grad():
                for key, parameter in model.module.named_parameters():
                    parameter.copy_(untuned[key])
    full = statistics.median(seconds[names[0]])
    rows = [
        {
            "method": name,
            "seconds": round(statistics.median(found), 3),
            "to_" + names[0]: round(statistics.median(found) / full, 3),
            "least": round(min(found), 3),
            "steps": len(found),
        }
        for name, found in seconds.items()
    ]
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
