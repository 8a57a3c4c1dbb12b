"""The optional package lm-eval: the one place that imports it, and says so where it is missing."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from keepshot.errors import ConfigError

MAX_GEN_TOKENS = 256
"""Tokens that lm-eval generates where a task does not say."""


def lm_eval(module: str) -> Any:
    """Return a module of lm-eval, such as `tasks`.

    Raises:
        ConfigError: if lm-eval is not installed.
    """
    try:
        return import_module(f"lm_eval.{module}")
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("lm_eval"):
            raise
        raise ConfigError(
            "lm-evaluation-harness is not installed, and this needs it;\n"
            "install it with: pip install 'keepshot[lm-eval]'"
        ) from None
