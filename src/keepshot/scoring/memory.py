"""How many tokens a forward pass may hold: from the model's own shapes and the memory there is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from keepshot.scoring.forward import Trunk

CPU_BUDGET = 2**30
"""Bytes for one forward pass on a CPU: more would not be faster, and the machine is shared."""
GPU_SHARE = 0.5
"""Share of the free memory of a GPU; the rest is for caches that are kept and for the head."""


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


USUAL_KEYS = 512


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
