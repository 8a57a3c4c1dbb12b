"""Two (or three) checkpoints checked against each other: what will be written of them, by rule.

Reads headers and configs, and of the data only what must be equal. Nothing is guessed:

- a tensor on both sides is blended; its shape may differ in the rows of the vocabulary alone,
  where the rows that only the tuned side has are taken from it;
- a tensor on one side is left out if it is a tied copy of another there; any other is refused, or,
  if `one_sided` is "carry", taken from the tuned side and dropped from the base's. At least half
  of the tuned weights must be on both sides, or what comes out would be no blend.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from keepshot.blending.adapter import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    check_adapts,
    check_exact,
    scale_dora,
)
from keepshot.blending.arithmetic import FLOATS, Lambda, Rounding, RowLambda
from keepshot.blending.companions import compare_configs, compare_tokens, may_be_tied, vocabulary
from keepshot.blending.rules import LambdaRule, as_rule, check_lambda
from keepshot.blending.stream import Side, TensorPlan, same_bytes
from keepshot.errors import ConfigError, ModelError, unknown
from keepshot.models.reference import read_json
from keepshot.models.shards import Checkpoint, StoredTensor, open_checkpoint

MAX_SHARD_BYTES = 5_000_000_000
DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
Settings = Literal["tuned", "base"]
OneSided = Literal["refuse", "carry"]
_TORCH_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_WIDTH = {"F64": 3, "F32": 2, "F16": 1, "BF16": 1}


@dataclass(frozen=True)
class Writing:
    """How a blend is written, apart from its lambda."""

    dtype: str | None = None
    """Of floating-point tensors: float32, bfloat16 or float16. None: what the inputs have, that
    is base's at lambda 0, tuned's at 1, the wider of both in between and under a rule."""
    rounding: Rounding = "nearest"
    """Rounding to 16 bits; "stochastic" keeps the mean of small changes exact."""
    seed: int = 0
    """Of stochastic rounding."""
    max_shard_bytes: int = MAX_SHARD_BYTES
    """A shard is closed before it would exceed this."""
    settings_from: Settings = "tuned"
    """Whose tokenizer, chat template and generation settings go into the output."""
    one_sided: OneSided = "refuse"
    """What becomes of tensors that only one side has."""
    second: tuple[Path, float] | None = None
    """A further model tuned from the same base, and how much of its difference is added
    (RE-Adapt, arXiv 2405.15007, eq. 4)."""
    hash_files: bool = True
    """Put the sha256 of every file read and written into the record, and read what was written
    again (see `keepshot.blending.reread`)."""
    names: tuple[str, ...] = ()
    """What the record calls base, tuned and `second`, if not by their directories."""
    made_from: Path | None = None
    """The directory whose sha256 the record has as tuned, if what is read was made from it."""
    overwrite: bool = False
    """Replace what lies at the output, and forget an unfinished try."""
    notes: tuple[str, ...] = ()
    """What the record says besides."""


@dataclass(frozen=True)
class BlendPlan:
    """Checked inputs, and how each tensor of the output comes about, in the order written."""

    inputs: Mapping[str, Checkpoint]
    tensors: Mapping[str, TensorPlan]
    is_adapter: bool = False
    notes: tuple[str, ...] = ()
    variant: str = ""
    """What determines the bytes written and shows in none of the tensors."""

    def folder(self, side: str) -> Path:
        """Return the directory that an input lies in."""
        return self.inputs[side].files[0].parent

    @property
    def num_bytes(self) -> int:
        """Size of the weights to be written."""
        size = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
        return sum(plan.num_elements * size.get(plan.dtype, 8) for plan in self.tensors.values())

    @property
    def dtype_name(self) -> str | None:
        """Torch's name of the floating-point type, None if there are several."""
        names = {plan.dtype for plan in self.tensors.values() if plan.dtype in FLOATS}
        return _TORCH_NAMES[names.pop()] if len(names) == 1 else None


