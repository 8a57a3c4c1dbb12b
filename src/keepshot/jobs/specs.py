"""What each command is asked for, as frozen specs. No torch, so that mistakes show at once."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from decimal import Decimal, InvalidOperation
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import Field, model_validator

from keepshot.blending.rules import LambdaMap
from keepshot.errors import ConfigError, unknown
from keepshot.judging.policy import Following, Policy
from keepshot.specs import Spec
from keepshot.tuning.method_specs import LoRA, ProMoT, prompt_tokens
from keepshot.tuning.recipe import Recipe

TunedArm = Literal["plain", "gentle", "kept"]
ARMS: tuple[TunedArm, ...] = get_args(TunedArm)
Reduction = Literal["lore", "prune", "shrink-intruders"]
REDUCTIONS: tuple[Reduction, ...] = get_args(Reduction)
MAX_LAMBDAS = 1001
_Finite = Annotated[float, Field(allow_inf_nan=False)]


class Where(Spec):
    """Where a job runs, and what it may run."""

    seed: int = Field(default=0, ge=0)
    """Seed of training, and first draw of demonstrations."""
    device: str = "cpu"
    """Torch device."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Torch dtype of the weights."""
    trust_remote_code: bool = False
    """Run code that a checkpoint brings along."""


class Measuring(Spec):
    """Which tasks are asked, with how many demonstrations, how often."""

    tasks: tuple[str, ...] = Field(default=("core",), min_length=1)
    """Suites, task names or paths of examples files."""
    shots: tuple[int, ...] = Field(default=(0, 4), min_length=1)
    """Numbers of demonstrations."""
    seeds: int = Field(default=3, ge=1)
    """Draws of demonstrations per task and number of shots."""
    limit: int | None = Field(default=None, ge=1)
    """Items per task at most; all if not given."""
    template: str | None = None
    """Prompt template in place of each task's own."""
    following: Following | None = None
    """Verifiable instructions besides; none if left out."""


class MeasureSpec(Measuring, Where):
    """`keepshot measure`: the models, and what they are asked."""

    no_effect_on_results = frozenset({"engine", "workers"})

    models: tuple[str, ...] = Field(min_length=1)
    """Model references; retention is against the first."""
    server: str | None = None
    """OpenAI-compatible server that generates in the model's place."""
    server_model: str | None = None
    """The model's name on the server; left out, its only one."""
    engine: Literal["local", "ray"] = "local"
    """One model after the other here, or each in a worker of Ray."""
    workers: int | None = Field(default=None, ge=1)
    """Models measured at the same time by Ray; left out, as many as there are processors."""


class JudgeSpec(Where):
    """`keepshot judge`: two sets of answers and who compares them, or instructions to one model."""

    no_effect_on_results = frozenset({"tries", "first_wait", "timeout", "workers"})

    candidate: str | None = None
    """Outputs file, or a model that answers `prompts`."""
    reference: str | None = None
    """What it is compared with."""
    judges: tuple[str, ...] = ()
    """Each a model, a file of judgements, or MODEL@URL of an OpenAI-compatible server."""
    prompts: str = "embedded"
    """What models answer: `embedded`, or a file with `instruction` or `prompt` on each row."""
    ifeval: str | None = None
    """A model to put verifiable instructions to, instead of a comparison."""
    limit: int | None = Field(default=None, ge=1)
    """Prompts at most."""
    sanity: bool = True
    """Test each judge that can be asked, on at most 16 of the reference's answers: against
    themselves, and against their shuffled words."""
    variant: Literal["official", "repaired"] | None = None
    """How verifiable instructions are judged; see `Following`."""
    answers: Policy = Policy()
    """How models are asked."""
    tries: int = Field(default=6, ge=1)
    """Times that a server is asked before giving up."""
    first_wait: float = Field(default=1.0, ge=0.0)
    """Seconds before the second try; doubled after each."""
    timeout: float = Field(default=60.0, gt=0.0)
    """Seconds to wait for a server's answer."""
    workers: int = Field(default=4, ge=1)
    """Questions put to a server at the same time."""


class TuneSpec(Where):
    """`keepshot tune`: a recipe, and where it runs."""

    recipe: Recipe
    """What is tuned, on what, and how; its own seed counts."""
    merged: bool = Field(default=False, exclude_if=operator.not_)
    """Write a whole model with the adapter added to its weights, instead of the adapter."""

    @model_validator(mode="after")
    def _check_merged(self) -> Self:
        method = self.recipe.method
        trained = method.then if isinstance(method, ProMoT) else method
        if self.merged and not isinstance(trained, LoRA):
            raise ValueError(
                f"`merged` is for adapters, and {method.name!r} trains none; leave it out"
            )
        if self.merged and self.recipe.fsdp is not None:
            raise ValueError(
                "`merged` does not go with fsdp, where no process has the whole model; leave it "
                "out, and merge the adapter that is written"
            )
        return self


