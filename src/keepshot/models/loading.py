"""A reference becomes a live causal language model with its tokenizer.

`load` checks the files before it reads weights, so that what is broken is named. Knows nothing of
tasks or training.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, assert_never

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from keepshot.assets import AssetStore
from keepshot.errors import ModelError, unknown
from keepshot.models.adapter import merge_adapter
from keepshot.models.bases import check_base
from keepshot.models.checkpoint import TensorReader
from keepshot.models.conversion import (
    convert,
    converted_tokenizer,
    fetch_model,
    quiet_transformers,
)
from keepshot.models.identity import directory_sha256, joint_sha256
from keepshot.models.reference import (
    AdapterDirectory,
    Embedded,
    GGUFFile,
    HubModel,
    LocalDirectory,
    ModelReference,
    RunDirectory,
    is_converted,
    parse_reference,
    read_json,
    refuse_pickles,
)
from keepshot.models.soft_prompts import attached, load_prompts_, own_prompt, prompts_beside
from keepshot.records import building_directory

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
CONTEXT_LENGTH_NAMES = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
GENERIC_TOKENIZERS = ("PreTrainedTokenizerFast", "TokenizersBackend")
ModelFiles = Embedded | HubModel | LocalDirectory | GGUFFile
HUB_FILES = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "LICENSE*", "NOTICE*")


@dataclass(frozen=True)
class LanguageModel:
    """A causal language model in evaluation mode, with all that measuring and tuning need.

    `sha256` is of the files that were loaded; `path` is the directory they lie in (for an
    adapter, its own directory; the module is the base with the adapter merged in).
    """

    reference: str
    module: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    sha256: str
    path: Path
    num_parameters: int
    dtype: str

    def soft_prompt(self, task: str) -> tuple[int, ...]:
        """Return the token ids of the soft prompt that stands before texts of `task`, if any."""
        prompts = attached(self.module)
        return prompts.ids(task) if prompts else ()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.module.parameters()).device

    @cached_property
    def context_length(self) -> int:
        """The number of tokens that the model can read, prompt and answer together."""
        config = self.module.config.get_text_config()
        for name in CONTEXT_LENGTH_NAMES:
            length = getattr(config, name, None)
            if isinstance(length, int) and length > 0:
                return length
        raise ModelError(
            f"model {self.reference!r}: config.json does not give a context length "
            f"({', '.join(CONTEXT_LENGTH_NAMES)})"
        )

    @cached_property
    def eos_ids(self) -> frozenset[int]:
        """Every token that ends a text, by tokenizer, configuration or generation settings."""
        config = self.module.config
        places = (self.tokenizer, config, config.get_text_config(), self.module.generation_config)
        found: list[Any] = [getattr(place, "eos_token_id", None) for place in places]
        flat = [n for ids in found for n in (ids if isinstance(ids, list) else [ids])]
        return frozenset(int(number) for number in flat if number is not None)

    @cached_property
    def bos_ids(self) -> tuple[int, ...]:
        """What the tokenizer puts before every text: one token, or nothing."""
        with_special = self._tokenize("a", special=True)
        plain = self._tokenize("a", special=False)
        starts = range(len(with_special) - len(plain) + 1)
        first = next(n for n in starts if with_special[n : n + len(plain)] == plain)
        return tuple(with_special[:first])

    def encode(self, text: str) -> list[int]:
        """Return the token ids of `text`, with BOS exactly where this tokenizer adds one.

        A text that already begins with BOS (a rendered chat template) gets no second one, and EOS
        is never appended.
        """
        ids = self._tokenize(text, special=False)
        bos = list(self.bos_ids)
        return ids if ids[: len(bos)] == bos else bos + ids

    def encode_plain(self, text: str) -> list[int]:
        """Return the token ids of `text` alone, without BOS or EOS."""
        return self._tokenize(text, special=False)

    @property
    def start_ids(self) -> list[int]:
        """The token that stands for an empty text: BOS, or where there is none, EOS."""
        return list(self.bos_ids) or sorted(self.eos_ids)[:1]

    def encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokenise context and continuation together and split them where the context ends.

        Trailing spaces of the context go to the continuation, because tokens of words hold the
        space before them. The rule is that of lm-evaluation-harness 0.4 (`_encode_pair`).
        """
        stripped = context.rstrip()
        moved = context[len(stripped) :]
        context_ids = self.encode(stripped)
        whole = self.encode(stripped + moved + continuation)
        return context_ids, whole[len(context_ids) :]

    def encode_answer(self, context: str, answer: str) -> tuple[list[int], list[int]]:
        """Tokenise a prompt and the answer to be written after it, and split them.

        As `encode_pair`, but newlines at the end of the prompt stay there: an answer ends at one.
        """
        cut = len(context.rstrip())
        if "\n" in context[cut:]:
            kept = self.encode(context[: context.rindex("\n") + 1])
            whole = self.encode(context + answer)
            if whole[: len(kept)] == kept:
                return kept, whole[len(kept) :]
        return self.encode_pair(context, answer)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids, leaving out special tokens such as BOS and EOS."""
        decoded = self.tokenizer.decode(
            list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        assert isinstance(decoded, str)
        return decoded

    def last_of_answer(self, token_id: int) -> str | None:
        r"""Return what this token still says of an answer that ends at it; None if it goes on.

        An answer ends at EOS, or at the first newline. Judged on text, because one tokenizer has a
        token for "\n\n" where another needs two, and a third joins them to the full stop before.
        """
        if token_id in self.eos_ids:
            return ""
        said, newline, _ = self.decode([token_id]).partition("\n")
        return said if newline else None

    def ends_answer(self, token_id: int) -> bool:
        """Say whether an answer ends at this token."""
        return self.last_of_answer(token_id) is not None

    def decode_answer(self, ids: Sequence[int]) -> str:
        """Return the text of an answer that ends within its last token."""
        last = self.decode(ids[-1:])
        said = self.last_of_answer(ids[-1])
        return self.decode(ids).removesuffix(last[len(said or "") :])

    def _tokenize(self, text: str, *, special: bool) -> list[int]:
        # verbose=False: the caller checks lengths itself; the tokenizer would warn on long texts.
        encoded: Any = self.tokenizer(text, add_special_tokens=special, verbose=False)
        return list(encoded["input_ids"])


def load(
    reference: str,
    store: AssetStore,
    *,
    device: str | torch.device = "cpu",
    dtype: str = "float32",
    trust_remote_code: bool = False,
) -> LanguageModel:
    """Load what `reference` names; see `keepshot.models.reference` for the forms.

    Args:
        reference: As the user wrote it.
        store: The cache for embedded models, conversions and digests.
        device: A torch device.
        dtype: float32, bfloat16 or float16.
        trust_remote_code: Let transformers run code that comes with the model.

    Raises:
        ModelError: naming the file, tensor or value that does not fit.
        AssetError: if an embedded model cannot be had.
    """
    target = _check_device(str(device))
    if dtype not in DTYPES:
        raise ModelError(unknown("dtype", dtype, DTYPES, f"known: {', '.join(DTYPES)}"))
    whole = parse_reference(reference)
    parsed = _inner(whole)
    if isinstance(parsed, AdapterDirectory):
        model = _load_adapter(
            parsed, store, device=target, dtype=dtype, trust_remote_code=trust_remote_code
        )
    else:
        path = locate(parsed, store, trust_remote_code=trust_remote_code)
        model = _load_directory(
            reference, path, store, device=target, dtype=dtype, trust_remote_code=trust_remote_code
        )
    load_prompts_(model.module, prompts_beside(whole))
    return replace(model, sha256=_with_prompts(model.sha256, whole, store))


def outline(reference: str, store: AssetStore, *, trust_remote_code: bool = False) -> LanguageModel:
    """Load all of a model but its weights, to check what is asked of it before hours are spent.

    It tokenises and knows its context length; its module holds no numbers. Every weight file that
    `load` would read has its header checked.

    Raises:
        ModelError: as `load` does, for all that shows without the weights.
        AssetError: if an embedded model cannot be had.
    """
    whole = parse_reference(reference)
    parsed = _inner(whole)
    if isinstance(parsed, AdapterDirectory):
        TensorReader(parsed.path)
        base = outline(parsed.base, store, trust_remote_code=trust_remote_code)
        check_base(parsed.path, base.sha256, base.reference)
        load_prompts_(base.module, prompts_beside(whole) or own_prompt(parsed.path))
        return replace(base, reference=reference, path=parsed.path)
    path = locate(parsed, store, trust_remote_code=trust_remote_code)
    TensorReader(path)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    with _explained(reference, path):
        config = AutoConfig.from_pretrained(path, local_files_only=True, **options)
        with torch.device("meta"):
            module: Any = AutoModelForCausalLM.from_config(config, **options)
        if (path / "generation_config.json").is_file():  # a chat's end tokens often stand here
            module.generation_config = GenerationConfig.from_pretrained(path, local_files_only=True)
        tokenizer = _load_tokenizer(path, {"local_files_only": True, **options})
    load_prompts_(module, prompts_beside(whole))
    return LanguageModel(
        reference=reference,
        module=module,
        tokenizer=tokenizer,
        sha256=directory_sha256(path, store),
        path=path,
        num_parameters=module.num_parameters(),
        dtype="float32",
    )


def locate(
    reference: ModelFiles,
    store: AssetStore,
    *,
    trust_remote_code: bool = False,
) -> Path:
    """Return the directory with the model's safetensors, fetched or converted if need be."""
    match reference:
        case Embedded():
            return fetch_model(reference.model.name, store)
        case HubModel():
            return _download(reference, trust_remote_code=trust_remote_code)
        case LocalDirectory():
            return reference.path
        case GGUFFile():
            return convert(reference.path, store)
        case _:
            assert_never(reference)


