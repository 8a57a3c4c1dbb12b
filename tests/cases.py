"""The one list of each kind that contract tests go through; `test_lists_are_whole` compares them.

Whoever adds a method, a keep term, a task or a family adds it here, and so to every contract.
"""

from __future__ import annotations

from keepshot.tasks.catalog import SUITES
from keepshot.tuning.keep import EWC, KL, L2SP, FewShot, Mix, SelfDistil, TokenMask
from keepshot.tuning.method_specs import (
    AttentionOnly,
    BiasOnly,
    BottomFrozen,
    Full,
    LoRA,
    ProMoT,
    PromptTuning,
    ValueOnly,
)

METHODS = [
    Full(),
    LoRA(rank=2),
    LoRA(rank=2, targets="value"),
    LoRA(rank=2, targets="query-value"),
    LoRA(name="dora", rank=2),
    LoRA(name="dora", rank=2, targets="value"),
    LoRA(name="rslora", rank=2),
    ValueOnly(),
    AttentionOnly(name="query-key-only"),
    AttentionOnly(),
    BottomFrozen(blocks=1),
    BiasOnly(),
    PromptTuning(tokens=3),
    ProMoT(tokens=3, prompt_steps=3),
    ProMoT(tokens=3, prompt_steps=3, then=LoRA(rank=2)),
    ProMoT(tokens=3, prompt="joint", then=ValueOnly()),
]
TERMS = [
    KL(prompts=8), Mix(), FewShot(shots=2, prompts_per_step=2), L2SP(), EWC(prompts=4),
    TokenMask(threshold=300.0), SelfDistil(max_new_tokens=8),
]  # fmt: skip
FAMILIES = ["llama", "gpt2", "gpt_neox", "qwen2", "gemma3", "falcon"]
WITH_BIASES = ["gpt2", "gpt_neox", "qwen2", "falcon"]
TASKS = [
    "country-capital", "country-demonym", "country-continent", "english-french",
    "english-spanish", "past-tense", "plural", "comparative", "word-feeling",
    "sentence-language", "addition", "private-concatenation", "largest", "date-format",
    "reference-format", "second-item", "last-item", "look-up", "pick-animal", "pick-colour",
    "word-group", "number-name", "number-spelling", "extract-phone", "extract-town",
    "extract-day", "sentence-topic", "sentence-feeling", "short-facts", "opposite", "support",
    "instructions", "instructions-homogeneous", "request-letters", "worked-sums", "compositions",
    *SUITES["composed"],
    "upper-case", "repeat-words", "title-case", "drop-vowels", "spell-out", "link-words",
    "add-article", "exchange", "initials", "negate", "ask-back",
]  # fmt: skip
