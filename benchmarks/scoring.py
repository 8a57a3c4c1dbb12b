"""Score the same items with lm-evaluation-harness' `hf` backend and with keepshot's engine.

    python benchmarks/scoring.py --results build/scoring.json --rounds 3 --table docs/benchmarks.md
    python benchmarks/scoring.py --rounds 1 --questions 4    # every workload, small; nothing kept

Each measurement is a process of its own, so that memory can be compared: it loads the model, asks
lm-eval's interface once for a few requests, and times one `loglikelihood` call over the workload,
tokenising included. Tools alternate. Results are kept as they come: a run that was stopped goes on.
`--clock process` counts processor seconds, for a machine that others use too; give it one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from keepshot.assets import AssetStore
from keepshot.models.loading import LanguageModel, load
from keepshot.records import write_text
from keepshot.scoring.prefix import build_trie
from keepshot.scoring.request import LogLikelihood, tokens_to_read
from keepshot.tasks.catalog import load_task

TOOLS = ("hf", "keepshot")
HF_BATCH = 16
BARE_SHAPES = ((4, 256), (8, 128), (16, 64), (16, 128), (32, 64))
SMOLLM2, GEMMA = "smollm2-135m-instruct", "gemma-3-270m"


@dataclass(frozen=True)
class Question:
    """A prompt, its possible continuations, and which of them is right."""

    context: str
    continuations: tuple[str, ...]
    gold: int


@dataclass(frozen=True)
class Workload:
    """What is scored; `batches` calls, because some users ask one question at a time."""

    title: str
    model: str
    build: Callable[[AssetStore], list[Question]]
    one_by_one: bool = False


@dataclass(frozen=True)
class Outcome:
    """What one process measured; seconds of wall time, MiB above what the loaded model takes."""

    workload: str
    tool: str
    round: int
    seconds: float
    accuracy: float
    peak_mib: float | None
    requests: int
    trie_tokens: int
    naive_tokens: int
    bare_rate: float
    """Tokens a second of a plain forward pass of the whole model, head included, at its best."""
    trunk_rate: float
    """The same without the head."""
    clock: str = "wall"
    threads: int = 2


CLOCKS = {"wall": time.perf_counter, "process": time.process_time}


def few_shot(
    names: Sequence[tuple[str, int]], shots: int
) -> Callable[[AssetStore], list[Question]]:
    """Questions of embedded choice tasks under fixed demonstrations."""

    def build(store: AssetStore) -> list[Question]:
        questions: list[Question] = []
        for name, count in names:
            task = load_task(name, store)
            drawn = task.draw(shots, seed=0)
            for example in (*task.test, *task.validation)[:count]:
                assert example.choices
                continuations = tuple(task.template.continuation(c) for c in example.choices)
                context = task.template.context(drawn, example)
                questions.append(
                    Question(context, continuations, example.choices.index(example.output))
                )
        return questions

    return build


def words(store: AssetStore) -> list[str]:
    task = load_task("word-feeling", store)
    return [example.input for example in (*task.test, *task.validation, *task.demonstrations)]


def exam(store: AssetStore) -> list[Question]:
    """The shape of MMLU: 5 shots, long questions, one letter of four; texts are random words."""
    generator, vocabulary = random.Random(0), words(store)
    letters = (" A", " B", " C", " D")

    def question() -> str:
        lines = [" ".join(generator.choices(vocabulary, k=24)) + "?"]
        lines += [f"{mark}. {' '.join(generator.choices(vocabulary, k=4))}" for mark in "ABCD"]
        return "\n".join([*lines, "Answer:"])

    questions: list[Question] = []
    for _ in range(2):
        shown = "".join(question() + generator.choice(letters) + "\n\n" for _ in range(5))
        questions += [
            Question(shown + question(), letters, generator.randrange(4)) for _ in range(30)
        ]
    return questions


def endings(store: AssetStore) -> list[Question]:
    """The shape of HellaSwag: no shots, a passage and four long endings; random words."""
    generator, vocabulary = random.Random(1), words(store)

    def text(count: int) -> str:
        return " ".join(generator.choices(vocabulary, k=count))

    return [
        Question(text(30), tuple(" " + text(13) for _ in range(4)), generator.randrange(4))
        for _ in range(40)
    ]


WORKLOADS: dict[str, Workload] = {
    "sixteen-shots": Workload(
        "16 shots: 200 two-choice and 115 four-choice questions",
        SMOLLM2,
        few_shot((("word-feeling", 200), ("english-french", 115)), 16),
    ),
    "exam": Workload("5 shots, MMLU shape: 60 long questions, one letter of four", SMOLLM2, exam),
    "endings": Workload("0 shots, HellaSwag shape: 40 passages, four endings", SMOLLM2, endings),
    "gemma-words": Workload(
        "8 shots: 115 four-choice word questions, Gemma-3-270M",
        GEMMA,
        few_shot((("english-french", 115),), 8),
    ),
    "one-question": Workload(
        "0 shots: 40 two-choice questions, one call each",
        SMOLLM2,
        few_shot((("word-feeling", 40),), 0),
        one_by_one=True,
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description="time keepshot beside lm-eval's hf backend")
    parser.add_argument("--results", type=Path, default=Path("build/scoring.json"))
    parser.add_argument("--rounds", type=int, default=3, help="alternating runs of each tool")
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--questions", type=int, help="of each workload, at most; keeps no file")
    parser.add_argument("--table", type=Path, help="Markdown file whose table is replaced")
    parser.add_argument(
        "--measure", nargs=3, metavar=("WORKLOAD", "TOOL", "ROUND"), help="internal"
    )
    arguments = parser.parse_args()
    if arguments.measure:
        name, tool, number = arguments.measure
        print(json.dumps(asdict(measure(name, tool, int(number), arguments))))
        return
    small = arguments.questions is not None
    outcomes = [] if small else read(arguments.results)
    for number in range(arguments.rounds):
        for name in arguments.workloads:
            for tool in TOOLS if number % 2 == 0 else TOOLS[::-1]:
                if any((o.workload, o.tool, o.round) == (name, tool, number) for o in outcomes):
                    continue
                outcomes.append(in_process(name, tool, number, arguments))
                print(f"{name} {tool}: {outcomes[-1].seconds:.2f} s", file=sys.stderr, flush=True)
                if not small:
                    write_text(
                        json.dumps([asdict(o) for o in outcomes], indent=1), arguments.results
                    )
    lines = table(outcomes)
    print("\n".join(lines))
    if arguments.table:
        replace_table(arguments.table, lines)


def read(path: Path) -> list[Outcome]:
    return [Outcome(**row) for row in json.loads(path.read_text("utf-8"))] if path.exists() else []


def in_process(name: str, tool: str, number: int, setting: argparse.Namespace) -> Outcome:
    """Measure in a process of its own."""
    threads = setting.threads
    command = [sys.executable, __file__, "--threads", str(threads), "--clock", setting.clock]
    command += ["--measure", name, tool, str(number)]
    command += [] if setting.questions is None else ["--questions", str(setting.questions)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return Outcome(**json.loads(done.stdout.strip().splitlines()[-1]))


def measure(name: str, tool: str, number: int, setting: argparse.Namespace) -> Outcome:
    now = CLOCKS[setting.clock]
    torch.set_num_threads(setting.threads)
    workload = WORKLOADS[name]
    store = AssetStore.from_environment(os.environ)
    questions = workload.build(store)[: setting.questions]
    model = load(workload.model, store)
    read_weights(model)
    resident = reset_peak()  # before the first call: what that one keeps allocated counts too
    backend = backend_of(tool, model)
    pairs = [(q.context, c) for q in questions for c in q.continuations]
    # A first call allocates and compiles; no prompt of the workload begins like these.
    score(backend, [("a b c", " d e"), ("a b c", " f"), ("b c", " d")])
    started = now()
    if workload.one_by_one:
        found = [score(backend, [(q.context, c) for c in q.continuations]) for q in questions]
        scores = [value for values in found for value in values]
    else:
        scores = score(backend, pairs)
    seconds = now() - started
    peak = peak_kib() - resident
    # Whole model and trunk by turns, so that both see the machine in the same state.
    rates = bare_rates(model, now) if tool == "keepshot" else (0.0, 0.0)
    requests = [LogLikelihood(*map(tuple, model.encode_pair(*pair))) for pair in pairs]
    sequences = [tokens_to_read(request) for request in requests]
    calls = [[s] for s in sequences] if workload.one_by_one else [sequences]
    if workload.one_by_one:
        width = len(questions[0].continuations)
        calls = [sequences[i : i + width] for i in range(0, len(sequences), width)]
    return Outcome(
        workload=name,
        tool=tool,
        round=number,
        seconds=seconds,
        accuracy=accuracy(questions, scores),
        peak_mib=peak / 1024,
        requests=len(pairs),
        trie_tokens=sum(build_trie(call).num_tokens for call in calls),
        naive_tokens=sum(map(len, sequences)),
        bare_rate=rates[0],
        trunk_rate=rates[1],
        clock=setting.clock,
        threads=setting.threads,
    )


def backend_of(tool: str, model: LanguageModel) -> Any:
    if tool == "hf":
        from lm_eval.models.huggingface import HFLM

        made: Any = HFLM
        return made(pretrained=model.module, tokenizer=model.tokenizer, batch_size=HF_BATCH)
    from keepshot.harness.model import KeepshotLM

    return KeepshotLM(model)


def score(backend: Any, pairs: Sequence[tuple[str, str]]) -> list[float]:
    from lm_eval.api.instance import Instance

    instances = [
        Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=i)
        for i, pair in enumerate(pairs)
    ]
    return [value for value, _ in backend.loglikelihood(instances, disable_tqdm=True)]


def accuracy(questions: Sequence[Question], scores: Sequence[float]) -> float:
    values = iter(scores)
    right = 0
    for question in questions:
        own = [next(values) for _ in question.continuations]
        right += own.index(max(own)) == question.gold
    return right / len(questions)


def bare_rates(model: LanguageModel, now: Callable[[], float]) -> tuple[float, float]:
    """Tokens a second of a plain forward pass, at the best of some batch shapes."""
    module: Any = model.module
    best = [0.0, 0.0]
    with torch.inference_mode():
        for rows, length in BARE_SHAPES:
            ids = torch.randint(5, module.config.vocab_size - 5, (rows, length))
            for place, run in enumerate((module, module.base_model)):
                for _ in range(2):
                    started = now()
                    run(ids, use_cache=False)
                    best[place] = max(best[place], ids.numel() / (now() - started))
    return best[0], best[1]


def read_weights(model: LanguageModel) -> None:
    """Bring the weights into memory: they are mapped, and would count where they are first used."""
    for parameter in model.module.parameters():
        parameter.sum().item()


def reset_peak() -> int:
    """Forget the largest resident size so far (Linux); return the present one, in KiB."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    return peak_kib()