def own_dtype(reference: str, store: AssetStore, *, trust_remote_code: bool = False) -> str:
    """Return the dtype that a model's config.json says its weights have; float32 if it does not.

    Raises:
        ModelError: if the reference leads nowhere.
    """
    parsed = parse_reference(reference)
    if isinstance(parsed, RunDirectory):
        parsed = parsed.inner
    if isinstance(parsed, AdapterDirectory):
        return own_dtype(parsed.base, store, trust_remote_code=trust_remote_code)
    path = locate(parsed, store, trust_remote_code=trust_remote_code) / "config.json"
    config: Any = read_json(path) if path.is_file() else {}
    inner: Any = config.get("text_config") or {}
    named = (c.get(key) for c in (config, inner) for key in ("dtype", "torch_dtype"))
    return next((name for name in named if name in DTYPES), "float32")


def save(model: LanguageModel, out_dir: Path, *, overwrite: bool = False, **given: Any) -> None:
    """Write the model and its tokenizer as a directory that transformers loads.

    What else is `given` is for the module's `save_pretrained`.

    Raises:
        OutputError: if `out_dir` cannot be written, or holds something and is not to be replaced.
    """
    with building_directory(out_dir, overwrite=overwrite) as folder, quiet_transformers():
        model.module.save_pretrained(folder, **given)
        model.tokenizer.save_pretrained(folder)


