"""The guard and the joined KL term in trainers that are not ours, TRL's included."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments

from keepshot.errors import AssetError, ConfigError
from keepshot.models.loading import LanguageModel
from keepshot.prompts import Example
from keepshot.scoring.evaluate import Plan, measure
from keepshot.tasks.task import Task
from keepshot.tuning.anchors import draw_prompts
from keepshot.tuning.batch import pad, read_logits
from keepshot.tuning.guard import PROBE, ICLGuard, Probe
from keepshot.tuning.join import keep_close
from keepshot.tuning.keep import KL
from keepshot.tuning.live import live_model, named_tasks
from keepshot.tuning.terms import kl_divergence

Build = Callable[..., LanguageModel]
TEXTS = [
    f"Q: {word}\nA: {word[0].upper()}\n" for word in ("fig", "pea", "oat", "rye", "nut", "yam")
]
ROWS = [{"prompt": text[:-2], "completion": text[-2:]} for text in TEXTS]
PAIRS = [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": "zz\n"} for row in ROWS]
WORDS = ["one", "two", "six", "ten", "red", "blue", "cat", "dog", "sun", "sky", "sea", "tree"]
ANCHOR = Task("upper", "exact", 1, "", "", tuple(Example(w, w.upper()) for w in WORDS), (), ())


def known_task(model: LanguageModel, count: int = 40) -> Task:
    """A task whose right answers are what the untuned model prefers, so that its score is 1."""
    choices = ("x", "y", "z")
    shown = tuple(Example(f"d{n}", choices[n % 3], choices) for n in range(8))
    asked = tuple(Example(f"q{n}", "x", choices) for n in range(count))
    task = Task("known", "choice", 1, "", "", shown, asked, ())
    items = measure(model, Plan((task,), (2,), (0,), "validation"), arm="a").items
    right = tuple(
        replace(e, output=item.answer) for e, item in zip(asked, items, strict=True)
    )  # fmt: skip
    return replace(task, validation=right)


def arguments(place: Path, **settings: Any) -> dict[str, Any]:
    return {
        "output_dir": str(place), "max_steps": 6, "per_device_train_batch_size": 6,
        "learning_rate": 1e-3, "lr_scheduler_type": "constant", "save_strategy": "no",
        "report_to": [], "use_cpu": True, "disable_tqdm": True, "logging_steps": 1, "seed": 0,
        **settings,
    }  # fmt: skip


def stock_trainer(
    model: LanguageModel, place: Path, module: Any = None, **settings: Any
) -> Trainer:
    tokenizer: Any = model.tokenizer
    rows = [{"input_ids": tokenizer(text)["input_ids"]} for text in TEXTS]
    width = max(len(row["input_ids"]) for row in rows)

    def collate(batch: list[dict[str, Any]]) -> dict[str, Tensor]:
        ids = [[*row["input_ids"], *[2] * (width - len(row["input_ids"]))] for row in batch]
        labels = [[-100 if token == 2 else token for token in row] for row in ids]
        return {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)}

    return Trainer(
        model=module or model.module,
        args=TrainingArguments(**arguments(place, remove_unused_columns=False, **settings)),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows),
        data_collator=collate,
        processing_class=tokenizer,
    )


def weights(module: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return all(torch.equal(weight, second[name]) for name, weight in first.items())


def divergence(model: LanguageModel, untuned: LanguageModel) -> float:
    padded = pad(draw_prompts(untuned, [ANCHOR], KL(prompts=24), max_length=512, seed=9))
    with torch.no_grad():
        student, teacher = (
            read_logits(m.module, padded.ids_BT, padded.read_N, m.module.get_output_embeddings())
            for m in (model, untuned)
        )
    everywhere = torch.ones(len(student), dtype=torch.bool)
    return kl_divergence(student, teacher, everywhere, "forward").item()


# The guard.


class Hearing(TrainerCallback):
    """A tracker: it hears what the trainer logs."""

    def __init__(self) -> None:
        self.heard: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.heard.append(dict(logs))


def test_the_guard_logs_to_every_tracker_and_changes_no_bit(fresh_pico: Build, tmp_path: Path):
    plain, watched = fresh_pico("llama"), fresh_pico("llama")
    guard = ICLGuard([known_task(watched)], every=2, probe=Probe(shots=2, limit=20))
    stock_trainer(plain, tmp_path).train()
    trainer = stock_trainer(watched, tmp_path)
    tracker = Hearing()
    trainer.add_callback(tracker)
    guard.watch(trainer)
    trainer.train()
    assert equal(weights(plain.module), weights(watched.module))
    assert [reading.step for reading in guard.readings] == [0, 2, 4, 6]
    first = guard.readings[0]
    assert (first.score, first.retention, first.num_items) == (1.0, 1.0, 20)
    rows = [logs for logs in tracker.heard if "icl/retention" in logs]
    assert [row["icl/retention"] for row in rows] == [r.retention for r in guard.readings]
    assert all(low <= 1.0 for low in [r.ci95[0] for r in guard.readings])
    losses = [row for row in trainer.state.log_history if "loss" in row]
    assert len(losses) == 6


def test_the_readings_are_what_measuring_says(fresh_pico: Build, tmp_path: Path):
    model = fresh_pico("gpt2")
    task = known_task(model)
    guard = ICLGuard([task], every=3, probe=Probe(shots=2, limit=40))
    trainer = stock_trainer(model, tmp_path, learning_rate=1e-2)
    trainer.add_callback(guard)
    trainer.train()
    assert model.module.training
    model.module.eval()
    items = measure(model, Plan((task,), (2,), (0,), "validation"), arm="after").items
    score = sum(item.correct for item in items) / len(items)
    assert guard.readings[-1].score == pytest.approx(score)
    assert guard.readings[-1].retention == pytest.approx((score - 1 / 3) / (1 - 1 / 3))
    logged = [row for row in trainer.state.log_history if "icl/score" in row]
    assert [row["step"] for row in logged] == [0, 3, 6]


@pytest.mark.parametrize("action", ["warn", "stop", "rollback"])
def test_the_guard_acts(
    action: Any, fresh_pico: Build, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    model = fresh_pico("llama")
    before = weights(model.module)
    guard = ICLGuard([known_task(model)], 2, 0.05, action, Probe(shots=2, limit=40))
    trainer = stock_trainer(model, tmp_path, learning_rate=0.3)
    guard.watch(trainer)
    with caplog.at_level(logging.WARNING, logger="keepshot.tuning.guard"):
        trainer.train()
    assert "guard: few-shot retention is" in caplog.text
    assert guard.readings[1].retention < 0.95
    assert trainer.state.global_step == (6 if action == "warn" else 2)
    assert guard.acted_at == (None if action == "warn" else 2)
    assert equal(weights(model.module), before) == (action == "rollback")


BEST: dict[str, Any] = {
    "load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2,
    "save_strategy": "steps", "save_steps": 2, "greater_is_better": True,
}  # fmt: skip


def test_the_last_reading_is_of_the_weights_that_come_out(fresh_pico: Build, tmp_path: Path):
    """The trainer puts back what it calls its best, here the weights of the highest loss."""
    model = fresh_pico("llama")
    guard = ICLGuard([known_task(model)], 2, 0.05, "warn", Probe(shots=2, limit=40))
    trainer = stock_trainer(model, tmp_path, learning_rate=0.01, **BEST)
    guard.watch(trainer)
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best is not None
    assert best.endswith("checkpoint-2")
    assert [reading.step for reading in guard.readings] == [0, 2, 4, 6, 6]
    scores = [reading.score for reading in guard.readings]
    assert scores[-1] == scores[1] != scores[-2]


def test_what_the_guard_refuses(fresh_pico: Build, tmp_path: Path):
    for settings, message in (
        ({"every": 0}, "every=0 is no number of steps"),
        ({"tolerance": 1.5}, "tolerance=1.5 is no share"),
        ({"action": "shout"}, "action 'shout' is unknown"),
    ):
        with pytest.raises(ConfigError, match=message):
            ICLGuard(**settings)  # type: ignore[arg-type]
    with pytest.raises(AssetError, match="is not fetched here"):
        ICLGuard("country-capital")
    with pytest.raises(ConfigError, match="both choose the weights that come out"):
        ICLGuard(action="rollback").on_train_begin(
            SimpleNamespace(load_best_model_at_end=True), None, None
        )
    sharded = SimpleNamespace(fsdp="full_shard", deepspeed=None)
    with pytest.raises(ConfigError, match="divided among processes"):
        ICLGuard().on_train_begin(sharded, None, None)
    model = fresh_pico("llama")
    hopeless = Task(
        "hopeless", "exact", 1, "", "", ANCHOR.demonstrations,
        tuple(Example(f"n{n}", "no such answer") for n in range(9)), (),
    )  # fmt: skip
    trainer = stock_trainer(model, tmp_path)
    ICLGuard([hopeless]).watch(trainer)
    with pytest.raises(ConfigError, match="no better than chance on hopeless at 4 shots"):
        trainer.train()
    with pytest.raises(ConfigError, match="has no tokenizer"):
        live_model(model.module, None)


def test_a_soft_prompt_of_pefts_leaves_nothing_to_watch_or_to_hold(
    fresh_pico: Build, tmp_path: Path
):
    """The guard saw weights that never change; the term read the wrong positions."""
    model = fresh_pico("llama")
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    trainer = stock_trainer(model, tmp_path, get_peft_model(model.module, config))
    with pytest.raises(ConfigError, match=r"what trains is a soft prompt \(PROMPT_TUNING\)"):
        keep_close(trainer, KL(prompts=8), tasks=[ANCHOR])
    ICLGuard([ANCHOR]).watch(trainer)
    with pytest.raises(ConfigError, match="nothing to watch or to hold; leave the guard and the"):
        trainer.train()


def test_a_term_that_would_reach_nothing_says_what_there_is(fresh_pico: Build, tmp_path: Path):
    model = fresh_pico("llama")
    model.module.requires_grad_(False)
    with pytest.raises(ConfigError, match="none of the 30 of LlamaForCausalLM does"):
        keep_close(stock_trainer(model, tmp_path), KL(prompts=8), tasks=[ANCHOR])


def test_after_a_resume_the_reference_is_the_model_as_resumed(
    fresh_pico: Build, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    first, second = fresh_pico("llama"), fresh_pico("llama")
    task = known_task(first)
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 4, "learning_rate": 1e-3}
    trainer = stock_trainer(first, tmp_path, **settings)
    ICLGuard([task], every=4, probe=Probe(shots=2)).watch(trainer)
    trainer.train()
    guard = ICLGuard([task], every=2, probe=Probe(shots=2))
    trainer = stock_trainer(second, tmp_path, **settings)
    guard.watch(trainer)
    with caplog.at_level(logging.WARNING, logger="keepshot.tuning.guard"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert [reading.step for reading in guard.readings] == [4, 6]
    assert guard.readings[0].retention == 1.0
    assert "goes on at step 4, so retention is against the model there" in caplog.text
    assert equal(weights(first.module), weights(second.module))


def test_the_default_probe_needs_no_download():
    tasks = named_tasks(PROBE)
    assert len(tasks) == 5
    assert all(len(task.validation) >= 16 for task in tasks)


# The joined KL term.


@pytest.mark.parametrize("adapted", [False, True], ids=["full", "lora"])
def test_the_term_holds_a_stock_trainer_to_the_untuned_model(
    adapted: bool, fresh_pico: Build, tmp_path: Path
):
    untuned, free, held = (fresh_pico("llama") for _ in range(3))
    for model, joined in ((free, False), (held, True)):
        module = None
        if adapted:
            torch.manual_seed(0)
            module = get_peft_model(model.module, LoraConfig(r=4, target_modules="all-linear"))
        trainer = stock_trainer(model, tmp_path, module, max_steps=25, learning_rate=1e-2)
        if joined:
            keep_close(trainer, KL(prompts=24), tasks=[ANCHOR])
        trainer.train()
        values = [row["keep/kl"] for row in trainer.state.log_history if "keep/kl" in row]
        assert len(values) == (25 if joined else 0)
        if joined:
            assert values[0] == pytest.approx(0.0, abs=1e-5)
    assert divergence(held, untuned) < 0.5 * divergence(free, untuned)


def test_the_untuned_model_writes_the_terms_prompts_itself(
    fresh_pico: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The spec takes `self`, which joining took for the name of a task."""
    asked: list[bool] = []

    def written(model: LanguageModel, seed: int) -> list[Task]:
        layers = [part for part in model.module.modules() if isinstance(part, LoraLayer)]
        asked.append(any(not layer.disable_adapters for layer in layers))
        return [ANCHOR]

    monkeypatch.setattr("keepshot.tuning.join.write_tasks", written)
    model = fresh_pico("llama")
    module = get_peft_model(model.module, LoraConfig(r=4, target_modules="all-linear"))
    trainer = stock_trainer(model, tmp_path, module, max_steps=1)
    keep_close(trainer, KL(prompts=8, tasks="self"))
    trainer.train()
    assert asked == [False]  # by the model under the adapter
    assert any("keep/kl" in row for row in trainer.state.log_history)


