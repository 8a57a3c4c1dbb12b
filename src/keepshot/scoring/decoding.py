"""Decoding of many answers at once, in one packed row that answers join and leave.

    keys:   demonstrations . question 1 . question 4 . demonstrations' . question 2 . new tokens ...
    row:    one pending token of each answer that goes on, each seeing its own keys only

Answers under the same demonstrations share their keys, nothing is padded, and the key columns that
no answer sees any more are dropped now and then.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import assert_never

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache

from keepshot.models.loading import LanguageModel
from keepshot.scoring.forward import Layout, Trunk, cache_of, tensors
from keepshot.scoring.prefix import Forward, Trie
from keepshot.scoring.request import Generate, GreedyMatch, LogLikelihood, Request
from keepshot.scoring.sampling import next_tokens


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
    finished: bool = field(default=False)

    def check(self, model: LanguageModel) -> bool:
        """Look at the newest token: has the answer ended, or reached its limit?"""
        match self.request:
            case GreedyMatch():
                limit = self.request.limit
                if model.ends_answer(self.tokens[-1]):
                    self._end(model.decode(self.tokens[:-1]))
            case Generate():
                limit = self.request.max_new_tokens
                self._check_stop_strings(model, self.request.stop)
            case _:
                assert_never(self.request)
        if not self.finished and len(self.tokens) >= min(limit, self.room):
            self.text, self.finished = model.decode(self.tokens), True
        return self.finished

    def _check_stop_strings(self, model: LanguageModel, stop: Sequence[str]) -> None:
        ended = self.tokens[-1] in model.eos_ids
        if not ended and not stop:
            return
        text = model.decode(self.tokens[:-1] if ended else self.tokens)
        places = [place for string in stop if (place := text.find(string)) >= 0]
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
            if agreed < len(wanted) or not model.ends_answer(tokens[-1]):
                # Not the answer, though it may begin with lines of it: decoding ends at the first.
                ends = (i for i, token in enumerate(tokens) if model.ends_answer(token))
                tokens = tokens[: next(ends, len(tokens)) + 1]
        case Generate():
            tokens = [predicted[0]]
    room = model.context_length - len(request.context)
    answer = Answer(number, request, tokens, room)
    answer.check(model)
    return answer


class Decoder:
    """The packed row of answers that go on."""

    def __init__(self, model: LanguageModel, trunk: Trunk) -> None:
        self._model = model
        self._trunk = trunk
        self._layers: list[tuple[Tensor, Tensor]] = []
        self._depths: NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        self._visible: NDArray[np.bool_] = np.zeros((0, 0), dtype=np.bool_)
        self._active: list[Answer] = []

    @property
    def num_active(self) -> int:
        """Number of answers that go on."""
        return len(self._active)

    @property
    def num_keys(self) -> int:
        """Number of key columns held."""
        return len(self._depths)

    def join(
        self,
        answers: Sequence[tuple[Answer, int, int]],
        trie: Trie,
        forward: Forward,
        layout: Layout,
        cache: DynamicCache,
    ) -> None:
        """Take in answers from one forward pass.

        Args:
            answers: each with its row, and the place in that row of the node its request ends in.
            trie: what the pass was planned from.
            forward: the pass.
            layout: its rows as arrays.
            cache: its cache after the pass, [R, heads, P + L, head width] in each layer.
        """
        num_past = trie.nodes[forward.past].end
        columns: dict[tuple[int, int], int] = {}
        seen: list[list[int]] = []
        for answer, r, place in answers:
            node = trie.nodes[forward.rows[r].nodes[place]]
            last = layout.places[r][place] + len(node.tokens) - 1
            length = len(answer.request.context) + len(answer.tokens) - 1
            own = np.flatnonzero(layout.visible[r, last] & (layout.depths[r] < length))
            keys = [(r, int(column)) for column in own]
            seen.append([columns.setdefault(key, len(columns)) for key in keys])
        visible = np.zeros((len(answers), num_past + len(columns)), dtype=np.bool_)
        visible[:, :num_past] = True
        for row, own in zip(visible, seen, strict=True):
            row[[num_past + column for column in own]] = True
        depths = [int(layout.depths[r, column]) for r, column in columns]
        self._append(
            [answer for answer, _, _ in answers],
            visible,
            np.array([*range(num_past), *depths], dtype=np.int64),
            _gather(cache, num_past, list(columns)),
        )

    def _append(
        self,
        answers: Iterable[Answer],
        visible: NDArray[np.bool_],
        depths: NDArray[np.int64],
        layers: list[tuple[Tensor, Tensor]],
    ) -> None:
        above = np.pad(self._visible, ((0, 0), (0, visible.shape[1])))
        below = np.pad(visible, ((0, 0), (self.num_keys, 0)))
        self._visible = np.concatenate([above, below])
        self._depths = np.concatenate([self._depths, depths])
        self._active.extend(answers)
        self._layers = (
            [
                (torch.cat([k, new_k], dim=2), torch.cat([v, new_v], dim=2))
                for (k, v), (new_k, new_v) in zip(self._layers, layers, strict=True)
            ]
            if self._layers
            else layers
        )

    def step(self) -> list[Answer]:
        """Decode one token of every answer; return those that are finished, which leave."""
        trunk, device = self._trunk, self._trunk.device
        depths = np.array([len(a.request.context) + len(a.tokens) - 1 for a in self._active])
        self._visible = np.concatenate(
            [self._visible, np.eye(len(self._active), dtype=np.bool_)], axis=1
        )
        self._depths = np.concatenate([self._depths, depths])
        cache = cache_of(self._layers)
        hidden = trunk.hidden(
            torch.tensor([[answer.tokens[-1] for answer in self._active]], device=device),
            torch.from_numpy(depths)[None].to(device),
            torch.from_numpy(self._visible)[None].to(device),
            torch.from_numpy(self._depths)[None].to(device),
            cache,
        )
        self._layers = tensors(cache)
        asked = [(answer.request, len(answer.tokens)) for answer in self._active]
        tokens = next_tokens(trunk.logits(hidden[0]), asked)
        for answer, token in zip(self._active, tokens, strict=True):
            answer.tokens.append(token)
            answer.check(self._model)
        finished = [answer for answer in self._active if answer.finished]
        if finished:
            going = [i for i, answer in enumerate(self._active) if not answer.finished]
            self._visible = self._visible[going]
            self._active = [self._active[i] for i in going]
            self._drop_unseen()
        return finished

    def _drop_unseen(self) -> None:
        seen = np.flatnonzero(self._visible.any(axis=0))
        if len(seen) > 0.7 * self.num_keys:
            return
        self._visible, self._depths = self._visible[:, seen], self._depths[seen]
        index = torch.from_numpy(seen).to(self._trunk.device)
        self._layers = [
            (k.index_select(2, index), v.index_select(2, index)) for k, v in self._layers
        ]


def _gather(
    cache: DynamicCache, num_past: int, columns: Sequence[tuple[int, int]]
) -> list[tuple[Tensor, Tensor]]:
    """Return the cached path once, then the keys and values of (row, column), as one row."""
    layers = tensors(cache)
    device = layers[0][0].device
    rows = torch.tensor([r for r, _ in columns], dtype=torch.long, device=device)
    places = torch.tensor([num_past + c for _, c in columns], dtype=torch.long, device=device)

    def pick(states: Tensor) -> Tensor:
        own = states[rows, :, places].transpose(0, 1)[None]
        return torch.cat([states[:1, :, :num_past], own], dim=2)

    return [(pick(keys), pick(values)) for keys, values in layers]