def identify(reference: str, store: AssetStore) -> str:
    """Return the sha256 that a model has once it is loaded, from its files alone."""
    whole = parse_reference(reference)
    parsed = _inner(whole)
    if isinstance(parsed, AdapterDirectory):
        own = directory_sha256(parsed.path, store)
        sha256 = joint_sha256(identify(parsed.base, store), own)
    else:
        sha256 = directory_sha256(locate(parsed, store), store)
    return _with_prompts(sha256, whole, store)


def _with_prompts(sha256: str, reference: ModelReference, store: AssetStore) -> str:
    for folder in prompts_beside(reference):
        sha256 = joint_sha256(sha256, directory_sha256(folder, store))
    return sha256


def _inner(reference: ModelReference) -> ModelFiles | AdapterDirectory:
    return reference.inner if isinstance(reference, RunDirectory) else reference


def _load_directory(
    reference: str,
    path: Path,
    store: AssetStore,
    *,
    device: torch.device,
    dtype: str,
    trust_remote_code: bool,
) -> LanguageModel:
    refuse_pickles(path)
    TensorReader(path)
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": trust_remote_code}
    with _explained(reference, path):
        tokenizer = _load_tokenizer(path, options)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=DTYPES[dtype],
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    module, report = loaded
    _check_report(path, report)
    module.to(device).eval()
    # peft and transformers copy this name into what they save; a path into our cache would bind
    # an adapter to this machine, the reference does not.
    name = str(path.absolute()) if Path(reference).exists() else reference
    module.config._name_or_path = name
    module.name_or_path = name
    return LanguageModel(
        reference=reference,
        module=module,
        tokenizer=tokenizer,
        sha256=directory_sha256(path, store),
        path=path,
        num_parameters=sum(parameter.numel() for parameter in module.parameters()),
        dtype=dtype,
    )


