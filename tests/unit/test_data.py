"""Rows become samples: what is learned, what is refused, how batches are made."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from command import status
from keepshot.errors import ConfigError, TaskError
from keepshot.models.loading import LanguageModel, save
from keepshot.prompts import VERBATIM, Example, Template
from keepshot.tasks.source import Message, MessagesRow, PromptRow, Role, Row, TextRow
from keepshot.tuning.batch import Sample, Source, fingerprint, group, pad, read_logits, schedule
from keepshot.tuning.data import (
    Encoded,
    encode_demonstrations,
    encode_few_shot,
    encode_row,
    encode_rows,
    hold_out,
    slide_few_shot,
)
from keepshot.tuning.recipe import Auto, Recipe
from keepshot.tuning.tokenised import Extra, Tokenised, tokenise

TEMPLATE = Template()
CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SHOWN = [Example("one", "ONE"), Example("two", "TWO"), Example("six", "SIX")]


@pytest.fixture(params=["llama", "gemma3"])
def model(request: pytest.FixtureRequest, pico_models: dict[str, LanguageModel]) -> LanguageModel:
    """Without a BOS token (llama), and with one (gemma3)."""
    return pico_models[request.param]


def encode(model: LanguageModel, row: Row) -> Sample:
    return encode_row(model, row, TEMPLATE, where="row 1")


def learned(model: LanguageModel, sample: Sample) -> str:
    return model.decode(sample.targets)


def test_an_example_is_learned_from_the_answer_to_its_newline(model: LanguageModel):
    sample = encode(model, Example("Peru", "Lima"))
    assert model.decode(sample.ids) == "Q: Peru\nA: Lima\n"
    assert learned(model, sample) == " Lima\n"
    context, answer = model.encode_pair("Q: Peru\nA:", " Lima\n")
    assert list(sample.ids) == context + answer
    assert len(sample.read) == len(answer)


def test_a_prompt_row_is_joined_as_it_is(model: LanguageModel):
    sample = encode(model, PromptRow("2+2=", "4\nor four"))
    assert (model.decode(sample.ids), learned(model, sample)) == ("2+2=4\nor four", "4\nor four")
    assert sample.targets[-1] == model.tokenizer.eos_token_id
    again = encode_few_shot(model, VERBATIM, [], Example("2+2=", "4\nor four\n"))
    assert sample.ids[:-1] == again.ids[:-1]


def test_all_of_a_free_text_is_learned_and_its_end(model: LanguageModel):
    sample = encode(model, TextRow("abc"))
    assert sample.ids[-1] == model.tokenizer.eos_token_id
    assert sample.read == tuple(range(len(sample.ids) - 1))


def test_only_the_assistants_turns_are_learned(model: LanguageModel, monkeypatch):
    monkeypatch.setattr(model.tokenizer, "chat_template", CHAT)
    turns = ("user", "hi"), ("assistant", "Hello."), ("user", "bye"), ("assistant", "See you.")
    sample = encode(model, MessagesRow(tuple(Message(*turn) for turn in turns)))
    assert model.decode(sample.ids) == (
        "<user>hi\n<assistant>Hello.\n<user>bye\n<assistant>See you.\n"
    )
    assert learned(model, sample) == "Hello.\nSee you.\n"


def test_a_template_that_rewrites_earlier_turns_is_refused(model: LanguageModel, monkeypatch):
    monkeypatch.setattr(model.tokenizer, "chat_template", "{{ messages|length }}" + CHAT)
    row = MessagesRow((Message("user", "hi"), Message("assistant", "Hello.")))
    with pytest.raises(TaskError, match=r"row 1: the chat template of 'pico-.*' rewrites"):
        encode(model, row)


REFUSING = (
    "{% for m in messages %}{% if m.role == 'system' %}"
    "{{ raise_exception('System role not supported.') }}{% endif %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}\n{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "roles", "message"),
    [
        (REFUSING, "system user assistant", "System role not supported;\nput what the system says"),
        (REFUSING, "user user assistant", "Roles must alternate;\nlet user and assistant speak in"),
        (REFUSING, "assistant user assistant", "Roles must alternate;\nlet the user speak first"),
        (
            "{{ messages[0].role }}" + CHAT,
            "assistant user assistant",
            "Provide at least one message;\nlet the user speak first, or give prompt and",
        ),
    ],
    ids=["system", "twice", "assistant", "empty"],
)
def test_turns_that_a_template_refuses_say_what_to_do(
    template: str, roles: str, message: str, model: LanguageModel, monkeypatch
):
    monkeypatch.setattr(model.tokenizer, "chat_template", template)
    turns = [Message(cast(Role, role), "hi") for role in roles.split()]
    refused = f"row 1: the chat template of '{model.reference}' refuses turns of "
    with pytest.raises(TaskError) as error:
        encode(model, MessagesRow(tuple(turns)))
    assert str(error.value).startswith(refused + ", ".join(roles.split()))
    assert message in str(error.value)


def test_a_template_that_opens_thoughts_is_not_said_to_rewrite(model: LanguageModel, monkeypatch):
    thinking = CHAT.replace("<assistant>", "<assistant><think>")
    monkeypatch.setattr(model.tokenizer, "chat_template", thinking)
    row = MessagesRow((Message("user", "hi"), Message("assistant", "Hello.")))
    with pytest.raises(TaskError, match=r"row 1: .* asks for an answer with '<assistant><think>'"):
        encode(model, row)


def test_messages_without_a_chat_template_say_what_to_do(model: LanguageModel):
    row = MessagesRow((Message("user", "hi"), Message("assistant", "Hello.")))
    with pytest.raises(TaskError, match="has no chat template; give prompt and completion"):
        encode(model, row)


def test_few_shot_samples_learn_the_last_answer_only(model: LanguageModel):
    sample = encode_few_shot(model, TEMPLATE, SHOWN[:2], SHOWN[2])
    assert model.decode(sample.ids) == "Q: one\nA: ONE\n\nQ: two\nA: TWO\n\nQ: six\nA: SIX\n"
    assert learned(model, sample) == " SIX\n"


def test_demonstrations_are_read_at_every_answer_and_its_end(model: LanguageModel):
    sample = encode_demonstrations(model, TEMPLATE, SHOWN, "answers")
    assert learned(model, sample) == " ONE\n TWO\n SIX\n"
    everything = encode_demonstrations(model, TEMPLATE, SHOWN, "all")
    assert len(everything.read) == len(everything.ids) - 1


def test_sliding_makes_every_example_the_query_once(model: LanguageModel):
    examples = [Example(word, word.upper()) for word in ("one", "two", "six", "ten", "zero")]
    samples = slide_few_shot(model, TEMPLATE, examples, 3, np.random.default_rng(0))
    answers = sorted(learned(model, sample) for sample in samples)
    assert answers == sorted(f" {example.output}\n" for example in examples)
    for sample in samples:
        text = model.decode(sample.ids)
        assert text.count("Q: ") == len(set(text.split("\n\n"))) == 4
    with pytest.raises(TaskError, match="3 examples are too few"):
        slide_few_shot(model, TEMPLATE, examples[:3], 3, np.random.default_rng(0))


def test_long_rows_are_an_error_or_counted_but_never_cut(model: LanguageModel):
    rows = [Example("short", "yes"), Example("long " * 10, "no")]
    with pytest.raises(
        TaskError, match=r"my.jsonl: row 'long long .*' has \d+ tokens, \d+ more than max_length 30"
    ):
        encode_rows(
            model, rows, template=TEMPLATE, max_length=30, long_rows="error", source="my.jsonl"
        )
    encoded = encode_rows(
        model, rows, template=TEMPLATE, max_length=30, long_rows="drop", source="my.jsonl"
    )
    assert (len(encoded.samples), encoded.num_dropped) == (1, 1)
    assert encoded.samples[0] == encode(model, rows[0])
    with pytest.raises(TaskError, match="all 2 rows have more tokens than max_length 3"):
        encode_rows(
            model, rows, template=TEMPLATE, max_length=3, long_rows="drop", source="my.jsonl"
        )
    with pytest.raises(TaskError, match="there is no row to tune on"):
        encode_rows(
            model, [], template=TEMPLATE, max_length=30, long_rows="drop", source="my.jsonl"
        )


def test_cut_rows_keep_what_is_left_of_their_answers(model: LanguageModel):
    rows = [Example("a", "short"), Example("b", "much longer"), Example("far too long", "x")]
    opening = len(model.encode("ab")) - 2

    def cut(most: float) -> Encoded:
        return encode_rows(
            model, rows, template=Template(), max_length=14 + opening, long_rows="cut",
            source="my.jsonl", most_unanswered=most,
        )  # fmt: skip

    found = cut(0.34)
    assert (found.num_cut, found.num_unanswered, found.num_dropped) == (1, 1, 0)
    first, second = (model.decode(sample.ids[opening:]) for sample in found.samples)
    assert (first, second) == ("Q: a\nA: short\n", "Q: b\nA: much l")
    # A character is a token here: the answer begins after `Q: b\nA:`, at the eighth.
    assert found.samples[1].read == tuple(range(6 + opening, 13 + opening))
    with pytest.raises(TaskError, match="1 of 3 rows have no token of their answer left"):
        cut(0.3)


@pytest.mark.parametrize("learned", [False, True])
def test_held_out_rows_are_judged_together_with_the_others(learned: bool, model: LanguageModel):
    """One row of a hundred was refused as one of the ten held out."""
    rows: list[Row] = [Example(f"q {number}", f"a {number}") for number in range(30)]
    long = Example("x" * 90, "a")
    extra = Extra(learn_held_out=learned)

    def tokenised(held_out: list[Row], **settings: Any) -> Tokenised:
        recipe = Recipe(data="my.jsonl", max_length=60, steps=2, **settings)
        return tokenise(recipe, model, rows, anchors=(), validation=held_out, extra=extra)

    cut = tokenised([*rows[:9], long], long_rows="cut")
    assert cut.held_out is not None
    assert (len(cut.held_out.samples), cut.held_out.num_unanswered) == (9, 1)
    with pytest.raises(TaskError, match=r"my\.jsonl: .*, 2 of 32 rows have no token"):
        tokenised([long, long], long_rows="cut")
    assert tokenised([long], long_rows="drop").held_out is None
    with pytest.raises(TaskError, match=r"my\.jsonl: row 'xxx.*' has \d+ tokens"):
        tokenised([long])
    with pytest.raises(ConfigError, match=r"auto: none of the 1 held-out rows .*another `seed`"):
        tokenised([long], long_rows="drop", auto=Auto())


def test_hold_out_is_seeded_and_keeps_every_row_once():
    rows: list[Row] = [Example(f"question {number}", "answer") for number in range(40)]
    train, held = hold_out(rows, share=0.1, seed=3)
    assert sorted(train + held, key=rows.index) == rows
    assert len(held) == 4
    assert (train, held) == hold_out(rows, share=0.1, seed=3) != hold_out(rows, share=0.1, seed=4)
    assert len(hold_out(rows[:2], share=0.1, seed=0)[1]) == 1
    with pytest.raises(TaskError, match=r"my\.jsonl: 1 row is too few, .*give at least two"):
        hold_out(rows[:1], share=0.1, seed=0, source="my.jsonl")


def test_a_file_of_one_row_is_named(
    fresh_pico: Callable[..., LanguageModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):  # fmt: skip
    monkeypatch.chdir(tmp_path)
    save(fresh_pico("llama"), tmp_path / "m")
    Path("one.jsonl").write_text('{"input": "a", "output": "b"}\n', encoding="utf-8")
    asked = ["--model", "m", "--data", "one.jsonl", "--keep", "none", "--out", "o"]
    assert status("tune", *asked) == 2
    assert "one.jsonl: 1 row is too few" in capsys.readouterr().err


def test_hold_out_takes_a_tenth_of_questions_that_are_asked_often():
    """Of two questions with 500 answers each one was held out."""
    rows: list[Row] = [PromptRow(f"Write {n % 2}.", str(n)) for n in range(1000)]
    train, held = hold_out(rows, share=0.1, seed=0)
    assert (len(train), len(held)) == (900, 100)
    assert {row.prompt for row in held if isinstance(row, PromptRow)} == {"Write 0.", "Write 1."}


@pytest.mark.parametrize(
    "ask",
    [
        lambda text, answer: Example(text, answer),
        lambda text, answer: PromptRow(text, answer),
        lambda text, answer: MessagesRow(
            (Message("system", "Be kind."), Message("user", text), Message("assistant", answer))
        ),
        lambda text, _: TextRow(text),
    ],
    ids=["example", "prompt", "messages", "text"],
)
def test_hold_out_leaves_no_question_on_both_sides(ask: Callable[[str, str], Row]):
    wordings = ["{}", " {} ", "{}\n"]
    rows = [ask(wordings[n % 3].format("aB"[n % 2] + "c" * (n % 9)), "yes") for n in range(90)]
    for seed in range(20):
        sides = hold_out(rows, share=0.2, seed=seed)
        first, second = ({re.sub(r"\s|\\n", "", str(row)) for row in side} for side in sides)
        assert not first & second
        assert sum(map(len, sides)) == 90
        assert 1 <= len(sides[1]) <= 18
    # One question in ten wordings of its answer, and one other.
    ten = [ask("same", str(number)) for number in range(10)]
    assert hold_out([*ten, ask("other", "x")], share=0.1, seed=0)[1] == [ask("other", "x")]
    assert len(hold_out(ten, share=0.2, seed=0)[1]) == 2


def sample_of(length: int, read: int = 1) -> Sample:
    ids = tuple(3 + number % 50 for number in range(length + 1))
    return Sample(ids, tuple(range(length - read, length)))


def test_groups_keep_every_sample_and_spare_padding():
    samples = [sample_of(length) for length in (10, 12, 200, 11, 190, 9)]
    parts = group(samples)
    assert [len(part) for part in parts] == [4, 2]
    assert sorted(len(s) for part in parts for s in part) == [9, 10, 11, 12, 190, 200]
    assert group(samples[:2]) == [sorted(samples[:2], key=len)]


def test_padding_does_not_change_what_is_read(pico_models: dict[str, LanguageModel]):
    samples = [sample_of(5, 2), sample_of(23, 4), sample_of(14, 1)]
    for family, model in pico_models.items():
        head = model.module.get_output_embeddings()
        padded = pad(samples)
        assert padded.targets_N.tolist() == [token for s in samples for token in s.targets]
        with torch.no_grad():
            together = read_logits(model.module, padded.ids_BT, padded.read_N, head)
            alone = [
                model.module(input_ids=torch.tensor([s.ids])).logits[0, list(s.read)]
                for s in samples
            ]
        assert together.shape == (7, model.module.config.vocab_size), family
        assert torch.allclose(together, torch.cat(alone), atol=2e-5), family


def test_a_schedule_goes_through_everything_before_repeating():
    targets = tuple(sample_of(length) for length in range(2, 26))
    others = tuple(sample_of(length) for length in range(100, 104))
    drawn = schedule([Source(targets, 6), Source(others, 2)], steps=8, seed=1)
    assert len(drawn) == 8 * 8
    batches = [drawn[start : start + 8] for start in range(0, 64, 8)]
    assert all(sum(len(s) >= 100 for s in batch) == 2 for batch in batches)
    assert set(Counter(len(s) for s in drawn if len(s) < 100).values()) == {2}
    assert set(Counter(len(s) for s in drawn if len(s) >= 100).values()) == {4}
    assert drawn == schedule([Source(targets, 6), Source(others, 2)], steps=8, seed=1)
    assert drawn != schedule([Source(targets, 6), Source(others, 2)], steps=8, seed=2)


def test_the_fingerprint_sees_tokens_and_what_is_learned():
    sample = sample_of(8, 2)
    assert fingerprint([sample]) == fingerprint([sample_of(8, 2)])
    assert fingerprint([sample]) != fingerprint([sample_of(8, 3)])
    assert fingerprint([sample]) != fingerprint([Sample((9, *sample.ids[1:]), sample.read)])