def plan_blend(
    base_dir: Path, tuned_dir: Path, lam: float | LambdaRule, options: Writing, scratch: Path
) -> BlendPlan:
    """Check the inputs and say what will be written.

    `scratch` is an empty directory that lasts until the blend is written; a DoRA adapter at this
    lambda is computed there.

    Raises:
        ConfigError: if a lambda is not a finite number, or an option is unknown.
        ModelError: if the inputs do not fit (which tensor).
    """
    _check_options(options)
    if (base_dir / ADAPTER_CONFIG).exists():
        raise ModelError(f"{base_dir}: is an adapter; base must be a whole model")
    if not (tuned_dir / ADAPTER_CONFIG).exists():
        return _plan_model(base_dir, tuned_dir, lam, options)
    if callable(lam) or options.dtype is not None or options.second is not None:
        raise ConfigError(
            f"{tuned_dir}: an adapter takes one lambda and keeps its dtype; "
            "merge it into its base for anything else"
        )
    return _plan_adapter(base_dir, tuned_dir, lam, scratch)


def _check_options(options: Writing) -> None:
    known: dict[str, tuple[str | None, ...]] = {
        "dtype": (None, *DTYPES),
        "rounding": get_args(Rounding),
        "settings_from": get_args(Settings),
        "one_sided": get_args(OneSided),
    }
    for name, values in known.items():
        value = getattr(options, name)
        if value not in values:
            names = [text for text in values if text]
            raise ConfigError(unknown(name, str(value), names, f"known: {', '.join(names)}"))


def _plan_adapter(base_dir: Path, adapter_dir: Path, lam: float, scratch: Path) -> BlendPlan:
    config = read_json(adapter_dir / ADAPTER_CONFIG)
    check_exact(config, where=str(adapter_dir))
    base = open_checkpoint(base_dir)
    adapter = open_checkpoint(adapter_dir / ADAPTER_WEIGHTS)
    origins = check_adapts(adapter, base)
    inputs = {"base": base, "tuned": adapter}
    tensors: dict[str, TensorPlan] = {}
    if config.get("use_dora") and lam != 1.0:
        scale_dora(adapter, base, config, lam, scratch / ADAPTER_WEIGHTS)
        for name, tensor in open_checkpoint(scratch / ADAPTER_WEIGHTS).tensors.items():
            side, kind = (Side(tensor, 1.0),), adapter.tensors[name].dtype
            tensors[name] = TensorPlan(name, kind, tensor.shape, None, side, on_path=False)
        return BlendPlan(inputs, tensors, is_adapter=True, variant=f"DoRA at {lam!r}")
    for name, tensor in adapter.tensors.items():
        origin = origins[name]
        # The path goes from the adapter that changes nothing to this one; what does not move
        # (the matrices A) stays as it is.
        moves = origin is not None
        side = Side(tensor, lam if moves else 1.0)
        tensors[name] = TensorPlan(
            name, tensor.dtype, tensor.shape, None, (side,), origin=origin or 0.0, on_path=moves
        )
    return BlendPlan(inputs, tensors, is_adapter=True)


def _plan_model(
    base_dir: Path, tuned_dir: Path, given: float | LambdaRule, options: Writing
) -> BlendPlan:
    rule = as_rule(given)
    notes = compare_configs(base_dir, tuned_dir)
    inputs = {"base": open_checkpoint(base_dir), "tuned": open_checkpoint(tuned_dir)}
    second = _second_side(base_dir, inputs, options, notes)
    base, tuned = inputs["base"].tensors, inputs["tuned"].tensors
    carried = _one_sided(inputs, tuned_dir, options, notes)
    resized = _Vocabulary(base_dir, tuned_dir, options)
    reach = (0.0, 1.0)
    tensors: dict[str, TensorPlan] = {}
    for name, end in tuned.items():
        if name in carried:
            sides = (Side(end, 1.0),)
            kind = _written(end.dtype, options)
            tensors[name] = TensorPlan(name, kind, end.shape, None, sides, on_path=False)
        if name not in base:
            continue
        start = base[name]
        lam = rule(name)
        check_lambda(lam)
        values = lam.values if isinstance(lam, RowLambda) else (lam,)
        reach = min(reach[0], *values), max(reach[1], *values)
        if start.shape != end.shape:
            resized.check(start, end)
        sides = (Side(end, lam), *second(name, start))
        # Under a rule some tensors are copies: all get one dtype, which none of them loses by.
        kept = _blended_dtype(start, end, 0.5 if callable(given) or len(sides) > 1 else lam)
        tensors[name] = TensorPlan(name, _written(kept, options), end.shape, start, sides)
    notes += [note for end in reach if (note := check_lambda(end))]
    return BlendPlan(inputs, tensors, notes=(*notes, *resized.notes()))


