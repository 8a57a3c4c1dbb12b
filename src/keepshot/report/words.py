"""Figures in words: formatted numbers, names, and methods. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from keepshot.records import TrainingRecord
from keepshot.report.view import Arm
from keepshot.unseen import visible

NAMES = {
    "before": "the untuned model",
    "plain": "plain fine-tuning",
    "gentle": "gentle fine-tuning",
    "kept": "keepshot's recipe",
    "blended": "the blend",
}
METHODS = {
    "full": "full fine-tuning",
    "lora": "LoRA",
    "dora": "DoRA",
    "rslora": "rsLoRA",
    "value-only": "value matrices only",
    "query-key-only": "query and key matrices only",
    "attention-only": "attention matrices only",
    "bottom-frozen": "lowest blocks frozen",
    "bias-only": "biases only",
    "prompt-tuning": "a soft prompt only",
    "promot": "ProMoT",
}


def score(value: float | None) -> str:
    """Return a score as `.91`, `1.00` or `-.05`; `n/a` for None."""
    if value is None:
        return "n/a"
    text = f"{value:.2f}"
    if text in ("-0.00", "0.00"):
        return ".00"
    return text.replace("0.", ".", 1) if abs(value) < 0.995 else text


def score_interval(interval: tuple[float, float] | None) -> str:
    """Return `[.88, .94]`, or nothing for None."""
    return "" if interval is None else f"[{score(interval[0])}, {score(interval[1])}]"


def percent(value: float | None) -> str:
    """Return a share as `12 %`; `n/a` for None."""
    return "n/a" if value is None else f"{_whole(value)} %"


def percent_interval(interval: tuple[float, float] | None) -> str:
    """Return `[8, 17]`, or nothing for None."""
    return "" if interval is None else f"[{_whole(interval[0])}, {_whole(interval[1])}]"


def _whole(share: float) -> int:
    return round(100 * share)


def duration(seconds: float) -> str:
    """Return a time as `40 s`, `12 min` or `2 h 05 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def lam(value: float) -> str:
    """Return lambda without trailing zeros: `0.4`, `1`."""
    return f"{value:.3g}"


def rate(value: float) -> str:
    """Return a learning rate as it is usually written: `1e-4`, `2.5e-5`, `0.01`."""
    if not 0 < value < 0.01:
        return f"{value:g}"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Shorten references to their last part where that stays unique, with nothing unseen in it."""
    last = {name: _last_part(name) for name in names}
    short = last if len(set(last.values())) == len(last) else {name: name for name in names}
    return {name: visible(text, limit=40) for name, text in short.items()}


def _last_part(name: str) -> str:
    parts = [part for part in name.split("/") if part]
    generic = len(parts) > 1 and parts[-1] in ("model", "adapter")
    return "/".join(parts[-2:] if generic else parts[-1:]) or name


def method(arm: Arm, training: Sequence[TrainingRecord]) -> str:
    """Say in words how an arm came about."""
    record = next((record for record in training if record.arm == arm.name), None)
    if record is not None:
        keep = f", keep terms: {', '.join(record.keep)}" if record.keep else ""
        how = METHODS.get(record.method, record.method)
        return f"{how}, learning rate {rate(record.learning_rate)}, {record.steps} steps{keep}"
    match arm.row.lam:
        case 0.0:
            return "not tuned"
        case 1.0:
            return "the tuned model"
        case None:
            return "not tuned" if arm.name == "before" else ""
        case share:
            other = "plain" if any(r.arm == "plain" for r in training) else "tuned"
            return f"untuned + {lam(share)} x ({other} - untuned), no further training"


def name_of(arm: str) -> str:
    """Return what an arm is called inside a sentence."""
    return NAMES.get(arm, visible(arm, limit=60))


def count(number: int, noun: str) -> str:
    """Return `1 task`, `2 tasks`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
