"""The claims, one function each: predicted in closed form beside what sampling and training found.

What each claim says, where it comes from (arXiv 2602.23197, or ours) and where it stops holding is
in docs/theory.md.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache

import torch

from keepshot.progress import Progress
from keepshot.theory import exact, optima
from keepshot.theory.bridge import bridge
from keepshot.theory.descent import descend_values, flow, head_of, state_of, train_values
from keepshot.theory.document import (
    Check,
    Claim,
    ClaimRecord,
    Panel,
    Point,
    RealArm,
    TheoryDocument,
    TheoryRow,
    TheorySpec,
)
from keepshot.theory.extensions import extensions
from keepshot.theory.lab import SETTLED, Lab, Method, between, curves
from keepshot.theory.linear_attention import Attention, draw_prompts

TARGET, UNSEEN = "target task", "unseen tasks"
BOTH = {"target": TARGET, "unseen": UNSEEN}
SHOTS_AXIS = "demonstrations n"


def run_claims(
    spec: TheorySpec, progress: Progress, real: Sequence[RealArm] = ()
) -> TheoryDocument:
    """Check every claim that the spec names.

    Args:
        spec: claims and world.
        progress: told of every claim.
        real: arms of real models, for the claim `bridge`.

    Raises:
        ConfigError: if the covariance or the step size cannot be used.
    """
    lab = replace(Lab.of(spec), real=tuple(real))
    done: list[ClaimRecord] = []
    for claim in dict.fromkeys(spec.claims):
        progress.stage(f"claim: {claim}")
        began = time.perf_counter()
        record = RUN[claim](lab)
        done.append(record.model_copy(update={"seconds": time.perf_counter() - began}))
    notes = []
    if spec.d == 1:
        notes.append(
            "d = 1 is special: an unseen task is the target or its opposite, each half of the time"
        )
    return TheoryDocument.of(done, notes, spec.in_words())


def _shots_panels(names: Sequence[str] = (TARGET, UNSEEN), axes: str = "errors") -> list[Panel]:
    return [Panel(name=name, x_title=SHOTS_AXIS, log_x=True, axes=axes) for name in names]


def _at(rows: Sequence[TheoryRow], method: str, task: str, shots: int) -> TheoryRow | None:
    wanted = (method, task, shots)
    return next((row for row in rows if (row.method, row.task, row.shots) == wanted), None)


# -- 1 -------------------------------------------------------------------------------------------


def pretraining(lab: Lab) -> ClaimRecord:
    """Pretraining gives one step of preconditioned gradient descent."""
    methods = [lab.method_pretrained()]
    rows = lab.rows("pretraining", methods)
    points = curves(lab, rows, methods, {"unseen": UNSEEN})
    grid = sorted({*lab.spec.shots, *between(lab.spec.shots)})
    for name, m in (("m = 2", 2), ("m = 20", 20), ("m = n", None)):
        points += [
            Point(panel=UNSEEN, series=name, x=n,
                  predicted=lab.error(lab.pretrained(n if m is None else m), "unseen", n))
            for n in grid
        ]  # fmt: skip
    checks = [_is_gradient_descent(lab), _pretraining_flow(lab), *_pretraining_slope(lab)]
    best = max(lab.spec.shots)
    sentences = [
        f"The pretrained head is one step of preconditioned gradient descent: its error on unseen "
        f"tasks falls to {lab.error(lab.pretrained(), 'unseen', best):.3f} at {best} shots.",
        "Gradient flow on the expected pretraining loss over all of (v, Q), from a small random "
        f"start, ends at the predicted w Q11 up to {checks[1].measured:.1g} of its norm.",
    ]
    return ClaimRecord(
        claim="pretraining", sentences=sentences, rows=rows, checks=checks,
        panels=_shots_panels([UNSEEN]), points=points,
    )  # fmt: skip


def _is_gradient_descent(lab: Lab) -> Check:
    """Compare f(Z) with x_q' S^-1 (1/N) sum y_i x_i on sampled prompts."""
    shots, d = 10, lab.d
    tokens, _ = draw_prompts(lab.world, lab.theta, shots, 1000, lab.generator(1))
    head = lab.pretrained(math.inf)
    gram = tokens.mT @ tokens / (shots + 1)
    output = torch.einsum("d,bde,ef,bf->b", head.v, gram, head.q, tokens[:, -1])
    step = torch.einsum("bt,bti->bi", tokens[..., d], tokens[..., :d]) / (shots + 1)
    by_hand = (step @ torch.linalg.inv(lab.world.covariance) * tokens[:, -1, :d]).sum(-1)
    return Check(
        claim="pretraining", quantity="largest |f(Z) - one preconditioned step|, 1000 prompts",
        predicted=0.0, measured=float((output - by_hand).abs().max()), se=None,
    )  # fmt: skip


