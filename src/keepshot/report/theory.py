"""The page of the theory lab: curves predicted in closed form, points measured, tables of both."""

from __future__ import annotations

import re
from pathlib import Path

from keepshot.report.page import beside, draw, write_page
from keepshot.report.panels import claim_chart
from keepshot.theory.document import TheoryDocument

TITLES = {
    "pretraining": "Pretraining: one step of preconditioned gradient descent",
    "full": "Full tuning: the noise floor at zero shots, few shots ruined",
    "value-only": "Value-only tuning: less gained, few shots kept",
    "auxiliary": "The auxiliary few-shot loss: the target gains, unseen tasks pay",
    "sweeps": "Sweeps: unseen tasks at 20 shots",
    "extensions": "Beyond the paper: partial adaptation, KL, low rank, softmax",
    "bridge": "The bridge: linear attention, a softmax transformer, real models",
}
CAPTIONS = {
    "pretraining": "m: demonstrations in pretraining; pretrained: m infinite, or as the command "
    "says.",
    "full": "On the right the same without the constant channel: full tuning can do no harm there.",
    "value-only": "Errors before and after, against the number of demonstrations.",
    "auxiliary": "On the right what the auxiliary loss changes on unseen tasks; below 0 it helps.",
    "sweeps": "Errors at 20 shots; where two methods agree, the later one covers the earlier.",
    "extensions": "Points on full tuning with the KL term and on low rank are ends of exact flows, "
    "joined; the softmax head has no closed form.",
    "bridge": "Right and down is better; all panels have the same axes. Rings are closed forms. "
    "Bars are two standard errors: over prompts, over pretrained transformers, and in real models "
    "over test items of one training run, the untuned model's score on the target taken as known. "
    "Lines join the settings of one recipe.",
}
SYMBOLS = {
    r"\|theta_0\|": "|\u03b8\u2080|", r"theta_0": "\u03b8\u2080", r"\btheta\b": "\u03b8",
    r"\bsigma2\b": "\u03c3\u00b2", r"\bs2\b": "\u03c3\u00b2", r"\blambda\b": "\u03bb",
    r"\^2(?!\d)": "\u00b2", r"10\^6": "10\u2076", r"\^-a": "\u207b\u1d43",
}  # fmt: skip
"""How formulas in sentences are set in a page; records keep to plain letters."""


def write_theory_report(document: TheoryDocument, out_dir: Path) -> Path:
    """Write `report.html` and one figure per claim, `figures/CLAIM.svg`.

    Args:
        document: what the lab returned.
        out_dir: where `spec.yaml` and `environment.json` are shown from, if they are there.

    Returns:
        The path of the page.

    Raises:
        OutputError: if it cannot be written.
    """
    shown = beside(out_dir)
    figures = {
        claim.claim: draw(
            claim.claim,
            TITLES[claim.claim],
            [claim_chart(claim, "wide"), claim_chart(claim, "narrow")],
            out_dir / "figures",
        )
        for claim in document.claims
        if claim.points
    }
    return write_page(
        "theory.html",
        out_dir,
        document=document,
        figures=figures,
        titles=TITLES,
        captions=CAPTIONS,
        set_formulas=set_formulas,
        **shown,
    )


def set_formulas(text: str) -> str:
    """Return a sentence with its formulas in mathematical letters."""
    for pattern, symbol in SYMBOLS.items():
        text = re.sub(pattern, symbol, text)
    return text
