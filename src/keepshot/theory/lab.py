"""The bench that every claim works on: one world, one target, methods, and prompts to test on."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from keepshot.theory import exact, optima
from keepshot.theory.descent import descend_values, flow, head_of, state_of
from keepshot.theory.document import Claim, Point, RealArm, TheoryRow, TheorySpec
from keepshot.theory.linear_attention import Attention, World, make_world, pretrained
from keepshot.theory.simulate import RandomTasks, sampled_errors, stack

SETTLED = 400.0
"""Flow time after which tuning has settled at every default; it stops before where it can."""


@dataclass(frozen=True)
class Method:
    """A way of tuning: where the closed form says that it ends, and where training ended.

    Both depend on the number of shots at which the head is used, where pretraining or the
    auxiliary loss does.
    """

    name: str
    predicted: Callable[[int], Attention]
    trained: Callable[[int], Attention]


@dataclass(frozen=True)
class Lab:
    """A world, a target in it, and a seed."""

    spec: TheorySpec
    world: World
    real: tuple[RealArm, ...] = ()
    """Arms of real models, to be shown beside what is computed here."""

    @classmethod
    def of(cls, spec: TheorySpec, *, constant: float = 1.0) -> Lab:
        """Build the lab of a spec.

        Raises:
            ConfigError: if the covariance is not positive definite.
        """
        covariance = spec.covariance or torch.diag(
            torch.tensor(spec.spectrum or [1.0] * spec.d, dtype=torch.float64)
        )
        world = make_world(covariance, spec.sigma2, constant=constant, device=spec.device)
        return cls(spec, world)

    def changed(self, **changes: object) -> Lab:
        """Return the lab of the same spec with some fields changed."""
        content = {**self.spec.model_dump(), **changes}
        return Lab.of(TheorySpec.model_validate(content), constant=self.world.constant)

    def without_constant(self) -> Lab:
        """Return the same lab without the constant channel."""
        return replace(self, world=replace(self.world, constant=0.0))

    @property
    def d(self) -> int:
        """Number of inputs."""
        return self.spec.d

    @cached_property
    def theta(self) -> Tensor:
        """The target theta_0: equal parts along every whitened input, |theta_0| = norm."""
        white = self.world.covariance.new_full((self.d,), self.spec.norm / math.sqrt(self.d))
        return torch.linalg.solve(torch.linalg.cholesky(self.world.covariance).mT, white)

    @cached_property
    def prior(self) -> Tensor:
        """Covariance of the pretraining tasks."""
        tau2 = self.spec.tau2 or 1.0 / self.d
        return tau2 * torch.eye(self.d, dtype=torch.float64, device=self.world.covariance.device)

    @cached_property
    def unseen(self) -> exact.Tasks:
        """Tasks that stand for random directions of the target's norm."""
        return exact.unseen_tasks(self.world, self.spec.norm)

    def generator(self, *keys: int) -> torch.Generator:
        """Return a source of draws that depends on the spec's seed and these keys alone."""
        seed = self.spec.seed
        for key in keys:
            seed = (seed * 1_000_003 + key + 12_345) % (2**63 - 1)
        return torch.Generator(device=self.world.covariance.device).manual_seed(seed)

    def pretrained(self, shots: float | None = None) -> Attention:
        """Return the pretrained head; at the spec's number of shots if none is given."""
        m = self.spec.pretrain_shots if shots is None else shots
        return pretrained(self.world, self.prior, math.inf if m is None else m)

    # -- errors ----------------------------------------------------------------------------

    def error(self, head: Attention, task: str, shots: float) -> float:
        """Return the exact error of a head on the target or, averaged, on unseen tasks."""
        if task == "target":
            return float(exact.error(head, self.world, self.theta, shots))
        tasks = self.unseen
        if float(head.q[..., -2, :].abs().max()) > 0:  # keys read labels: degree 4 in theta
            tasks = exact.unseen_tasks(self.world, self.spec.norm, 5)
        return float(exact.mean_error(head, self.world, tasks, shots))

    def sampled(
        self, heads: Sequence[Attention], task: str, shots: int
    ) -> list[tuple[float, float]]:
        """Return (mean, standard error) of each head's error on the same sampled prompts."""
        where = self.theta if task == "target" else RandomTasks(self.spec.norm)
        per_prompt = (shots + 1) * (self.d + 1)
        num_prompts = max(100, min(self.spec.num_prompts, self.spec.num_numbers // per_prompt))
        draws = self.generator(shots, self.d, int(task == "target"))
        found = sampled_errors(stack(heads), self.world, where, shots, num_prompts, draws)
        return list(zip(found.mean.tolist(), found.se.tolist(), strict=True))

    def rows(
        self, claim: Claim, methods: Sequence[Method], shots: Sequence[int] | None = None
    ) -> list[TheoryRow]:
        """Compare every method on both tasks at every number of shots."""
        found: list[TheoryRow] = []
        for count in self.spec.shots if shots is None else shots:
            for task in ("target", "unseen"):
                measured = self.sampled([m.trained(count) for m in methods], task, count)
                found += [
                    TheoryRow(
                        claim=claim, method=method.name, task=task, shots=count,
                        predicted=self.error(method.predicted(count), task, count),
                        measured=mean, se=se,
                    )
                    for method, (mean, se) in zip(methods, measured, strict=True)
                ]  # fmt: skip
        return found

    # -- tuning ----------------------------------------------------------------------------

    def flow_all(self, head: Attention, duration: float = SETTLED) -> Attention:
        """Follow gradient flow on the target's zero-shot loss over all of (v, Q)."""
        width = self.world.width
        end = flow(
            lambda state: exact.zero_shot_error(head_of(state, width), self.world, self.theta),
            state_of(head)[None],
            duration,
        )
        return head_of(end.state[0], width)

    def method_pretrained(self, shots: float | None = None) -> Method:
        """Return the model as pretraining left it."""
        head = self.pretrained(shots)
        return Method("pretrained", lambda _: head, lambda _: head)

    def method_full(self) -> Method:
        """Return tuning of all of (v, Q) on the target at zero shots."""
        start = self.pretrained()
        predicted, trained = optima.full_limit(start, self.world, self.theta), self.flow_all(start)
        return Method("full", lambda _: predicted, lambda _: trained)

    def method_value_only(self) -> Method:
        """Return tuning of v on the target at zero shots."""
        start = self.pretrained()
        predicted = optima.value_only(start, self.world, self.theta)
        loss = exact.error_form(start.q, self.world, self.theta, 0)
        trained = Attention(descend_values(loss, start.v), start.q)
        return Method("value_only", lambda _: predicted, lambda _: trained)


def between(shots: Sequence[int]) -> list[int]:
    """Return numbers of shots to draw a smooth curve with, those given left out.

    All up to 10, then about twelve for each factor of ten.
    """
    least, most = min(shots), max(shots)
    grid = {*range(11), *(round(10.0 ** (k / 12)) for k in range(12, 12 * 7))}
    return sorted(n for n in grid if least < n < most and n not in shots)


def curves(
    lab: Lab, rows: Sequence[TheoryRow], methods: Sequence[Method], panels: Mapping[str, str]
) -> list[Point]:
    """Turn rows into points of a figure, one panel per task, with the closed forms between them.

    Args:
        lab: that the rows are of.
        rows: of one claim.
        methods: that the rows are of.
        panels: task -> name of its panel.
    """
    points = [
        Point(
            panel=panels[row.task], series=row.method, x=row.shots,
            predicted=row.predicted, measured=row.measured, se=row.se,
        )
        for row in rows if row.task in panels
    ]  # fmt: skip
    for method in methods:
        points += [
            Point(panel=panel, series=method.name, x=n,
                  predicted=lab.error(method.predicted(n), task, n))
            for task, panel in panels.items() for n in between(lab.spec.shots)
        ]  # fmt: skip
    return points
