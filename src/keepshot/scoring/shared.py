"""One pass over a plan: forward passes in, results out, with answers decoded on the way."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from keepshot.errors import ModelError
from keepshot.models.loading import LanguageModel
from keepshot.scoring.decoding import Answer, Decoder, open_answer
from keepshot.scoring.forward import NO_NUMBERS, Caches, Layout, Trunk
from keepshot.scoring.head import is_sampled, next_tokens
from keepshot.scoring.prefix import ROOT, Forward, Limits, build_trie, plan
from keepshot.scoring.request import (
    Generate,
    GenerateResult,
    GreedyMatch,
    GreedyMatchResult,
    LogLikelihood,
    LogLikelihoodResult,
    Request,
    Result,
    targets,
    tokens_to_read,
)

ANSWERS_PER_BATCH = 1 / 8
"""Decoding waits for batch tokens times this many answers, so that a step is worth its while."""
KEYS_PER_BATCH = 6
"""It waits no longer once it holds slots for this many keys a batch token, which take memory."""


@dataclass(frozen=True)
class Reading:
    """What was read for one request: a value for each place from its context's end on."""

    likeliest: list[int]
    log_probs: list[float]
    """One for each target token."""

    def result(self, request: Request, answer: Answer | None) -> Result:
        """Return the answer to `request`; `answer` is its decoded text, if it wants one.

        Raises:
            ModelError: if the model's logits are no numbers.
        """
        if any(math.isnan(log_prob) for log_prob in self.log_probs):
            raise ModelError(NO_NUMBERS)
        match request:
            case LogLikelihood(continuation=wanted):
                greedy = tuple(self.likeliest[: len(wanted)]) == wanted
                return LogLikelihoodResult(sum(self.log_probs), greedy)
            case GreedyMatch(answer=wanted):
                assert answer is not None
                ended = answer.stopped and answer.ends_apart
                correct = ended and tuple(answer.tokens[:-1]) == wanted
                return GreedyMatchResult(correct, answer.text, answer.stopped)
            case Generate():
                assert answer is not None
                return GenerateResult(answer.text, answer.stopped)


class SharedRun:
    """Executes the plan of some different requests.

    Args:
        model: judges where answers end.
        trunk: runs the forward passes; must be able to share.
        requests: no two equal.
        limits: shape the plan.
    """

    def __init__(
        self, model: LanguageModel, trunk: Trunk, requests: Sequence[Request], limits: Limits
    ) -> None:
        self.tokens_prefilled = 0
        self._model = model
        self._trunk = trunk
        self._requests = requests
        self._limits = limits
        self._trie = build_trie([tokens_to_read(request) for request in requests])
        self._plan = plan(self._trie, limits)
        self._decoder = Decoder(model, trunk)
        self._targets = [targets(request) for request in requests]
        self._readings = [
            Reading([-1] * (len(tokens_to_read(r)) - len(r.context) + 1), [0.0] * len(wanted))
            for r, wanted in zip(requests, self._targets, strict=True)
        ]
        self._reads = self._find_reads()
        self._ends = {n: node.ends for n, node in enumerate(self._trie.nodes) if node.ends}

    def results(self, going: list[Answer]) -> Iterator[tuple[int, Result]]:
        """Yield (number of the request, result) as they come.

        Args:
            going: gets the answers that must be decoded without sharing.
        """
        caches = Caches(self._trunk, packed=self._limits.packed, apart=self._trunk.prefills_apart)
        last_use = {forward.past: i for i, forward in enumerate(self._plan.forwards)}
        for i, forward in enumerate(self._plan.forwards):
            layout, hidden = caches.run(self._trie, forward)
            self.tokens_prefilled += sum(row.length for row in forward.rows)
            self._read(forward, layout, hidden)
            joining: list[tuple[Answer, int, int]] = []
            for number, r, place in self._ended(forward):
                answer = open_answer(
                    number, self._requests[number], self._readings[number].likeliest, self._model
                )
                if answer is None or answer.finished:
                    yield self._result(number, answer)
                elif answer.num_read < self._trie.nodes[forward.past].end:
                    # The cache that others share goes on where this answer has departed.
                    going.append(answer)
                else:
                    joining.append((answer, r, place))
            if not self._trunk.apart:
                going.extend(answer for answer, _, _ in joining)
            elif joining:
                self._decoder.join(joining, self._trie, forward, layout, caches)
                yield from self._decode(until_empty=False)
            if last_use[forward.past] == i:
                caches.release(forward.past)
        yield from self._decode(until_empty=True)

    def _decode(self, *, until_empty: bool) -> Iterator[tuple[int, Result]]:
        answers = self._limits.batch * ANSWERS_PER_BATCH
        keys = self._limits.batch * KEYS_PER_BATCH
        decoder = self._decoder
        while decoder.num_active and (
            until_empty or decoder.num_active >= answers or decoder.num_keys > keys
        ):
            for answer in decoder.step():
                yield self._result(answer.number, answer)

    def _result(self, number: int, answer: Answer | None) -> tuple[int, Result]:
        return number, self._readings[number].result(self._requests[number], answer)

    def _find_reads(self) -> dict[int, list[tuple[int, int, int]]]:
        """For each node, what is read in it: (offset, number of the request, place)."""
        reads: dict[int, list[tuple[int, int, int]]] = defaultdict(list)
        nodes = self._trie.nodes
        for number, request in enumerate(self._requests):
            first = len(request.context) - 1
            at = self._trie.end_nodes[number]
            while nodes[at].end > first and at != ROOT:
                for depth in range(max(first, nodes[at].start), nodes[at].end):
                    reads[at].append((depth - nodes[at].start, number, depth - first))
                at = nodes[at].parent
        return reads

    def _read(self, forward: Forward, layout: Layout, hidden: Tensor) -> None:
        """Apply the head where something is read, each place once."""
        places: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
        for r, row in enumerate(forward.rows):
            for node, column in zip(row.nodes, layout.places[r], strict=True):
                for offset, number, place in self._reads.pop(node, ()):
                    places[r, column + offset].append((number, place))
        if not places:
            return
        rows = torch.tensor([r for r, _ in places], device=hidden.device)
        columns = torch.tensor([c for _, c in places], device=hidden.device)
        readers = [
            (i, number, place)
            for i, found in enumerate(places.values())
            for number, place in found
            if place < len(self._targets[number])
        ]
        states = hidden[rows, columns]
        likeliest, log_probs = self._trunk.read(
            states,
            [(i, self._targets[number][place]) for i, number, place in readers],
        )
        for i, (token, found) in enumerate(zip(likeliest, places.values(), strict=True)):
            for number, place in found:
                self._readings[number].likeliest[place] = token
                if is_sampled(self._requests[number]):
                    # Drawing takes all logits of this one place; elsewhere they are never held.
                    logits = self._trunk.logits(states[i : i + 1])
                    drawn = next_tokens(logits, [(self._requests[number], place)])
                    self._readings[number].likeliest[place] = drawn[0]
        for log_prob, (_, number, place) in zip(log_probs, readers, strict=True):
            self._readings[number].log_probs[place] = log_prob

    def _ended(self, forward: Forward) -> Iterator[tuple[int, int, int]]:
        """Yield (number, row, place in the row) of requests that end in this pass, once each."""
        for r, row in enumerate(forward.rows):
            for place, node in enumerate(row.nodes):
                for number in self._ends.pop(node, ()):
                    yield number, r, place
