"""Our engine as lm-eval's model gives what lm-eval's own `hf` gives, and its tasks become ours."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from keepshot.errors import ConfigError, TaskError
from keepshot.harness.launch import run_harness
from keepshot.harness.model import KeepshotLM
from keepshot.harness.once import compile_templates_once, each_read_once
from keepshot.harness.results import write_results
from keepshot.harness.tasks import harness_tasks, split_names
from keepshot.models.loading import LanguageModel, save
from keepshot.records import Cost, ModelRecord, ResultDocument, Score
from keepshot.scoring.evaluate import Plan, measure
from pico import pico_model

WORDS = ["plum", "pear", "fig", "oak", "elm", "ash", "yew", "fir"]
MAX_LENGTH = 96
CHAT = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def write_task(folder: Path, **changes: Any) -> Path:
    """A stock multiple-choice task on local JSONL files."""
    generator = random.Random(0)
    for name, count in (("test", 12), ("shots", 8)):
        rows = [
            {"q": f"{name} {n} {generator.choice(WORDS)}", "choices": WORDS[:3], "a": n % 3}
            for n in range(count)
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    config: dict[str, Any] = {
        "task": "trees",
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {
                "test": str(folder / "test.jsonl"), "validation": str(folder / "shots.jsonl")
            }
        },
        "output_type": "multiple_choice",
        "test_split": "test",
        "fewshot_split": "validation",
        "doc_to_text": "Q: {{q}}\nA:",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "a",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        "metadata": {"version": 1.0},
    }  # fmt: skip
    path = folder / "trees.yaml"
    path.write_text(json.dumps({**config, **changes}), encoding="utf-8")
    return path


def evaluate(**settings: Any) -> Any:
    """lm-eval's own evaluation of task files, without its thousands of tasks."""
    settings = {"bootstrap_iters": 0, "log_samples": True, **settings}
    return simple_evaluate(task_manager=TaskManager(include_defaults=False), **settings)


def backends(model: LanguageModel) -> tuple[Any, Any]:
    theirs: Any = HFLM
    hf = theirs(
        pretrained=model.module, tokenizer=model.tokenizer, batch_size=4, max_length=MAX_LENGTH
    )
    return hf, KeepshotLM(model, max_length=MAX_LENGTH)


def instances(kind: Any, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, pair, n) for n, pair in enumerate(arguments)]


@pytest.fixture(params=["llama", "gpt2", "gemma3", "falcon"])
def model(request: pytest.FixtureRequest) -> LanguageModel:
    return pico_model(request.param)


def test_log_likelihoods_are_those_of_hf(model: LanguageModel) -> None:
    shown = "".join(f"Q: {word}\nA: tree\n\n" for word in WORDS[:4])
    pairs: list[tuple[str, str]] = [
        (f"{shown[:40]}Q: {word}\nA:", answer) for word in WORDS for answer in (" tree", " fruit")
    ]
    pairs += [
        ("", "no context"),  # BOS or EOS stands for it
        ("Q: plum \n ", "A"),  # trailing space goes to the continuation
        (shown * 3, " too long"),  # cut from the left
        ("x", "y"),
        pairs[0],
    ]
    hf, ours = backends(model)
    requests = instances("loglikelihood", pairs)
    expected = hf.loglikelihood(requests, disable_tqdm=True)
    found = ours.loglikelihood(requests, disable_tqdm=True)
    for (log_likelihood, greedy), (theirs, their_greedy), pair in zip(
        found, expected, pairs, strict=True
    ):
        assert log_likelihood == pytest.approx(theirs, abs=1e-4 * len(pair[1])), pair
        assert greedy == their_greedy
    assert ours.engine.cost.tokens_prefilled < 0.7 * ours.engine.cost.tokens_naive


