"""Which weight does what in a decoder: queries, keys, values, outputs, MLP, norms, embeddings.

Found by structure, not by names. Two forward passes over a few tokens cut the graph after every
linear layer of a block and go on with noise; autograd then says what each layer's input depends on:

- the attention *output* is the one layer whose input looks at other positions;
- with a single token softmax is 1, so exactly the *value* rows reach it;
- of the other rows, those of an earlier position that reach it are *keys*, the rest *queries*.

So fused projections come out right in whatever order they hold their rows (per head, per group,
transposed), and what does not behave like softmax attention is refused. Knows nothing of tuning.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from keepshot.errors import ModelError

NUM_PROBE_TOKENS = 6
NUM_DIRECTIONS = 4
Role = Literal["query", "key", "value"]


@dataclass(frozen=True, eq=False)
class WeightSlice:
    """Some or all output features of one weight.

    `rows` index the output features (None: all of them; a tensor of indices where they do not lie
    together); in a `transposed` weight (Conv1D, stored as in x out) these are columns. The same
    rows of `bias` belong to it.
    """

    parameter: str
    module: str
    rows: slice | Tensor | None
    transposed: bool
    bias: str | None = None

    def of(self, weight: Tensor) -> Tensor:
        """Select this slice from the weight (or from anything of its shape), as out x in."""
        by_output = weight.T if self.transposed else weight
        return by_output if self.rows is None else by_output[self.rows]


@dataclass(frozen=True, eq=False)
class Block:
    """One decoder block; `mlp` and `norms` are names of parameters."""

    name: str
    query: WeightSlice
    key: WeightSlice
    value: WeightSlice
    output: WeightSlice
    mlp: tuple[str, ...]
    norms: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Anatomy:
    """Parameter names of a whole decoder; `head` is `embeddings` where the two are tied."""

    embeddings: str
    blocks: tuple[Block, ...]
    final_norm: tuple[str, ...]
    head: str
    tied: bool


@dataclass(frozen=True, eq=False)
class _Call:
    """One linear layer in one forward pass: its input, and its output cut from the graph."""

    input: Tensor
    output: Tensor


def anatomy(module: nn.Module) -> Anatomy:
    """Find the parts of a causal language model by what its layers depend on.

    Runs two forward passes over at most six tokens, without touching weights or modes.

    Raises:
        ModelError: if a block is no softmax attention with one projection each for queries, keys,
            values and output (separate or fused).
    """
    prefix, blocks = find_blocks(module)
    linears = [linear_layers(block, f"{prefix}.{n}") for n, block in enumerate(blocks)]
    names = {id(p): name for name, p in module.named_parameters()}
    several = _probe(module, linears, NUM_PROBE_TOKENS)
    single = _probe(module, linears, 1)
    found = tuple(
        _dissect(module, f"{prefix}.{n}", layers, several, single)
        for n, layers in enumerate(linears)
    )
    embeddings = _weight_name(names, _call(module, "get_input_embeddings"), "embeddings", module)
    head = _weight_name(names, _call(module, "get_output_embeddings"), "output head", module)
    return Anatomy(
        embeddings=embeddings,
        blocks=found,
        final_norm=_final_norm(module, prefix),
        head=head,
        tied=embeddings == head,
    )


def find_blocks(module: nn.Module) -> tuple[str, list[nn.Module]]:
    """Return the list of blocks: the outermost ModuleList that holds the most parameters."""
    lists = {name: m for name, m in module.named_modules() if isinstance(m, nn.ModuleList)}
    outer = {
        name: m
        for name, m in lists.items()
        if not any(name.startswith(f"{other}.") for other in lists)
    }
    if not outer:
        raise _refusal(module, "it has no list of blocks")
    name = max(outer, key=lambda n: sum(p.numel() for p in outer[n].parameters()))
    return name, list(outer[name])


def linear_layers(block: nn.Module, prefix: str) -> dict[str, nn.Module]:
    """Return the linear layers of a block by their names in the model."""
    return {
        f"{prefix}.{name}": m
        for name, m in block.named_modules()
        if isinstance(m, nn.Linear | Conv1D)
    }


def _probe(
    module: nn.Module, linears: Sequence[dict[str, nn.Module]], num_tokens: int
) -> dict[str, _Call]:
    """Run the model once and keep every linear layer's input and cut output.

    Outputs are replaced by small random numbers: real ones can saturate the softmax so that, in
    bfloat16, gradients of queries and keys round to 0.
    """
    calls: dict[str, _Call] = {}
    generator = torch.Generator().manual_seed(0)

    def cut(name: str, args: tuple[Any, ...], output: Any) -> Tensor:
        noise = 0.3 * torch.randn(output.shape, generator=generator)
        leaf = noise.to(output).requires_grad_(True)
        calls[name] = _Call(args[0], leaf)
        return leaf.clone()  # some families add to it in place, which a leaf does not allow

    parameter = next(module.parameters())
    ids = torch.arange(1, num_tokens + 1, device=parameter.device)[None]
    handles = [
        layer.register_forward_hook(lambda _, args, out, name=name: cut(name, args, out))
        for layers in linears
        for name, layer in layers.items()
    ]
    try:
        with _evaluating(module), torch.enable_grad():
            _decoder(module)(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return calls


@contextmanager
def _evaluating(module: nn.Module) -> Generator[None]:
    """Switch dropout off, and every submodule's mode back afterwards."""
    training = [m for m in module.modules() if m.training]
    module.eval()
    try:
        yield
    finally:
        for m in training:
            m.training = True


