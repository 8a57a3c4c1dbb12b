"""Training steps, timed: keepshot beside TRL's SFTTrainer, and its own methods beside each other.

    python benchmarks/tuning.py --arms trl,lora-qv --rounds 5
    python benchmarks/tuning.py --arms trl,lora-qv --data long --rounds 5
    python benchmarks/tuning.py --arms full,value-only,bottom-frozen,lora,lora-kl --rounds 3
    python benchmarks/tuning.py --model gemma-3-270m ...

Every measurement is a process of its own, and rounds go through all arms in turn. `short` data are
generated messages of ten intents, about 20 tokens with their label; `long` ones have answers of
about 100 tokens. TRL gets the same peft configuration, batch, rows, threads and precision, lengths
grouped, and no checkpointing; the loss is on the completion alone in both. The first steps are not
timed. Peak memory counts from after the model was loaded. Prints medians with their range, and
ratios to the first arm.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from keepshot.progress import Silent

ARMS = ("trl", "lora-qv", "lora", "lora-kl", "full", "value-only", "bottom-frozen")
UNTIMED = 3
INTENTS = {
    "balance": "how much money is left on my {thing}",
    "block": "please block the {thing} that I lost",
    "limit": "can the limit of my {thing} be raised",
    "transfer": "I want to send money from my {thing}",
    "statement": "where do I find last month's statement of my {thing}",
    "fee": "why was I charged a fee for my {thing}",
    "address": "my address has changed, put the new one on my {thing}",
    "rate": "what rate of interest does my {thing} have",
    "close": "I would like to give up my {thing}",
    "password": "I forgot the password of my {thing}",
}
THINGS = ("card", "account", "savings account", "credit card", "company account", "loan")
ENDS = ("", ", please", " today", " and soon", ", thank you", " if that is possible")


def rows(kind: str, count: int) -> list[tuple[str, str]]:
    """Return prompts and completions, the same in every process."""
    asked = [
        (intent, words.format(thing=thing) + end)
        for intent, words in INTENTS.items()
        for thing, end in itertools.product(THINGS, ENDS)
    ]
    generator = random.Random(0)
    generator.shuffle(asked)
    if kind == "short":
        return [(f"Q: {text}\nA:", f" {intent}") for intent, text in asked[:count]]
    made: list[tuple[str, str]] = []
    for intent, text in asked[:count]:
        steps = generator.randint(5, 12)
        said = " ".join(f"Step {n}: look at the {intent} page again." for n in range(1, steps))
        made.append((f"Q: {text}\nA:", f" {said}"))
    return made


class Clock(Silent):
    """Ends of steps, in seconds of wall and of processor time."""

    def __init__(self) -> None:
        self.ends: list[tuple[float, float]] = []

    def update(self, done: int = 0, total: int = 0, detail: str = "") -> None:
        """Note the time."""
        self.ends.append((time.perf_counter(), time.process_time()))


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_megabytes() -> float:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) / 1024


def run_trl(asked: argparse.Namespace, model: Any, clock: Clock) -> None:
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Ticking(TrainerCallback):
        """Notes the time of every step."""

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            """Note the time."""
            clock.update()

    pairs = rows(asked.data, asked.rows)
    data = Dataset.from_list([{"prompt": p, "completion": c} for p, c in pairs])
    fields = SFTConfig.__dataclass_fields__
    names = ("activation_checkpointing", "gradient_checkpointing")
    off = {name: False for name in names if name in fields}
    if "train_sampling_strategy" in fields:
        off["train_sampling_strategy"] = "group_by_length"
    with tempfile.TemporaryDirectory() as place:
        settings = SFTConfig(
            output_dir=place, max_steps=asked.steps, per_device_train_batch_size=asked.batch,
            learning_rate=1e-4, save_strategy="no", report_to=[], use_cpu=True, bf16=False,
            disable_tqdm=True, logging_strategy="no", completion_only_loss=True,
            dataloader_num_workers=0, seed=0, optim="adamw_torch_fused", **off,
        )  # fmt: skip
        trainer = SFTTrainer(
            model.module, args=settings, train_dataset=data, processing_class=model.tokenizer,
            peft_config=LoraConfig(
                task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules=["q_proj", "v_proj"]
            ),
            callbacks=[Ticking()],
        )  # fmt: skip
        forget_peak()
        clock.update()
        trainer.train()


def run_keepshot(asked: argparse.Namespace, model: Any, clock: Clock) -> None:
    from keepshot.assets import AssetStore
    from keepshot.tasks.catalog import resolve_tasks
    from keepshot.tasks.source import PromptRow
    from keepshot.tuning.method_specs import LoRA, parse_method
    from keepshot.tuning.recipe import AUTO_TERM, Recipe
    from keepshot.tuning.train import train

    name = asked.one.removesuffix("-kl")
    narrow = name == "lora-qv"
    method = LoRA(targets="query-value") if narrow else parse_method(name)
    held = asked.one.endswith("-kl")
    anchors = resolve_tasks([AUTO_TERM.tasks], AssetStore.from_environment(os.environ))
    recipe = Recipe(
        data="rows", method=method, keep=(AUTO_TERM,) if held else (), steps=asked.steps,
        batch_size=asked.batch, learning_rate=1e-4,
    )  # fmt: skip
    pairs = [PromptRow(*pair) for pair in rows(asked.data, asked.rows)]
    forget_peak()
    clock.update()
    train(recipe, model, pairs, None, anchors=anchors if held else (), progress=clock)


def measure_one(asked: argparse.Namespace) -> dict[str, float]:
    import torch

    from keepshot.assets import AssetStore
    from keepshot.models.loading import load

    torch.set_num_threads(asked.threads)
    licences = frozenset(os.environ.get("KEEPSHOT_ACCEPT_LICENCE", "").split(",")) - {""}
    store = AssetStore.from_environment(os.environ, accepted_licences=licences)
    model = load(asked.model, store)
    clock = Clock()
    (run_trl if asked.one == "trl" else run_keepshot)(asked, model, clock)
    first, last = clock.ends[UNTIMED], clock.ends[-1]
    steps = len(clock.ends) - 1 - UNTIMED
    return {
        "examples_per_second": asked.batch * steps / (last[0] - first[0]),
        "seconds_a_step": (last[0] - first[0]) / steps,
        "processor_seconds_a_step": (last[1] - first[1]) / steps,
        "peak_megabytes": peak_megabytes(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--arms", default="trl,lora-qv")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--data", choices=["short", "long"], default="short")
    parser.add_argument("--steps", type=int, default=23)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rows", type=int, default=320)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--one", choices=ARMS, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.steps <= UNTIMED:
        parser.error(f"--steps {asked.steps}: the first {UNTIMED} are not timed; give more")
    if asked.one:
        return print(json.dumps(measure_one(asked)))
    arms = asked.arms.split(",")
    seen: dict[str, list[dict[str, float]]] = {arm: [] for arm in arms}
    environment = {**os.environ, "OMP_NUM_THREADS": str(asked.threads)}
    for _ in range(asked.rounds):
        for arm in arms:
            command = [sys.executable, __file__, *sys.argv[1:], "--one", arm]
            done = subprocess.run(
                command, env=environment, stdout=subprocess.PIPE, text=True, check=True
            )
            seen[arm].append(json.loads(done.stdout.splitlines()[-1]))
    show(asked, seen)


def show(asked: argparse.Namespace, seen: dict[str, list[dict[str, float]]]) -> None:
    print(f"{asked.model}, {asked.data} rows, batch {asked.batch}, {asked.threads} threads")
    first = next(iter(seen))
    for key in next(iter(seen.values()))[0]:
        for arm, found in seen.items():
            values = [one[key] for one in found]
            middle = statistics.median(values)
            ratio = middle / statistics.median(one[key] for one in seen[first])
            print(
                f"{key:<26} {arm:<14} {middle:>9.3f} [{min(values):.3f}, {max(values):.3f}] "
                f"n={len(values)}  {ratio:.3f} of {first}"
            )


if __name__ == "__main__":
    main()