def test_rolling_windows_are_those_of_hf(model: LanguageModel) -> None:
    texts = [("a short text",), ("words " * 60,), ("",), ("x" * MAX_LENGTH,)]
    hf, ours = backends(model)
    requests = instances("loglikelihood_rolling", [text for text in texts if text[0]])
    expected = hf.loglikelihood_rolling(requests, disable_tqdm=True)
    found = ours.loglikelihood_rolling(requests, disable_tqdm=True)
    assert found == pytest.approx(expected, abs=1e-2)


def test_generations_are_those_of_hf(model: LanguageModel) -> None:
    stops: list[list[str]] = [["e"], ["qq", "\n"], ["a", "1", "T"]]
    arguments = [
        (f"Q: {word}\nA:", {"until": stops[n % 3], "max_gen_toks": 4 + n, "do_sample": False})
        for n, word in enumerate(WORDS)
    ]
    arguments.append(("long " * 40, {"until": ["z"], "max_gen_toks": 6}))
    hf, ours = backends(model)
    requests = instances("generate_until", arguments)
    for request in requests:  # one at a time: hf pads, which moves positions of some families
        expected = hf.generate_until([request], disable_tqdm=True)
        assert ours.generate_until([request], disable_tqdm=True) == expected
    assert ours.generate_until(requests, disable_tqdm=True) == [
        ours.generate_until([request], disable_tqdm=True)[0] for request in requests
    ]


@pytest.mark.parametrize("chat", [False, True])
def test_a_stock_task_gives_the_results_of_hf(tmp_path: Path, chat: bool) -> None:
    model = pico_model("llama")
    model.tokenizer.chat_template = CHAT
    task = write_task(tmp_path, description="Trees.\n\n", num_fewshot=3)
    results: list[dict[str, Any]] = []
    theirs: Any = HFLM
    for backend in (theirs(pretrained=model.module, tokenizer=model.tokenizer), KeepshotLM(model)):
        evaluated = evaluate(
            model=backend,
            tasks=[str(task)],
            limit=10,
            apply_chat_template=chat,
            fewshot_as_multiturn=chat,
        )
        results.append(evaluated)
    hf, ours = results
    assert ours["results"]["trees"] == hf["results"]["trees"]
    assert ours["n-samples"]["trees"]["effective"] == 10
    for mine, their in zip(ours["samples"]["trees"], hf["samples"]["trees"], strict=True):
        assert mine["arguments"] == their["arguments"]
        sums = [answer[0][0] for answer in mine["resps"]]
        assert sums == pytest.approx([answer[0][0] for answer in their["resps"]], abs=1e-3)
    prompt = ours["samples"]["trees"][0]["arguments"][0][0]
    assert ("[user]" in prompt) == chat
    assert "Trees." in prompt


def test_command_line_passes_flags_through(tmp_path: Path) -> None:
    save(pico_model("llama"), tmp_path / "model")
    task = write_task(tmp_path)
    run_harness(
        ["run", "--model", "keepshot", "--model_args", f"pretrained={tmp_path / 'model'}",
         "--tasks", str(task), "--num_fewshot", "2", "--limit", "5", "--device", "cpu",
         "--log_samples", "--output_path", str(tmp_path / "out")]
    )  # fmt: skip
    written = json.loads(next((tmp_path / "out").rglob("results_*.json")).read_text("utf-8"))
    assert written["n-shot"] == {"trees": 2}
    assert written["n-samples"]["trees"]["effective"] == 5
    assert written["config"]["keepshot_sharing"] == "packed"
    samples = next((tmp_path / "out").rglob("samples_*.jsonl")).read_text("utf-8")
    assert len(samples.splitlines()) == 5