def test_accumulated_batches_give_the_same_weights(fresh_pico: Build, tmp_path: Path):
    results: list[dict[str, Tensor]] = []
    for size, steps in ((6, 1), (2, 3)):
        model = fresh_pico("llama")
        trainer = stock_trainer(
            model, tmp_path, max_steps=4, learning_rate=1e-3, per_device_train_batch_size=size,
            gradient_accumulation_steps=steps, train_sampling_strategy="sequential", optim="sgd",
        )  # fmt: skip
        keep_close(trainer, KL(prompts=8, weight=5.0), tasks=[ANCHOR])
        trainer.train()
        results.append(weights(model.module))
    for name, weight in results[0].items():
        assert torch.allclose(weight, results[1][name], atol=2e-5), name


def test_evaluation_does_not_see_the_term(fresh_pico: Build, tmp_path: Path):
    model = fresh_pico("llama")
    trainer = stock_trainer(model, tmp_path)
    plain = trainer.evaluate(trainer.train_dataset)["eval_loss"]
    keep_close(trainer, KL(prompts=8), tasks=[ANCHOR])
    with pytest.raises(ConfigError, match="has a kl term already"):
        keep_close(trainer, KL(prompts=8), tasks=[ANCHOR])
    trainer.train()
    tuned = trainer.evaluate(trainer.train_dataset)["eval_loss"]
    assert tuned < plain