def peak_kib() -> int:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))


def table(outcomes: Sequence[Outcome]) -> list[str]:
    """Medians of each workload, side by side."""
    lines = [
        "| workload | requests | tokens: all, trie | `hf` s | keepshot s | times as fast "
        "| accuracy: `hf`, keepshot | MiB above the model: `hf`, keepshot "
        "| share of the limit: whole model, trunk |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, workload in WORKLOADS.items():
        mine = {
            tool: [o for o in outcomes if (o.workload, o.tool) == (name, tool)] for tool in TOOLS
        }
        if not all(mine.values()):
            continue
        theirs, ours = (median(mine[tool], "seconds") for tool in TOOLS)
        first = mine["keepshot"][0]
        shares = [
            statistics.median(
                o.trie_tokens / getattr(o, rate) / o.seconds for o in mine["keepshot"]
            )
            for rate in ("bare_rate", "trunk_rate")
        ]
        right = [median(mine[tool], "accuracy") for tool in TOOLS]
        memory = [median(mine[tool], "peak_mib") for tool in TOOLS]
        lines.append(
            f"| {workload.title} | {first.requests} "
            f"| {first.naive_tokens:,}, {first.trie_tokens:,} "
            f"| {theirs:.2f} | {ours:.2f} | **{theirs / ours:.1f}** "
            f"| {right[0]:.3f}, {right[1]:.3f} | {memory[0]:,.0f}, {memory[1]:,.0f} "
            f"| {shares[0]:.2f}, {shares[1]:.2f} |"
        )
    return lines


def median(outcomes: Sequence[Outcome], field: str) -> float:
    values = [getattr(outcome, field) for outcome in outcomes]
    return statistics.median(value for value in values if value is not None)


def replace_table(path: Path, lines: Sequence[str]) -> None:
    """Put the table between the two marks of a Markdown file."""
    begin, end = "<!-- scoring table -->", "<!-- end of scoring table -->"
    text = path.read_text(encoding="utf-8")
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    write_text("\n".join([before + begin, *lines, end]) + after, path)


if __name__ == "__main__":
    main()
