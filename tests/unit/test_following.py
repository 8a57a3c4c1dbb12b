"""Answers by policy, and instruction following beside few-shot ability in jobs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from keepshot.assets import AssetStore
from keepshot.blending.sweep import sweep
from keepshot.errors import ModelError, TaskError
from keepshot.jobs.following import Follower
from keepshot.judging.answers import Answer, answer_prompts, rendered, style_of
from keepshot.judging.follow import Examiner, instruction_scores, load_set
from keepshot.judging.policy import Following, Policy
from keepshot.models.loading import LanguageModel, outline, save
from keepshot.progress import Silent
from keepshot.records import InstructionRow, read_instructions, write_instructions
from keepshot.scoring.engine import Engine
from keepshot.scoring.request import Generate, GenerateResult
from keepshot.tasks.instruction_templates import embedded_set

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<bot>{% endif %}"
)


def test_a_policy_says_how_a_prompt_is_put(fresh_pico: Callable[..., LanguageModel]) -> None:
    model = fresh_pico("llama")
    assert style_of(model, Policy()) == "raw"
    assert rendered(model, " Say hi. ", Policy()) == "Say hi.\n\n"
    with pytest.raises(ModelError, match="no chat template; ask it with style raw"):
        rendered(model, "Say hi.", Policy(style="chat"))
    model.tokenizer.chat_template = TEMPLATE
    assert style_of(model, Policy()) == "chat"
    assert rendered(model, "Say hi.", Policy()) == "<user>Say hi.\n<bot>"
    assert rendered(model, "Hi", Policy(system="Be kind")) == "<system>Be kind\n<user>Hi\n<bot>"
    assert rendered(model, "Say hi.", Policy(style="raw")) == "Say hi.\n\n"


@pytest.mark.parametrize("family", ["llama", "gemma3", "falcon", "gpt2"])
def test_draws_are_the_same_alone_and_together(
    pico_models: dict[str, LanguageModel], family: str
) -> None:
    model = pico_models[family]
    contexts = [tuple(model.encode(text)) for text in ("abc", "abd", "xyz 12345")]
    asked = [Generate(c, 8, (), 30.0, seed) for c in contexts for seed in (0, 1)]
    together = Engine(model).run(asked)
    alone = [Engine(model, share=False).run([request])[0] for request in asked]
    assert together == alone
    texts = [r.text for r in together if isinstance(r, GenerateResult)]
    assert texts[0] != texts[1]  # another seed
    greedy = Engine(model).run([Generate(contexts[0], 8), Generate(contexts[0], 8, (), 1e-6, 3)])
    assert greedy[0] == greedy[1]  # a temperature near zero draws the likeliest token
    beside = Engine(model).run([asked[0], asked[1], Generate(contexts[0], 8)])
    assert beside == [*together[:2], greedy[0]]  # draws at a place leave its likeliest token alone


def test_draws_follow_the_softmax(pico_models: dict[str, LanguageModel]) -> None:
    """First tokens of 400 seeds against the model's own distribution; p of a false alarm < 1e-4."""
    import torch

    model = pico_models["llama"]
    context = tuple(model.encode("hello"))
    with torch.inference_mode():
        logits = model.module(torch.tensor([context])).logits[0, -1].double()
    shares = torch.softmax(logits / 2.0, dim=-1).numpy()
    texts = Engine(model).run([Generate(context, 1, (), 2.0, seed) for seed in range(400)])
    likeliest = int(np.argmax(shares))
    count = sum(
        isinstance(r, GenerateResult) and r.text == model.decode([likeliest]) for r in texts
    )
    spread = np.sqrt(400 * shares[likeliest] * (1 - shares[likeliest]))
    assert abs(count - 400 * shares[likeliest]) < 4 * spread


def test_truncated_answers_are_counted(pico_models: dict[str, LanguageModel]) -> None:
    answers = answer_prompts(pico_models["llama"], ["a", "b"], Policy(max_new_tokens=3))
    assert [a.prompt for a in answers] == ["a", "b"]
    assert all(a.truncated and len(a.text) <= 3 for a in answers)