def _dissect(
    module: nn.Module,
    name: str,
    layers: dict[str, nn.Module],
    several: dict[str, _Call],
    single: dict[str, _Call],
) -> Block:
    local = {layer: several[layer] for layer in layers if layer in several}
    mixing = [layer for layer in local if _looks_back(layer, local)]
    if len(mixing) != 1:
        problem = f"{len(mixing)} layers whose input looks at other positions"
        raise _refusal(module, f"{name} has {problem}, not one")
    output = mixing[0]
    roles: dict[Role, WeightSlice] = {}
    for layer, masks in _roles(module, name, local, output, single).items():
        for role, mask in masks.items():
            if role in roles:
                raise _refusal(module, f"{name} takes its {role} from more than one layer")
            roles[role] = _slice(module, layer, mask)
    if len(roles) != 3:
        missing = sorted({"query", "key", "value"} - set(roles))
        raise _refusal(module, f"{name} has no {' and no '.join(missing)} projection")
    attention = {output, *(part.module for part in roles.values())}
    rest = [n for n, _ in module.named_parameters() if n.startswith(f"{name}.")]
    rest = [n for n in rest if n.rpartition(".")[0] not in attention]
    norms = tuple(n for n in rest if _is_norm(module.get_submodule(n.rpartition(".")[0])))
    return Block(
        name=name,
        query=roles["query"],
        key=roles["key"],
        value=roles["value"],
        output=_slice(module, output, None),
        mlp=tuple(n for n in rest if n not in norms),
        norms=norms,
    )


def _looks_back(layer: str, calls: dict[str, _Call]) -> bool:
    """Say whether the layer's input at the last position depends on earlier ones."""
    gradients = _gradients(calls[layer].input, {name: c.output for name, c in calls.items()})
    return any(bool(gradient[:-1].any()) for gradient in gradients.values())


