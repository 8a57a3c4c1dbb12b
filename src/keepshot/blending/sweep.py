"""Many lambdas on one live model: weights changed in place, the base restored bit for bit.

Knows nothing of what is measured: that is a callback. Memory, however many lambdas there are: a
copy of the base's changed tensors beside the model, and the tuned tensors if they are given live.
Either is spared by giving the checkpoint instead, whose tensors are read again at every lambda,
one at a time; with both, the live model is all there is.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from peft.helpers import rescale_adapter_scale
from peft.tuners.ia3 import IA3Layer
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from keepshot.blending.adapter import check_exact, dora_at
from keepshot.blending.blend import blend_, check_pair, same_bits
from keepshot.blending.parts import stored_names
from keepshot.blending.rules import LambdaRule, as_rule, check_lambda
from keepshot.errors import ModelError
from keepshot.models.checkpoint import TensorReader
from keepshot.models.loading import LanguageModel

T = TypeVar("T")


@dataclass(frozen=True)
class _Place:
    """One tensor of the live model with the two ends between which it moves."""

    name: str
    live: Tensor
    base: Callable[[], Tensor]
    tuned: Callable[[], Tensor]


def sweep(
    model: LanguageModel,
    tuned: Mapping[str, Tensor] | TensorReader,
    lams: Sequence[float],
    measure: Callable[[float], T],
    rule: Callable[[float], LambdaRule] = as_rule,
    base: TensorReader | None = None,
) -> list[tuple[float, T]]:
    """Call `measure(lam)` with `model` at base + lam * (tuned - base), for each lambda in turn.

    The model is the base before and after, bit for bit, also if `measure` raises or the user
    interrupts. Tensors that are tied in the model are blended once.

    Args:
        model: the base; changed in place during the sweep.
        tuned: state dict of the tuned model, or its checkpoint, which is read in the model's own
            dtype; tied tensors may be there under any of their names.
        lams: in the order in which they are to be measured.
        measure: reads the model as it then is; its results are returned beside their lambdas.
        rule: makes of each lambda what each tensor gets; all the same if not given.
        base: the checkpoint that `model` was loaded from. The base is then read from it whenever
            it is needed, also at the end, in place of a copy in memory.

    Raises:
        ConfigError: if a lambda is not a finite number.
        ModelError: before anything is changed, if names, shapes or dtypes do not fit, or a tensor
            holds NaN or infinity.
    """
    for lam in lams:
        check_lambda(lam)
    state = model.module.state_dict()
    ends = tuned if isinstance(tuned, Mapping) else _Stored(tuned, model.module)
    places = _places(state, ends, None if base is None else _Stored(base, model.module))
    results: list[tuple[float, T]] = []
    with torch.no_grad():
        try:
            for lam in lams:
                lookup = rule(lam)
                for place in places:
                    blend_(place.live, place.base(), place.tuned(), lookup(place.name))
                results.append((lam, measure(lam)))
        finally:
            _restore_(places)
    return results


def sweep_adapter(
    model: LanguageModel, lams: Sequence[float], measure: Callable[[float], T]
) -> list[tuple[float, T]]:
    """Call `measure(lam)` with the model's LoRA adapter scaled by each lambda in turn.

    Exact, without a copy of any weight; the adapter's scale is put back at the end.

    Raises:
        ConfigError: if a lambda is not a finite number.
        ModelError: see `rescale_adapter`.
    """
    for lam in lams:
        check_lambda(lam)
    results: list[tuple[float, T]] = []
    for lam in lams:
        with rescale_adapter(model.module, lam):
            results.append((lam, measure(lam)))
    return results


@contextmanager
def rescale_adapter(module: nn.Module, lam: float) -> Generator[None]:
    """Within the block, the module is base + lam * (adapted - base).

    Exact for LoRA and rsLoRA (through peft's own scaling), DoRA and IA3 (see
    `keepshot.blending.adapter`); all is put back at the end, also after an exception.

    Raises:
        ConfigError: if `lam` is not a finite number.
        ModelError: if the module has no adapter, or one for which this is not exact.
    """
    check_lambda(lam)
    layers = _adapted_layers(module)
    if not layers:
        raise ModelError("the model carries no LoRA adapter, so there is nothing to scale")
    moved = [pair for layer in layers for pair in _at_lambda(layer, lam)]
    if not moved:
        with rescale_adapter_scale(module, lam):
            yield
        return
    kept = [(tensor, tensor.clone()) for tensor, _ in moved]
    with torch.no_grad():
        try:
            for tensor, value in moved:
                tensor.copy_(value)
            yield
        finally:
            for tensor, value in kept:
                tensor.copy_(value)


def _at_lambda(layer: Any, lam: float) -> list[tuple[Tensor, Tensor]]:
    """Return the tensors of an IA3 or DoRA layer with their values at lambda; none for LoRA."""
    if isinstance(layer, IA3Layer):
        return [(v.data, 1.0 + lam * (v.data - 1.0)) for v in layer.ia3_l.values()]
    found: list[tuple[Tensor, Tensor]] = []
    for name, dora in layer.lora_magnitude_vector.items():
        up, down = layer.lora_B[name].weight.data, layer.lora_A[name].weight.data
        weight = layer.get_base_layer().weight.data
        weight = weight.T if layer.fan_in_fan_out else weight
        update = layer.scaling[name] * (up.double() @ down.double())
        magnitude: Tensor = dora.weight.data
        ends = [end.double().cpu().numpy() for end in (weight, update, magnitude)]
        at = dora_at(ends[0], ends[1], ends[2], lam)
        if at is None:
            raise ModelError(f"lambda {lam:g} of this DoRA adapter is no DoRA adapter; merge it")
        factor, size = (torch.from_numpy(values).to(up.device) for values in at)
        new = (factor[:, None] * up.double()).to(up.dtype)
        same = lam == 1.0
        found.append((up, up if same else new))
        found.append((magnitude, magnitude if same else size))
    return found


def _adapted_layers(module: nn.Module) -> Sequence[Any]:
    """Return the adapted layers of a module whose lambda can be set exactly; empty if none.

    Raises:
        ModelError: if an adapter is of another kind, not exact, or merged into the weights.
    """
    configs: Mapping[str, Any] = getattr(module, "peft_config", {})
    for name, config in configs.items():
        check_exact(config.to_dict(), where=f"adapter {name!r}")
    layers = [layer for layer in module.modules() if isinstance(layer, LoraLayer | IA3Layer)]
    if any(layer.merged for layer in layers):
        raise ModelError(
            "the adapter is merged into the weights, so its scale has no effect; unmerge it first"
        )
    return layers


def _places(
    state: Mapping[str, Tensor], tuned: Mapping[str, Tensor], base: Mapping[str, Tensor] | None
) -> list[_Place]:
    """Pair every tensor of the live model that tuning changed with its two ends."""
    tied: dict[tuple[int, torch.Size, tuple[int, ...]], list[str]] = defaultdict(list)
    for name, tensor in state.items():
        tied[tensor.data_ptr(), tensor.shape, tensor.stride()].append(name)
    missing = [names[0] for names in tied.values() if not any(name in tuned for name in names)]
    if missing and isinstance(tuned, _Stored):
        raise ModelError(
            f"tensor {missing[0]!r}: {tuned.directory} does not store it as it is in memory "
            "(experts may be stored apart), so it cannot be streamed; leave `stream` out"
        )
    if missing:
        raise ModelError(_mismatch(missing, "the base has", "the tuned model has not"))
    # What lies in both checkpoints and in no model (old buffers) is read by neither.
    unknown = sorted(tuned.keys() - state.keys() - (base.keys() if base is not None else set()))
    if unknown:
        raise ModelError(_mismatch(unknown, "the tuned model has", "the base has not"))
    places: list[_Place] = []
    for names in tied.values():
        first, *others = [name for name in names if name in tuned]
        for other in others:
            if not same_bits(tuned[first], tuned[other]):
                raise ModelError(
                    f"tensors {first!r} and {other!r} are tied in the base and differ in the "
                    "tuned model; untie the base's first"
                )
        _check_fits(first, state[first], tuned[first])
        live = state[first]
        if not same_bits(live, tuned[first].to(live.device)):
            read = partial(_on_device, tuned, first, live.device)
            places.append(_Place(names[0], live, _origin(names, live, base), read))
    return places


def _origin(
    names: Sequence[str], live: Tensor, base: Mapping[str, Tensor] | None
) -> Callable[[], Tensor]:
    """Return what gives a base tensor back: a copy, or its checkpoint."""
    if base is None:
        kept = live.clone()
        return lambda: kept
    name = next((name for name in names if name in base), None)
    if name is None or not same_bits(live, base[name].to(live.device)):
        raise ModelError(
            f"tensor {names[0]!r}: the base's checkpoint does not hold it as it is in memory; "
            "sweep with the base in memory (leave `stream` out)"
        )
    return partial(_on_device, base, name, live.device)


class _Stored(Mapping[str, Tensor]):
    """The tensors of a checkpoint, read when they are asked for and not kept.

    Under the names, and in the dtype, of the live model, as loading would have them.
    """

    def __init__(self, reader: TensorReader, module: nn.Module) -> None:
        self._reader = reader
        self.directory = reader.directory
        self._live: dict[str, Tensor] = module.state_dict()
        names = stored_names(module)
        self._names = {names.get(name, name): name for name in reader.names}

    def __getitem__(self, name: str) -> Tensor:
        found = self._reader.read(self._names[name])
        live = self._live.get(name)
        if live is None or not (live.is_floating_point() and found.is_floating_point()):
            return found
        return found.to(live.dtype)

    def __contains__(self, name: object) -> bool:
        return name in self._names  # without reading it

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _on_device(tuned: Mapping[str, Tensor], name: str, device: torch.device) -> Tensor:
    return tuned[name].to(device)


def _check_fits(name: str, live: Tensor, tuned: Tensor) -> None:
    check_pair(name, live, tuned)
    # Lambda 1 would not be the tuned model if its numbers had to be rounded.
    if torch.promote_types(live.dtype, tuned.dtype) != live.dtype:
        raise ModelError(
            f"tensor {name!r}: the tuned model is {tuned.dtype}, wider than the base in memory "
            f"({live.dtype}); load the base with --dtype {str(tuned.dtype).removeprefix('torch.')}"
        )
    shares = live.untyped_storage().data_ptr() == tuned.untyped_storage().data_ptr()
    assert not shares or live.numel() == 0, f"{name}: the tuned tensors are the live model's own"


def _restore_(places: Sequence[_Place]) -> None:
    try:
        for place in places:
            place.live.copy_(place.base())
    except KeyboardInterrupt:
        # A second Ctrl-C must not leave half a blend behind; copying again is idempotent.
        for place in places:
            place.live.copy_(place.base())
        raise


def _mismatch(names: Sequence[str], having: str, lacking: str) -> str:
    more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
    return f"tensor {names[0]!r}{more}: {having} it, {lacking}; these two models cannot be blended"