class BlendSpec(Where):
    """`keepshot blend`: two models, and one lambda or a path."""

    base: str
    """The model before tuning."""
    tuned: str
    """The tuned model, or an adapter."""
    lam: float | None = Field(default=None, allow_inf_nan=False)
    """The lambda to write; left out, the one that `pick` chooses on the path."""
    sweep: tuple[_Finite, ...] | None = Field(default=None, min_length=1)
    """Lambdas to measure."""
    resolution: float | None = Field(default=None, gt=0.0)
    """Measure on around the pick until its neighbours are no further away than this."""
    target: str | None = None
    """Examples file or task that the tuning was for."""
    pick: str = "keep-target:0.9"
    """The rule that picks lambda; left out beside `rule`, whose path does not lead to the tuned
    model, it is `knee`."""
    tasks: tuple[str, ...] = ("core",)
    """Suites, task names or paths of examples files that stand for few-shot ability."""
    shots: tuple[int, ...] = (4,)
    """Numbers of demonstrations."""
    seeds: int = Field(default=2, ge=1)
    """Draws of demonstrations."""
    limit: int | None = Field(default=None, ge=1)
    """Items per task and split at most."""
    following: Following | None = None
    """Verifiable instructions at every point of the path and on the arms; none if left out."""
    restore: tuple[Literal["blocks", "kinds"], ...] = ()
    """Along a sweep, also measure the tuned model with each block, or each kind of weight, put back
    to the base's: where the damage sits."""
    write_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type of the weights written; what the inputs have if not given."""
    rounding: Literal["nearest", "stochastic"] = "nearest"
    """Rounding to 16 bits; stochastic rounding (by `seed`) keeps small changes in the mean."""
    settings_from: Literal["tuned", "base"] = "tuned"
    """Whose tokenizer, chat template and generation settings are written."""
    one_sided: Literal["refuse", "carry"] = "refuse"
    """What becomes of tensors that one model alone has: carried are those of the tuned one."""
    second: str | None = None
    """A further model tuned from the same base (RE-Adapt); `lam` counts for the first."""
    beta: float = Field(default=1.0, allow_inf_nan=False)
    """How much of the further model's difference is added."""
    reduce: str | None = None
    """Make the difference smaller first: `lore:0.5` (truncated SVD that explains this share, as an
    adapter; arXiv 2405.15007), `prune:0.1` (this share of all changes; arXiv 2509.08255) or
    `shrink-intruders:0.5` (factor on intruding directions; arXiv 2410.21228)."""
    rule: LambdaMap | None = None
    """Factors on lambda by block or kind of module; 1 for what the rule does not name."""
    stream: bool = False
    """Along a sweep, keep one model in memory rather than three copies: both are read again from
    disk at every lambda."""
    check: Literal["none", "files", "generate"] | None = None
    """Of what is written: `files` hashes all that is read and written and reads the result again;
    `generate` also loads it and lets it write a few tokens. Not given: `files` for one lambda,
    `generate` after a sweep, for which torch and the models are loaded anyway."""

    @property
    def checks_files(self) -> bool:
        """Whether files are hashed and the result is read again."""
        return self.check != "none"

    @property
    def generates(self) -> bool:
        """Whether what was written is loaded."""
        return self.check == "generate" or (self.check is None and self.sweep is not None)

    @model_validator(mode="before")
    @classmethod
    def _fill_in_pick(cls, content: Any) -> Any:
        if isinstance(content, dict) and content.get("rule") is not None:
            return {"pick": "knee", **content}
        return content

    @model_validator(mode="after")
    def _check_lambda(self) -> Self:
        if (self.lam is None) == (self.sweep is None):
            raise ValueError(
                "give either --lambda, to write one point, or --sweep, to measure many"
            )
        if self.restore and self.sweep is None:
            raise ValueError("`restore` is measured along a --sweep; give one, such as 0,.5,1")
        if self.restore and self.rule is not None:
            raise ValueError("`restore` starts from the whole tuned model; leave `rule` out")
        if self.second is not None and self.sweep is not None:
            raise ValueError("`second` can be added at one --lambda, not along a --sweep")
        if self.beta != 1.0 and self.second is None:
            raise ValueError("`beta` is how much of `second` is added; name that model too")
        if self.reduce is not None:
            self._check_reduction(parse_reduction(self.reduce)[0])
        return self

    def _check_reduction(self, kind: Reduction) -> None:
        if self.sweep is not None:
            raise ValueError(
                "`reduce` works at one --lambda; write it with --lambda 1, then --sweep that"
            )
        more = {"rule": self.rule, "second": self.second, "write_dtype": self.write_dtype}
        given = [f"`{name}`" for name, value in more.items() if value is not None]
        if kind == "lore" and given:
            raise ValueError(
                f"`reduce` = {self.reduce!r} makes an adapter, which takes one lambda and keeps "
                f"its dtype; leave out {', '.join(given)}"
            )


