"""Requests shared out among the processes that `torchrun` started, by prefix.

Each process holds the whole model and answers a run of requests that begin alike; every process
then has all answers. Objects travel through gloo, whatever device the models are on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch.distributed

from keepshot.errors import ConfigError
from keepshot.scoring.prefix import Tokens, common_length

T = TypeVar("T")
PATIENCE = timedelta(hours=6)
"""How long a process waits for one that has more to do."""


@dataclass(frozen=True)
class Processes:
    """How many processes work together, and which of them this is."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def gathered(self, value: T) -> list[T]:
        """Return the values of all processes, by rank; all must call it."""
        if self.size == 1:
            return [value]
        values: list[T | None] = [None] * self.size
        torch.distributed.all_gather_object(values, value)
        return [found for found in values if found is not None]

    def of_first(self, value: T) -> T:
        """Return the first process' value; all must call it."""
        if self.size == 1:
            return value
        values = [value]
        torch.distributed.broadcast_object_list(values, src=0)
        return values[0]


ALONE = Processes()


def join_processes(environ: Mapping[str, str]) -> Processes:
    """Join the group that `torchrun` describes in the environment; alone where it does not.

    Raises:
        ConfigError: if the description is not whole.
    """
    try:
        size = int(environ.get("WORLD_SIZE", "1"))
        if size == 1:
            return ALONE
        rank, local_rank = int(environ["RANK"]), int(environ.get("LOCAL_RANK", "0"))
    except (KeyError, ValueError):
        names = ("WORLD_SIZE", "RANK", "LOCAL_RANK")
        given = ", ".join(f"{name}={environ[name]!r}" for name in names if name in environ)
        raise ConfigError(
            f"{given}: WORLD_SIZE and RANK must both be set to numbers; start with `torchrun "
            "--nproc_per_node N -m keepshot ...`, or unset WORLD_SIZE"
        ) from None
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", timeout=PATIENCE)
    return Processes(rank, size, local_rank)


def shares(sequences: Sequence[Tokens], num_shares: int) -> list[list[int]]:
    """Return the numbers of the sequences that each process computes.

    In the order of the trie, cut where each share has about as many tokens to compute: what begins
    alike stays together, and only what two neighbours share is computed twice.
    """
    order = sorted(range(len(sequences)), key=sequences.__getitem__)
    new: list[int] = []
    previous: Tokens = ()
    for number in order:
        new.append(len(sequences[number]) - common_length(previous, sequences[number]))
        previous = sequences[number]
    total, before = max(1, sum(new)), 0
    parts: list[list[int]] = [[] for _ in range(num_shares)]
    for number, count in zip(order, new, strict=True):
        # By the middle of what it adds, so that one long beginning does not end a share early.
        place = min(num_shares - 1, int((before + count / 2) * num_shares / total))
        parts[place].append(number)
        before += count
    return parts
