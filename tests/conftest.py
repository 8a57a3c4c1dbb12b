"""Shared fixtures: pico models of several families, and the user's asset store."""

from __future__ import annotations

import os
from collections.abc import Callable

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

from keepshot.assets import AssetStore
from keepshot.models.loading import LanguageModel
from pico import PICO_CONFIGS, pico_model


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option behind `make golden`."""
    parser.addoption("--golden", action="store_true", help="rewrite the files of tests/golden")


@pytest.fixture(scope="session")
def pico_models() -> dict[str, LanguageModel]:
    """One pico model per family; tests must not change them (use `fresh_pico` for that)."""
    return {family: pico_model(family) for family in PICO_CONFIGS}


@pytest.fixture(scope="session")
def store() -> AssetStore:
    """The user's own cache, so that the small model is downloaded once per machine."""
    return AssetStore.from_environment(os.environ)


@pytest.fixture
def fresh_pico() -> Callable[..., LanguageModel]:
    """Return a builder of pico models that a test may change: `fresh_pico("llama", seed=1)`."""
    return pico_model