class BlendArm(Spec):
    """How the blended arm of a run is made from the plain one."""

    lambdas: tuple[_Finite, ...] = Field(
        default=(0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0), min_length=1
    )
    """Points of the path that are measured on validation items; 0 is the model before tuning."""
    pick: str = "keep-target:0.9"
    """The rule that picks lambda."""
    limit: int = Field(default=30, ge=1)
    """Validation items per task."""
    seeds: int = Field(default=1, ge=1)
    """Draws of demonstrations on validation items."""


class RunSpec(Where):
    """`keepshot run`: one model, one target, several arms."""

    name: str = Field(default="run", pattern=r"^\w[\w.-]*$")
    """Name of the run, and of its directory where none is given."""
    model: str
    """Model reference."""
    data: str
    """Name of the target task, or path of an examples file."""
    arms: Mapping[TunedArm, Recipe] = Field(min_length=1)
    """How each tuned arm is trained; `model`, `data` and `seed` are filled in from above."""
    blended: BlendArm | None = BlendArm()
    """The blend of `plain`; null leaves it out."""
    measure: Measuring = Measuring(seeds=2)
    """What every arm is asked besides the target."""

    @model_validator(mode="before")
    @classmethod
    def _fill_in_arms(cls, content: Any) -> Any:
        if isinstance(content, dict) and isinstance(content.get("arms"), dict):
            shared = {key: content[key] for key in ("model", "data", "seed") if key in content}
            arms = {
                arm: {**recipe, **shared} if isinstance(recipe, dict) else recipe
                for arm, recipe in content["arms"].items()
            }
            return {**content, "arms": arms}
        return content

    @model_validator(mode="after")
    def _check_blend(self) -> Self:
        if self.blended and "plain" not in self.arms:
            raise ValueError("`blended` needs the arm `plain`; add it, or set `blended: null`")
        if self.blended and prompt_tokens(self.arms["plain"].method):
            raise ValueError(
                "`plain` is tuned under a soft prompt, which has no place between it and the base; "
                "take another method, or set `blended: null`"
            )
        return self


def parse_reduction(text: str) -> tuple[Reduction, float]:
    """Read `NAME:SHARE`, such as `lore:0.5`.

    Raises:
        ConfigError: if there is no such reduction, or the share is not above 0 and at most 1.
    """
    name, _, share = text.partition(":")
    kind: Reduction | None = next((known for known in REDUCTIONS if known == name), None)
    if kind is None:
        listing = f"expected {', '.join(f'{known}:0.5' for known in REDUCTIONS)}"
        raise ConfigError(unknown("reduction", text, REDUCTIONS, listing))
    try:
        number = float(share)
    except ValueError:
        number = float("nan")
    if not 0.0 < number <= 1.0:
        raise ConfigError(
            f"reduction {text!r}: expected a number above 0 and at most 1 after {name}:"
        )
    return kind, number


def parse_lambdas(text: str) -> tuple[float, ...]:
    """Read `start:stop:step` (both ends included) or a list such as `0,0.3,1`, in rising order.

    Counted in decimals, so that `0:1:0.1` holds exactly 0.3 and 1.

    Raises:
        ConfigError: if the text is neither, or asks for more than `MAX_LAMBDAS` lambdas.
    """
    expected = "expected start:stop:step such as 0:1:0.1, or a list such as 0,0.3,1"
    separator = ":" if ":" in text else ","
    try:
        numbers = [Decimal(part) for part in text.split(separator)]
    except InvalidOperation:
        raise ConfigError(f"--sweep {text!r}: not numbers; {expected}") from None
    if not all(number.is_finite() for number in numbers):
        raise ConfigError(f"--sweep {text!r}: {expected}")
    if separator == ",":
        return tuple(sorted({float(number) for number in numbers}))
    if len(numbers) != 3 or numbers[2] <= 0 or numbers[1] < numbers[0]:
        raise ConfigError(f"--sweep {text!r}: {expected}")
    start, stop, step = numbers
    count = int((stop - start) / step) + 1
    if count > MAX_LAMBDAS:
        raise ConfigError(f"--sweep {text!r}: {count} lambdas, at most {MAX_LAMBDAS}; widen it")
    steps = {start + step * index for index in range(count)}
    return tuple(float(number) for number in sorted({*steps, stop}))
