"""What batches are made of: shares, the tree, few-shot samples, symbols; and the terms' prompts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from keepshot.errors import ConfigError
from keepshot.models.loading import LanguageModel
from keepshot.prompts import Example, Template
from keepshot.scoring.request import Generate, GenerateResult
from keepshot.tasks.source import PromptRow, TextRow
from keepshot.tasks.task import Task
from keepshot.tuning.anchors import AnchorKL, cache_teacher, draw_prompts
from keepshot.tuning.batch import Sample, Source, fingerprint
from keepshot.tuning.data import encode_few_shot
from keepshot.tuning.distil import ASK, agrees, rewrite
from keepshot.tuning.keep import EWC, KL, L2SP, FewShot, Mix, SelfDistil, TokenMask
from keepshot.tuning.masking import mask_tokens
from keepshot.tuning.method_specs import Full, LoRA, ValueOnly
from keepshot.tuning.methods import prepare
from keepshot.tuning.mixture import auxiliary_samples, few_shot_samples, lines, mix
from keepshot.tuning.penalties import diagonal_fisher, few_shot_loss, pull_from_here
from keepshot.tuning.recipe import Recipe
from keepshot.tuning.symbols import SYMBOLS, symbol_windows
from keepshot.tuning.terms import next_token
from keepshot.tuning.tokenised import Extra
from keepshot.tuning.train import train

Build = Callable[..., LanguageModel]
TEMPLATE = Template()
WORDS = ["one", "two", "six", "ten", "red", "blue", "cat", "dog", "sun", "sky", "sea", "tree"]
TASK = Task("upper", "exact", 1, "words", "", tuple(Example(w, w.upper()) for w in WORDS), (), ())
EXAMPLES = [Example(f"w{n}", "ABC"[n % 3]) for n in range(12)]


@pytest.fixture(scope="module")
def model(pico_models: dict[str, LanguageModel]) -> LanguageModel:
    return pico_models["llama"]


def recipe(**settings: Any) -> Recipe:
    return Recipe(**{"data": "x", "steps": 3, "batch_size": 10, "method": Full(), **settings})


def samples(count: int, length: int) -> list[Sample]:
    return [Sample((3 + n % 50,) * (length + 1), (length - 1,)) for n in range(count)]


def test_shares_become_counts_and_a_tree():
    term = Mix(icl_share=0.2, general_share=0.3, general_data="instructions")
    few_shot = [("one", samples(30, 9)), ("two", samples(10, 5))]
    made = mix(recipe(keep=(term,)), [("x", samples(8, 4))], few_shot, samples(7, 6))
    assert [(source.count, len(source.samples)) for source in made.sources] == [
        (5, 8), (2, 40), (3, 7),
    ]  # fmt: skip
    target, shots, general = made.tree
    assert (target.name, target.per_step, target.tokens, target.parts) == ("target: x", 5, 32, ())
    assert (general.name, general.per_step, general.tokens) == ("general: instructions", 3, 42)
    assert [(p.name, p.per_step, p.tokens) for p in shots.parts] == [
        ("one", 1.5, 270), ("two", 0.5, 50),
    ]  # fmt: skip
    assert shots.tokens == 320
    assert general.fingerprint == fingerprint(samples(7, 6))
    assert [line.split()[0] for line in lines(made.tree)] == [
        "target:", "few-shot", "one", "two", "general:",
    ]  # fmt: skip


def test_several_data_sets_are_one_or_have_stated_shares():
    parts = [("a", samples(90, 4)), ("b", samples(10, 5))]
    together = mix(recipe(data="a,b"), parts, [], [])
    assert [source.count for source in together.sources] == [10]
    assert [part.per_step for part in together.tree[0].parts] == [9.0, 1.0]
    apart = mix(recipe(data="a,b", data_shares=(0.55, 0.45)), parts, [], [])
    assert [source.count for source in apart.sources] in ([6, 4], [5, 5])
    tiny = mix(recipe(data="a,b", data_shares=(0.99, 0.01)), parts, [], [])
    assert [source.count for source in tiny.sources] == [9, 1]
    with pytest.raises(ConfigError, match="has 2 shares for 3 data sets"):
        mix(recipe(data_shares=(0.5, 0.5)), [*parts, ("c", samples(2, 2))], [], [])
    with pytest.raises(ValueError, match="leaves no room for 2 data sets; raise it"):
        recipe(batch_size=1, data_shares=(0.5, 0.5))
    with pytest.raises(ValueError, match="no room for the target beside 1 samples of the mix term"):
        recipe(batch_size=1, keep=(Mix(icl_share=0.4),))
    with pytest.raises(ValueError, match=r"add up to 0.9, not 1"):
        recipe(data_shares=(0.5, 0.4))


def test_the_record_holds_the_tree(fresh_pico: Build):
    rows = [*EXAMPLES, *(Example(f"v{n}", "D") for n in range(6))]
    keep = (Mix(icl_share=0.2, icl_from="data", shots=2), FewShot(shots=2))
    extra = Extra(origins=(("a", 12), ("b", 6)))
    record = train(recipe(data="a,b", keep=keep), fresh_pico("llama"), rows, None, extra=extra)
    names = [source.name for source in record.sources]
    assert names == [
        "target: a,b", "few-shot prompts (2 shots)", "few-shot prompts (beside the batch)",
    ]  # fmt: skip
    target = record.sources[0]
    assert [(part.name, part.samples) for part in target.parts] == [("a", 12), ("b", 6)]
    assert target.fingerprint == record.data_fingerprint
    assert target.per_step == 8


def learned(model: LanguageModel, sample: Sample) -> str:
    return model.decode(sample.targets)


def test_the_last_answer_or_every_answer_is_learned(model: LanguageModel):
    given = [("t", TEMPLATE, EXAMPLES)]
    built = {
        which: few_shot_samples(
            model, Mix(shots=3, learned=which), given, max_length=999, seed=0
        )[0][1]
        for which in ("last", "every")
    }  # fmt: skip
    assert {len(learned(model, sample).split()) for sample in built["last"]} == {1}
    for sample in built["every"]:
        answers = [block.rpartition("A: ")[2].strip() for block in decode(model, sample)]
        assert learned(model, sample).split() == answers
        assert len(answers) == 4


def decode(model: LanguageModel, sample: Sample) -> list[str]:
    return [block for block in model.decode(sample.ids).split("\n\n") if "A:" in block]


def test_symbols_stand_for_labels_and_can_be_read_off_the_demonstrations():
    windows = symbol_windows(EXAMPLES, 3, np.random.default_rng(0), name="t")
    truth = {example.input: example.output for example in EXAMPLES}
    assert Counter(window[-1].input for window in windows) == Counter(list(truth))
    meanings: set[tuple[tuple[str, str], ...]] = set()
    for window in windows:
        assert len({shown.input for shown in window}) == 4
        symbols = {truth[shown.input]: shown.output for shown in window}
        assert all(symbols[truth[shown.input]] == shown.output for shown in window)
        assert len(set(symbols.values())) == len(symbols)
        assert set(symbols.values()) <= set(SYMBOLS)
        assert window[-1].output in [shown.output for shown in window[:-1]]
        meanings.add(tuple(sorted(symbols.items())))
    assert len(meanings) > 8
    open_ended = [Example(str(n), str(n)) for n in range(9)]
    with pytest.raises(ConfigError, match=r"labels=symbols needs 2 to 32 labels .*\('0' once\)"):
        symbol_windows(open_ended, 3, np.random.default_rng(0), name="t")


def test_terms_on_the_targets_own_rows_need_questions_with_answers(model: LanguageModel):
    with pytest.raises(ConfigError, match="the data has none"):
        auxiliary_samples(model, FewShot(), [TextRow("x y")], TEMPLATE, max_length=99, seed=0)
    with pytest.raises(ConfigError, match="no prompt of 4 shots is within 10 tokens"):
        auxiliary_samples(model, FewShot(), EXAMPLES, TEMPLATE, max_length=10, seed=0)


def test_the_few_shot_loss_is_that_of_the_answers(fresh_pico: Build):
    model = fresh_pico("llama")
    head = model.module.get_output_embeddings()
    term = FewShot(weight=2.0, final_weight=0.0, shots=2, prompts_per_step=12)
    prompts = auxiliary_samples(model, term, EXAMPLES, TEMPLATE, max_length=999, seed=0)
    loss = few_shot_loss(term, prompts, steps=5, seed=0)
    assert [loss.weight_at(step) for step in range(5)] == pytest.approx([2.0, 1.5, 1.0, 0.5, 0.0])
    total, count = 0.0, 0
    with torch.no_grad():
        for sample in prompts:
            logits = model.module(input_ids=torch.tensor([sample.ids])).logits[0, list(sample.read)]
            total += next_token(logits, torch.tensor(sample.targets)).item() * len(sample.read)
            count += len(sample.read)
        assert loss(model.module, 0, head).item() == pytest.approx(total / count, abs=1e-4)


@pytest.mark.parametrize("method", [Full(), LoRA(rank=2), ValueOnly()], ids=lambda m: m.name)
def test_the_pull_is_zero_at_the_start_and_grows(method: Any, fresh_pico: Build):
    model = fresh_pico("gpt2")
    prepared = prepare(method, model.module, 0)
    term = pull_from_here("l2-sp", 3.0, prepared)
    assert term(prepared.module, 0, None).item() == 0.0
    with torch.no_grad():
        for parameter in prepared.parameters.values():
            parameter.add_(0.1)
    expected = 0.5 * 0.01 * sum(p.numel() for p in prepared.parameters.values())
    assert term(prepared.module, 1, None).item() == pytest.approx(expected, rel=1e-3)


def test_the_fisher_agrees_with_its_definition(fresh_pico: Build):
    """E over the model's own tokens of the squared gradient, by going through the vocabulary."""
    model = fresh_pico("llama")
    prepared = prepare(ValueOnly(), model.module, 0)
    head = model.module.get_output_embeddings()
    sample = encode_few_shot(model, TEMPLATE, EXAMPLES[:1], EXAMPLES[1])
    sample = Sample(sample.ids, sample.read[:1])
    parameters = list(prepared.parameters.values())
    logits = model.module(input_ids=torch.tensor([sample.ids])).logits[0, sample.read[0]]
    log_probs = logits.log_softmax(-1)
    exact = [torch.zeros_like(parameter) for parameter in parameters]
    for token in range(len(log_probs)):
        gradients = torch.autograd.grad(log_probs[token], parameters, retain_graph=True)
        for sums, gradient in zip(exact, gradients, strict=True):
            sums += log_probs[token].exp().detach() * gradient**2
    estimate = diagonal_fisher(prepared, [sample] * 400, head=head, seed=0)
    for name, expected in zip(prepared.parameters, exact, strict=True):
        found = estimate[name]
        assert found.sum().item() == pytest.approx(expected.sum().item(), rel=0.25)
        pair = torch.stack([found.flatten(), expected.flatten()])
        assert torch.corrcoef(pair)[0, 1] > 0.95, name


