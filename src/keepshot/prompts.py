"""Worked examples and a question, rendered to text.

An `Example` is one question with its answer; a `Template` joins demonstrations and the open
question. Knows nothing of tokens, tasks or models: whoever tokenises decides where answers end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

INPUT = "{input}"
OUTPUT = "{output}"


@dataclass(frozen=True)
class Example:
    """One question and its answer; `choices`, if given, are the possible answers."""

    input: str
    output: str
    choices: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Template:
    r"""How an example becomes text.

    `question` holds `{input}` once, `answer` holds `{output}` once; other braces mean nothing, here
    and in the texts that are filled in.

    >>> capital = Template()
    >>> capital.context([Example("Peru", "Lima")], Example("Chile", "Santiago"))
    'Q: Peru\nA: Lima\n\nQ: Chile\nA:'
    >>> capital.continuation("Santiago")
    ' Santiago'
    """

    question: str = "Q: {input}\nA:"
    answer: str = " {output}"
    separator: str = "\n\n"
    description: str = ""
    """Stands before everything else, as it is."""

    def __post_init__(self) -> None:
        """Check the two places to fill."""
        assert self.question.count(INPUT) == 1, f"question {self.question!r} needs one {INPUT}"
        assert self.answer.count(OUTPUT) == 1, f"answer {self.answer!r} needs one {OUTPUT}"

    def context(self, demonstrations: Sequence[Example], query: Example) -> str:
        """Return the demonstrations and the open question, without a trailing space."""
        return self.shared_prefix(demonstrations) + self._ask(query)

    def continuation(self, output: str) -> str:
        """Return what follows the context if the answer is `output`, such as `" Paris"`."""
        return _fill(self.answer, OUTPUT, output)

    def shared_prefix(self, demonstrations: Sequence[Example]) -> str:
        """Return the part of the context that every question under these demonstrations shares."""
        return self.description + "".join(
            self._ask(shown) + self.continuation(shown.output) + self.separator
            for shown in demonstrations
        )

    def _ask(self, query: Example) -> str:
        return _fill(self.question, INPUT, query.input)


TEMPLATES: dict[str, Template] = {
    "qa": Template(),
    "arrow": Template(question="{input} ->", answer=" {output}", separator="\n"),
    "input-output": Template(question="Input: {input}\nOutput:"),
}
"""Templates by name: `qa` is used everywhere, the others check that ability is not tied to it."""

VERBATIM = Template(question="{input}", answer="{output}")
"""For rows that carry their own formatting: prompt and completion are joined as they are."""


def _fill(pattern: str, place: str, text: str) -> str:
    before, _, after = pattern.partition(place)
    return before + text + after