def _pretraining_flow(lab: Lab) -> Check:
    """Train all of (v, Q) from a small random start on the expected loss; compare w Q11."""
    shots, d = 10, lab.d
    width, draws = lab.world.width, lab.generator(2)
    v = torch.zeros(width, dtype=torch.float64, device=lab.theta.device)
    v[d] = 0.5
    noise = torch.empty(width, width, dtype=torch.float64, device=v.device)
    noise.normal_(generator=draws)
    q = torch.zeros_like(noise)
    q[:d, :d] = 0.1 * torch.eye(d, dtype=torch.float64, device=v.device) + 0.05 * noise[:d, :d]
    tasks = exact.prior_tasks(lab.prior)

    def loss(state: torch.Tensor) -> torch.Tensor:
        head = head_of(state, width)
        form = exact.error_form(head.q[None], lab.world, tasks.thetas[:, None], shots)
        return tasks.mean(form).at(head.v)

    end = flow(loss, state_of(Attention(v, q))[None], SETTLED, tolerance=1e-4, settled=1e-5)
    found = head_of(end.state[0], width)
    wanted = lab.pretrained(shots).q11
    gap = (found.w * found.q11 - wanted).norm() / wanted.norm()
    return Check(
        claim="pretraining", quantity="|w Q11 of gradient flow - closed form| / norm, m = 10",
        predicted=0.0, measured=float(gap), se=None,
    )  # fmt: skip


def _pretraining_slope(lab: Lab) -> list[Check]:
    """Sample the slope of the pretraining loss along Q11 at the predicted optimum: zero."""
    shots, d, num_prompts = 10, lab.d, 40_000
    draws = lab.generator(3)
    head = lab.pretrained(shots)
    white = torch.empty(num_prompts, d, dtype=torch.float64, device=lab.theta.device)
    thetas = white.normal_(generator=draws) @ torch.linalg.cholesky(lab.prior).mT
    tokens, labels = draw_prompts(lab.world, thetas, shots, num_prompts, draws)
    query = tokens[:, -1, :d]
    step = torch.einsum("bt,bti->bi", tokens[..., d], tokens[..., :d]) / (shots + 1)
    residual = labels - torch.einsum("bi,ij,bj->b", step, head.q11, query)
    slope = residual * torch.einsum("bi,bi->b", step, query)  # along Q11 = I
    se = float(slope.std()) / math.sqrt(num_prompts)
    return [
        Check(claim="pretraining", quantity="slope of the sampled loss at the optimum, m = 10",
              predicted=0.0, measured=float(slope.mean()), se=se)
    ]  # fmt: skip


# -- 2 -------------------------------------------------------------------------------------------