def test_the_fisher_is_read_without_dropout(fresh_pico: Build):
    """It was another one each time, and not the untuned model's."""

    def fisher(dropout: float) -> dict[str, torch.Tensor]:
        model = fresh_pico("llama")
        prepared = prepare(LoRA(rank=2, dropout=dropout), model.module, 0)
        head = model.module.get_output_embeddings()
        sample = encode_few_shot(model, TEMPLATE, EXAMPLES[:1], EXAMPLES[1])
        layers = [part for part in prepared.module.modules() if isinstance(part, torch.nn.Dropout)]
        modes = [layer.training for layer in layers]
        found = diagonal_fisher(prepared, [sample], head=head, seed=0)
        assert [layer.training for layer in layers] == modes
        return found

    plain, dropping = fisher(0.0), fisher(0.5)
    assert plain.keys() == dropping.keys()
    assert all(torch.equal(dropping[name], found) for name, found in plain.items())


@pytest.mark.parametrize(
    ("term", "part"),
    [(L2SP(weight=100.0), "l2-sp"), (EWC(weight=1e5, prompts=4), "ewc")],
    ids=["l2-sp", "ewc"],
)
def test_a_pull_holds_weights_nearer_their_start(term: Any, part: str, fresh_pico: Build):
    def moved(keep: tuple[Any, ...]) -> float:
        model = fresh_pico("llama")
        before = {name: p.detach().clone() for name, p in model.module.named_parameters()}
        settings = recipe(keep=keep, steps=20, learning_rate=1e-3)
        record = train(settings, model, EXAMPLES, None, anchors=[TASK])
        if keep:
            assert record.losses[0][part] == 0.0
            assert record.losses[-1][part] > 0.0
        after = model.module.named_parameters()
        return sum((p - before[name]).square().sum().item() for name, p in after) ** 0.5

    assert moved((term,)) < 0.9 * moved(())