# TRL, where it is installed.


@pytest.fixture
def trl() -> Any:
    return pytest.importorskip("trl")


def sft_trainer(trl: Any, model: LanguageModel, place: Path, **settings: Any) -> Any:
    return trl.SFTTrainer(
        model=model.module,
        args=trl.SFTConfig(**arguments(place, max_length=64, **settings)),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=model.tokenizer,
    )


def test_the_guard_in_trls_sft_trainer(trl: Any, fresh_pico: Build, tmp_path: Path):
    plain, model = fresh_pico("llama"), fresh_pico("llama")
    sft_trainer(trl, plain, tmp_path).train()
    guard = ICLGuard([known_task(model)], every=3, probe=Probe(shots=2, limit=10))
    trainer = sft_trainer(trl, model, tmp_path)
    guard.watch(trainer)
    trainer.train()
    assert [reading.step for reading in guard.readings] == [0, 3, 6]
    logged = [row["icl/retention"] for row in trainer.state.log_history if "icl/retention" in row]
    assert logged == [reading.retention for reading in guard.readings]
    assert equal(weights(plain.module), weights(model.module))
    # The trainer's own rows keep what it gathers for them.
    assert all("mean_token_accuracy" in r for r in trainer.state.log_history if "loss" in r)


def test_the_term_in_trls_sft_trainer(trl: Any, fresh_pico: Build, tmp_path: Path):
    untuned, free, held = (fresh_pico("llama") for _ in range(3))
    settings = {"max_steps": 25, "learning_rate": 1e-2}
    sft_trainer(trl, free, tmp_path, **settings).train()
    trainer = sft_trainer(trl, held, tmp_path, **settings)
    keep_close(trainer, KL(prompts=24), tasks=[ANCHOR])
    trainer.train()
    assert divergence(held, untuned) < 0.5 * divergence(free, untuned)
    rows = [row for row in trainer.state.log_history if "keep/kl" in row]
    # TRL trains under autocast to bfloat16, and so the untuned model was read.
    assert rows[0]["keep/kl"] == pytest.approx(0.0, abs=1e-5)
    assert max(row["keep/kl"] for row in rows) > 1e-3


def test_the_term_in_trls_dpo_trainer(trl: Any, fresh_pico: Build, tmp_path: Path):
    untuned, free, held = (fresh_pico("llama") for _ in range(3))
    for model, joined in ((free, False), (held, True)):
        trainer = trl.DPOTrainer(
            model=model.module,
            args=trl.DPOConfig(
                **arguments(tmp_path, max_steps=20, learning_rate=3e-3, max_length=64)
            ),
            train_dataset=Dataset.from_list(PAIRS),
            processing_class=model.tokenizer,
            # Without an adapter it would want a second model, from the hub, to compare with.
            peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
        )
        if joined:
            keep_close(trainer, KL(prompts=24), tasks=[ANCHOR])
        trainer.train()
        assert any("keep/kl" in row for row in trainer.state.log_history) == joined
    assert divergence(held, untuned) < 0.5 * divergence(free, untuned)
