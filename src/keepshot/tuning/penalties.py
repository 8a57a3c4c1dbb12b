"""Keep terms of one run that need no untuned model beside: few-shot loss, L2-SP and EWC.

Each is called with the model and the step, and returns a scalar for the loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from keepshot.tuning.batch import Sample, pad, read_logits, turn
from keepshot.tuning.keep import FewShot
from keepshot.tuning.live import evaluating
from keepshot.tuning.methods import Prepared
from keepshot.tuning.terms import annealed, next_token, pull, token_log_probs


@dataclass(frozen=True)
class FewShotLoss:
    """The auxiliary few-shot loss: next-token loss on prompts of the target itself."""

    name: str
    weights: tuple[float, float]
    """At the first and at the last step."""
    steps: int
    batches: tuple[tuple[Sample, ...], ...]
    seed: int

    def weight_at(self, step: int) -> float:
        """Return the term's factor in the loss at a step."""
        return annealed(*self.weights, step, self.steps)

    def __call__(self, module: Any, step: int, head: Any) -> Tensor:
        """Return the loss on this step's prompts, a scalar in nats per answer token."""
        padded = pad(self.batches[turn(len(self.batches), step, self.seed)])
        device = head.weight.device
        logits_NV = read_logits(module, padded.ids_BT.to(device), padded.read_N.to(device), head)
        return next_token(logits_NV, padded.targets_N.to(device))


def few_shot_loss(term: FewShot, samples: Sequence[Sample], steps: int, seed: int) -> FewShotLoss:
    """Batch the prompts by length and return the term."""
    ordered = sorted(samples, key=len)
    size = term.prompts_per_step
    batches = tuple(tuple(ordered[i : i + size]) for i in range(0, len(ordered), size))
    last = term.weight if term.final_weight is None else term.final_weight
    return FewShotLoss(term.name, (term.weight, last), steps, batches, seed)


@dataclass(frozen=True)
class WeightPull:
    """A pull of what trains towards where it started: L2-SP, or EWC with importances."""

    name: str
    weight: float
    current: Mapping[str, Tensor]
    starts: Mapping[str, Tensor]
    importances: Mapping[str, Tensor] | None = None

    def weight_at(self, step: int) -> float:
        """Return the term's factor in the loss, the same at every step."""
        return self.weight

    def __call__(self, module: Any, step: int, head: Any) -> Tensor:
        """Return half the (weighted) squared distance, a scalar: 0 before the first step."""
        weigh = self.importances
        return pull(
            (now, self.starts[name], None if weigh is None else weigh[name])
            for name, now in self.current.items()
        )


def pull_from_here(
    name: str, weight: float, prepared: Prepared, importances: Mapping[str, Tensor] | None = None
) -> WeightPull:
    """Return a pull towards the weights as they are now."""
    starts = {key: p.detach().clone() for key, p in prepared.parameters.items()}
    return WeightPull(name, weight, prepared.parameters, starts, importances)


def diagonal_fisher(
    prepared: Prepared, samples: Sequence[Sample], *, head: Any, seed: int
) -> dict[str, Tensor]:
    """Estimate the diagonal Fisher information of what trains, per token read.

    Tokens are drawn from the model itself (the true Fisher, not the empirical one), one draw a
    position; given the prompt they are independent, so the squared gradient of a prompt's sum has
    the sum of the positions' information as its mean.

    Args:
        prepared: the untuned model, ready to train.
        samples: prompts, whose read positions count.
        head: the output head.
        seed: of the draws.
    """
    generator = torch.Generator().manual_seed(seed)
    parameters = list(prepared.parameters.values())
    totals = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in parameters]
    device = head.weight.device
    for sample in samples:
        padded = pad([sample])
        # Dropout would make it another model's, and another one's each time.
        with evaluating(prepared.module):
            logits_NV = read_logits(
                prepared.module, padded.ids_BT.to(device), padded.read_N.to(device), head
            )
        probabilities_NV = torch.softmax(logits_NV.detach().float(), dim=-1).cpu()
        drawn_N = torch.multinomial(probabilities_NV, 1, generator=generator)[:, 0].to(device)
        total = token_log_probs(logits_NV, drawn_N).sum()
        # What no position depends on has no gradient, and no information: it counts as zero.
        gradients = torch.autograd.grad(
            total, parameters, allow_unused=True, materialize_grads=True
        )
        for sums, gradient in zip(totals, gradients, strict=True):
            sums += gradient.float().square()
    count = sum(len(sample.read) for sample in samples)
    return {
        name: sums / count * prepared.masks.get(name, torch.ones((), device=sums.device))
        for name, sums in zip(prepared.parameters, totals, strict=True)
    }
