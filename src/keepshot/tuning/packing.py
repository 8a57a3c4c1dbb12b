"""Samples one behind the other in one row, none of which sees another.

    ids        a0 a1 a2 b0 b1 c0 c1 c2 c3
    positions   0  1  2  0  1  0  1  2  3

Nothing is padded. That positions begin anew tells transformers where samples begin: it masks
attention between them (eager, SDPA), or calls flash-attention's kernel for varying lengths, which
spends nothing there. Whether a model family heeds that is tried, not looked up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from keepshot.errors import ModelError
from keepshot.tuning.batch import Padded, Sample, read_logits
from keepshot.tuning.live import evaluating

ROW_TOKENS = 512
"""A row is not made longer than this: masked attention still computes what is masked, which grows
with the square of the length. One longer sample has a row to itself."""
TRIAL = 7
"""Tokens of each sample of the trial."""
MOST_LEAK = 1e-4
"""Largest share of the logits' spread by which another neighbour may change them: rounding."""
MOST_MOVED = 0.05
"""The same for a sample in the second place instead of the first, also in bfloat16."""


def pack(samples: Sequence[Sample], row_tokens: int = ROW_TOKENS) -> list[Padded]:
    """Fill rows of at most `row_tokens` tokens with whole samples, the longest first.

    Each sample goes to the first row that has room for it. A row's positions and targets follow
    the order of its samples.
    """
    rows: list[list[Sample]] = []
    for sample in sorted(samples, key=len, reverse=True):
        for row in rows:
            if sum(map(len, row)) + len(sample) <= row_tokens:
                row.append(sample)
                break
        else:
            rows.append([sample])
    return [_in_one_row(row) for row in rows]


def _in_one_row(samples: Sequence[Sample]) -> Padded:
    ids: list[int] = []
    positions: list[int] = []
    read: list[int] = []
    for sample in samples:
        read += [len(ids) + position for position in sample.read]
        ids += sample.ids[: len(sample)]
        positions += range(len(sample))
    targets = [token for sample in samples for token in sample.targets]
    return Padded(
        torch.tensor([ids]), torch.tensor(read), torch.tensor(targets), torch.tensor([positions])
    )


def refuse_leaks(module: Any, head: Any) -> None:
    """Try on a few tokens whether the model keeps packed samples apart.

    Args:
        module: the causal language model, however wrapped.
        head: the module that maps hidden states to logits.

    Raises:
        ModelError: if a sample's logits change with what stands before it, or with its place.
    """
    first, other, second = (
        Sample(tuple(range(start, start + TRIAL + 1)), tuple(range(TRIAL))) for start in (3, 20, 40)
    )
    family = getattr(module.config, "model_type", type(module).__name__)
    told = f"model family {family!r} cannot be packed:"
    advice = "leave packing out; rows of like length share a batch then"
    try:
        with evaluating(module):
            beside = _of_second(module, head, first, second)
            again = _of_second(module, head, other, second)
            alone = _logits(module, head, _in_one_row([second]))
    except TypeError as error:
        if "position_ids" not in str(error):
            raise
        raise ModelError(f"{told} it takes no positions ({error}); {advice}") from None
    spread = float(alone.std()) or 1.0
    if float((beside - again).abs().max()) > MOST_LEAK * spread:
        raise ModelError(f"{told} a sample sees the one before it; {advice}")
    if float((beside - alone).abs().max()) > MOST_MOVED * spread:
        raise ModelError(f"{told} positions do not begin anew with each sample; {advice}")


def _of_second(module: Any, head: Any, first: Sample, second: Sample) -> Tensor:
    return _logits(module, head, _in_one_row([first, second]))[len(first) :]


def _logits(module: Any, head: Any, row: Padded) -> Tensor:
    assert row.positions_BT is not None
    device = head.weight.device
    with torch.no_grad():
        ids_BT, read_N, places_BT = (
            part.to(device) for part in (row.ids_BT, row.read_N, row.positions_BT)
        )
        return read_logits(module, ids_BT, read_N, head, places_BT).float()
