"""From a recipe file and command-line options to a frozen spec. Loads no model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from keepshot.errors import ConfigError
from keepshot.jobs.specs import BlendSpec, JudgeSpec, MeasureSpec, RunSpec, TuneSpec
from keepshot.specs import apply_overrides, read_yaml
from keepshot.study.spec import StudySpec
from keepshot.theory.document import TheorySpec
from keepshot.tuning.keep import KEEP_TERMS
from keepshot.tuning.method_specs import METHODS, describe_method
from keepshot.tuning.recipe import Recipe, auto

_ALONG_A_PATH = frozenset(
    {"target", "pick", "tasks", "shots", "seeds", "limit", "following", "resolution", "stream"}
)
"""Keys of `BlendSpec` that one lambda, which is written and not measured, has no use for."""


def shipped_recipe(name: str) -> Path:
    """Return the path of a recipe that the package brings along."""
    return Path(str(files("keepshot") / "recipes" / f"{name}.yaml"))


def run_spec(recipe: Path | None, given: Mapping[str, Any], overrides: Sequence[str]) -> RunSpec:
    """Return the spec of `keepshot run`: the file (the demo if None), then options, then `--set`.

    Raises:
        ConfigError: if the file or an override does not fit.
    """
    path = recipe or shipped_recipe("demo")
    content = {**read_yaml(path), **given}
    if recipe is None and not given.keys().isdisjoint({"model", "data"}):
        content["name"] = "run"
    return RunSpec.from_mapping(apply_overrides(content, overrides), source=path.name)


def measure_spec(given: Mapping[str, Any], overrides: Sequence[str]) -> MeasureSpec:
    """Return the spec of `keepshot measure`.

    Raises:
        ConfigError: if an option or override does not fit.
    """
    return MeasureSpec.from_mapping(apply_overrides(dict(given), overrides), source="measure")


def judge_spec(given: Mapping[str, Any], overrides: Sequence[str]) -> JudgeSpec:
    """Return the spec of `keepshot judge`.

    Raises:
        ConfigError: if an option or override does not fit.
    """
    content = apply_overrides(dict(given), overrides)
    spec = JudgeSpec.from_mapping(content, source="judge")
    if spec.ifeval is None and not (spec.candidate and spec.reference):
        raise ConfigError(
            "nothing to judge: give CANDIDATE and REFERENCE with --judge, or --ifeval MODEL"
        )
    if spec.ifeval is None and not spec.judges:
        raise ConfigError(
            "no judge: give --judge MODEL, --judge FILE.json or --judge MODEL@http://SERVER/v1"
        )
    return spec


def blend_spec(
    recipe: Path | None, given: Mapping[str, Any], overrides: Sequence[str]
) -> BlendSpec:
    """Return the spec of `keepshot blend`: a recipe file if there is one, then options, `--set`.

    Raises:
        ConfigError: if the file, an option or an override does not fit.
    """
    if recipe is not None and recipe.suffix not in (".yaml", ".yml"):
        raise ConfigError(
            f"blend {str(recipe)!r}: expected BASE and TUNED, or a recipe (a .yaml file)"
        )
    content = {**(read_yaml(recipe) if recipe else {}), **given}
    # One lambda on the command line takes the place of a recipe's path, and the other way round.
    for one, other in (("lam", "sweep"), ("sweep", "lam")):
        if one in given and other not in given:
            content.pop(other, None)
    # Nothing is loaded to write one lambda: its type can only mean that of what is written.
    if content.get("lam") is not None and "dtype" in given:
        content.setdefault("write_dtype", given["dtype"])
    content = apply_overrides(content, overrides)
    if content.get("lam") is not None:
        _refuse_measuring(given, overrides)
    return BlendSpec.from_mapping(content, source=recipe.name if recipe else "blend")


def _refuse_measuring(given: Mapping[str, Any], overrides: Sequence[str]) -> None:
    """Refuse what was asked of a path beside one lambda; a recipe's own is left out in silence."""
    keys = {*given, *(override.partition("=")[0].partition(".")[0] for override in overrides)}
    if asked := sorted(keys & _ALONG_A_PATH):
        raise ConfigError(
            f"blend: `{asked[0]}` is for a --sweep, and --lambda measures nothing; leave it out, "
            "or `keepshot measure` what is written"
        )


def tune_spec(
    recipe: Path | None,
    given: Mapping[str, Any],
    where: Mapping[str, Any],
    overrides: Sequence[str],
) -> TuneSpec:
    """Return the spec of `keepshot tune`: a recipe file, or the default for `--model --data`.

    Args:
        recipe: YAML file, or None.
        given: model, data, method, keep and seed as given on the command line.
        where: device, dtype, trust_remote_code and merged as given.
        overrides: `key=value` on the recipe's keys.

    Raises:
        ConfigError: if neither a recipe nor data is given, or something does not fit.
    """
    content = read_yaml(recipe) if recipe else {}
    # In a file too they may be named as on the command line.
    named = {k: content.pop(k) for k in ("method", "keep") if isinstance(content.get(k), str)}
    options = {**named, **given}
    method, keep = options.pop("method", None), options.pop("keep", None)
    if recipe is None and "data" not in options:
        raise ConfigError("nothing to tune on: give a recipe, or --data FILE with --model MODEL")
    if recipe is None or method is not None or keep is not None:
        chosen = auto(
            options.get("data", content.get("data", "")),
            model=options.get("model", content.get("model", "smollm2-135m-instruct")),
            keep="auto" if keep is None else keep,
            method=method,
        ).model_dump(mode="json")
        kept = keep is not None or recipe is None
        # What a file says of `auto` stays where that is asked for.
        own = bool(chosen["auto"] and content.get("auto"))
        wanted = {"method": method or recipe is None, "keep": kept, "auto": kept and not own}
        content |= {key: chosen[key] for key, used in wanted.items() if used}
    content |= options
    source = recipe.name if recipe else "tune"
    tuned = Recipe.from_mapping(apply_overrides(content, overrides), source=source)
    return TuneSpec.from_mapping({"recipe": tuned, **where}, source=source)


def theory_spec(given: Mapping[str, Any], overrides: Sequence[str]) -> TheorySpec:
    """Return the spec of `keepshot theory`.

    Raises:
        ConfigError: if an option or override does not fit.
    """
    return TheorySpec.from_mapping(apply_overrides(dict(given), overrides), source="theory")


def study_spec(
    file: Path, given: Mapping[str, Any], overrides: Sequence[str]
) -> tuple[StudySpec, Path]:
    """Return the spec of `keepshot study`, and the directory that it has unless one is named.

    Args:
        file: a study (YAML), or the directory of one that was started.
        given: options of the command line.
        overrides: `key=value` on the study's keys.

    Raises:
        ConfigError: if the file or an override does not fit.
    """
    inside = file / "study.yaml"
    if file.is_dir() and not inside.exists():
        raise ConfigError(f"{file}: no study.yaml, so no study lies here; give a study's file")
    path = inside if file.is_dir() else file
    content = {**read_yaml(path), **given}
    spec = StudySpec.from_mapping(apply_overrides(content, overrides), source=path.name)
    return spec, file if file.is_dir() else Path("runs") / spec.name


def describe() -> list[dict[str, str]]:
    """Return name, kind and one sentence for every tuning method and keep term."""
    methods = [
        {"name": name, "kind": "method", "description": describe_method(name)} for name in METHODS
    ]
    terms = [
        {
            "name": term.name,
            "kind": "keep term",
            "description": (term.__doc__ or "").partition("\n")[0],
        }
        for term in KEEP_TERMS
    ]
    return [*methods, *terms]
