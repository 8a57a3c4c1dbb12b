"""What lm-eval reads and compiles again and again, done once: the same results, sooner.

lm-eval 0.4.13 parses each included YAML file for every task that includes it (about half of the
26,000 files that it reads to list its tasks), and compiles a prompt template for every document
and every demonstration.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import Any

from keepshot.harness.extra import lm_eval

TEMPLATES = 4096
"""Compiled templates held; a task has a handful."""


@contextmanager
def each_read_once() -> Generator[None]:
    """Parse lm-eval's included files once within the block, and compile templates once for good."""
    compile_templates_once()
    loader = lm_eval("tasks._yaml_loader")
    load_yaml = loader.load_yaml
    loader.load_yaml = _included_once(load_yaml)
    try:
        yield
    finally:
        loader.load_yaml = load_yaml


def compile_templates_once() -> None:
    """Let lm-eval remember the templates that it has compiled, from now on."""
    environment = lm_eval("utils").env
    if "from_string" not in vars(environment):
        environment.from_string = lru_cache(TEMPLATES)(environment.from_string)


def _included_once(load_yaml: Any) -> Any:
    """Wrap lm-eval's `load_yaml` so that a file included twice is parsed once.

    Files whose `!function` tags become functions are left alone: those are loaded for use.
    """
    known: dict[tuple[Path, bool], tuple[dict[str, Any], set[Path]]] = {}

    def load(
        path: str | Path,
        *,
        resolve_func: bool = True,
        recursive: bool = True,
        _seen: set[Path] | None = None,
    ) -> dict[str, Any]:
        if resolve_func or _seen is None:
            return load_yaml(path, resolve_func=resolve_func, recursive=recursive, _seen=_seen)
        key = (Path(path).expanduser().resolve(), recursive)
        _, files = known.get(key, ({}, {key[0]}))
        if key not in known or files & _seen:  # lm-eval refuses a file that is included twice
            before = set(_seen)
            config = load_yaml(path, resolve_func=False, recursive=recursive, _seen=_seen)
            known[key] = (config, _seen - before)
        _seen |= known[key][1]
        return deepcopy(known[key][0])

    return load