def _second_side(
    base_dir: Path, inputs: dict[str, Checkpoint], options: Writing, notes: list[str]
) -> Any:
    """Open the further model and return a function from a tensor to its side (or none)."""
    if options.second is None:
        return lambda _name, _start: ()
    directory, beta = options.second
    if note := check_lambda(beta):
        notes.append(note.replace("lambda", "beta", 1))
    compare_configs(base_dir, directory)
    inputs["second"] = open_checkpoint(directory)
    found = inputs["second"].tensors

    def side(name: str, start: StoredTensor) -> tuple[Side, ...]:
        if name not in found or found[name].shape != start.shape:
            raise ModelError(
                f"tensor {name!r}: {directory} does not have it in base's shape {start.shape}; "
                "only models tuned from one base can be added"
            )
        return (Side(found[name], beta),)

    return side


def _one_sided(
    inputs: Mapping[str, Checkpoint], tuned_dir: Path, options: Writing, notes: list[str]
) -> set[str]:
    """Return names that only the tuned side has and that are carried; note what is left out."""
    carried: set[str] = set()
    _check_common(inputs["base"], inputs["tuned"])
    common = inputs["base"].tensors.keys() & inputs["tuned"].tensors.keys()
    tie_allowed = may_be_tied(tuned_dir)
    for side, other in (("base", "tuned"), ("tuned", "base")):
        found = inputs[side].tensors
        for name in sorted(found.keys() - common):
            if tie_allowed and is_copy(found, name, common):
                notes.append(f"tensor {name!r} is stored by {side} alone, tied there: left out")
            elif options.one_sided == "refuse":
                raise ModelError(
                    f"tensor {name!r} ({inputs[side].directory}) is in {side} and not in {other}; "
                    "only two models of one architecture can be blended\n"
                    "(--set one_sided=carry takes such tensors from the tuned side as they are)"
                )
            elif side == "tuned":
                carried.add(name)
                notes.append(f"tensor {name!r} is in tuned alone: taken as it is")
            else:
                notes.append(f"tensor {name!r} is in base alone: left out")
    return carried


def _check_common(base: Checkpoint, tuned: Checkpoint) -> None:
    """Raise ModelError unless at least half of the tuned weights have the base's names."""
    sizes = {name: tensor.num_elements for name, tensor in tuned.tensors.items()}
    names = sizes.keys() & base.tensors.keys()
    common = sum(sizes[name] for name in names)
    if names and 2 * common >= sum(sizes.values()):
        return
    for first, second in ((base, tuned), (tuned, base)):
        if prefix := _prefix(first.tensors.keys(), second.tensors.keys()):
            raise ModelError(
                f"names of tensors begin with {prefix!r} in {first.directory} and without it in "
                f"{second.directory}, so there is nothing to blend; load the latter with "
                "transformers, save it again, and blend that"
            )
    raise ModelError(
        f"{base.directory} and {tuned.directory} have {common} of {sum(sizes.values())} weights "
        "under one name; only two models of one architecture, stored alike, can be blended"
    )


def _prefix(longer: Collection[str], shorter: Collection[str]) -> str | None:
    """Return what stands before names in `longer` that `shorter` has without it, if it is one."""
    longer, shorter = set(longer) - set(shorter), set(shorter) - set(longer)
    if not longer or not shorter:
        return None
    probe = max(sorted(shorter), key=len)
    found = sorted(name.removesuffix(probe) for name in longer if name.endswith(probe))
    fitting = (p for p in found if {p + name for name in shorter} <= longer)
    return next(fitting, None)


