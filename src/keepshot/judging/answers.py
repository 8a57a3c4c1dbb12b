"""A model answers prompts, by a stated policy; how many answers were cut is part of the result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from jinja2 import TemplateError

from keepshot.errors import ModelError, TaskError
from keepshot.judging.policy import Policy
from keepshot.models.loading import LanguageModel
from keepshot.scoring.engine import Engine
from keepshot.scoring.request import Generate, GenerateResult


@dataclass(frozen=True)
class Answer:
    """One answer; `truncated` if the token limit came before its end."""

    prompt: str
    text: str
    truncated: bool


def answer_prompts(
    model: LanguageModel,
    prompts: Sequence[str],
    policy: Policy,
    *,
    engine: Engine | None = None,
    chat: LanguageModel | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Answer]:
    """Let `model` answer every prompt, all in one run of the engine.

    Args:
        model: the model that answers.
        prompts: as a user would write them.
        policy: how they are put, and when an answer ends.
        engine: of `model`; None makes one.
        chat: the model whose chat template is used, and whose end tokens end an answer besides
            those of `model`; None means `model`. On a path from a base model to a tuned one every
            point is asked in the same words, and ends its answers as the tuned model does.
        progress: called with (answers, answers in all).

    Raises:
        ModelError: if a chat is asked for and the model has no chat template.
        TaskError: if a prompt leaves no room for an answer.
    """
    engine = engine or Engine(model)
    assert engine.model is model, "the engine must be of the model that answers"
    requests = [_request(chat or model, prompt, policy) for prompt in prompts]
    if chat is not None:
        ends = chat.eos_ids - model.eos_ids
        requests = [replace(request, ends=ends) for request in requests]
    results = engine.run(requests, progress)
    answers: list[Answer] = []
    for prompt, result in zip(prompts, results, strict=True):
        assert isinstance(result, GenerateResult)
        answers.append(Answer(prompt, result.text, truncated=not result.stopped))
    return answers


def check_prompts(model: LanguageModel, prompts: Sequence[str], policy: Policy) -> None:
    """Check that every prompt can be put to `model`, without asking anything.

    Raises:
        UserError: as `answer_prompts` does.
    """
    for prompt in prompts:
        _request(model, prompt, policy)


def style_of(model: LanguageModel, policy: Policy) -> Literal["chat", "raw"]:
    """Return the style that `policy` comes to for `model`."""
    if policy.style == "auto":
        return "chat" if getattr(model.tokenizer, "chat_template", None) else "raw"
    return policy.style


def rendered(model: LanguageModel, prompt: str, policy: Policy) -> str:
    """Return the text that the model continues.

    Raises:
        ModelError: if a chat is asked for and the model has no chat template that takes it.
    """
    if style_of(model, policy) == "raw":
        return f"{prompt.strip()}\n\n"
    tokenizer: Any = model.tokenizer
    if not tokenizer.chat_template:
        raise ModelError(
            f"model {model.reference!r} has no chat template; ask it with style raw, or auto"
        )
    messages = [{"role": "system", "content": policy.system}] if policy.system else []
    messages.append({"role": "user", "content": prompt})
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise ModelError(
            f"model {model.reference!r}: its chat template does not take these messages: {error}"
        ) from None
    return str(text)


def _request(model: LanguageModel, prompt: str, policy: Policy) -> Generate:
    context = model.encode(rendered(model, prompt, policy))
    if len(context) >= model.context_length:
        raise TaskError(
            f"prompt {prompt[:60]!r} has {len(context)} tokens and leaves no room in the context "
            f"of {model.reference!r} ({model.context_length}); drop it"
        )
    return Generate(
        tuple(context), policy.max_new_tokens, policy.stop, policy.temperature, policy.seed
    )
