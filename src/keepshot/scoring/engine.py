"""Answers scoring requests about a model, sharing what they share.

Answers are the same to rounding whatever the order, grouping or batch size. `share=False` is the
reference: each request in its own forward pass, from its first token. A pass holds as many tokens
as the model's own shapes and the memory there is allow.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from keepshot.models.loading import LanguageModel
from keepshot.records import Cost
from keepshot.scoring.decoding import Answer, open_answer
from keepshot.scoring.forward import Sharing, Trunk
from keepshot.scoring.head import is_sampled, next_tokens, read_logits
from keepshot.scoring.prefix import Limits, Plan, build_trie, plan
from keepshot.scoring.processes import ALONE, Processes, shares
from keepshot.scoring.request import Request, Result, longest, targets, tokens_to_read
from keepshot.scoring.shared import Reading, SharedRun

Progress = Callable[[int, int], None]
CPU_LIMITS = Limits(batch=1024)
GPU_LIMITS = Limits(batch=8192, row=512, fill=256, overhead=256)
MIN_BATCH = 128
"""Where memory runs out at a smaller batch than this, halving it would not help."""
CPU_BUDGET = 2**30
"""Bytes for one forward pass on a CPU: more would not be faster, and the machine is shared."""
GPU_SHARE = 0.5
"""Share of the free memory of a GPU; the rest is for caches that are kept and for the head."""
USUAL_KEYS = 512


@dataclass(frozen=True)
class Shape:
    """What a token costs, in numbers of elements."""

    width: int
    inner: int
    """Widest layer of a block."""
    key_value: int
    """Keys and values of all layers."""
    heads: int
    itemsize: int
    """Bytes of an element."""

    @property
    def bytes_per_token(self) -> int:
        """Bytes that a token holds at the worst moment of a pass over a few hundred keys.

        Its keys and values stay, twice while a cache grows; of one block there are the residual,
        the normed input, queries and attention's output (five widths) and three of the inner layer;
        its row of the mask, and keys repeated for every head, over `USUAL_KEYS` keys.
        """
        block = 5 * self.width + 3 * self.inner
        attention = USUAL_KEYS * (2 + self.width // max(1, self.heads) // 16)
        return self.itemsize * (2 * self.key_value + block + attention)


class Engine:
    """Answers requests about one model.

    Args:
        model: its structure must stay; its weights may change between runs.
        share: compute shared beginnings once (else: the slow reference).
        batch_tokens: tokens in one forward pass; None computes it from the model's shapes and the
            memory there is.
        processes: those that requests are shared out among; all must run the same requests.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        share: bool = True,
        batch_tokens: int | None = None,
        processes: Processes = ALONE,
    ) -> None:
        self.processes = processes
        self.model = model
        self.share = share
        self._trunk = Trunk(model.module, share=share)
        limits = CPU_LIMITS if self._trunk.device.type == "cpu" else GPU_LIMITS
        if batch_tokens is None:
            fitting = tokens_that_fit(shape_of(self._trunk), memory_budget(self._trunk.device))
            batch_tokens = max(MIN_BATCH, min(limits.batch, fitting))
        self._limits = replace(limits, batch=batch_tokens, packed=self.sharing == "packed")
        self._cost = Cost()

    @property
    def sharing(self) -> Sharing:
        """How far this model's structure lets requests share."""
        return self._trunk.sharing

    @property
    def cost(self) -> Cost:
        """What all runs so far took; tokens are those of prompts and answers given, not decoded."""
        return self._cost

    def plan(self, requests: Sequence[Request]) -> Plan:
        """Return the forward passes that `run` would make, before it does.

        What cannot be shared is read whole: it counts among the tokens, without a pass in the plan.
        """
        shared, alone = self._parted(dict.fromkeys(requests))
        found = plan(build_trie([tokens_to_read(request) for request in shared]), self._limits)
        whole = sum(len(tokens_to_read(request)) for request in alone)
        return replace(
            found,
            tokens_prefilled=found.tokens_prefilled + whole,
            tokens_padded=found.tokens_padded + whole,
            tokens_naive=found.tokens_naive + whole,
        )

    def run(self, requests: Sequence[Request], progress: Progress | None = None) -> list[Result]:
        """Return the answers in the order of `requests`; equal requests are computed once.

        Args:
            requests: of any kinds, mixed; none longer than the model's context.
            progress: called with (different requests answered, different requests in all).
        """
        started = time.perf_counter()
        unique = list(dict.fromkeys(requests))
        answered: dict[Request, Result] = {}
        mine = unique
        if self.processes.size > 1:
            parts = shares([tokens_to_read(request) for request in unique], self.processes.size)
            mine = [unique[number] for number in parts[self.processes.rank]]
        before = self._cost.tokens_prefilled
        with torch.inference_mode():
            for request, result in self._answer(mine):
                answered[request] = result
                if progress is not None:
                    progress(len(answered), len(mine))
        if self.processes.size > 1:
            own = self._cost.tokens_prefilled - before
            for found, spent in self.processes.gathered((answered, own)):
                answered = {**answered, **found}
                self._spend(tokens_prefilled=spent)
            self._spend(tokens_prefilled=-own)
        self._spend(
            seconds=time.perf_counter() - started,
            tokens_naive=sum(len(tokens_to_read(request)) for request in requests),
        )
        return [answered[request] for request in requests]

    def _spend(
        self, *, seconds: float = 0.0, tokens_prefilled: int = 0, tokens_naive: int = 0
    ) -> None:
        self._cost = Cost(
            seconds=self._cost.seconds + seconds,
            tokens_prefilled=self._cost.tokens_prefilled + tokens_prefilled,
            tokens_naive=self._cost.tokens_naive + tokens_naive,
        )

    def _answer(self, requests: Sequence[Request]) -> Iterator[tuple[Request, Result]]:
        """Answer in any order; where a device runs out of memory, go on with half the batch."""
        shared, alone = self._parted(requests)
        yield from self._answer_alike(shared, plainly=False)
        yield from self._answer_alike(alone, plainly=True)

    def _parted(self, requests: Iterable[Request]) -> tuple[list[Request], list[Request]]:
        """Return those that may share, and those that must be read from their beginning."""
        steady = self._trunk.steady_length
        shared: list[Request] = []
        alone: list[Request] = []
        for request in requests:
            within = steady is None or longest(request) <= steady
            (shared if within and self.sharing != "plain" else alone).append(request)
        return shared, alone

    def _answer_alike(
        self, requests: Sequence[Request], *, plainly: bool
    ) -> Iterator[tuple[Request, Result]]:
        limits = self._limits
        waiting = list(requests)
        while waiting:
            done: set[int] = set()
            try:
                for number, result in self._attempt(waiting, limits, plainly=plainly):
                    done.add(number)
                    yield waiting[number], result
            except torch.OutOfMemoryError:
                if limits.batch < 2 * MIN_BATCH:
                    raise
                limits = replace(limits, batch=limits.batch // 2)
            waiting = [request for number, request in enumerate(waiting) if number not in done]

    def _attempt(
        self, requests: Sequence[Request], limits: Limits, *, plainly: bool
    ) -> Iterator[tuple[int, Result]]:
        going: list[Answer] = []
        if plainly:
            yield from self._score_plainly(requests, limits, going)
        else:
            run = SharedRun(self.model, self._trunk, requests, limits)
            yield from run.results(going)
            self._spend(tokens_prefilled=run.tokens_prefilled)
        yield from self._decode_plainly(going, limits)

    def _score_plainly(
        self, requests: Sequence[Request], limits: Limits, going: list[Answer]
    ) -> Iterator[tuple[int, Result]]:
        """Run each request from its first token; answers that go on are added to `going`."""
        sequences = [list(tokens_to_read(request)) for request in requests]
        for numbers, ids in self._equal_lengths(sequences, limits):
            read = [len(sequences[n]) - len(requests[n].context) + 1 for n in numbers]
            logits = self._trunk.full_logits(ids, max(read))
            self._spend(tokens_prefilled=ids.numel())
            for number, num_read, rows in zip(numbers, read, logits, strict=True):
                wanted = targets(requests[number])
                pairs = [(place, token) for place, token in enumerate(wanted)]
                likeliest, log_probs = read_logits(rows[-num_read:], pairs)
                if is_sampled(requests[number]):
                    likeliest = next_tokens(rows[-1:], [(requests[number], 0)])
                reading = Reading(likeliest, log_probs)
                answer = open_answer(number, requests[number], likeliest, self.model)
                if answer is None or answer.finished:
                    yield number, reading.result(requests[number], answer)
                else:
                    going.append(answer)

    def _decode_plainly(
        self, going: Sequence[Answer], limits: Limits
    ) -> Iterator[tuple[int, Result]]:
        """Decode with a full forward pass for every token: slow, and right for any model."""
        while going:
            sequences = [[*answer.request.context, *answer.tokens] for answer in going]
            for numbers, ids in self._equal_lengths(sequences, limits):
                asked = [(going[n].request, len(going[n].tokens)) for n in numbers]
                tokens = next_tokens(self._trunk.full_logits(ids, 1)[:, 0], asked)
                for number, token in zip(numbers, tokens, strict=True):
                    going[number].tokens.append(token)
                    if going[number].check(self.model):
                        answer = going[number]
                        yield answer.number, Reading([], []).result(answer.request, answer)
            going = [answer for answer in going if not answer.finished]

    def _equal_lengths(
        self, sequences: Sequence[list[int]], limits: Limits
    ) -> Iterator[tuple[list[int], Tensor]]:
        """Yield batches of sequences of one length, so that nothing is padded."""
        groups: dict[int, list[int]] = defaultdict(list)
        for number, tokens in enumerate(sequences):
            groups[len(tokens)].append(number)
        for length, numbers in sorted(groups.items(), reverse=True):
            rows = max(1, limits.batch // length) if self.share else 1
            for start in range(0, len(numbers), rows):
                batch = numbers[start : start + rows]
                ids = torch.tensor([sequences[n] for n in batch], device=self._trunk.device)
                yield batch, ids


def shape_of(trunk: Trunk) -> Shape:
    """Read the shapes off the modules, whatever the configuration calls them."""
    config: Any = trunk.config
    widths = [
        int(parameter.shape[0])
        for name, parameter in trunk.body.named_parameters()
        if parameter.ndim == 2 and "embed" not in name and "wte" not in name
    ]
    width = int(config.hidden_size)
    heads = int(getattr(config, "num_attention_heads", 1) or 1)
    groups = int(getattr(config, "num_key_value_heads", heads) or heads)
    head_dim = int(getattr(config, "head_dim", None) or width // heads)
    layers = int(config.num_hidden_layers)
    return Shape(
        width=width,
        inner=max(widths, default=4 * width),
        key_value=2 * layers * groups * head_dim,
        heads=heads,
        itemsize=trunk.dtype.itemsize,
    )


def memory_budget(device: torch.device) -> int:
    """Return the bytes that one forward pass may take on `device`."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free * GPU_SHARE)
    return CPU_BUDGET


def tokens_that_fit(shape: Shape, budget: int) -> int:
    """Return how many tokens a forward pass may hold within `budget` bytes, at least one."""
    return max(1, budget // shape.bytes_per_token)