class _Vocabulary:
    """Tensors with a row per token, where the two models have different numbers of tokens."""

    def __init__(self, base_dir: Path, tuned_dir: Path, options: Writing) -> None:
        self._sizes = vocabulary(base_dir), vocabulary(tuned_dir)
        self._options = options
        self._resized: list[str] = []
        self._notes = compare_tokens(base_dir, tuned_dir)

    def check(self, base: StoredTensor, tuned: StoredTensor) -> None:
        """Check that shapes differ in the number of tokens alone."""
        rows = base.shape[:1] + tuned.shape[:1]
        if base.shape[1:] != tuned.shape[1:] or rows != self._sizes:
            raise ModelError(
                f"tensor {base.name!r}: base has shape {base.shape}, tuned {tuned.shape}; "
                "only two models of one architecture and vocabulary can be blended"
            )
        if rows[0] > rows[1] and self._options.settings_from == "base":
            raise ModelError(
                f"tensor {base.name!r}: base has {rows[0]} tokens, tuned {rows[1]}, and the base's "
                "tokenizer was asked for; take the tuned one's (settings_from=tuned)"
            )
        extra = rows[1] - rows[0]
        span = f"tensor {base.name!r}: rows {min(rows)} to {max(rows) - 1} are"
        taken = "taken from tuned as they are, the base has none"
        self._resized.append(f"{span} {taken if extra > 0 else 'in base alone: left out'}")

    def notes(self) -> list[str]:
        """Return what to tell of all of them."""
        return [*self._notes, *self._resized]


def is_copy(found: Mapping[str, StoredTensor], name: str, among: Sequence[str] | set[str]) -> bool:
    """Tell whether a tensor is stored twice in a checkpoint, as tied weights can be."""
    return any(same_bytes(found[name], found[other]) for other in sorted(among))


def _blended_dtype(base: StoredTensor, tuned: StoredTensor, lam: Lambda) -> str:
    """Return the dtype of a blend: base's at 0, tuned's at 1, the wider of both in between."""
    kinds = base.dtype, tuned.dtype
    if (kinds[0] in FLOATS) != (kinds[1] in FLOATS) or (
        kinds[0] not in FLOATS and kinds[0] != kinds[1]
    ):
        raise ModelError(f"tensor {base.name!r}: base is {kinds[0]}, tuned is {kinds[1]}")
    for side, kind in (("base", kinds[0]), ("tuned", kinds[1])):
        if kind.startswith("F8"):
            raise ModelError(
                f"tensor {base.name!r}: {side} is {kind}, which cannot be blended; "
                "convert it to bfloat16 or float32 first"
            )
    if kinds[0] not in FLOATS or kinds[0] == kinds[1]:
        return kinds[1]
    if lam in (0.0, 1.0):
        return kinds[0] if lam == 0.0 else kinds[1]
    widths = _WIDTH[kinds[0]], _WIDTH[kinds[1]]
    return "F32" if widths[0] == widths[1] else kinds[0 if widths[0] > widths[1] else 1]


def _written(kept: str, options: Writing) -> str:
    return DTYPES[options.dtype] if options.dtype is not None and kept in FLOATS else kept


def fingerprint_text(plan: BlendPlan, options: Writing) -> str:
    """Return all that determines the bytes to be written, as text."""
    rows = [
        (p.name, p.dtype, p.shape, p.origin, [(s.tensor.dtype, _plain(s.lam)) for s in p.sides])
        for p in plan.tensors.values()
    ]
    how = [options.rounding, options.seed, options.max_shard_bytes, options.settings_from]
    return json.dumps([rows, how, plan.variant])


def _plain(lam: Lambda) -> object:
    return lam if isinstance(lam, (int, float)) else [lam.axis, list(lam.values)]
