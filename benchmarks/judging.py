"""Instruction following, timed and checked: generation, judging, and a path on both axes.

python benchmarks/judging.py generate        embedded prompts: engine against generate(), batch 16
python benchmarks/judging.py judge           labels by likelihood against generated verdicts
python benchmarks/judging.py sanity          a local judge on outcomes that are known
python benchmarks/judging.py alpaca FOLDER   win rates against alpaca-eval's own functions, which
                                             lie unpacked in FOLDER (pip download, unzip)
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from keepshot.assets import AssetStore
from keepshot.judging.answers import answer_prompts, rendered
from keepshot.judging.judges import LikelihoodJudge, question, read_label
from keepshot.judging.length_control import Gamed, shrunken_win_rate
from keepshot.judging.outputs import Comparison, Outputs
from keepshot.judging.pairwise import (
    Pair,
    compare,
    from_preferences,
    sanity_comparisons,
    win_rate,
)
from keepshot.judging.policy import Policy
from keepshot.models.loading import LanguageModel, load
from keepshot.scoring.engine import Engine
from keepshot.tasks.instruction_templates import embedded_set

MODEL = "smollm2-135m-instruct"
CLOCK = time.perf_counter
BATCH = 16
ANSWERS = Path(__file__).parent.parent / "tests" / "golden" / "generations.jsonl"
VERDICTS = (8, 50, 100, 300)
"""Most tokens of a written verdict: 8 as `ServerJudge` asks for; else as alpaca-eval 0.6.6 sets up
its annotators: 50 where the judge names an output (those of local Hugging Face models, such as
`oasst_pythia_12b`), 100 where it ranks both (`alpaca_eval_gpt4`, `alpaca_eval_llama3_70b_fn`), 300
where it explains itself first (`alpaca_eval_cot_gpt4_turbo_fn`)."""


def generate_padded(model: LanguageModel, texts: list[str], max_new_tokens: int) -> list[str]:
    """Answer with transformers' own generate, in left-padded batches in the order given."""
    tokenizer: Any = model.tokenizer
    tokenizer.padding_side = "left"
    answers: list[str] = []
    for start in range(0, len(texts), BATCH):
        batch = tokenizer(
            texts[start : start + BATCH], return_tensors="pt", padding=True,
            add_special_tokens=False,
        )  # fmt: skip
        with torch.inference_mode():
            ids = model.module.generate(**batch, max_new_tokens=max_new_tokens, do_sample=False)
        answers += tokenizer.batch_decode(
            ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True
        )
    return answers


def time_generation(model: LanguageModel, number: int, rounds: int) -> None:
    prompts = [p.prompt for p in embedded_set().part("test", number).prompts]
    texts = [rendered(model, prompt, Policy()) for prompt in prompts]
    seconds: dict[str, list[float]] = {"engine": [], "generate": []}
    same = 0
    for _ in range(rounds):
        started = CLOCK()
        ours = answer_prompts(model, prompts, Policy(), engine=Engine(model))
        seconds["engine"].append(CLOCK() - started)
        started = CLOCK()
        theirs = generate_padded(model, texts, Policy().max_new_tokens)
        seconds["generate"].append(CLOCK() - started)
        same = sum(a.text == b for a, b in zip(ours, theirs, strict=True))
        cut = sum(a.truncated for a in ours)
        show(seconds, number)
        print(f"answers that are the same text: {same} of {number}; truncated: {cut}")


def time_judging(model: LanguageModel, number: int, rounds: int) -> None:
    """Real answers in both orders: labels by likelihood against verdicts written out.

    One run of generate() gives the time at every length of `VERDICTS`, noted as its tokens come.
    """
    comparisons = answered(number)
    pairs = [Pair(c.instruction, c.candidate, c.reference) for c in comparisons]
    pairs += [Pair(c.instruction, c.reference, c.candidate) for c in comparisons]
    texts = [rendered(model, question(pair), Policy()) for pair in pairs]
    tokens = [len(model.encode(text)) for text in texts]
    print(f"{len(pairs)} questions of {np.mean(tokens):.0f} tokens on average")
    seconds: dict[int, list[float]] = {0: []} | {most: [] for most in VERDICTS}
    for _ in range(rounds):
        engine = Engine(model)
        started = CLOCK()
        compare(LikelihoodJudge(model, engine=engine), comparisons)
        seconds[0].append(CLOCK() - started)
        verdicts, spent = write_verdicts(model, texts)
        for most in VERDICTS:
            seconds[most].append(spent[most])
    ours = min(seconds[0])
    print(f"likelihood: {ours:.1f} s, {engine.cost.tokens_prefilled} tokens read")
    for most in VERDICTS:
        theirs, read = min(seconds[most]), [read_label(v[most]).first for v in verdicts]
        ratios = [b / a for a, b in zip(seconds[0], seconds[most], strict=True)]
        print(
            f"at most {most} tokens: {theirs:.1f} s, likelihood {theirs / ours:.2f} times as fast "
            f"(rounds {', '.join(f'{ratio:.2f}' for ratio in ratios)}); "
            f"no label in {sum(one is None for one in read)} of {len(read)}"
        )