def _roles(
    module: nn.Module,
    block: str,
    several: dict[str, _Call],
    output: str,
    single: dict[str, _Call],
) -> dict[str, dict[Role, Tensor]]:
    """Say which output features of which layers are values, keys and queries, as masks.

    One token: attention is the identity on values, so their gradient is the number of query heads
    that share them, and that of queries and keys is 0. Several tokens: any gradient at an earlier
    position is of a key (or value), one at the last position alone is of a query.
    """
    alone = _gradients(single[output].input, {name: single[name].output for name in several})
    leaves = {name: several[name].output for name in alone}
    # In bfloat16 a sum may cancel to 0 by chance; not in each of several directions.
    tries = [_gradients(several[output].input, leaves, direction=n) for n in range(NUM_DIRECTIONS)]
    found: dict[str, dict[Role, Tensor]] = {}
    for name, gradient in alone.items():
        size = gradient[-1].abs()
        if bool(((size > 0.1) & (size < 0.9)).any()):
            raise _refusal(module, f"{name} is gated, or its attention is no plain softmax")
        reached = torch.stack([gradients[name] for gradients in tries]).any(dim=0)
        is_value = size > 0.5
        is_key = reached[:-1].any(dim=0) & ~is_value
        is_query = reached[-1] & ~is_value & ~is_key
        if not bool((is_value | is_key | is_query).all()):
            raise _refusal(module, f"some rows of {name} have no effect on the attention")
        masks: dict[Role, Tensor] = {"query": is_query, "key": is_key, "value": is_value}
        found[name] = {role: mask for role, mask in masks.items() if bool(mask.any())}
    assert found, f"{block}: the output looks back at something"
    return found


def _gradients(
    result: Tensor, sources: dict[str, Tensor], *, direction: int | None = None
) -> dict[str, Tensor]:
    """Differentiate the last position of `result` by each source that it depends on.

    Its features are added up, or weighted in a random direction of that number. Gradients come as
    positions x features.
    """
    if not result.requires_grad:
        return {}
    last = result.flatten(0, -2)[-1].float()
    if direction is not None:
        generator = torch.Generator().manual_seed(direction)
        last = last * torch.randn(last.shape, generator=generator).to(last)
    found: Any = torch.autograd.grad(
        last.sum(), list(sources.values()), retain_graph=True, allow_unused=True
    )
    pairs = zip(sources, found, strict=True)
    return {name: g.flatten(0, -2) for name, g in pairs if g is not None}


def _slice(module: nn.Module, layer: str, mask: Tensor | None) -> WeightSlice:
    linear: Any = module.get_submodule(layer)
    span: slice | Tensor | None = None
    if mask is not None and not bool(mask.all()):
        rows = mask.nonzero().flatten()
        first, last = int(rows[0]), int(rows[-1])
        together = last - first + 1 == rows.numel()
        span = slice(first, last + 1) if together else rows.cpu()
    return WeightSlice(
        parameter=f"{layer}.weight",
        module=layer,
        rows=span,
        transposed=isinstance(linear, Conv1D),
        bias=None if linear.bias is None else f"{layer}.bias",
    )


def _is_norm(module: nn.Module) -> bool:
    own = list(module.parameters(recurse=False))
    return bool(own) and all(p.ndim == 1 for p in own) and not list(module.children())


def _final_norm(module: nn.Module, blocks: str) -> tuple[str, ...]:
    """Name the parameters of the norm after the blocks: the last one registered beside them."""
    parent = blocks.rpartition(".")[0]
    outside = [
        name
        for name, m in module.named_modules()
        if _is_norm(m) and name.startswith(parent) and not name.startswith(f"{blocks}.")
    ]
    if not outside:
        return ()
    norm = module.get_submodule(outside[-1])
    return tuple(f"{outside[-1]}.{name}" for name, _ in norm.named_parameters())


def _decoder(module: nn.Module) -> Any:
    """Return the model without its output head, which costs most where the vocabulary is large."""
    return getattr(module, "base_model", module)


def _call(module: nn.Module, method: str) -> Any:
    return getattr(module, method)()


def _weight_name(names: dict[int, str], layer: Any, what: str, module: nn.Module) -> str:
    weight = getattr(layer, "weight", None)
    if weight is None or id(weight) not in names:
        raise _refusal(module, f"it has no {what}")
    return names[id(weight)]


def _refusal(module: nn.Module, reason: str) -> ModelError:
    return ModelError(
        f"the structure of {type(module).__name__} is not known: {reason}\n"
        "use a method that does not need it, such as full, or LoRA on all linear layers"
    )