def test_a_path_ends_its_answers_as_the_tuned_model_does(
    fresh_pico: Callable[..., LanguageModel], store: AssetStore, tmp_path: Path
) -> None:
    """Chat models end a turn with a token of their own, which the base does not count as an end.

    The whole path ran on to the token limit after it, and so did the tuned arm at lambda 1.
    """
    base, tuned = fresh_pico("llama", seed=0), fresh_pico("llama", seed=1)
    policy = Policy(max_new_tokens=12)
    (endless,) = answer_prompts(fresh_pico("llama", seed=1), ["Say hi"], policy)
    end = tuned.encode(endless.text)[2]
    tuned.module.generation_config.eos_token_id = [1, end]
    measured = answer_prompts(tuned, ["Say hi"], policy)
    assert endless.truncated
    assert (measured[0].truncated, len(measured[0].text)) == (False, 2)
    save(tuned, tmp_path / "tuned")
    light = outline(str(tmp_path / "tuned"), store)
    state = tuned.module.state_dict()
    for chat in (tuned, light):

        def ask(_lam: float, chat: LanguageModel = chat) -> list[Answer]:
            return answer_prompts(base, ["Say hi"], policy, chat=chat)

        [(_, asked)] = sweep(base, state, [1.0], ask)
        assert asked == measured
    assert light.eos_ids == tuned.eos_ids


def test_rows_and_scores_of_one_model(
    pico_models: dict[str, LanguageModel], store: AssetStore, tmp_path: Path
) -> None:
    examiner = Examiner(load_set("embedded"), Policy(max_new_tokens=4), "repaired", store)
    rows = examiner.examine(pico_models["llama"], arm="x", split="test", limit=8)
    assert [row.key for row in rows] == [p.key for p in embedded_set().part("test", 8).prompts]
    assert {(row.style, row.variant, row.split) for row in rows} == {("raw", "repaired", "test")}
    write_instructions(rows, tmp_path / "rows.parquet")
    assert read_instructions(tmp_path / "rows.parquet") == rows
    assert instruction_scores(rows)[0].truncated == np.mean([row.truncated for row in rows]) > 0.5


def test_scores_by_hand() -> None:
    def row(key: str, strict: list[bool], loose: list[bool]) -> InstructionRow:
        types = ["punctuation:no_comma", "startend:quotation", "startend:end_checker"]
        return InstructionRow(
            "x", "m", 0.5, "s", "test", "official", "raw", key, "?", "!", key == "a",
            types[: len(strict)], strict, loose,
        )  # fmt: skip

    rows = [row("a", [True], [True]), row("b", [True, False, False], [True, True, True])]
    (score,) = instruction_scores(rows)
    assert (score.prompt_strict, score.prompt_loose) == (0.5, 1.0)
    assert (score.instruction_strict, score.instruction_loose) == (0.5, 1.0)
    assert (score.num_prompts, score.num_instructions, score.truncated) == (2, 4, 0.5)
    assert score.by_type == {
        "punctuation:no_comma": 1.0, "startend:quotation": 0.0, "startend:end_checker": 0.0,
    }  # fmt: skip
    assert score.instruction_strict_ci95[0] <= 0.5 <= score.instruction_strict_ci95[1]


def test_a_prompt_without_room_is_named_before_anything_is_asked(
    fresh_pico: Callable[..., LanguageModel], tmp_path: Path
) -> None:
    model = fresh_pico("llama")
    long = "Say it again. " * model.context_length
    row = {
        "key": 1,
        "prompt": long,
        "instruction_id_list": ["punctuation:no_comma"],
        "kwargs": [{}],
    }
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps(row) + "\n")
    follower = Follower(Following(prompts=str(path)), AssetStore(tmp_path), None, Silent())
    with pytest.raises(TaskError, match="leaves no room in the context"):
        follower.check(model)