def _load_tokenizer(path: Path, options: dict[str, Any]) -> Any:
    """Load the tokenizer as its own file describes it.

    For some model types AutoTokenizer replaces a tokenizer of the generic class by the family's
    usual one, which splits text differently from what tokenizer.json says.
    """
    if is_converted(path):
        return converted_tokenizer(path)
    config_path = path / "tokenizer_config.json"
    config = read_json(config_path) if config_path.is_file() else {}
    if (path / "tokenizer.json").is_file() and config.get("tokenizer_class") in GENERIC_TOKENIZERS:
        return PreTrainedTokenizerFast.from_pretrained(path, local_files_only=True)
    return AutoTokenizer.from_pretrained(path, **options)


def _load_adapter(
    adapter: AdapterDirectory,
    store: AssetStore,
    *,
    device: torch.device,
    dtype: str,
    trust_remote_code: bool,
) -> LanguageModel:
    # Before the base is read: the adapter's own file, and which base it belongs to.
    TensorReader(adapter.path)
    check_base(adapter.path, identify(adapter.base, store), adapter.base)
    base = load(
        adapter.base, store, device=device, dtype=dtype, trust_remote_code=trust_remote_code
    )
    own = own_prompt(adapter.path)
    load_prompts_(base.module, own)
    merged = base.module if own else merge_adapter(base.module, adapter.path, base.reference)
    return LanguageModel(
        reference=adapter.text,
        module=merged,
        tokenizer=base.tokenizer,
        sha256=joint_sha256(base.sha256, directory_sha256(adapter.path, store)),
        path=adapter.path,
        num_parameters=base.num_parameters,
        dtype=dtype,
    )


def _check_device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ModelError(f"device {name!r} is unknown; give cpu, cuda, cuda:N or mps") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ModelError(
            f"device {name!r} is not here: torch sees {torch.cuda.device_count()} CUDA devices; "
            "use --device cpu"
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ModelError(f"device {name!r} is not here; use --device cpu")
    return device


def _download(reference: HubModel, *, trust_remote_code: bool) -> Path:
    patterns = [*HUB_FILES, *(["*.py"] if trust_remote_code else [])]
    try:
        path = Path(
            snapshot_download(
                reference.repo, revision=reference.revision, allow_patterns=patterns,
                ignore_patterns=["original/*"],
            )
        )  # fmt: skip
    except LocalEntryNotFoundError:
        raise ModelError(
            f"model {reference.text!r} is no directory here, not in the hub's local cache, and "
            "the hub cannot be reached\n(HF_HUB_OFFLINE is set, or there is no network); check "
            "the name, or give a directory"
        ) from None
    except (HfHubHTTPError, HFValidationError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"model {reference.text!r}: the hub says: {reason}") from None
    if not (path / "config.json").is_file() or not any(path.glob("*.safetensors")):
        raise ModelError(
            f"model {reference.text!r} has no config.json with safetensors (pickled weights and "
            "bare GGUF are not taken from the hub);\nuse a revision that has them, or convert it "
            "where you trust it and give the directory"
        )
    return path


@contextmanager
def _explained(reference: str, path: Path) -> Generator[None]:
    """Turn what transformers and tokenizers make of broken files into a ModelError."""
    with quiet_transformers():
        try:
            yield
        except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
            raise ModelError(_explain_transformers(reference, path, error)) from error
        except Exception as error:
            # tokenizers, written in Rust, has no other class for a file that it cannot read.
            if type(error) is not Exception:
                raise
            raise ModelError(_explain_transformers(reference, path, error)) from error


def _explain_transformers(reference: str, path: Path, error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if "trust_remote_code" in str(error):
        return (
            f"model {reference!r} brings its own code, which is not run unless you trust it; "
            "read it, then add --trust-remote-code"
        )
    if "backend tokenizer" in str(error):
        return (
            f"model {reference!r}: {path} holds no tokenizer.json that can be read; copy the "
            "tokenizer's files there from the model that it was made of"
        )
    return f"model {reference!r}: {path} cannot be loaded: {lines[0][:300]}"


def _check_report(path: Path, report: Any) -> None:
    """Refuse weights that are absent or of another shape: transformers would invent them."""
    for key, problem in (("missing_keys", "is missing"), ("mismatched_keys", "has another shape")):
        names = sorted(str(entry) for entry in report[key])
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise ModelError(f"{path}: tensor {names[0]} {problem}{more} for what config.json says")


__all__ = [
    "LanguageModel",
    "ModelReference",
    "fetch_model",
    "identify",
    "load",
    "locate",
    "outline",
    "own_dtype",
    "save",
]