def full(lab: Lab) -> ClaimRecord:
    """Full tuning reaches the noise floor at zero shots and ruins few shots."""
    method = lab.method_full()
    methods = [lab.method_pretrained(), method]
    rows = lab.rows("full", methods)
    head, trained = method.predicted(0), method.trained(0)
    plain = lab.without_constant()
    bare_method = plain.method_full()
    bare = bare_method.predicted(0)
    name = "target, no constant channel"
    points = curves(lab, rows, methods, BOTH)
    for series, source in (("pretrained", plain.pretrained()), ("full", bare)):
        measured = {n: plain.sampled([bare_method.trained(n)], "target", n)[0]
                    for n in lab.spec.shots} if series == "full" else {}  # fmt: skip
        points += [
            Point(panel=name, series=series, x=n, predicted=plain.error(source, "target", n),
                  measured=measured[n][0] if n in measured else None,
                  se=measured[n][1] if n in measured else None)
            for n in sorted({*lab.spec.shots, *between(lab.spec.shots)})
        ]  # fmt: skip
    signal = float(lab.world.squared(lab.theta)) + lab.spec.sigma2
    checks = [
        Check(claim="full", quantity="Q's constant entry q after flow (conservation law)",
              predicted=float(head.q[-1, -1]), measured=float(trained.q[-1, -1]), se=None),
        Check(claim="full", quantity="|Q11| after flow", predicted=0.0,
              measured=float(trained.q11.norm()), se=None),
        Check(claim="full", quantity="zero-shot error after flow", predicted=lab.spec.sigma2,
              measured=lab.error(trained, "target", 0), se=None),
        Check(claim="full", quantity="error on the target at 10^6 shots, |theta|^2 + sigma2",
              predicted=signal, measured=lab.error(trained, "target", 1e6), se=None),
        Check(claim="full", quantity="error on unseen tasks at 10^6 shots", predicted=signal,
              measured=lab.error(trained, "unseen", 1e6), se=None),
        Check(claim="full", quantity="zero-shot error after flow without the constant channel",
              predicted=float(optima.zero_shot_floor(lab.world, lab.theta)),
              measured=plain.error(bare_method.trained(0), "target", 0), se=None),
    ]  # fmt: skip
    most = max(lab.spec.shots)
    before, after = (lab.error(h, "target", most) for h in (lab.pretrained(), head))
    sentences = [
        f"Full tuning takes the zero-shot error on the target to the noise floor "
        f"{lab.spec.sigma2:g}; at {most} shots its error is {after:.3f}, where the pretrained "
        f"head's was {before:.3f}; it tends to |theta|^2 + sigma2 = {signal:.3f} on every task.",
        "Without the constant channel full tuning cannot do that: it ends at value-only tuning's "
        f"{checks[-1].predicted:.3f}, and few-shot ability stays "
        f"({plain.error(bare, 'target', most):.3f} at {most} shots).",
    ]
    return ClaimRecord(
        claim="full", sentences=sentences, rows=rows, checks=checks,
        panels=_shots_panels([TARGET, UNSEEN, name]), points=points,
    )  # fmt: skip


# -- 3 -------------------------------------------------------------------------------------------


def value_only(lab: Lab) -> ClaimRecord:
    """Value-only tuning reaches theta / (d + 4), leaves w alone and keeps few shots."""
    method = lab.method_value_only()
    methods = [lab.method_pretrained(), method]
    rows = lab.rows("value-only", methods)
    head = method.predicted(0)
    sampled = train_values(
        lab.pretrained(), lab.world, lab.theta, lab.generator(4), step_size=lab.spec.step_size
    )
    d, far = lab.d, 1e6
    along = lab.theta @ lab.world.covariance / lab.world.squared(lab.theta)
    spread = float((along.square() @ sampled.se[:d].square()).sqrt())
    before = lab.pretrained()
    excess = lab.error(head, "unseen", far) - lab.error(before, "unseen", far)
    wanted = float(lab.world.squared(head.v1))
    checks = [
        Check(claim="value-only", quantity="v1 along theta_0 after sampled tuning, 32 seeds",
              predicted=float(along @ head.v1), measured=float(along @ sampled.mean[:d]),
              se=spread),
        Check(claim="value-only", quantity="w after sampled tuning", predicted=float(before.w),
              measured=float(sampled.mean[d]), se=None),
        Check(claim="value-only", quantity="zero-shot error at the optimum, s2 + 2|theta|^2/(d+4)",
              predicted=float(optima.zero_shot_floor(lab.world, lab.theta)),
              measured=lab.error(method.trained(0), "target", 0), se=None),
        Check(claim="value-only", quantity="few-shot error added at 10^6 shots, |v1|^2",
              predicted=wanted, measured=excess, se=None),
    ]  # fmt: skip
    most = max(lab.spec.shots)
    sentences = [
        f"Value-only tuning takes the target's zero-shot error from "
        f"{lab.error(before, 'target', 0):.3f} to {lab.error(head, 'target', 0):.3f}, not to the "
        f"noise floor {lab.spec.sigma2:g}.",
        f"It leaves w alone and adds {wanted:.4f} = |theta_0|^2/(d+4)^2 to every task's error as "
        f"shots grow; on unseen tasks at {most} shots it is {lab.error(head, 'unseen', most):.3f} "
        f"against {lab.error(before, 'unseen', most):.3f} before.",
    ]
    return ClaimRecord(
        claim="value-only", sentences=sentences, rows=rows, checks=checks,
        panels=_shots_panels(), points=curves(lab, rows, methods, BOTH),
    )  # fmt: skip


# -- 4 -------------------------------------------------------------------------------------------


