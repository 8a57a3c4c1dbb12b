"""Shared scoring gives the answers of one full forward pass for each request."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    GraniteConfig,
    MambaConfig,
    MistralConfig,
    MptConfig,
    Phi3Config,
    PretrainedConfig,
)

from cases import FAMILIES
from keepshot.errors import ModelError
from keepshot.models.loading import LanguageModel
from keepshot.scoring.decoding import open_answer
from keepshot.scoring.engine import Engine
from keepshot.scoring.request import (
    Generate,
    GenerateResult,
    GreedyMatch,
    GreedyMatchResult,
    LogLikelihood,
    LogLikelihoodResult,
    Request,
    Result,
)
from keepshot.scoring.shared import Reading
from pico import SHARED, VOCAB_SIZE, character_tokenizer, pico_model

SAME: dict[str, Any] = dict(SHARED)
SMALL: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, **SAME,
}  # fmt: skip
MORE_CONFIGS: dict[str, tuple[PretrainedConfig, str]] = {
    "gemma2": (
        Gemma2Config(**SMALL, head_dim=8, sliding_window=16, final_logit_softcapping=5.0),
        "packed",
    ),
    "granite": (GraniteConfig(**SMALL, logits_scaling=4.0), "packed"),
    "mistral": (MistralConfig(**SMALL, sliding_window=16), "packed"),
    "bloom": (BloomConfig(hidden_size=32, n_layer=2, n_head=4, **SAME), "rows"),
    "mpt": (MptConfig(d_model=32, n_layers=2, n_heads=4, max_seq_len=512, **SAME), "rows"),
    "mamba": (
        MambaConfig(hidden_size=32, num_hidden_layers=2, state_size=8, **SAME),
        "plain",
    ),
}
"""Soft-capped, scaled and windowed logits; alibi; recurrent: and how far each may share."""


def tokens(generator: random.Random, length: int) -> tuple[int, ...]:
    return tuple(generator.randrange(3, VOCAB_SIZE) for _ in range(length))


def some_requests(num_questions: int, seed: int = 0) -> list[Request]:
    """Few-shot prompts (longer than every sliding window here) with choices and free answers."""
    generator = random.Random(seed)
    prompts = [tokens(generator, length) for length in (6, 30, 70)]
    requests: list[Request] = []
    for number in range(num_questions):
        context = prompts[number % 3] + tokens(generator, generator.randrange(1, 12))
        requests += [
            LogLikelihood(context, tokens(generator, generator.randrange(1, 6))) for _ in range(3)
        ]
        requests.append(GreedyMatch(context, tokens(generator, 2)))
        requests.append(Generate(context, 6, ("a", "x1")))
    return [*requests, *requests[:4]]


def with_right_answers(model: LanguageModel, requests: list[Request]) -> list[Request]:
    """Add greedy matches whose answer is what the model says, cut where it ends or anywhere."""
    added: list[Request] = []
    for request in requests:
        if isinstance(request, Generate):
            said = naive_greedy(model, request.context, 8, ())[0]
            added.append(GreedyMatch(request.context, tuple(said[: 1 + len(added) % 4]) or (5,)))
    return requests + added


@torch.no_grad()
def naive_greedy(
    model: LanguageModel, context: tuple[int, ...], limit: int, stop: tuple[str, ...]
) -> tuple[list[int], str, bool]:
    """Tokens, text and whether it ended, by one full forward pass for each token."""
    said: list[int] = []
    while len(said) < limit:
        ids = torch.tensor([[*context, *said]])
        said.append(int(model.module(ids, use_cache=False).logits[0, -1].argmax()))
        text = model.decode(said)
        places = [text.index(string) for string in stop if string in text]
        if said[-1] in model.eos_ids or places:
            return said, text[: min(places, default=len(text))], True
    return said, model.decode(said), False


def assert_same(found: list[Result], expected: list[Result], requests: list[Request]) -> None:
    for result, reference, request in zip(found, expected, requests, strict=True):
        if isinstance(result, LogLikelihoodResult):
            assert isinstance(request, LogLikelihood)
            assert isinstance(reference, LogLikelihoodResult)
            allowed = 1e-4 * len(request.continuation)
            assert abs(result.log_likelihood - reference.log_likelihood) < allowed
            assert result.is_greedy == reference.is_greedy
        else:
            assert result == reference


@pytest.mark.parametrize("family", FAMILIES)
def test_shared_equals_unshared(pico_models: dict[str, LanguageModel], family: str) -> None:
    model = pico_models[family]
    requests = with_right_answers(model, some_requests(15))
    reference = Engine(model, share=False)
    expected = reference.run(requests)
    correct = [r.correct for r in expected if isinstance(r, GreedyMatchResult)]
    engine = Engine(model)
    assert engine.sharing == ("rows" if family == "falcon" else "packed")
    assert_same(engine.run(requests), expected, requests)
    assert False in correct
    assert engine.cost.tokens_naive == reference.cost.tokens_naive
    assert reference.cost.tokens_prefilled < reference.cost.tokens_naive  # four are asked twice
    assert engine.cost.tokens_prefilled < 0.5 * reference.cost.tokens_prefilled


@pytest.mark.parametrize("family", MORE_CONFIGS)
def test_other_families_share_as_far_as_they_can(family: str) -> None:
    config, sharing = MORE_CONFIGS[family]
    model = other_pico(config)
    requests = some_requests(6)
    engine = Engine(model)
    assert engine.sharing == sharing
    assert_same(engine.run(requests), Engine(model, share=False).run(requests), requests)


def other_pico(config: PretrainedConfig) -> LanguageModel:
    torch.manual_seed(0)
    module = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.3 if "embed" not in name else 1.0)
    if not hasattr(module.config, "max_position_embeddings"):
        module.config.max_position_embeddings = 512
    return LanguageModel(
        reference="pico", module=module, tokenizer=character_tokenizer(), sha256="0" * 64,
        path=Path("."), num_parameters=0, dtype="float32",
    )  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("batch_tokens", [16, 100, 5000])
def test_batch_size_order_and_company_change_nothing(
    pico_models: dict[str, LanguageModel], family: str, batch_tokens: int
) -> None:
    model = pico_models[family]
    requests = some_requests(12, seed=1)
    expected = Engine(model).run(requests)
    order = list(range(len(requests)))
    random.Random(2).shuffle(order)
    engine = Engine(model, batch_tokens=batch_tokens)
    shuffled = engine.run([requests[i] for i in order])
    assert_same(shuffled, [expected[i] for i in order], [requests[i] for i in order])
    alone = [result for request in requests[:8] for result in engine.run([request])]
    assert_same(alone, expected[:8], requests[:8])


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "falcon"])
def test_log_likelihood_is_the_sum_over_the_continuation(
    pico_models: dict[str, LanguageModel], family: str
) -> None:
    model = pico_models[family]
    request = LogLikelihood(tokens(random.Random(3), 25), tokens(random.Random(4), 4))
    with torch.no_grad():
        logits: Any = model.module(torch.tensor([request.context + request.continuation])).logits
    log_probs = torch.log_softmax(logits[0, 24:28], dim=-1)
    expected = sum(float(log_probs[i, token]) for i, token in enumerate(request.continuation))
    result = Engine(model).run([request])[0]
    assert isinstance(result, LogLikelihoodResult)
    assert result.log_likelihood == pytest.approx(expected, abs=1e-4)
    likeliest = (int(logits[0, 24].argmax()),)
    greedy = Engine(model).run([LogLikelihood(request.context, likeliest)])[0]
    assert isinstance(greedy, LogLikelihoodResult)
    assert greedy.is_greedy


@pytest.mark.parametrize("family", FAMILIES)
def test_generate_equals_a_naive_loop(pico_models: dict[str, LanguageModel], family: str) -> None:
    model = pico_models[family]
    generator = random.Random(5)
    shared = tokens(generator, 40)
    stops = [("e",), ("0", "qq", "\n"), (), ("zz", "T")]
    requests = [
        Generate(shared[: 20 + 20 * (n % 2)] + tokens(generator, 1 + n % 5), 3 + n, stops[n % 4])
        for n in range(24)
    ]
    for request, result in zip(requests, Engine(model).run(requests), strict=True):
        _, text, stopped = naive_greedy(
            model, request.context, request.max_new_tokens, request.stop
        )
        assert result == GenerateResult(text, stopped)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_match_equals_decoding_the_answer(
    fresh_pico: Callable[..., LanguageModel], family: str
) -> None:
    model = often_ending(fresh_pico(family))
    generator = random.Random(6)
    shared = tokens(generator, 30)
    matches: list[GreedyMatch] = []
    for _ in range(30):
        context = shared + tokens(generator, generator.randrange(1, 6))
        said = naive_greedy(model, context, 5, ())[0]
        ends = [i for i, token in enumerate(said) if model.ends_answer(token)]
        answer = tuple(said[: ends[0]] if ends else said) or (4,)
        wrong = (*answer[:-1], (answer[-1] + 1) % VOCAB_SIZE)
        matches.append(GreedyMatch(context, answer))
        if not model.ends_answer(wrong[-1]):
            matches.append(GreedyMatch(context, wrong))
    num_correct = 0
    for match, result in zip(matches, Engine(model).run(matches), strict=True):
        assert isinstance(result, GreedyMatchResult)
        num_correct += result.correct
        said, _, _ = naive_greedy(model, match.context, match.limit, ())
        ends = [i for i, token in enumerate(said) if model.ends_answer(token)]
        answer = said[: ends[0]] if ends else said
        assert result.stopped == bool(ends)
        assert result.text == model.decode(answer)
        assert result.correct == (bool(ends) and tuple(answer) == match.answer)
    # The random gemma3 repeats its last token for ever, because its head is its embedding.
    assert num_correct > 5 or family == "gemma3"


def test_a_right_answer_may_end_within_its_last_token() -> None:
    model = pico_model("llama")
    model.tokenizer.add_tokens(["!\n\n"])
    (joined,) = model.encode_plain("!\n\n")
    told = [*model.encode_plain(" Hi"), joined, 9, 9]
    for wanted, text in ((" Hi!", " Hi!"), (" Hi", " Hi!"), (" Hi!\n!", " Hi!")):
        match = GreedyMatch((5,), tuple(model.encode_plain(wanted)))
        answer = open_answer(0, match, told, model)
        assert answer is not None
        result = Reading(told, []).result(match, answer)
        assert result == GreedyMatchResult(False, text, True), "right or not is told by the text"


def test_answers_that_begin_alike_are_not_read_by_each_other(
    pico_models: dict[str, LanguageModel],
) -> None:
    """Several reference answers to one question share a cache that holds their common beginning."""
    generator = random.Random(8)
    context, common = tokens(generator, 60), tokens(generator, 100)
    requests: list[Request] = [
        GreedyMatch(context, common + tokens(generator, 40)) for _ in range(3)
    ]
    requests.append(GreedyMatch(tokens(generator, 20), tokens(generator, 4)))
    model = pico_models["llama"]
    assert Engine(model).run(requests) == Engine(model, share=False).run(requests)


def test_rotary_positions_that_depend_on_length_are_not_shared() -> None:
    rope = {
        "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4, "original_max_position_embeddings": 64,
    }  # fmt: skip
    config = Phi3Config(**SMALL, original_max_position_embeddings=64, rope_parameters=rope)
    model = other_pico(config)
    generator = random.Random(9)
    before = tokens(generator, 50)
    requests: list[Request] = [
        LogLikelihood(tokens(generator, 20), tokens(generator, 2)) for _ in range(4)
    ]
    requests += [
        LogLikelihood(before + tokens(generator, n), tokens(generator, 2)) for n in (4, 20)
    ]
    engine = Engine(model)
    assert engine.sharing == "packed"
    expected = [Engine(model, share=False).run([request])[0] for request in requests]
    assert_same(engine.run(requests), expected, requests)
    assert engine.cost.tokens_prefilled == engine.plan(requests).tokens_prefilled


@pytest.mark.parametrize("share", [True, False])
def test_a_model_that_answers_nan_is_refused(
    fresh_pico: Callable[..., LanguageModel], share: bool
) -> None:
    model = fresh_pico("llama")
    engine = Engine(model, share=share)
    with torch.no_grad():
        next(model.module.parameters())[:] = float("nan")
    with pytest.raises(ModelError, match="answers with NaN"):
        engine.run([LogLikelihood((5, 6), (7,))])
    if share:
        with pytest.raises(ModelError, match="answers with NaN"):
            Engine(model)


def often_ending(model: LanguageModel) -> LanguageModel:
    """Let one token in four end an answer, or a random model would hardly ever end one."""
    model.module.config.eos_token_id = list(range(1, VOCAB_SIZE, 4))
    return model


def test_adapters_are_scored_with_what_they_add(
    fresh_pico: Callable[..., LanguageModel], pico_models: dict[str, LanguageModel]
) -> None:
    model = fresh_pico("llama")
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "lm_head"], task_type="CAUSAL_LM")
    module: Any = get_peft_model(model.module, config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "lora_" in name:
                parameter.normal_(0.0, 0.1)
    adapted = replace(model, module=module.eval())
    requests = some_requests(6)
    engine = Engine(adapted)
    found = engine.run(requests)
    assert engine.sharing == "packed"
    assert_same(found, Engine(adapted, share=False).run(requests), requests)
    assert found != Engine(pico_models["llama"]).run(requests)


def test_one_engine_follows_changed_weights(fresh_pico: Callable[..., LanguageModel]) -> None:
    model = fresh_pico("qwen2")
    requests = some_requests(4)
    engine = Engine(model)
    before = engine.run(requests)
    with torch.no_grad():
        next(model.module.parameters()).mul_(0.5)
    after = engine.run(requests)
    assert after != before
    assert_same(after, Engine(model, share=False).run(requests), requests)


def test_out_of_memory_halves_the_batch(fresh_pico: Callable[..., LanguageModel]) -> None:
    model = fresh_pico("llama")
    requests = some_requests(30)
    expected = Engine(model).run(requests)
    sizes: list[int] = []

    def refuse(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        sizes.append(kwargs["input_ids"].numel())
        if sizes[-1] > 200:
            raise torch.OutOfMemoryError

    engine = Engine(model)
    model.module.base_model.register_forward_pre_hook(refuse, with_kwargs=True)
    assert_same(engine.run(requests), expected, requests)
    assert max(sizes) > 200 >= sizes[-1]


def test_progress_counts_different_requests(pico_models: dict[str, LanguageModel]) -> None:
    requests = some_requests(5)
    told: list[tuple[int, int]] = []
    Engine(pico_models["gpt2"]).run(requests, lambda done, total: told.append((done, total)))
    assert told == [(done, len(set(requests))) for done in range(1, len(set(requests)) + 1)]


def test_plan_says_what_run_will_spend(pico_models: dict[str, LanguageModel]) -> None:
    requests = some_requests(10)
    engine = Engine(pico_models["llama"])
    planned = engine.plan(requests).tokens_prefilled
    engine.run(requests)
    assert engine.cost.tokens_prefilled == planned


def test_plan_promises_no_savings_where_nothing_can_be_shared(
    pico_models: dict[str, LanguageModel],
) -> None:
    """`measure --plan` said 7.3 times fewer tokens for a recurrent model, which reads them all."""
    requests = some_requests(10)
    recurrent, _ = MORE_CONFIGS["mamba"]
    for engine in (Engine(other_pico(recurrent)), Engine(pico_models["llama"], share=False)):
        planned = engine.plan(requests)
        engine.run(requests)
        assert engine.cost.tokens_prefilled == planned.tokens_prefilled
        assert planned.tokens_prefilled == planned.tokens_padded == planned.tokens_naive


def test_half_precision_shares_too(fresh_pico: Callable[..., LanguageModel]) -> None:
    model = fresh_pico("llama")
    requests = [r for r in some_requests(10) if isinstance(r, LogLikelihood)]
    exact = Engine(model).run(requests)
    module: Any = model.module
    halved = replace(model, module=module.to(torch.bfloat16), dtype="bfloat16")
    engine = Engine(halved)
    found = engine.run(requests)
    assert engine.sharing == "packed"
    differences = [
        abs(result.log_likelihood - reference.log_likelihood) / len(request.continuation)
        for result, reference, request in zip(found, exact, requests, strict=True)
        if isinstance(result, LogLikelihoodResult) and isinstance(reference, LogLikelihoodResult)
    ]
    assert max(differences) < 0.3
    assert sum(differences) / len(differences) < 0.05
