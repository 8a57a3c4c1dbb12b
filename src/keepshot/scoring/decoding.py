"""Decoding of many answers at once, one a row, which answers join and leave.

    demonstrations   |  question 1 . new tokens . room
    (held once)      |  question 2 . new tokens . room
    demonstrations'  |  question 3 . new tokens . room

Answers under the same demonstrations attend to their keys in common, and to own ones in slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import assert_never

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from keepshot.models.loading import LanguageModel
from keepshot.scoring.attention import LayerStates, Part
from keepshot.scoring.forward import Caches, Layers, Layout, Trunk
from keepshot.scoring.head import next_tokens
from keepshot.scoring.prefix import Forward, Trie
from keepshot.scoring.request import Generate, GreedyMatch, LogLikelihood, Request

SLOTS_TO_SPARE = 16
"""Tokens that an answer may grow by before its slots are copied into larger ones."""


@dataclass
class Answer:
    """Tokens decoded so far for the request `number`; the last one has not been read yet."""

    number: int
    request: GreedyMatch | Generate
    tokens: list[int]
    room: int
    """How many tokens the context still has room for, after the request's own context."""
    text: str = ""
    stopped: bool = False
    ends_apart: bool = True
    """Whether the end has a token of its own, which says nothing of the answer."""
    finished: bool = field(default=False)

    @property
    def num_read(self) -> int:
        """Tokens of context and answer that the model has read: all but the last."""
        return len(self.request.context) + len(self.tokens) - 1

    def check(self, model: LanguageModel) -> bool:
        """Look at the newest token: has the answer ended, or reached its limit?"""
        match self.request:
            case GreedyMatch():
                limit = self.request.limit
                said = model.last_of_answer(self.tokens[-1])
                if said is not None:
                    self.ends_apart = not said
                    self._end(model.decode_answer(self.tokens))
            case Generate():
                limit = self.request.max_new_tokens
                self._check_stop_strings(model, self.request)
            case _:
                assert_never(self.request)
        if not self.finished and len(self.tokens) >= min(limit, self.room):
            self.text, self.finished = model.decode(self.tokens), True
        return self.finished

    def _check_stop_strings(self, model: LanguageModel, request: Generate) -> None:
        ended = self.tokens[-1] in model.eos_ids or self.tokens[-1] in request.ends
        if not ended and not request.stop:
            return
        text = model.decode(self.tokens[:-1] if ended else self.tokens)
        places = [place for string in request.stop if (place := text.find(string)) >= 0]
        if ended or places:
            self._end(text[: min(places, default=len(text))])

    def _end(self, text: str) -> None:
        self.text, self.stopped, self.finished = text, True, True


def open_answer(
    number: int, request: Request, predicted: Sequence[int], model: LanguageModel
) -> Answer | None:
    """Return the greedy answer as far as one forward pass shows it, or None if none is wanted.

    Args:
        number: identifies the request to the caller.
        request: what was asked.
        predicted: the next tokens, first after the context, then after each answer token.
        model: judges where answers end.
    """
    match request:
        case LogLikelihood():
            return None
        case GreedyMatch(answer=wanted):
            agreed = next(
                (i for i, token in enumerate(wanted) if token != predicted[i]), len(wanted)
            )
            tokens = [*wanted[:agreed], predicted[agreed]]
            if agreed < len(wanted) or model.last_of_answer(tokens[-1]) != "":
                # Not the answer, though it may begin with lines of it: decoding ends at the first.
                ends = (i for i, token in enumerate(tokens) if model.ends_answer(token))
                tokens = tokens[: next(ends, len(tokens)) + 1]
        case Generate():
            tokens = [predicted[0]]
    room = model.context_length - len(request.context)
    answer = Answer(number, request, tokens, room)
    answer.check(model)
    return answer


@dataclass(frozen=True)
class _Bench:
    """Answers that share a cached path, in rows that lie side by side."""

    path: Layers
    num_answers: int


class _SlotLayer(DynamicLayer):
    """Own keys and values of one layer in slots with room to spare: a step writes, copies nothing.

    `keys` and `values` are [N, G, slots, E]; `places` says where each row's next token goes.
    """

    def __init__(self, states: LayerStates, places: Tensor, num_slots: int) -> None:
        super().__init__()
        self.keys, self.values = self._states = states
        self._places, self._num_slots = places, num_slots
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: object, **__: object
    ) -> LayerStates:
        """Write one token a row, and return the slots that are in use."""
        keys, values = self._states
        rows = torch.arange(len(self._places), device=key_states.device)
        keys[rows, :, self._places] = key_states[:, :, 0]
        values[rows, :, self._places] = value_states[:, :, 0]
        return keys[:, :, : self._num_slots], values[:, :, : self._num_slots]


