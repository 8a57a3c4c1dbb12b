"""What `--keep auto` decides by itself, on pico models: rates, steps, lambda, and the record."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from keepshot.blending.sweep import rescale_adapter
from keepshot.errors import ConfigError
from keepshot.models.loading import LanguageModel
from keepshot.progress import Silent
from keepshot.prompts import Example
from keepshot.scoring.evaluate import Plan, measure
from keepshot.tasks.catalog import task_from_file
from keepshot.tasks.task import Task
from keepshot.tuning.adapters import detach_
from keepshot.tuning.auto import Decisions
from keepshot.tuning.card import card
from keepshot.tuning.guard import ICLGuard, Probe, Reading
from keepshot.tuning.keep import KL
from keepshot.tuning.lowering import Point, find_lambda
from keepshot.tuning.method_specs import Full, LoRA, ProMoT, PromptTuning, default_learning_rate
from keepshot.tuning.methods import prepare
from keepshot.tuning.recipe import Auto, Recipe
from keepshot.tuning.record import TuneRecord
from keepshot.tuning.short_runs import Trial, lowest
from keepshot.tuning.tokenised import Extra
from keepshot.tuning.train import train

Build = Callable[..., LanguageModel]
FRUIT = ["apple", "berry", "cherry", "date", "egg", "fig", "grape", "honey", "ice", "jam", "kiwi"]
EXAMPLES = [Example(word, word[0].upper()) for word in FRUIT]
WORDS = ["one", "two", "six", "ten", "red", "blue", "cat", "dog", "sun", "sky", "sea", "tree"]
ANCHOR = Task(
    "upper", "exact", 1, "words", "", tuple(Example(w, w.upper()) for w in WORDS), (), ()
)  # fmt: skip
TERM = KL(prompts=24, prompts_per_step=1, shots=(2, 4), top_k=16)
IDS = torch.arange(3, 60).reshape(1, -1)


@pytest.fixture
def known(fresh_pico: Build, tmp_path: Path) -> str:
    """A file of questions that the untuned model answers better than chance from examples."""
    model = fresh_pico("llama")
    place = tmp_path / "known.jsonl"
    for label, other in itertools.permutations("xyzabcmn", 2):
        choices = [label, other]
        rows = [{"input": f"q{n}", "output": label, "choices": choices} for n in range(40)]
        place.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        plan = Plan((task_from_file(place),), (4,), (0,), "test")
        items = measure(model, plan, arm="a").items
        if sum(item.correct for item in items) > 0.9 * len(items):
            return str(place)
    raise AssertionError("the pico model prefers none of the labels")


def tune(
    model: LanguageModel, known: str | None, out_dir: Path | None = None, **settings: Any
) -> TuneRecord:
    guard = {"guard_tasks": (known,)} if known else {}
    recipe = Recipe(
        **{
            "data": "x", "batch_size": 6, "keep": (TERM,), "steps": 6,
            "auto": Auto(trial_steps=3, **guard), **settings,
        }
    )  # fmt: skip
    extra = Extra(state_dir=settings.pop("state_dir", None))
    return train(
        recipe, model, EXAMPLES, out_dir, anchors=[ANCHOR], validation=EXAMPLES[:4], extra=extra
    )


def weights(model: LanguageModel) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.module.named_parameters()}


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(weight, second[name]) for name, weight in first.items()
    )


def untimed(decisions: Decisions | None) -> Decisions:
    assert decisions is not None
    readings = tuple(dataclasses.replace(reading, seconds=0.0) for reading in decisions.guard)
    return dataclasses.replace(decisions, guard=readings, seconds=0.0)


@pytest.mark.parametrize("method", [Full(), LoRA(rank=2)], ids=lambda m: m.name)
def test_short_runs_leave_no_trace(method: Any, known: str, fresh_pico: Build):
    """A run at the rate that was found is, bit for bit, one that was given this rate."""
    searched, told = fresh_pico("llama"), fresh_pico("llama")
    found = tune(searched, known, method=method)
    assert found.auto is not None
    rates = [trial.learning_rate for trial in found.auto.trials]
    default = default_learning_rate(method)
    assert rates[:2] == [default, 2 * default]
    best = min(found.auto.trials, key=lambda trial: trial.total)
    assert found.learning_rate == found.auto.learning_rate == best.learning_rate / 2
    given = tune(told, known, method=method, learning_rate=found.learning_rate)
    assert given.auto is not None
    assert (given.auto.trials, given.auto.why_learning_rate) == ((), "given")
    assert found.losses == given.losses
    assert equal(weights(searched), weights(told))
    again = fresh_pico("llama")
    assert untimed(tune(again, known, method=method).auto) == untimed(found.auto)


@pytest.mark.parametrize("several", [False, True], ids=["one data set", "two"])
def test_rows_that_judged_the_rate_are_learned_afterwards(
    several: bool, known: str, fresh_pico: Build
):
    """Short runs are as if they were held out, training is as if nothing had been."""
    rows, held = EXAMPLES[4:], EXAMPLES[:4]
    auto = Auto(trial_steps=3, guard_tasks=(known,))
    extra, together, whole = Extra(), [*rows, *held], Extra()
    if several:
        extra = Extra(origins=[("a", 4), ("b", 3)], held_out_origins=[("a", 3), ("b", 1)])
        together = [*rows[:4], *held[:3], *rows[4:], *held[3:]]
        whole = Extra(origins=[("a", 7), ("b", 4)])

    def run(extra: Extra, rows: list[Example], held: list[Example], **settings: Any):
        fixed = {"data": "x", "batch_size": 6, "keep": (TERM,), "steps": 6, "method": LoRA(rank=2)}
        recipe, model = Recipe(**{**fixed, **settings}), fresh_pico("llama")
        record = train(recipe, model, rows, None, anchors=[ANCHOR], validation=held, extra=extra)
        return record, weights(model)

    learning = dataclasses.replace(extra, learn_held_out=True)
    learned, tensors = run(learning, rows, held, auto=auto)
    apart, _ = run(extra, rows, held, auto=auto)
    assert learned.auto is not None
    assert apart.auto is not None
    assert learned.auto.trials == apart.auto.trials != ()
    assert (learned.num_rows, apart.num_rows) == (11, 7)
    assert (learned.num_validation, learned.validation_loss) == (4, None)
    plain, others = run(whole, together, [], learning_rate=learned.learning_rate)
    assert learned.losses == plain.losses
    assert learned.data_fingerprint == plain.data_fingerprint
    assert equal(tensors, others)


def test_the_search_goes_on_while_the_total_falls(known: str, fresh_pico: Build):
    record = tune(fresh_pico("llama"), known, method=Full())
    assert record.auto is not None
    totals = {trial.learning_rate: trial.total for trial in record.auto.trials}
    best = min(totals, key=lambda rate: totals[rate])
    # A random model is so far from anything that the careful default is always too low.
    assert best > default_learning_rate(Full())
    furthest = 8 * default_learning_rate(Full())
    assert best == furthest or totals[2 * best] >= totals[best]


def test_the_lowest_rate_of_the_search_is_not_halved(known: str, fresh_pico: Build):
    """A keep term that outweighs everything makes every step down a gain."""
    heavy = (TERM.model_copy(update={"weight": 1e6}),)
    record = tune(fresh_pico("llama"), known, method=LoRA(rank=2), keep=heavy)
    assert record.auto is not None
    lowest_rate = default_learning_rate(LoRA(rank=2)) / 8
    assert min(record.auto.trials, key=lambda trial: trial.total).learning_rate == lowest_rate
    assert record.learning_rate == lowest_rate
    assert record.auto.why_learning_rate.startswith(f"{lowest_rate:g}, which was best of 5 rates")


@pytest.mark.parametrize(
    ("totals", "found", "asked"),
    [
        # Measured: a base model's totals are nearly flat, and the first step up gains a little.
        ({-2: 3.50, -1: 3.48, 0: 3.78, 1: 3.56, 2: 5.75}, -1, 5),
        ({-1: 5.38, 0: 2.61, 1: 1.51, 2: 2.69}, 1, 4),
        ({-1: 1.0, 0: 0.64, 1: 0.66}, 0, 3),
        ({-1: 1.0, 0: 1.0, 1: 1.0}, 0, 3),
        ({-1: 9.0, 0: 8.0, 1: 3.0, 2: 2.0, 3: 1.0}, 3, 5),
        ({-1: math.inf, 0: math.inf, 1: math.inf}, 0, 3),
    ],
)
def test_the_search_looks_both_ways(totals: dict[int, float], found: int, asked: int):
    seen: set[int] = set()

    def total(power: int) -> float:
        seen.add(power)
        return totals[power]

    assert lowest(total) == found
    assert len(seen) == asked


def test_the_guard_only_watches(known: str, fresh_pico: Build):
    record = tune(fresh_pico("llama"), known, method=LoRA(rank=2))
    assert record.auto is not None
    assert [reading.step for reading in record.auto.guard] == [0, 2, 4, 6]
    assert record.auto.guard[0].retention == 1.0
    assert record.steps == 6


def test_where_the_model_can_do_nothing_no_guard_watches(fresh_pico: Build):
    record = tune(fresh_pico("llama"), None, method=LoRA(rank=2))
    assert record.auto is not None
    assert (record.auto.guard, record.auto.lam) == ((), 1.0)
    assert "no better than chance" in record.auto.why_lambda


@pytest.mark.parametrize(
    "method", [PromptTuning(tokens=3), ProMoT(tokens=3, prompt_steps=3)], ids=lambda m: m.name
)
def test_soft_prompts_get_their_defaults(method: Any, fresh_pico: Build):
    keep = () if method.name == "prompt-tuning" else (TERM,)
    record = tune(fresh_pico("llama"), None, method=method, keep=keep)
    assert record.auto is not None
    assert record.learning_rate == default_learning_rate(method)
    assert "soft prompt" in record.auto.why_lambda


def test_something_must_be_held_out(fresh_pico: Build):
    with pytest.raises(ConfigError, match="no row of the target is held out"):
        train(Recipe(data="x", auto=Auto()), fresh_pico("llama"), EXAMPLES, None)


def test_a_killed_run_takes_up_its_rate_and_ends_with_the_same_bits(
    known: str, fresh_pico: Build, tmp_path: Path
):
    whole, broken, resumed = (fresh_pico("llama") for _ in range(3))
    auto = Auto(trial_steps=3, guard_tasks=(known,))
    recipe = Recipe(
        data="x", batch_size=6, keep=(TERM,), steps=6, auto=auto, method=LoRA(rank=2), save_every=2
    )

    def run(model: LanguageModel, extra: Extra, progress: Silent) -> TuneRecord:
        return train(
            recipe, model, EXAMPLES, None, anchors=[ANCHOR], validation=EXAMPLES[:4],
            extra=extra, progress=progress,
        )  # fmt: skip

    class Stopping(Silent):
        def update(self, done: int, total: int, detail: str = "") -> None:
            if done == 5:
                raise KeyboardInterrupt

    class Hearing(Silent):
        def __init__(self) -> None:
            self.stages: list[str] = []

        def stage(self, title: str) -> None:
            self.stages.append(title)

    expected = run(whole, Extra(), Silent())
    extra = Extra(state_dir=tmp_path / "state")
    with pytest.raises(KeyboardInterrupt):
        run(broken, extra, Stopping())
    assert (tmp_path / "state-rate.json").exists()
    hearing = Hearing()
    record = run(resumed, extra, hearing)
    assert not [title for title in hearing.stages if title.startswith("short run")]
    assert record.losses == expected.losses
    assert untimed(record.auto) == untimed(expected.auto)
    assert equal(weights(resumed), weights(whole))
    assert not list(tmp_path.glob("state*"))


def test_an_unknown_tracker_shows_before_the_first_short_run(known: str, fresh_pico: Build):
    """A third of the run was spent by then."""
    untuned, model = fresh_pico("llama"), fresh_pico("llama")
    with pytest.raises(ConfigError, match=r"wandbb is not supported.*; install the tracker, or"):
        tune(model, known, report_to=("wandbb",))
    assert weights(model).keys() == weights(untuned).keys()  # no adapter was put in


def reading(retention: float, spread: float = 0.02) -> Reading:
    return Reading(6, retention, retention, (retention - spread, retention + spread), 64, 0.0)


def lowered(
    model: LanguageModel,
    method: Any,
    seen: list[Reading],
    losses: Sequence[float] = (1.5, 1.5, 1.5),
) -> tuple[float, dict[str, Tensor], dict[str, Tensor]]:
    """Change what trains, lower lambda while `seen` says so; return weights before and after."""
    guard = ICLGuard([ANCHOR], tolerance=0.05, probe=Probe())
    start = weights(model) if method.name == "full" else None
    prepared = prepare(method, model.module, 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in prepared.parameters.values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    full = weights(model)
    guard.readings.append(seen[0])
    rest, loss = iter(seen[1:]), iter(losses)
    lam, why, path = find_lambda(
        prepared, start, guard, (0.75, 0.5), lambda: next(rest), lambda: next(loss)
    )
    assert why
    assert [point.lam for point in path] == [1.0, 0.75, 0.5][: len(seen) if len(seen) > 1 else 0]
    return lam, full, weights(model)


@pytest.mark.parametrize("method", [Full(), LoRA(rank=2)], ids=lambda m: m.name)
def test_lambda_stays_where_the_guard_is_content(method: Any, fresh_pico: Build):
    # Below the tolerance, but with no loss at all inside the interval: too little to act on.
    for last in (reading(0.97), reading(0.9, spread=0.2)):
        lam, full, now = lowered(fresh_pico("llama"), method, [last])
        assert lam == 1.0
        assert equal(full, now)


def test_lambda_is_lowered_until_the_guard_is_content(fresh_pico: Build):
    seen = [reading(0.5), reading(0.8), reading(0.96)]
    base = fresh_pico("llama")
    lam, full, now = lowered(model := fresh_pico("llama"), Full(), seen)
    assert lam == 0.5
    for name, weight in weights(base).items():
        assert torch.allclose(now[name], 0.5 * (weight + full[name]), atol=1e-6)
    assert model.module.training is False
    # An adapter at lambda is what peft makes of it.
    lam, full, now = lowered(model := fresh_pico("llama"), LoRA(rank=2), seen[:1] + seen[2:])
    assert lam == 0.75
    found = model.module(input_ids=IDS).logits
    with torch.no_grad():
        for name, parameter in model.module.named_parameters():
            parameter.copy_(full[name])
    with rescale_adapter(model.module, 0.75):
        assert torch.allclose(model.module(input_ids=IDS).logits, found, atol=1e-4)


@pytest.mark.parametrize(
    ("second", "third", "losses", "expected"),
    [
        (0.6, 0.7, (1.5, 1.55, 1.59), 0.5),  # the best reading
        (0.6, 0.7, (1.5, 1.55, 1.61), 0.75),  # at more than .1 nats it is too dear
        (0.6, 0.7, (1.5, 1.3, 1.59), 0.75),  # the least loss need not be that of lambda 1
        (0.4, 0.4, (1.5, 1.5, 1.5), 1.0),  # nothing lowered is better
    ],
)
def test_where_no_lambda_contents_the_best_reading_at_little_loss_is_taken(
    second: float, third: float, losses: tuple[float, ...], expected: float, fresh_pico: Build
):
    base = fresh_pico("llama")
    seen = [reading(0.5), reading(second), reading(third)]
    lam, full, now = lowered(fresh_pico("llama"), Full(), seen, losses)
    assert lam == expected
    assert lam < 1.0 or equal(full, now)
    for name, weight in weights(base).items():
        assert torch.allclose(now[name], weight + lam * (full[name] - weight), atol=1e-6)


def test_the_card_says_where_a_short_run_broke():
    broken = Trial(1.0, None, None)
    assert broken.total == math.inf
    assert Trial(1e-3, 0.5, 0.25).total == 0.5 + 5 * 0.25
    found = Decisions(
        1e-3, "x", 8, "x", (Trial(1e-3, 0.5, 0.25), broken), (),
        (Point(1.0, 0.5, (0.4, 0.6), 1.5),), 1.0, "x", 0.0,
    )  # fmt: skip
    record = TuneRecord(
        recipe={"data": "x"}, recipe_fingerprint="r", model="m", model_sha256="s", method="lora",
        keep=[], learning_rate=1e-3, steps=1, batch_size=1, seed=0, num_trainable=1, num_rows=1,
        num_dropped=0, num_validation=0, data_fingerprint="d", tokens=1, seconds=0.0,
        losses=[{"loss": 1.0}], auto=found,
    )  # fmt: skip
    text = card(record, "adapter")
    assert "| 0.001 | 0.500 | 0.250 |\n| 1 | broke | broke |" in text
    assert "| 1 | 0.50 [0.40, 0.60] | 1.500 |" in text
    assert "| target loss on rows held out |" in text
    learned = card(dataclasses.replace(record, num_validation=4), "adapter")
    assert "| target loss on rows held out from the short runs, learned since |" in learned


def test_record_and_card_say_what_was_decided_and_why(
    known: str, fresh_pico: Build, tmp_path: Path
):
    model = fresh_pico("llama")
    record = tune(model, known, tmp_path, method=LoRA(rank=2), steps=None)
    written = json.loads((tmp_path / "tuning.json").read_text("utf-8"))
    assert record.auto is not None
    assert written["auto"]["why_learning_rate"] == record.auto.why_learning_rate
    assert written["auto"]["steps"] == record.steps == 75
    card = (tmp_path / "adapter" / "README.md").read_text("utf-8")
    assert f"learning rate {record.learning_rate:g}: half of" in card
    assert "75 steps: the more of 75 steps and 3 passes over the data" in card
    assert "lambda 1: the guard found retention" in card
    assert record.data_fingerprint in card
    assert record.recipe_fingerprint in card
    assert f"next-token loss on 4 held-out rows: {record.validation_loss:.3f}" in card
    assert card.startswith("---\nbase_model: pico-llama\nlibrary_name: peft\n")
    detach_(model.module, merge=False)