def test_included_files_are_parsed_once_with_the_same_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = {
        "common.yml": "include: deeper.yml\nmetadata: {version: 1}\nfewshot_split: a\n",
        "deeper.yml": "output_type: multiple_choice\ntarget: !function code.f\n",
        "one.yaml": "include: common.yml\ntask: one\n",
        "two.yaml": "include: [common.yml]\ntask: two\nfewshot_split: b\n",
        "twice.yaml": "include: [common.yml, deeper.yml]\ntask: twice\n",
        "circle.yaml": "include: circle.yaml\ntask: circle\n",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    index: Any = import_module("lm_eval.tasks._index").TaskIndex
    loader: Any = import_module("lm_eval.tasks._yaml_loader")
    parsed: list[Path] = []
    make_loader = loader._make_loader

    def counted(folder: Path, **options: Any) -> Any:
        parsed.append(folder)
        return make_loader(folder, **options)

    monkeypatch.setattr(loader, "_make_loader", counted)
    expected = index.build([tmp_path])
    assert sorted(expected) == ["one", "two"]  # a file may not be included twice in one task
    every_time = len(parsed)
    with each_read_once():
        assert index.build([tmp_path]) == expected
        assert len(parsed) - every_time == every_time - 4
    assert index.build([tmp_path]) == expected
    assert len(parsed) == 3 * every_time - 4


def test_templates_are_compiled_once() -> None:
    environment: Any = import_module("lm_eval.utils").env
    compile_templates_once()
    once = environment.from_string("{{q}} {{q}}")
    assert environment.from_string("{{q}} {{q}}") is once
    fresh = type(environment).from_string(environment, "{{q}} {{q}}")
    assert fresh is not once
    assert once.render(q="x") == fresh.render(q="x") == "x x"


def test_other_models_stay_known() -> None:
    code = "import keepshot.harness.model; from lm_eval.api.registry import get_model as g; g('hf')"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_two_processes_give_the_results_of_one(tmp_path: Path) -> None:
    save(pico_model("llama"), tmp_path / "model")
    arguments = ["lm-eval", "run", "--model", "keepshot", "--device", "cpu", "--tasks"]
    arguments += [str(write_task(tmp_path)), "--num_fewshot", "3", "--model_args"]
    arguments += [f"pretrained={tmp_path / 'model'}", "--output_path"]
    two = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29519"]
    found: list[Any] = []
    for number, launcher in enumerate(([], two)):
        out = tmp_path / f"out-{number}"
        command = [sys.executable, *launcher, "-m", "keepshot", *arguments, str(out)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.count("|trees") == 1, "one process prints"
        (path,) = out.rglob("results_*.json")
        found.append(json.loads(path.read_text("utf-8")))
    assert found[0]["results"] == found[1]["results"]
    assert [content["config"]["keepshot_processes"] for content in found] == [1, 2]


def test_command_line_words_what_the_user_can_mend(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="'hellaswog' \\(nearest is 'hellaswag'\\)"):
        run_harness(["run", "--model", "keepshot", "--tasks", "hellaswog"])
    save(pico_model("llama"), tmp_path / "model")
    where = f"pretrained={tmp_path / 'model'}"
    with pytest.raises(ConfigError, match=r"'batch_token' is unknown; nearest is 'batch_tokens'"):
        run_harness(
            ["run", "--model", "keepshot", "--model_args", where, "batch_token=3",
             "--tasks", str(write_task(tmp_path))]
        )  # fmt: skip
    with pytest.raises(ConfigError, match="--output_path"):
        run_harness(["run", "--tasks", "hellaswag", "--log_samples"])


def test_refused_settings_name_what_to_do() -> None:
    ours = KeepshotLM(pico_model("llama"), max_length=32)
    sampling = instances("generate_until", [("a", {"do_sample": True, "temperature": 1.0})])
    with pytest.raises(ConfigError, match="do_sample=False"):
        ours.generate_until(sampling)
    with pytest.raises(ConfigError, match="max_gen_toks 40 leaves no room"):
        ours.generate_until(instances("generate_until", [("a", {"max_gen_toks": 40})]))
    with pytest.raises(TaskError, match="gives no token of its own"):
        ours.loglikelihood(instances("loglikelihood", [("a", "")]))


GENERATED: dict[str, Any] = {
    "output_type": "generate_until",
    "doc_to_choice": None,
    "doc_to_target": "{{choices[a]}}",
    "generation_kwargs": {"until": ["\n", "m"], "max_gen_toks": 9, "do_sample": False},
    "metric_list": [{"metric": "exact_match", "ignore_case": True}],
}
KINDS: dict[str, dict[str, Any]] = {
    "choice": {"description": "Trees.\n\n"},
    "described": {"description": "About {{q}}.\n", "gen_prefix": "So:"},
    "informed": {"metric_list": [{"metric": "acc"}, {"metric": "acc_mutual_info"}]},
    "several right": {
        "doc_to_target": "{{[a, (a + 1) % 3]}}",
        "fewshot_config": {"sampler": "first_n", "doc_to_target": "a"},
    },
    "contexts": {
        "doc_to_text": "a", "doc_to_target": " and so on",
        "doc_to_choice": "{{[q + ' oak', q + ' elm', q + ' fir']}}",
        "metric_list": [{"metric": "acc"}],
    },
    "generated": GENERATED,
    "filtered": {
        **GENERATED,
        "filter_list": [
            {"name": "first letter", "filter": [
                {"function": "regex", "regex_pattern": "([a-z])"}, {"function": "take_first"},
            ]},
            {"name": "whole", "filter": [{"function": "take_first"}]},
        ],
        "doc_to_target": "{{['p', 'e', 's'][a]}}",
    },
    "likely": {
        "output_type": "loglikelihood", "doc_to_choice": None, "doc_to_target": " {{choices[a]}}",
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    },
}  # fmt: skip


def test_what_asks_the_same_is_chosen_on_or_reported_on(tmp_path: Path) -> None:
    """Questions that came again lay in both splits, since these were cut by position."""
    path = write_task(tmp_path)
    rows = [{"q": f"tree {n % 5}", "choices": [f"oak {n}", f"elm {n}"], "a": 0} for n in range(15)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "test.jsonl").write_text(text, encoding="utf-8")
    [task] = harness_tasks([str(path)], validation_share=0.5)
    assert (len(task.validation), len(task.test)) == (6, 9)
    assert not {e.input for e in task.validation} & {e.input for e in task.test}
    [whole] = harness_tasks([str(path)])
    assert [e.input[3:9] for e in whole.test[:6]] == [f"tree {n}" for n in (0, 1, 2, 3, 4, 0)]
    # Minimal pairs ask nothing: their choices are what differs.
    [pairs] = harness_tasks([str(write_pairs(tmp_path))], validation_share=0.5)
    assert (len(pairs.validation), len(pairs.test)) == (7, 7)
    assert not {e.choices for e in pairs.validation} & {e.choices for e in pairs.test}


def write_pairs(folder: Path) -> Path:
    """A task without questions, the last and the first of whose pairs are the same."""
    path = write_task(folder, doc_to_text="")
    rows = [{"q": "", "choices": [f"oak {n}", f"elm {n}"], "a": 0} for n in (*range(13), 0)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "test.jsonl").write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_their_tasks_are_asked_and_graded_as_they_do(tmp_path: Path, kind: str) -> None:
    """lm-eval's prompts under the same demonstrations, and its grade of each question."""
    model = pico_model("llama")
    path = write_task(tmp_path, **{"fewshot_config": {"sampler": "first_n"}, **KINDS[kind]})
    task = harness_tasks([str(path)], shots=2)[0]
    assert (task.name, len(task.test)) == ("lm-eval:trees", 12)
    assert task.kind == ("exact" if kind in ("generated", "filtered", "likely") else "choice")
    assert task.examiner
    evaluated = evaluate(model=KeepshotLM(model), tasks=[str(path)], num_fewshot=2)
    samples = evaluated["samples"]["trees"]
    samples = [sample for sample in samples if sample["filter"] != "whole"]
    first = replace(task, demonstrations=task.demonstrations[:2])
    seed = next(seed for seed in range(50) if first.draw(2, seed) == first.demonstrations)
    for example, sample in zip(task.test, samples, strict=True):
        asked = task.examiner.ask(first.demonstrations, example)
        assert [text.context for text in asked] == [pair[0] for pair in sample["arguments"]]
    metric = next(name for name in ("acc", "exact_match") if name in samples[0])
    rows = measure(model, Plan((first,), (2,), (seed,)), arm="a").items
    assert [row.correct for row in rows] == [float(sample[metric]) for sample in samples]
    unshot = evaluate(model=KeepshotLM(model), tasks=[str(path)])
    expected = [float(s[metric]) for s in unshot["samples"]["trees"] if s["filter"] != "whole"]
    rows = measure(model, Plan((task,), (0,), (0,)), arm="a").items
    assert [row.correct for row in rows] == expected


def test_tasks_that_would_be_bent_are_refused(tmp_path: Path) -> None:
    sampled = {**GENERATED, "generation_kwargs": {"do_sample": True, "temperature": 1.0}}
    for changes, reason in [
        ({"num_fewshot": 0}, "sets num_fewshot: 0 itself, so 2 shots are refused"),
        ({"output_type": "loglikelihood_rolling"}, "measures perplexity"),
        (sampled, "sampled answers"),
        (
            {"metric_list": [{"metric": "f1"}]},
            r"no metric that gives each question a number \(f1\)",
        ),
        ({"doc_to_target": "birch"}, "which is none of its 3 choices"),
        (
            {"doc_to_target": "{{[a]}}"},
            "lm-eval cannot word question 'Q: test 0.* with 2 demonstrat",
        ),
    ]:
        with pytest.raises(TaskError, match=reason):
            harness_tasks([str(write_task(tmp_path, **changes))], shots=2)
    assert harness_tasks([str(write_task(tmp_path, num_fewshot=0))], shots=0)
    with pytest.raises(TaskError, match="8 demonstrations that are not asked too"):
        harness_tasks([str(write_task(tmp_path))], shots=9)
    with pytest.raises(TaskError, match="nearest is 'hellaswag'"):
        harness_tasks(["hellaswog"])
    with pytest.raises(TaskError, match="no such file"):
        harness_tasks(["none.yaml"])


def test_demonstrations_are_set_aside_where_there_is_one_split(tmp_path: Path) -> None:
    path = write_task(tmp_path, fewshot_split="test")
    task = harness_tasks([str(path)], shots=3)[0]
    assert (len(task.demonstrations), len(task.test)) == (6, 6)
    assert not {e.input for e in task.demonstrations} & {e.input for e in task.test}


def test_names_are_told_apart() -> None:
    assert split_names(["core,lm-eval:a", "lm-eval:b.yaml"]) == (["core"], ["a", "b.yaml"])


def test_results_in_the_form_of_lm_eval(tmp_path: Path) -> None:
    scores = [
        Score(
            arm="org/m", model="org/m", task="t", task_version=1, shots=shots, seed=0,
            metric="accuracy", value=0.75, ci95=(0.5, 0.9), chance=0.25, num_items=13,
            format_failure=0.0, label_leakage=0.0,
        )
        for shots in (0, 4)
    ]  # fmt: skip
    model = ModelRecord(reference="org/m", sha256="0" * 64, num_parameters=5, dtype="float32")
    document = ResultDocument(models=[model], scores=scores, summary=[], cost=Cost())
    paths = write_results(document, tmp_path)
    assert [path.relative_to(tmp_path).as_posix() for path in paths] == [
        "org__m/results_0-shot_seed-0.json",
        "org__m/results_4-shot_seed-0.json",
    ]
    content = json.loads(paths[1].read_text("utf-8"))
    assert content["results"]["t"]["acc,none"] == 0.75
    # Twelve of sixteen right, say: lm-eval's stderr of a mean of 0/1 values, sqrt(p q / (n - 1)).
    assert content["results"]["t"]["acc_stderr,none"] == pytest.approx(0.125)
    assert content["n-shot"] == {"t": 4}