class Decoder:
    """The answers that go on, one a row."""

    def __init__(self, model: LanguageModel, trunk: Trunk) -> None:
        self._model = model
        self._trunk = trunk
        self._benches: list[_Bench] = []
        self._layers: Layers = []
        """Slots [N, G, slots, E]."""
        self._filled: NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        self._active: list[Answer] = []

    @property
    def num_active(self) -> int:
        """Number of answers that go on."""
        return len(self._active)

    @property
    def num_keys(self) -> int:
        """Number of slots held."""
        return len(self._active) * self._num_slots

    @property
    def _num_slots(self) -> int:
        return int(self._layers[0][0].shape[2]) if self._layers else 0

    def join(
        self,
        answers: Sequence[tuple[Answer, int, int]],
        trie: Trie,
        forward: Forward,
        layout: Layout,
        caches: Caches,
    ) -> None:
        """Take in answers from one forward pass.

        Args:
            answers: each with its row, and the place in that row of the node its request ends in.
            trie: what the pass was planned from.
            forward: the pass.
            layout: its rows as arrays.
            caches: has just run the pass.
        """
        own: list[NDArray[np.int64]] = []
        for answer, r, place in answers:
            node = trie.nodes[forward.rows[r].nodes[place]]
            last = layout.places[r][place] + len(node.tokens) - 1
            length = answer.num_read
            # In a row an ancestor stands before its descendants: these columns are in order.
            own.append(np.flatnonzero(layout.visible[r, last] & (layout.depths[r] < length)))
        filled = np.array([len(columns) for columns in own], dtype=np.int64)
        columns = np.zeros((len(own), int(filled.max())), dtype=np.int64)
        for row, found in zip(columns, own, strict=True):
            row[: len(found)] = found
        rows = torch.tensor([[r] for _, r, _ in answers], device=self._trunk.device)
        index = torch.from_numpy(columns).to(self._trunk.device)
        # Advanced indices around a slice come first: [N, columns, G, E].
        found = [
            (k[rows, :, index].transpose(1, 2), v[rows, :, index].transpose(1, 2))
            for k, v in caches.own
        ]
        self._benches.append(_Bench(caches.path(forward.past), len(answers)))
        self._filled = np.concatenate([self._filled, filled])
        self._active.extend(answer for answer, _, _ in answers)
        slots = max(self._num_slots, int(self._filled.max()) + SLOTS_TO_SPARE)
        old = self._layers or [(k[:0], v[:0]) for k, v in found]
        self._layers = [
            (_stacked(k, new_k, slots), _stacked(v, new_v, slots))
            for (k, v), (new_k, new_v) in zip(old, found, strict=True)
        ]

    def step(self) -> list[Answer]:
        """Decode one token of every answer; return those that are finished, which leave."""
        trunk, device = self._trunk, self._trunk.device
        depths = np.array([[answer.num_read] for answer in self._active])
        used = int(self._filled.max()) + 1
        if used > self._num_slots:
            more = used + SLOTS_TO_SPARE
            self._layers = [
                (_stacked(k, k[:0], more), _stacked(v, v[:0], more)) for k, v in self._layers
            ]
        slots = np.arange(used)
        visible = torch.from_numpy(slots[None] <= self._filled[:, None]).to(device)
        key_depths = torch.from_numpy(depths - self._filled[:, None] + slots).to(device)
        places = torch.from_numpy(self._filled).to(device)
        cache = DynamicCache()
        cache.layers.extend(_SlotLayer(states, places, used) for states in self._layers)
        hidden = trunk.hidden(
            torch.tensor([[answer.tokens[-1]] for answer in self._active], device=device),
            torch.from_numpy(depths).to(device),
            (visible[:, None], key_depths),
            self._parts(),
            cache,
        )
        self._filled = self._filled + 1
        asked = [(answer.request, len(answer.tokens)) for answer in self._active]
        tokens = next_tokens(trunk.logits(hidden[:, 0]), asked)
        for answer, token in zip(self._active, tokens, strict=True):
            answer.tokens.append(token)
            answer.check(self._model)
        finished = [answer for answer in self._active if answer.finished]
        if finished:
            self._leave()
        return finished

    def _parts(self) -> list[Part]:
        parts: list[Part] = []
        start = 0
        for bench in self._benches:
            stop = start + bench.num_answers
            if bench.path:
                parts.append(Part(slice(start, stop), bench.path))
            start = stop
        return parts

    def _leave(self) -> None:
        """Drop the rows of answers that are finished."""
        going = [row for row, answer in enumerate(self._active) if not answer.finished]
        benches: list[_Bench] = []
        start = 0
        for bench in self._benches:
            stop = start + bench.num_answers
            left = sum(start <= row < stop for row in going)
            if left:
                benches.append(replace(bench, num_answers=left))
            start = stop
        self._benches = benches
        self._active = [self._active[row] for row in going]
        self._filled = self._filled[going]
        index = torch.tensor(going, dtype=torch.long, device=self._trunk.device)
        self._layers = [
            (k.index_select(0, index), v.index_select(0, index)) for k, v in self._layers
        ]


def _stacked(upper: Tensor, lower: Tensor, slots: int) -> Tensor:
    """Return the rows of both in zeroed tensors of `slots` slots [N, G, slots, E]."""
    shape = len(upper) + len(lower), upper.shape[1], slots, upper.shape[3]
    stacked = upper.new_zeros(shape)
    stacked[: len(upper), :, : upper.shape[2]] = upper
    stacked[len(upper) :, :, : lower.shape[2]] = lower
    return stacked