def test_k3_caches_one_number_a_token(fresh_pico: Build):
    model = fresh_pico("llama")
    head = model.module.get_output_embeddings()
    term = KL(prompts=8, direction="k3")
    prompts = draw_prompts(model, [TASK], term, max_length=512, seed=0)
    pool = cache_teacher(model, prompts, term, head=head)
    for batch, log_probs in zip(pool.batches, pool.log_probs, strict=True):
        assert log_probs.shape == (sum(len(sample.read) for sample in batch),)
    with torch.no_grad():
        assert AnchorKL("kl", 5.0, pool, "k3", 0)(model.module, 0, head).item() == pytest.approx(
            0.0, abs=1e-9
        )


def test_masking_leaves_out_what_the_untuned_model_finds_unlikely(model: LanguageModel):
    head = model.module.get_output_embeddings()
    encoded = [encode_few_shot(model, TEMPLATE, [], Example(w, w.upper())) for w in WORDS]
    perplexities: dict[tuple[tuple[int, ...], int], float] = {}
    with torch.no_grad():
        for sample in encoded:
            log_probs = model.module(input_ids=torch.tensor([sample.ids])).logits[0].log_softmax(-1)
            for position in sample.read:
                value = log_probs[position, sample.ids[position + 1]]
                perplexities[sample.ids, position] = float(np.exp(-value.item()))
    threshold = float(np.median(list(perplexities.values())))
    masked = mask_tokens(model, [Source(tuple(encoded), 4)], threshold, head=head)
    left = {(s.ids, position) for s in masked.sources[0].samples for position in s.read}
    assert left == {place for place, value in perplexities.items() if value <= threshold}
    assert masked.num_tokens == len(perplexities) - len(left)
    assert masked.num_samples == len(encoded) - len(masked.sources[0].samples)
    assert masked.sources[0].count == 4
    with pytest.raises(ConfigError, match=r"every answer token of 12 samples .* raise `threshold`"):
        mask_tokens(model, [Source(tuple(encoded), 4)], 1.0, head=head)


