"""A model taken apart for scoring: trunk, key-value caches that are forked, and head.

Sharing is by structure and by trial. Models whose attention takes a mask as given run rows of
packed branches (`packed`), which attend to shared keys apart where that works too (`apart`); models
with an ordinary cache but position biases of their own (alibi) run plain rows on a copied cache
(`rows`); all others, such as recurrent ones, read every request from its beginning (`plain`).
Whatever structure suggests is tried on a few tokens and used only if the logits agree with an
ordinary forward pass.

Shapes: R rows, L tokens a row, P tokens in the cache, K = P + L keys, C own keys, G groups of keys,
E width of a head, D width, V vocabulary.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from keepshot.errors import ModelError
from keepshot.scoring.attention import FreshLayer, LayerStates, Masks, Part, Shared, attending
from keepshot.scoring.head import Finish, read_hidden
from keepshot.scoring.prefix import Forward, Limits, Row, Tokens, Trie, build_trie, plan

Sharing = Literal["packed", "rows", "plain"]
Layers = list[LayerStates]
FULL, SLIDING = "full_attention", "sliding_attention"
RELATIVE_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
"""How far logits may be off in the trial, in their standard deviations; half precision: 0.2."""

NO_NUMBERS = (
    "the model answers with NaN: take --dtype bfloat16 or float32 if it ran in float16, else look "
    "for NaN or infinity among its weights"
)


@dataclass(frozen=True)
class Layout:
    """Rows of packed nodes as arrays; tokens of a row come after the P tokens of the cache."""

    ids: NDArray[np.int64]
    """[R, L], zero where padded."""
    depths: NDArray[np.int64]
    """[R, L], position ids."""
    visible: NDArray[np.bool_]
    """[R, L, L]: may the row's token attend to the row's token?"""
    places: tuple[tuple[int, ...], ...]
    """For each row and node in it, the column of the node's first token."""


def lay_out(trie: Trie, rows: Sequence[Row]) -> Layout:
    """Return `rows` as arrays, padded on the right."""
    shape = len(rows), max(row.length for row in rows)
    ids = np.zeros(shape, dtype=np.int64)
    depths = np.zeros(shape, dtype=np.int64)
    visible = np.zeros((*shape, shape[1]), dtype=np.bool_)
    visible[:, range(shape[1]), range(shape[1])] = True  # padding sees itself: no row is empty
    places: list[tuple[int, ...]] = []
    for r, row in enumerate(rows):
        columns: list[int] = []
        column = 0
        for number, parent in zip(row.nodes, row.parents, strict=True):
            node = trie.nodes[number]
            stop = column + len(node.tokens)
            ids[r, column:stop] = node.tokens
            depths[r, column:stop] = range(node.start, node.end)
            visible[r, column:stop, column:stop] = np.tri(len(node.tokens), dtype=np.bool_)
            if parent >= 0:
                last = columns[parent] + len(trie.nodes[row.nodes[parent]].tokens) - 1
                visible[r, column:stop, :column] = visible[r, last, :column]
            columns.append(column)
            column = stop
        places.append(tuple(columns))
    return Layout(ids, depths, visible, tuple(places))


