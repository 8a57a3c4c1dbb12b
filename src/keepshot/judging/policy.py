"""How answers are asked for: in the model's own chat format or as raw text, greedily or sampled.

No torch, so that a spec can hold a policy.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from keepshot.specs import Spec

Style = Literal["auto", "chat", "raw"]


class Policy(Spec):
    """What a model is given to answer, and when its answer ends."""

    style: Style = "auto"
    """`chat`: the model's own chat template; `raw`: the prompt and an empty line; `auto`: chat if
    the model has a template, else raw."""
    system: str | None = None
    """System message; left out, what the template puts there by itself (chat only)."""
    max_new_tokens: int = Field(default=96, ge=1)
    """Tokens after which an answer is cut, and counted as truncated."""
    temperature: float = Field(default=0.0, ge=0.0)
    """0 is greedy; above, tokens are drawn."""
    seed: int = Field(default=0, ge=0)
    """Seed of the draws."""
    stop: tuple[str, ...] = ()
    """Texts that end an answer, besides the model's own end tokens."""


class Following(Spec):
    """Verifiable instructions put to the same models: the other axis of the trade-off."""

    prompts: str = "embedded"
    """`embedded`, `ifeval` (the public set, from the hub), or the path of a file of its format."""
    limit: int | None = Field(default=100, ge=1)
    """Prompts at most, in each part of the set."""
    variant: Literal["official", "repaired"] | None = None
    """How answers are judged; left out, `repaired` for the embedded set and `official` for others.
    """
    answers: Policy = Policy()
    """How prompts are put, and when an answer ends."""

    @property
    def judged(self) -> Literal["official", "repaired"]:
        """The variant that this comes to."""
        return self.variant or ("repaired" if self.prompts == "embedded" else "official")