def auxiliary(lab: Lab) -> ClaimRecord:
    """The auxiliary few-shot loss helps the target at unseen tasks' expense."""
    fixed = lab.spec.pretrain_shots

    @cache
    def start(n: int) -> Attention:
        return lab.pretrained(n if fixed is None else fixed)

    @cache
    def tuned(name: str, n: int) -> Attention:
        head = optima.value_only(start(n), lab.world, lab.theta)
        if name == "value_only_aux":
            return optima.value_only_aux(start(n), lab.world, lab.theta, n)
        if name == "value_only_joint":
            return optima.value_only_joint(start(n), lab.world, lab.theta, n, 1.0)
        return head

    @cache
    def trained(name: str, n: int) -> Attention:
        zero = exact.error_form(start(n).q, lab.world, lab.theta, 0)
        few = exact.error_form(start(n).q, lab.world, lab.theta, n)
        if name == "value_only_joint":
            return Attention(descend_values(zero.plus(few), start(n).v), start(n).q)
        v = descend_values(zero, start(n).v)
        if name == "value_only_aux" and n > 0:
            v = descend_values(few, v, free=[lab.d])
        return Attention(v, start(n).q)

    methods = [
        Method(name, lambda n, name=name: tuned(name, n), lambda n, name=name: trained(name, n))
        for name in ("value_only", "value_only_aux", "value_only_joint")
    ]
    rows = lab.rows("auxiliary", methods)
    change = "unseen: aux - value_only"
    grid = sorted({*range(1, 61), *(n for n in lab.spec.shots if n > 0)})
    points, crossings = curves(lab, rows, methods, BOTH), {}
    for label, m in (("m = n", None), ("m = inf", math.inf)):
        gaps = [_aux_change(lab, n, m) for n in grid]
        points += [Point(panel=change, series=label, x=n, predicted=gap)
                   for n, gap in zip(grid, gaps, strict=True)]  # fmt: skip
        crossings[label] = next((n for n, g in zip(grid, gaps, strict=True) if g > 0), None)
    checks = _aux_checks(lab, [n for n in lab.spec.shots if n > 0])
    most = max(lab.spec.shots)
    pairs = {
        task: [_at(rows, name, task, most) for name in ("value_only", "value_only_aux")]
        for task in ("target", "unseen")
    }
    shown = {
        task: f"{a.predicted:.4f} to {b.predicted:.4f}"
        for task, (a, b) in pairs.items()
        if a is not None and b is not None
    }
    basis = "matched pretraining (m = n)" if fixed is None else f"pretraining at m = {fixed:g}"
    turn = crossings["m = inf"]
    sentences = [
        f"At {basis} and {most} shots the auxiliary loss takes the target's error from "
        f"{shown['target']} and unseen tasks' from {shown['unseen']}.",
        "With infinitely many pretraining shots it helps unseen tasks too "
        + (f"below n = {turn}, by adding the shrinkage that is missing there."
           if turn and turn > 1 else "nowhere on this grid."),
    ]  # fmt: skip
    last = Panel(name=change, x_title=SHOTS_AXIS, y_title="change of error", log_x=True)
    return ClaimRecord(
        claim="auxiliary", sentences=sentences, rows=rows, checks=checks,
        panels=[*_shots_panels(axes=""), last], points=points,
    )  # fmt: skip


def _aux_change(lab: Lab, n: int, m: float | None) -> float:
    start = lab.pretrained(n if m is None else m)
    plain = optima.value_only(start, lab.world, lab.theta)
    aux = optima.value_only_aux(start, lab.world, lab.theta, n)
    return lab.error(aux, "unseen", n) - lab.error(plain, "unseen", n)


def _aux_checks(lab: Lab, shots: Sequence[int]) -> list[Check]:
    """Compare w* in plain numbers (Q11 = S^-1) with the minimiser of the general form."""
    found: list[Check] = []
    start = lab.pretrained(math.inf)
    v1 = lab.theta / (lab.d + 4.0)
    special = optima.products(lab.world, lab.theta, v1, 1.0)
    for n in shots:
        head = optima.value_only_aux(start, lab.world, lab.theta, n)
        found.append(
            Check(claim="auxiliary", quantity=f"w*(n, theta_0), n = {n}",
                  predicted=float(special.best_w(n)), measured=float(head.w), se=None)
        )  # fmt: skip
    found.append(
        Check(claim="auxiliary", quantity="w* as shots grow, (d+3)/(d+4)",
              predicted=(lab.d + 3) / (lab.d + 4), measured=float(special.best_w(1e9)), se=None)
    )  # fmt: skip
    return found


# -- 5 -------------------------------------------------------------------------------------------

SWEEP_SHOTS = 20


