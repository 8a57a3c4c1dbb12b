"""What `report_to` names gets every step: loss, keep terms and the guard's readings."""

from __future__ import annotations

import struct
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from keepshot.models.loading import LanguageModel
from keepshot.progress import Silent
from keepshot.prompts import Example
from keepshot.scoring.evaluate import Plan, measure
from keepshot.tasks.task import Task
from keepshot.tuning.anchors import AnchorKL, cache_teacher, draw_prompts
from keepshot.tuning.batch import Source, schedule
from keepshot.tuning.data import encode_rows
from keepshot.tuning.guard import ICLGuard, Probe
from keepshot.tuning.keep import KL
from keepshot.tuning.loop import Loop, run
from keepshot.tuning.method_specs import Full
from keepshot.tuning.methods import prepare
from keepshot.tuning.recipe import Recipe

WORDS = ["one", "two", "six", "ten", "red", "blue", "cat", "dog", "sun", "sky", "sea", "tree"]
UPPER = tuple(Example(word, word.upper()) for word in WORDS)


def written(place: Path) -> dict[str, list[tuple[int, float]]]:
    """Read the scalars of an event file: records of length, check, bytes, check."""
    event_pb2: Any = pytest.importorskip("tensorboardX.proto.event_pb2")
    (file,) = place.rglob("events.out.tfevents*")
    content, at = file.read_bytes(), 0
    found: dict[str, list[tuple[int, float]]] = defaultdict(list)
    while at < len(content):
        (length,) = struct.unpack_from("<Q", content, at)
        event = event_pb2.Event.FromString(content[at + 12 : at + 12 + length])
        for value in event.summary.value:
            found[value.tag].append((event.step, value.simple_value))
        at += 16 + length
    return found


def known_task(model: LanguageModel) -> Task:
    """A task whose right answers are what the untuned model prefers."""
    choices = ("x", "y", "z")
    shown = tuple(Example(f"d{n}", choices[n % 3], choices) for n in range(4))
    asked = tuple(Example(f"q{n}", "x", choices) for n in range(8))
    task = Task("known", "choice", 1, "", "", shown, asked, ())
    items = measure(model, Plan((task,), (2,), (0,), "validation"), arm="a").items
    right = [replace(e, output=item.answer) for e, item in zip(asked, items, strict=True)]
    return replace(task, validation=tuple(right))


def test_loss_keep_term_and_guard_reach_tensorboard(
    fresh_pico: Callable[..., LanguageModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("tensorboardX")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "runs"))
    model = fresh_pico("llama")
    head: Any = model.module.get_output_embeddings()
    anchor = Task("upper", "exact", 1, "words", "", UPPER, (), ())
    term = KL(prompts=4, prompts_per_step=2)
    pool = cache_teacher(
        model, draw_prompts(model, [anchor], term, max_length=512, seed=0), term, head=head
    )
    guard = ICLGuard([known_task(model)], every=2, probe=Probe(shots=2, limit=8))
    recipe = Recipe(
        data="x", method=Full(), steps=4, batch_size=2, learning_rate=1e-3,
        report_to=("tensorboard",),
    )  # fmt: skip
    samples = encode_rows(
        model, UPPER, template=anchor.template, max_length=64, long_rows="error", source="x"
    ).samples
    losses: list[dict[str, float]] = []
    loop = Loop(
        recipe, prepare(recipe.method, model.module, 0), schedule([Source(samples, 2)], 4, 0),
        [AnchorKL("kl", 5.0, pool, "forward", 0)], head, None, guard, model.tokenizer,
    )  # fmt: skip
    run(loop, losses, Silent())
    found = written(tmp_path / "runs")
    for tag, key in (
        ("train/loss", "loss"), ("train/next_token", "next_token"), ("train/keep/kl", "kl")
    ):  # fmt: skip
        steps, values = zip(*found[tag], strict=True)
        assert steps == (1, 2, 3, 4), tag
        assert values == pytest.approx([row[key] for row in losses], rel=1e-6), tag
    assert [step for step, _ in found["train/icl/score"]] == [0, 2, 4]
    scores = [reading.score for reading in guard.readings]
    assert [value for _, value in found["train/icl/score"]] == pytest.approx(scores)