def test_masking_is_of_the_target_alone_and_recorded(fresh_pico: Build):
    keep = (Mix(icl_share=0.2, shots=2), TokenMask(threshold=60.0))
    record = train(recipe(keep=keep), fresh_pico("llama"), EXAMPLES, None, anchors=[TASK])
    assert record.num_masked_tokens > 0
    assert record.sources[0].samples == 12


def test_answers_are_rewritten_where_the_model_agrees(fresh_pico: Build):
    model = fresh_pico("llama")
    rows = [Example("w1", "A"), PromptRow("w2", " B"), TextRow("free text")]
    term = SelfDistil(max_new_tokens=6)
    assert rewrite(model, rows, term).rows == rows
    contexts = [
        f"{ASK.description}Question: {q}\nReference answer: {a}\nYour answer:"
        for q, a in (("w1", "A"), ("w2", " B"))
    ]
    requests = [Generate(tuple(model.encode(text)), 6, ("\n",)) for text in contexts]

    class Agreeable:
        """Says what a random model never does."""

        def __init__(self, _: LanguageModel) -> None: ...

        def run(self, asked: list[Generate]) -> list[GenerateResult]:
            assert asked == requests
            return [GenerateResult(" It is a. ", True), GenerateResult(" x B y", False)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("keepshot.tuning.distil.Engine", Agreeable)
        made = rewrite(model, rows, term)
    assert made.rows == [Example("w1", "It is a."), rows[1], rows[2]]
    assert made.num_rewritten == 1


@pytest.mark.parametrize(
    ("own", "answer", "expected"),
    [
        ("That makes 12 euros.", "3 * 4 = 12", True), ("That makes 13.", "12", False),
        ("It is blue.", "Blue", True), ("bluebell", "Blue", False), ("", "Blue", False),
        ("no number", "7", False), ("It is U.S. law.", "U.S.", True),
    ],
)  # fmt: skip
def test_agreement(own: str, answer: str, expected: bool):
    assert agrees(own, answer) == expected
