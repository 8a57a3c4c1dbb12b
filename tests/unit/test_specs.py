"""Specs: what is refused, in which words, and what the fingerprint sees."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import pytest
from pydantic import Field

from keepshot.errors import ConfigError
from keepshot.specs import Spec, apply_overrides, read_yaml


class Inner(Spec):
    learning_rate: float = 0.1


class Outer(Spec):
    no_effect_on_results: ClassVar[frozenset[str]] = frozenset({"log_every"})
    arms: dict[str, Inner] = Field(default_factory=dict)
    log_every: int = 10
    name: str


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"name": "x", "log_evry": 1}, "a.yaml: key `log_evry` is unknown; nearest is 'log_every'"),
        (
            {"name": "x", "arms": {"plain": {"learning_rat": 1}}},
            "a.yaml: key `arms.plain.learning_rat` is unknown; nearest is 'learning_rate'",
        ),
        ({}, "a.yaml: key `name` is missing"),
        ({"name": "x", "log_every": "often"}, "a.yaml: `log_every` = 'often'"),
    ],
)
def test_a_mistake_is_named_with_its_place(content: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Outer.from_mapping(content, source="a.yaml")
    assert str(caught.value).startswith(message)


def test_fingerprint_sees_what_changes_results_and_nothing_else() -> None:
    base = Outer(name="x")
    assert base.fingerprint() == Outer(name="x", log_every=99).fingerprint()
    assert base.fingerprint() != Outer(name="y").fingerprint()
    assert base.fingerprint() != Outer(name="x", arms={"a": Inner()}).fingerprint()


def test_overrides_reach_into_mappings_and_read_yaml_values() -> None:
    content = {"arms": {"plain": {"learning_rate": 0.1}}}
    changed = apply_overrides(content, ["arms.plain.learning_rate=2.5e-5", "shots=[0, 4]"])
    assert changed == {"arms": {"plain": {"learning_rate": 2.5e-5}}, "shots": [0, 4]}
    assert content == {"arms": {"plain": {"learning_rate": 0.1}}}


@pytest.mark.parametrize("override", ["learning_rate", "=3", "name.first=3", "arms=[1"])
def test_a_malformed_override_is_refused(override: str) -> None:
    with pytest.raises(ConfigError, match="--set"):
        apply_overrides({"name": "x"}, [override])


def test_scientific_notation_without_a_dot_is_a_number(tmp_path: Path) -> None:
    """YAML 1.1 reads `1e-4` as text; learning rates are written so everywhere."""
    path = tmp_path / "a.yaml"
    path.write_text("name: x\narms: {plain: {learning_rate: 1e-4}}\n", encoding="utf-8")
    assert Outer.from_yaml(path).arms["plain"].learning_rate == 1e-4


def test_yaml_that_cannot_be_read_names_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text("name: x\narms: [1,\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"broken\.yaml line 3: not valid YAML"):
        read_yaml(path)
    with pytest.raises(ConfigError, match="no such file"):
        read_yaml(tmp_path / "absent.yaml")
    path.write_bytes(b"name: \xff\xfe\n")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_yaml(path)