def sweeps(lab: Lab) -> ClaimRecord:
    """Sweep dimension, noise, spectrum and auxiliary weight; shots are swept by other claims."""
    spectrum_free = {"spectrum": None, "covariance": None}
    axes: list[tuple[str, str, Sequence[float], Sequence[float], Callable[[float], Lab]]] = [
        ("dimension d", "d", (1, 2, 5, 10, 20, 40), (3, 7, 14, 28),
         lambda x: lab.changed(d=int(x), **spectrum_free)),
        ("noise sigma2", "sigma2", (0.0, 0.03, 0.1, 0.3, 1.0), (0.06, 0.2, 0.45, 0.6, 0.8),
         lambda x: lab.changed(sigma2=x)),
        ("spectrum i^-a", "exponent a", (0.0, 0.5, 1.0, 1.5, 2.0), (0.25, 0.75, 1.25, 1.75),
         lambda x: lab.changed(spectrum=_power_law(lab.d, x), covariance=None)),
    ]  # fmt: skip
    rows: list[TheoryRow] = []
    points: list[Point] = []
    panels: list[Panel] = []
    for panel, title, values, further, make in axes:
        panels.append(Panel(name=panel, x_title=title, log_x=title == "d", log_y=True))
        for value in values:
            methods = [_closed(name, head) for name, head in _ends(make(value)).items()]
            own = make(value).rows("sweeps", methods, [SWEEP_SHOTS])
            rows += own
            points += [
                Point(panel=panel, series=row.method, x=value, predicted=row.predicted,
                      measured=row.measured, se=row.se)
                for row in own if row.task == "unseen"
            ]  # fmt: skip
        for value in further:  # for the curve alone
            world = make(value)
            points += [
                Point(panel=panel, series=name, x=value,
                      predicted=world.error(head, "unseen", SWEEP_SHOTS))
                for name, head in _ends(world).items()
            ]  # fmt: skip
    panels.append(Panel(name="auxiliary weight", x_title="weight of the few-shot loss", log_x=True))
    for index in range(33):
        weight = 10.0 ** (index / 8 - 2)
        head = optima.value_only_joint(lab.pretrained(), lab.world, lab.theta, SWEEP_SHOTS, weight)
        kinds = {"target, 0 shots": ("target", 0), "target, 20 shots": ("target", SWEEP_SHOTS),
                 "unseen, 20 shots": ("unseen", SWEEP_SHOTS)}  # fmt: skip
        for series, (task, shots) in kinds.items():
            mean, se = None, None
            if index % 8 == 0:
                mean, se = lab.sampled([head], task, shots)[0]
            points.append(
                Point(panel="auxiliary weight", series=series, x=weight,
                      predicted=lab.error(head, task, shots), measured=mean, se=se)
            )  # fmt: skip
    few = [row.predicted for row in rows if row.task == "unseen"]
    ratios = [(few[i + 1] / few[i], few[i + 2] / few[i]) for i in range(0, len(few), 4)]
    sentences = [
        f"Over dimension, noise and spectrum, value-only tuning multiplies unseen tasks' error at "
        f"{SWEEP_SHOTS} shots by at most {max(r[1] for r in ratios):.2f}, full tuning by at least "
        f"{min(r[0] for r in ratios):.2f} and by up to {max(r[0] for r in ratios):.1f}.",
        "The rows of this claim go through dimension, noise and spectrum in the figure's order.",
    ]
    return ClaimRecord(claim="sweeps", sentences=sentences, rows=rows, panels=panels, points=points)


def _ends(lab: Lab) -> dict[str, Attention]:
    start = lab.pretrained()
    return {
        "pretrained": start,
        "full": optima.full_limit(start, lab.world, lab.theta),
        "value_only": optima.value_only(start, lab.world, lab.theta),
        "value_only_aux": optima.value_only_aux(start, lab.world, lab.theta, SWEEP_SHOTS),
    }


def _closed(name: str, head: Attention) -> Method:
    return Method(name, lambda _: head, lambda _: head)


def _power_law(d: int, exponent: float) -> tuple[float, ...]:
    """Eigenvalues i^-exponent, scaled to sum to d."""
    values = [i**-exponent for i in range(1, d + 1)]
    return tuple(value * d / sum(values) for value in values)


RUN: dict[Claim, Callable[[Lab], ClaimRecord]] = {
    "pretraining": pretraining,
    "full": full,
    "value-only": value_only,
    "auxiliary": auxiliary,
    "sweeps": sweeps,
    "extensions": extensions,
    "bridge": bridge,
}