def answered(number: int) -> list[Comparison]:
    """Return real answers of the small model, each against its answer to the next prompt."""
    rows = [json.loads(line) for line in ANSWERS.read_text("utf-8").splitlines()]
    answers = {row["key"]: row["output"] for row in rows if row["output"].strip()}
    prompts = [p for p in embedded_set().prompts if p.key in answers][:number]
    texts = [answers[prompt.key] for prompt in prompts]
    others = [*texts[1:], texts[0]]
    return [Comparison(p.prompt, a, b) for p, a, b in zip(prompts, texts, others, strict=True)]


def write_verdicts(
    model: LanguageModel, texts: list[str]
) -> tuple[list[dict[int, str]], dict[int, float]]:
    """Write verdicts with transformers' generate: greedy, padded batches sorted by length.

    Returns:
        Each verdict as it stands at each length, and the seconds to that length in all.
    """
    tokenizer: Any = model.tokenizer
    tokenizer.padding_side = "left"
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
    seconds = dict.fromkeys(VERDICTS, 0.0)
    verdicts: dict[int, dict[int, str]] = {}
    for start in range(0, len(texts), BATCH):
        chosen = order[start : start + BATCH]
        clock = StepClock()
        batch = tokenizer(
            [texts[i] for i in chosen], return_tensors="pt", padding=True, add_special_tokens=False
        )
        with torch.inference_mode():
            ids = model.module.generate(
                **batch, max_new_tokens=max(VERDICTS), do_sample=False,
                stopping_criteria=StoppingCriteriaList([clock]),
            )  # fmt: skip
        new = ids[:, batch["input_ids"].shape[1] :]
        for most in VERDICTS:
            seconds[most] += clock.spent(most)
        for i, row in zip(chosen, new, strict=True):
            verdicts[i] = {
                most: tokenizer.decode(row[:most], skip_special_tokens=True) for most in VERDICTS
            }
    return [verdicts[i] for i in range(len(texts))], seconds


class StepClock(StoppingCriteria):
    """Notes when each token of a batch was there; stops nothing."""

    def __init__(self) -> None:
        self.began = CLOCK()
        self.at: list[float] = []

    def __call__(self, ids: Any, _scores: Any, **_: Any) -> Any:
        """Note the time."""
        self.at.append(CLOCK())
        return torch.zeros(len(ids), dtype=torch.bool)

    def spent(self, most: int) -> float:
        """Return the seconds to `most` tokens, or to the end where all rows ended before."""
        return self.at[min(most, len(self.at)) - 1] - self.began


def show(seconds: dict[str, list[float]], number: int) -> None:
    for name, times in seconds.items():
        print(f"{name}: {min(times):.1f} s at best of {len(times)}, {number / min(times):.2f} /s")
    ours, theirs = (min(times) for times in seconds.values())
    print(f"times faster: {theirs / ours:.2f}")


