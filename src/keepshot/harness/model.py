"""The engine as a model of lm-evaluation-harness: `--model keepshot`.

Tokens, truncation, empty contexts and windows are lm-eval's own (`hf` of 0.4.13); only the work is
shared. Importing this module needs lm-eval and registers the model.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Sequence
from logging import getLogger
from typing import Any

import jinja2
import torch
from tqdm import tqdm

from keepshot.assets import AssetStore
from keepshot.errors import ConfigError, TaskError, unknown
from keepshot.harness.extra import MAX_GEN_TOKENS, lm_eval
from keepshot.models.loading import LanguageModel, load, own_dtype
from keepshot.scoring.engine import Engine
from keepshot.scoring.processes import Processes, join_processes
from keepshot.scoring.request import (
    Generate,
    GenerateResult,
    LogLikelihood,
    LogLikelihoodResult,
    Request,
    Result,
)

SPELLINGS = {"float": "float32", "bf16": "bfloat16", "half": "float16", "fp16": "float16"}
"""Dtypes that lm-eval's users write otherwise."""
log = getLogger(__name__)

Tokens = list[int]
TemplateLM: Any = lm_eval("api.model").TemplateLM


class KeepshotLM(TemplateLM):
    """Answers lm-eval's requests, each shared beginning computed once.

    Args:
        pretrained: model reference of keepshot, or a live `LanguageModel`.
        dtype: float32, bfloat16 or float16; `auto` is the checkpoint's own, as with `hf`.
        device: torch device; None is the GPU if there is one.
        max_length: context length, if the model's own is not wanted.
        add_bos_token: whether texts begin with BOS; None leaves it to the tokenizer.
        trust_remote_code: run code that a checkpoint brings along.
        share: compute shared beginnings once (else: the slow reference).
        batch_tokens: tokens in one forward pass; None computes it from the memory there is.
        batch_size: taken for lm-eval's sake; batches are formed by tokens, whatever it says.
        max_batch_size: likewise.
        accept_licence: licence of an embedded model to accept, such as gemma.
    """

    def __init__(
        self,
        pretrained: str | LanguageModel,
        *,
        dtype: str = "auto",
        device: str | None = None,
        max_length: int | None = None,
        add_bos_token: bool | None = None,
        trust_remote_code: bool = False,
        share: bool = True,
        batch_tokens: int | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        accept_licence: str | None = None,
        **others: object,
    ) -> None:
        super().__init__()
        if others:
            raise ConfigError(_unknown_argument(next(iter(others))))
        # Under torchrun every process runs lm-eval's loop and the engine shares the requests out;
        # lm-eval writes and prints in the first one alone.
        processes = join_processes(os.environ)
        if isinstance(pretrained, str):
            licences = frozenset([accept_licence]) if accept_licence else frozenset[str]()
            store = AssetStore.from_environment(os.environ, accepted_licences=licences)
            trust = bool(trust_remote_code)
            if dtype == "auto":
                dtype = own_dtype(pretrained, store, trust_remote_code=trust)
            pretrained = load(
                pretrained,
                store,
                device=_usable(device, processes),
                dtype=SPELLINGS.get(dtype, dtype),
                trust_remote_code=trust,
            )
        self.language_model = pretrained
        self.tokenizer: Any = pretrained.tokenizer
        self.engine = Engine(
            pretrained, share=share, batch_tokens=batch_tokens, processes=processes
        )
        self.max_length = max_length or pretrained.context_length
        self._add_bos = add_bos_token
        self._device = pretrained.device

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token that stands for an empty context."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def max_gen_toks(self) -> int:
        """Tokens generated where a task does not say."""
        return MAX_GEN_TOKENS

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer in lm-eval's request caches."""
        return f"{self.language_model.reference}-{self.language_model.sha256[:12]}".replace(
            "/", "__"
        )

    def get_model_info(self) -> dict[str, object]:
        """Return what lm-eval writes about the model into its results."""
        model = self.language_model
        return {
            "model_num_parameters": model.num_parameters,
            "model_dtype": model.dtype,
            "model_revision": "",
            "model_sha": model.sha256,
            "keepshot_sharing": self.engine.sharing,
            "keepshot_processes": self.engine.processes.size,
        }

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return the conversation as text; a template without a system role gets none."""
        options: dict[str, Any] = {
            "tokenize": False,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": not add_generation_prompt,
        }
        try:
            return self.tokenizer.apply_chat_template(chat_history, **options)
        except jinja2.TemplateError:
            log.warning("the chat template refuses the conversation; leaving out the system role")
            without = [message for message in chat_history if message["role"] != "system"]
            return self.tokenizer.apply_chat_template(without, **options)
        except ValueError as error:
            raise ConfigError(
                f"model {self.language_model.reference!r}: --apply_chat_template: "
                f"{str(error).partition(chr(10))[0][:200]}"
            ) from None

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: object
    ) -> Tokens:
        """Tokenise as `hf` does: BOS where this tokenizer adds one, and never twice."""
        if add_special_tokens is None:
            add_special_tokens = self._add_bos
        if add_special_tokens is False:
            return self.language_model.encode_plain(string)
        if add_special_tokens and not self.language_model.bos_ids:
            ids = self.language_model.encode_plain(string)
            begins = ids[:1] == [self.prefix_token_id]
            return ids if begins else [self.prefix_token_id, *ids]
        return self.language_model.encode(string)

    def loglikelihood(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Return (log-likelihood, is_greedy) of each (context, continuation)."""
        # Contexts recur for every answer: each is tokenised once.
        seen: dict[str, Tokens] = {}
        asked: list[tuple[str, str]] = [request.args for request in requests]
        pairs = [self._encode(context, continuation, seen) for context, continuation in asked]
        found = self._run([self._cut_left(*pair) for pair in pairs], disable_tqdm)
        answers: list[tuple[float, bool]] = []
        for request, result in zip(requests, found, strict=True):
            assert isinstance(result, LogLikelihoodResult)
            answers.append((result.log_likelihood, result.is_greedy))
            self.cache_hook.add_partial("loglikelihood", request.args, answers[-1])
        return answers

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, Tokens, Tokens]], **_: object
    ) -> list[tuple[float, bool]]:
        found = self._run([self._cut_left(before, after) for _, before, after in requests], True)
        return [
            (result.log_likelihood, result.is_greedy)
            for result in found
            if isinstance(result, LogLikelihoodResult)
        ]

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Return the log-likelihood of each whole text, in windows of the context's length."""
        utils = lm_eval("utils")
        windows: list[Request] = []
        counts: list[int] = []
        for request in requests:
            rolling = utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            disjoint = [utils.make_disjoint_window(window) for window in rolling]
            windows += [LogLikelihood(tuple(before), tuple(after)) for before, after in disjoint]
            counts.append(len(disjoint))
        found = iter(self._run(windows, disable_tqdm))
        answers: list[float] = []
        for request, count in zip(requests, counts, strict=True):
            sums = [next(found) for _ in range(count)]
            answers.append(
                sum(r.log_likelihood for r in sums if isinstance(r, LogLikelihoodResult))
            )
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, answers[-1])
        return answers

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return greedy continuations, each up to its first stop string."""
        asked = [self._generation(*request.args) for request in requests]
        answers: list[str] = []
        for request, result in zip(requests, self._run(asked, disable_tqdm), strict=True):
            assert isinstance(result, GenerateResult)
            answers.append(result.text)
            self.cache_hook.add_partial("generate_until", request.args, result.text)
        return answers

    def _generation(self, context: str, settings: dict[str, Any]) -> Generate:
        normal = lm_eval("models.utils").normalize_gen_kwargs(settings, self.max_gen_toks)
        if normal.get("do_sample"):
            raise ConfigError(
                f"the task samples its answers ({settings!r}); keepshot decodes greedily: "
                "add --gen_kwargs do_sample=False, or use --model hf"
            )
        most, stop = int(normal["max_gen_toks"]), normal.get("until") or []
        room = self.max_length - most
        if room <= 0:
            raise ConfigError(
                f"max_gen_toks {most} leaves no room for a prompt in a context of "
                f"{self.max_length} tokens; give --gen_kwargs max_gen_toks=N with a smaller N"
            )
        stop = [stop] if isinstance(stop, str) else stop
        ids = self.tok_encode(context) or [self.prefix_token_id]
        return Generate(tuple(ids[-room:]), most, tuple(string for string in stop if string))

    def _encode(
        self, context: str, continuation: str, seen: dict[str, Tokens]
    ) -> tuple[Tokens, Tokens]:
        if not context:
            ids = self.tok_encode(continuation, add_special_tokens=False)
            if ids[:1] == [self.prefix_token_id]:
                return ids[:1], ids[1:]
            return [self.prefix_token_id], ids
        stripped = context.rstrip()
        if stripped not in seen:
            seen[stripped] = self.tok_encode(stripped)
        before = seen[stripped]
        return before, self.tok_encode(context + continuation)[len(before) :]

    def _cut_left(self, context: Tokens, continuation: Tokens) -> LogLikelihood:
        """Drop the oldest tokens of what is too long, as lm-eval does."""
        if not context or not continuation:
            raise TaskError(
                "a continuation gives no token of its own to score after "
                f"{self.language_model.decode(context[-20:])!r}; mend the task or drop the row"
            )
        whole = context + continuation
        excess = len(whole) - (self.max_length + 1)
        if excess > 0:
            if len(continuation) > self.max_length:
                raise TaskError(
                    f"a continuation of {len(continuation)} tokens does not fit into a context "
                    f"of {self.max_length}; drop the row, or give --model_args max_length=N"
                )
            log.warning("a prompt is %d tokens too long; dropping its first ones", excess)
            context = context[excess:]
        return LogLikelihood(tuple(context), tuple(continuation))

    def _run(self, requests: Sequence[Request], quiet: bool) -> list[Result]:
        if quiet or not requests:
            return self.engine.run(requests)
        with tqdm(total=len(set(requests)), desc="Answering different requests") as bar:

            def show(done: int, _: int) -> None:
                bar.update(done - bar.n)

            return self.engine.run(requests, show)


def _usable(device: str | None, processes: Processes) -> str:
    """Return the device, or the CPU: lm-eval asks for a GPU by default, be there one or not."""
    cuda = torch.cuda.is_available()
    if device is None or (device.startswith("cuda") and not cuda):
        device = "cuda" if cuda else "cpu"
    if device.startswith("cuda") and processes.size > 1:
        return f"cuda:{processes.local_rank}"
    return device


def _unknown_argument(name: str) -> str:
    parameters = inspect.signature(KeepshotLM.__init__).parameters
    known = [n for n, p in parameters.items() if n != "self" and p.kind is not p.VAR_KEYWORD]
    return unknown("--model_args", name, known, f"known: {', '.join(known)}")


# lm-eval fills its table of models when it finds it empty: with one entry of ours it would not.
lm_eval("models")
lm_eval("api.registry").register_model("keepshot")(KeepshotLM)
