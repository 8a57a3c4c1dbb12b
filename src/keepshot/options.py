"""The options of the command line, by name, and how the text of some becomes a list.

Loads nothing but typer: every command waits for this file.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from keepshot.errors import ConfigError

Number = TypeVar("Number", int, float)

# -- shared by most commands -------------------------------------------------------------------

Out = Annotated[Path | None, typer.Option("--out", help="Directory to write.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document, nothing else.")]
Seed = Annotated[int | None, typer.Option("--seed", help="Seed of draws and training.")]
Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:1, mps.")]
DType = Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16 or float16.")]
Set = Annotated[
    list[str] | None, typer.Option("--set", help="Override a spec key: --set key=value.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]
Model = Annotated[str | None, typer.Option("--model", help="Model reference.")]
Data = Annotated[str | None, typer.Option("--data", help="Examples file, or name of a task.")]
Tasks = Annotated[str | None, typer.Option("--tasks", help="Suites, tasks, files: core,my.jsonl.")]
Shots = Annotated[str | None, typer.Option("--shots", help="Numbers of demonstrations: 0,4.")]
Seeds = Annotated[int | None, typer.Option("--seeds", help="Draws of demonstrations.")]
Limit = Annotated[int | None, typer.Option("--limit", help="Items per task at most.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run a checkpoint's own code.")]
Licence = Annotated[
    list[str] | None, typer.Option("--accept-licence", help="Accept a licence, such as gemma.")
]
Follow = Annotated[
    str | None,
    typer.Option("--follow", help="Instructions too: embedded, ifeval, or a file of its format."),
]
Gate = Annotated[
    float | None, typer.Option("--require-retention", help="Exit with 3 below this retention.")
]

# -- run, tune ---------------------------------------------------------------------------------

RunRecipe = Annotated[Path | None, typer.Argument(help="Recipe (YAML); the demo if left out.")]
TuneRecipe = Annotated[Path | None, typer.Argument(help="Recipe (YAML).")]
Method = Annotated[str | None, typer.Option("--method", help="full, lora, value-only.")]
Keep = Annotated[str | None, typer.Option("--keep", help="auto, none, or kl,mix.")]
Merged = Annotated[
    bool, typer.Option("--merged", help="Write the adapter merged into a whole model.")
]

# -- measure -----------------------------------------------------------------------------------

Models = Annotated[list[str], typer.Argument(help="Model references.", metavar="MODEL...")]
Plan = Annotated[bool, typer.Option("--plan", help="Say what it would cost, and stop.")]
Template = Annotated[str | None, typer.Option("--template", help="Prompt template.")]
LmEvalOut = Annotated[
    Path | None, typer.Option("--lm-eval-out", help="Write results in lm-eval's format too.")
]
NoShare = Annotated[
    bool, typer.Option("--no-share", help="Read every prompt from its start: the reference.")
]
Server = Annotated[
    str | None, typer.Option("--server", help="OpenAI-compatible server that generates.")
]
ServerModel = Annotated[
    str | None, typer.Option("--server-model", help="The model's name on the server.")
]
Engine = Annotated[
    str | None, typer.Option("--engine", help="local, or ray: each model in a worker.")
]
Workers = Annotated[int | None, typer.Option("--workers", help="Models at the same time on Ray.")]

# -- blend -------------------------------------------------------------------------------------

Base = Annotated[str, typer.Argument(help="Model before tuning, or a recipe.", metavar="BASE")]
Tuned = Annotated[str | None, typer.Argument(help="The tuned model or adapter.", metavar="TUNED")]
Lambda = Annotated[float | None, typer.Option("--lambda", help="Write base + LAMBDA * delta.")]
Sweep = Annotated[str | None, typer.Option("--sweep", help="START:STOP:STEP, or 0,.5,1.")]
Target = Annotated[str | None, typer.Option("--target", help="File or task tuned for.")]
Pick = Annotated[str | None, typer.Option("--pick", help="Rule, such as keep-target:0.9.")]
Restore = Annotated[
    str | None,
    typer.Option("--restore", help="Put back one part at a time: blocks, kinds, or both."),
]
NoCheck = Annotated[
    bool, typer.Option("--no-check", help="Write without hashing and without reading it again.")
]

# -- judge -------------------------------------------------------------------------------------

Candidate = Annotated[str | None, typer.Argument(help="Outputs file, or a model.")]
Reference = Annotated[str | None, typer.Argument(help="Outputs file, or a model.")]
JudgedBy = Annotated[
    list[str] | None,
    typer.Option("--judge", help="A model, a file of judgements, or MODEL@http://SERVER/v1."),
]
Prompts = Annotated[str | None, typer.Option("--prompts", help="Prompts to answer.")]
IFEval = Annotated[
    str | None, typer.Option("--ifeval", help="Put verifiable instructions to this MODEL.")
]
NoSanity = Annotated[bool, typer.Option("--no-sanity", help="Do not test the judge itself.")]

# -- study -------------------------------------------------------------------------------------

StudyFile = Annotated[
    Path, typer.Argument(help="Study (YAML), or its directory.", metavar="STUDY.yaml")
]
StudyEngine = Annotated[
    str, typer.Option("--engine", help="local, ray, or HOST:PORT of a Ray cluster.")
]
StudyWorkers = Annotated[int | None, typer.Option("--workers", min=1, help="Workers of Ray.")]
Status = Annotated[bool, typer.Option("--status", help="Say how far it is, and stop.")]
LimitMinutes = Annotated[
    float | None, typer.Option("--limit-minutes", help="Begin nothing after this time.")
]
Yes = Annotated[bool, typer.Option("--yes", help="A large study is meant.")]
Retry = Annotated[bool, typer.Option("--retry", help="Do again what failed.")]

# -- theory ------------------------------------------------------------------------------------

Claim = Annotated[
    list[str] | None, typer.Option("--claim", help="A claim; all but `bridge` if left out.")
]
Dimension = Annotated[int | None, typer.Option("--d", help="Number of inputs.")]
Sigma2 = Annotated[float | None, typer.Option("--sigma2", help="Variance of the noise.")]
Spectrum = Annotated[
    str | None, typer.Option("--spectrum", help="Eigenvalues of the covariance: 4,2,1.")
]
PretrainShots = Annotated[
    float | None, typer.Option("--pretrain-shots", help="Of pretraining prompts; or inf.")
]

# -- records and lists -------------------------------------------------------------------------

RunDirs = Annotated[list[Path], typer.Argument(help="Run directories.", metavar="DIR...")]
Written = Annotated[Path, typer.Argument(help="A written blend or run.", metavar="DIR")]
Sql = Annotated[str, typer.Argument(help='Such as "select * from scores limit 5".')]
QueryDirs = Annotated[
    list[Path] | None, typer.Argument(help="Run directories; all under runs/ if left out.")
]
Fetch = Annotated[str | None, typer.Option("--fetch", help="Download and convert NAME.")]
Version = Annotated[bool, typer.Option("--version", help="Print the version.")]


def given(**options: Any) -> dict[str, Any]:
    """Return the options that were given."""
    return {name: value for name, value in options.items() if value is not None}


def following(prompts: str | None) -> dict[str, str] | None:
    """Return the part of a spec that `--follow` stands for."""
    return {"prompts": prompts} if prompts else None


def names(text: str | None) -> list[str] | None:
    """Return the parts of a list such as `core,my.jsonl`; None where nothing was given."""
    return [part.strip() for part in text.split(",") if part.strip()] if text else None


def whole_numbers(option: str, text: str | None) -> list[int] | None:
    """Return the numbers of a list such as `0,4`.

    Raises:
        ConfigError: naming the option, if one is no whole number.
    """
    return _numbers(int, f"{option} {text!r}: expected whole numbers, such as 0,4", text)


def decimals(option: str, text: str | None) -> list[float] | None:
    """Return the numbers of a list such as `4,2.5`.

    Raises:
        ConfigError: naming the option, if one is no number.
    """
    return _numbers(float, f"{option} {text!r}: expected numbers, such as 4,2,1", text)


def _numbers(kind: Callable[[str], Number], wrong: str, text: str | None) -> list[Number] | None:
    if text is None:
        return None
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(wrong) from None
