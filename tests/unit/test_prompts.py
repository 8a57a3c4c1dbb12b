"""Rendering: text for text."""

from __future__ import annotations

import pytest

from keepshot.prompts import TEMPLATES, VERBATIM, Example, Template

SHOWN = [Example("Peru", "Lima"), Example("Chile", "Santiago")]
ASKED = Example("Japan", "Tokyo")


@pytest.mark.parametrize(
    ("name", "context"),
    [
        ("qa", "Q: Peru\nA: Lima\n\nQ: Chile\nA: Santiago\n\nQ: Japan\nA:"),
        ("arrow", "Peru -> Lima\nChile -> Santiago\nJapan ->"),
        (
            "input-output",
            "Input: Peru\nOutput: Lima\n\nInput: Chile\nOutput: Santiago\n\nInput: Japan\nOutput:",
        ),
    ],
)
def test_context_is_this_text(name: str, context: str) -> None:
    assert TEMPLATES[name].context(SHOWN, ASKED) == context
    assert TEMPLATES[name].continuation("Tokyo") == " Tokyo"


@pytest.mark.parametrize("name", list(TEMPLATES))
def test_context_starts_with_the_shared_prefix_and_has_no_trailing_space(name: str) -> None:
    template = TEMPLATES[name]
    context = template.context(SHOWN, ASKED)
    assert context.startswith(template.shared_prefix(SHOWN))
    assert context == template.shared_prefix(SHOWN) + template.context([], ASKED)
    assert context == context.rstrip()
    assert template.shared_prefix([]) == ""


def test_braces_and_places_in_texts_survive() -> None:
    odd = Example("{output} {0} {{x}} {input}", "{input}{}")
    assert Template().context([odd], odd) == (
        "Q: {output} {0} {{x}} {input}\nA: {input}{}\n\nQ: {output} {0} {{x}} {input}\nA:"
    )


def test_verbatim_joins_as_it_is() -> None:
    assert VERBATIM.context([], Example("2+2=", "4")) + VERBATIM.continuation("4") == "2+2=4"


def test_template_without_a_place_is_a_fault_of_ours() -> None:
    with pytest.raises(AssertionError, match="needs one"):
        Template(question="Q: {query}")