def check_sanity(model: LanguageModel, number: int) -> None:
    """Real answers against themselves, their shuffled words, and the answer to the next prompt."""
    # Half as many again, because answers of a few words cannot be shuffled.
    real = answered(number + number // 2)
    outputs = Outputs(MODEL, {c.instruction: c.candidate for c in real})
    known = {**sanity_comparisons(outputs, most=number), "another prompt's": real[:number]}
    judge = LikelihoodJudge(model)
    for name, comparisons in known.items():
        rate = win_rate(compare(judge, comparisons), (name, "itself"), (judge.identity, ""))
        low, high = rate.win_rate_ci95
        print(
            f"{name}: win rate {rate.win_rate:.1f} % [{low:.1f}, {high:.1f}], discrete "
            f"{rate.discrete_win_rate:.1f} %, n {rate.num_comparisons}, position bias "
            f"{rate.position_bias:+.1f}, off label {rate.num_off_label}"
        )


def compare_with_alpaca(folder: Path) -> None:
    """Feed synthetic annotations, difficulties and gamed rows to both."""
    import pandas as pd

    metrics = import_alpaca(folder)
    size = 805
    for seed in range(8):
        generator = np.random.default_rng(seed)
        difficulty = generator.normal(size=size)
        theirs = generator.integers(100, 3000, size)
        ours = (theirs * generator.lognormal(0.2 * (seed % 4), 0.5, size)).astype(int)
        logits = generator.normal(0, 0.5) + 0.3 * difficulty + generator.normal(0, 0.8, size)
        logits += 0.8 * np.tanh((ours - theirs) / np.std(ours - theirs))
        chance = 1 / (1 + np.exp(-logits))
        coin = (generator.random(size) < chance).astype(float)
        preferences = np.where(generator.random(size) < 0.5, chance, coin)
        table = pd.DataFrame(
            {
                "output_1": ["x" * n for n in theirs],
                "output_2": ["x" * n for n in ours],
                "preference": preferences + 1,
                "generator_1": "reference", "generator_2": "candidate", "annotator": "synthetic",
            }
        )  # fmt: skip
        table.index.name = "index"
        gamed = pd.DataFrame(
            {
                "index": np.tile(np.arange(size), 2),
                "preference": generator.random(2 * size),
                "std_delta_len": generator.normal(size=2 * size),
                "instruction_difficulty": np.tile(difficulty, 2),
                "not_gamed_baseline": False, "model": "gamed",
            }
        )  # fmt: skip
        metrics.hf_hub_download = lambda frame=gamed, **_: _written(frame, folder)
        comparisons = [
            Comparison(str(i), "x" * n, "x" * m)
            for i, (n, m) in enumerate(zip(ours, theirs, strict=True))
        ]
        found = {str(i): float(p) + 1 for i, p in enumerate(preferences)}
        rate = win_rate(from_preferences(comparisons, found), ("candidate", "reference"), ("s", ""))
        lengths = np.stack([ours, theirs], axis=1).astype(float)
        rows = Gamed(
            *(gamed[c].to_numpy() for c in ("preference", "std_delta_len")), np.tile(difficulty, 2)
        )
        line = [f"seed {seed}:"]
        for name, given in (("length_controlled_v1", rows), ("length_controlled_noreg", None)):
            expected = metrics.get_length_controlled_winrate(
                table.copy(), glm_name=name, save_weights_dir=None
            )
            mine = 100 * shrunken_win_rate(preferences, lengths, difficulty, given)
            line.append(f"{name} {mine:.3f} / {float(expected['length_controlled_winrate']):.3f}")
        line.append(f"raw {rate.win_rate:.3f} / {float(expected['win_rate']):.3f}")
        line.append(
            f"discrete {rate.discrete_win_rate:.3f} / {float(expected['discrete_win_rate']):.3f}"
        )
        line.append(f"maximum likelihood {rate.length_controlled_win_rate:.3f}")
        print(" ".join(line), flush=True)


def import_alpaca(folder: Path) -> Any:
    """Import the metrics alone: the package's own `__init__` wants an API client."""
    package: Any = types.ModuleType("alpaca_eval")
    package.__path__ = [str(folder / "alpaca_eval")]
    parts: dict[str, dict[str, Any]] = {
        "constants": dict.fromkeys(
            ("DATASETS_TOKEN", "DATASETS_FORCE_DOWNLOAD", "DEFAULT_CACHE_DIR")
        ),
        "types": {"AnyLoadableDF": object},
        "utils": {
            "convert_to_dataframe": lambda frame: frame,
            "validate_alpacaeval_preference": lambda x, is_allow_nan=False: 1.0 <= x <= 2.0,
        },
    }
    sys.modules["alpaca_eval"] = package
    for name, content in parts.items():
        module = types.ModuleType(f"alpaca_eval.{name}")
        module.__dict__.update(content)
        sys.modules[module.__name__] = module
        setattr(package, name, module)
    return importlib.import_module("alpaca_eval.metrics.glm_winrate")


def _written(frame: Any, folder: Path) -> str:
    path = folder / "gamed.csv"
    frame.to_csv(path, index=False)
    return str(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=["generate", "judge", "sanity", "alpaca"])
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--number", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--clock", choices=["wall", "process"], default="wall")
    parser.add_argument("--threads", type=int, default=None)
    given = parser.parse_args()
    global CLOCK
    CLOCK = time.process_time if given.clock == "process" else time.perf_counter
    if given.threads:
        torch.set_num_threads(given.threads)
    if given.what == "alpaca":
        return compare_with_alpaca(given.folder)
    model = load(given.model, AssetStore.from_environment(os.environ))
    print(
        f"{given.model}, {torch.get_num_threads()} threads, {given.number} prompts, "
        f"{given.clock} clock"
    )
    match given.what:
        case "generate":
            time_generation(model, given.number, given.rounds)
        case "judge":
            time_judging(model, given.number, given.rounds)
        case _:
            check_sanity(model, given.number)


if __name__ == "__main__":
    main()