class Trunk:
    """Everything but the head: token ids in, hidden states and caches out.

    Args:
        module: a causal language model of transformers, or one wrapped by peft.
        share: look for a way to share (else: plain).
    """

    def __init__(self, module: Any, *, share: bool = True) -> None:
        self.module = module
        self.inner: Any = module.get_base_model() if isinstance(module, PeftModel) else module
        self.body: Any = self.inner.base_model
        self.config: Any = self.inner.config.get_text_config()
        parameter = next(self.inner.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        self.head: Any = self.inner.get_output_embeddings()
        self._finish: Finish = _unchanged
        kinds: Any = getattr(self.config, "layer_types", None)
        self.window: int | None = getattr(self.config, "sliding_window", None)
        if kinds is None:
            kinds = [SLIDING if self.window else FULL]
        self.kinds: frozenset[str] = frozenset(kinds)
        self.steady_length = _steady_length(self.config)
        """Tokens up to which positions are encoded alike in texts of any length; None: always."""
        self.sharing: Sharing = "plain"
        self.apart = False
        """Whether attention to shared keys can be computed apart from that to a row's own."""
        if share:
            with torch.inference_mode():
                self.sharing = self._find_sharing()
        # On a GPU, scores of long rows would be held whole: there the model's own kernels run over
        # all keys, and only decoding attends apart.
        self.prefills_apart = self.apart and self.device.type == "cpu"

    def hidden(
        self,
        ids: Tensor,
        depths: Tensor,
        own: tuple[Tensor, Tensor],
        parts: Sequence[Part],
        cache: DynamicCache,
    ) -> Tensor:
        """Run the packed form, which needs `apart`.

        Args:
            ids: [R, L].
            depths: [R, L], position ids.
            own: which of the row's own keys each token may attend to, [R, L, C], apart from
                sliding windows; and their position ids [R, C].
            parts: keys that rows share, from position 0 on.
            cache: takes the keys and values of the tokens, and gives the C own ones.

        Returns:
            Hidden states [R, L, D].
        """
        visible, key_depths = own
        masks = {
            kind: Masks(
                self._own_mask(kind, visible, depths, key_depths),
                tuple(self._part_mask(kind, depths[part.rows], part.num_keys) for part in parts),
            )
            for kind in sorted(self.kinds)
        }
        given = {kind: found.own for kind, found in masks.items()}
        with attending(self.config):
            output = self.body(
                input_ids=ids,
                position_ids=depths,
                attention_mask=given if len(given) > 1 else next(iter(given.values())),
                past_key_values=cache,
                use_cache=True,
                shared=Shared(tuple(parts), tuple(masks.values())),
            )
        return output[0]

    def hidden_together(
        self, ids: Tensor, depths: Tensor, visible: Tensor, key_depths: Tensor, cache: DynamicCache
    ) -> Tensor:
        """Run the packed form by the model's own attention, with masks over all keys.

        Args:
            ids: [R, L].
            depths: [R, L], position ids.
            visible: [R, L, K], what each token may attend to, apart from sliding windows.
            key_depths: [R, K], position ids of the keys.
            cache: holds P tokens in each of R rows; grows by L.

        Returns:
            Hidden states [R, L, D].
        """
        masks = {
            kind: self._own_mask(kind, visible, depths, key_depths) for kind in sorted(self.kinds)
        }
        output = self.body(
            input_ids=ids,
            position_ids=depths,
            attention_mask=masks if len(masks) > 1 else next(iter(masks.values())),
            past_key_values=cache,
            use_cache=True,
        )
        return output[0]

    def _own_mask(self, kind: str, visible: Tensor, depths: Tensor, key_depths: Tensor) -> Tensor:
        allowed = visible
        if kind == SLIDING and self.window is not None:
            allowed = visible & (depths[:, :, None] - key_depths[:, None, :] < self.window)
        return self._added(allowed)[:, None]

    def _part_mask(self, kind: str, depths: Tensor, num_keys: int) -> Tensor | None:
        if kind != SLIDING or self.window is None or int(depths.max()) < self.window:
            return None
        distance = depths.reshape(-1, 1) - torch.arange(num_keys, device=self.device)
        return self._added(distance < self.window)[None, None]

    def _added(self, allowed: Tensor) -> Tensor:
        """Return what is added to scores: nothing, or so much that the key does not count."""
        mask = torch.zeros(allowed.shape, dtype=self.dtype, device=self.device)
        return mask.masked_fill_(~allowed, torch.finfo(self.dtype).min)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return float32 logits [N, V] of hidden states [N, D]."""
        return self._finish(self.head(hidden)).float()

    def read(
        self, hidden: Tensor, pairs: Sequence[tuple[int, int]]
    ) -> tuple[list[int], list[float]]:
        """Return the likeliest token after each of N hidden states, and log-probabilities.

        Args:
            hidden: [N, D].
            pairs: (state, token) places whose log-probability is wanted.
        """
        return read_hidden(self.head, self._finish, hidden, pairs)

    def full_logits(self, ids: Tensor, num_last: int) -> Tensor:
        """Return float32 logits of the last tokens [R, num_last, V] by an ordinary forward pass."""
        output = self.module(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            use_cache=False,
            **self._keep(num_last),
        )
        return output.logits[:, -num_last:].float()

    def _keep(self, num_last: int) -> dict[str, int]:
        names = inspect.signature(self.inner.forward).parameters
        return {"logits_to_keep": num_last} if "logits_to_keep" in names else {}

    def _find_sharing(self) -> Sharing:
        adapted = isinstance(self.module, PeftModel)
        prompts = adapted and any(c.is_prompt_learning for c in self.module.peft_config.values())
        if self.body is self.inner or self.head is None or prompts or self.inner._is_stateful:
            return "plain"
        if not self.kinds <= {FULL, SLIDING}:
            return "plain"
        if self.inner._supports_attention_backend:
            if self._try("packed", apart=True):
                self.apart = True
                return "packed"
            if self._try("packed"):
                return "packed"
        return "rows" if self._try("rows") else "plain"

    def _try(self, sharing: Sharing, *, apart: bool = False) -> bool:
        """Say whether a trunk that shares gives the logits of an ordinary forward pass.

        Raises:
            ModelError: if these are no numbers.
        """
        ids = [int(i) for i in np.linspace(1, self.config.vocab_size - 1, 12)]
        shared, left, right = ids[:5], ids[5:9], ids[9:]
        sequences: list[Tokens] = [
            (*shared, *left),
            (*shared, *left[:2], *right),
            (*shared, *right),
        ]
        trie = build_trie(sequences)
        limits = Limits(batch=64, row=8, overhead=0, packed=sharing == "packed")
        expected = [
            self.full_logits(torch.tensor([tokens], device=self.device), 1)[0, 0]
            for tokens in sequences
        ]
        if any(bool(logits.isnan().any()) for logits in expected):
            raise ModelError(NO_NUMBERS)
        try:
            found = self._leaf_hidden(trie, limits, apart=apart)
        # A model that cannot run this way refuses somewhere in its own code, in any of these ways.
        except (TypeError, ValueError, RuntimeError, IndexError, AttributeError, KeyError):
            return False
        tolerance = RELATIVE_TOLERANCE.get(self.dtype, 0.2)
        for finish in _finishes(self.config):
            self._finish = finish
            if all(
                bool(
                    (self.logits(hidden[None])[0] - logits).abs().max() <= tolerance * logits.std()
                )
                for hidden, logits in zip(found, expected, strict=True)
            ):
                return True
        return False

    def _leaf_hidden(self, trie: Trie, limits: Limits, *, apart: bool) -> list[Tensor]:
        caches = Caches(self, packed=limits.packed, apart=apart)
        ends: dict[int, Tensor] = {}
        for forward in plan(trie, limits).forwards:
            layout, hidden = caches.run(trie, forward)
            for r, row in enumerate(forward.rows):
                for number, column in zip(row.nodes, layout.places[r], strict=True):
                    ends[number] = hidden[r, column + len(trie.nodes[number].tokens) - 1]
        return [ends[number] for number in trie.end_nodes]


class Caches:
    """Runs forward passes of a plan and keeps the caches that later ones start from.

    Args:
        trunk: runs the passes.
        packed: whether rows hold branches.
        apart: whether packed rows attend to shared keys apart.
    """

    def __init__(self, trunk: Trunk, *, packed: bool, apart: bool) -> None:
        self._trunk = trunk
        self._packed = packed
        self._apart = apart
        self._paths: dict[int, Layers] = {}
        self._copied: dict[int, DynamicCache] = {}
        self.own: Layers = []
        """Keys and values that the last packed pass added, [R, G, L, E] of each layer."""

    def run(self, trie: Trie, forward: Forward) -> tuple[Layout, Tensor]:
        """Return the layout and the hidden states [R, L, D] of one pass."""
        layout = lay_out(trie, forward.rows)
        ids = torch.from_numpy(layout.ids).to(self._trunk.device)
        if not self._packed:
            return layout, self._run_rows(trie, forward, ids)
        depths = torch.from_numpy(layout.depths).to(self._trunk.device)
        visible = torch.from_numpy(layout.visible).to(self._trunk.device)
        path = self.path(forward.past)
        if self._apart:
            cache = DynamicCache()
            cache.layers.extend(FreshLayer() for _ in range(self._trunk.config.num_hidden_layers))
            parts = [Part(slice(None), path)] if path else []
            hidden = self._trunk.hidden(ids, depths, (visible, depths), parts, cache)
            self.own = tensors(cache)
        else:
            num_past = trie.nodes[forward.past].end
            cache = fork(path, len(forward.rows))
            past = torch.arange(num_past, device=self._trunk.device).expand(len(forward.rows), -1)
            seen = torch.nn.functional.pad(visible, (num_past, 0), value=True)
            key_depths = torch.cat([past, depths], dim=1)
            hidden = self._trunk.hidden_together(ids, depths, seen, key_depths, cache)
            self.own = [(k[:, :, num_past:], v[:, :, num_past:]) for k, v in tensors(cache)]
        if forward.keep:
            self._keep(trie, forward)
        return layout, hidden

    def path(self, node: int) -> Layers:
        """Return keys and values of the kept path to `node`; nothing for the root."""
        return self._paths.get(node, [])

    def release(self, node: int) -> None:
        """Drop the cache of `node`, if it is kept."""
        self._paths.pop(node, None)
        self._copied.pop(node, None)

    def _keep(self, trie: Trie, forward: Forward) -> None:
        path = self.path(forward.past)
        for r, row in enumerate(forward.rows):
            start = 0
            for group in row.groups():
                stop = start + sum(len(trie.nodes[number].tokens) for number in group)
                own = [(k[r : r + 1, :, start:stop], v[r : r + 1, :, start:stop])
                       for k, v in self.own]  # fmt: skip
                self._paths[group[-1]] = _append(path, own)
                start = stop

    def _run_rows(self, trie: Trie, forward: Forward, ids: Tensor) -> Tensor:
        """Run whole paths, one a row, on a copy of the family's own kind of cache."""
        trunk, kept = self._trunk, self._copied.get(forward.past)
        cache = DynamicCache(config=trunk.config) if kept is None else copy.deepcopy(kept)
        if kept is not None:
            cache.batch_repeat_interleave(len(forward.rows))
        length = trie.nodes[forward.past].end + ids.shape[1]
        mask = torch.ones((len(ids), length), device=trunk.device)
        output = trunk.body(
            input_ids=ids, attention_mask=mask.long(), past_key_values=cache, use_cache=True
        )
        for r, row in enumerate(forward.rows if forward.keep else ()):
            one = copy.deepcopy(cache)
            one.batch_select_indices(torch.tensor([r], device=trunk.device))
            self._copied[row.nodes[-1]] = one
        return output[0]


def tensors(cache: DynamicCache) -> Layers:
    """Return keys and values [R, G, K, E] of each layer."""
    layers: Any = cache.layers
    return [(layer.keys, layer.values) for layer in layers]


def fork(path: Layers, rows: int) -> DynamicCache:
    """Return a cache of `rows` rows that shares the memory of `path`, one row.

    All layers are of the growing kind, also where a model has sliding windows: the windows are in
    our masks, and a cache cut to the window could not be forked or packed.
    """
    cache = DynamicCache()
    for one, other in path:
        keys, values = one.expand(rows, -1, -1, -1), other.expand(rows, -1, -1, -1)
        layer = DynamicLayer()
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        cache.layers.append(layer)
    return cache


def _append(path: Layers, own: Layers) -> Layers:
    """Return a copy of `path` followed by `own`; both of one row."""
    if not path:
        return [(keys.clone(), values.clone()) for keys, values in own]
    return [
        (torch.cat([k, new_k], dim=2), torch.cat([v, new_v], dim=2))
        for (k, v), (new_k, new_v) in zip(path, own, strict=True)
    ]


def _unchanged(logits: Tensor) -> Tensor:
    return logits


def _steady_length(config: Any) -> int | None:
    """Return the length from which rotary frequencies depend on a text's length, if they do.

    All tokens of a pass get those of its longest text (`longrope`, `dynamic`), so that texts beyond
    this length share nothing with others.
    """
    found: Any = getattr(config, "rope_parameters", None) or {}
    by_layer = [entry for entry in found.values() if isinstance(entry, dict)]
    lengths = [
        entry.get("original_max_position_embeddings") or config.max_position_embeddings
        for entry in by_layer or [found]
        if entry.get("rope_type") in ("longrope", "dynamic")
    ]
    return min(lengths, default=None)


def _finishes(config: Any) -> list[Finish]:
    """Return what families do to logits after the head, as far as the configuration says."""
    cap: Any = getattr(config, "final_logit_softcapping", None)
    divisor: Any = getattr(config, "logits_scaling", None)
    factor: Any = getattr(config, "logit_scale", None)
    finishes: list[Finish] = [_unchanged]
    if cap:
        finishes.append(lambda logits: torch.tanh(logits / cap) * cap)
    if divisor:
        finishes.append(lambda logits: logits / divisor)
    if factor:
        finishes.append(lambda logits: logits * factor)
    return finishes
