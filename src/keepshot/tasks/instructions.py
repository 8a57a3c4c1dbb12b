"""Prompts with verifiable instructions: what is asked for, and what each instruction needs.

Reads the public IFEval file (arXiv 2311.07911) in its own format: one object a line with `key`,
`prompt`, `instruction_id_list` and `kwargs`. Whether an answer does what is asked is judged in
`keepshot.judging`; nothing here looks at answers.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from keepshot.errors import TaskError, unknown
from keepshot.records import Split
from keepshot.tasks.source import read_objects

Kind = Literal["count", "relation", "text", "texts", "letter", "language"]
PUBLIC_SET = "ifeval"
PUBLIC_REPO, PUBLIC_FILE = "google/IFEval", "ifeval_input_data.jsonl"
RELATIONS = ("less than", "at least")

ARGUMENTS: dict[str, Mapping[str, Kind]] = {
    "keywords:existence": {"keywords": "texts"},
    "keywords:frequency": {"keyword": "text", "frequency": "count", "relation": "relation"},
    "keywords:forbidden_words": {"forbidden_words": "texts"},
    "keywords:letter_frequency": {
        "letter": "letter", "let_frequency": "count", "let_relation": "relation",
    },
    "language:response_language": {"language": "language"},
    "length_constraints:number_sentences": {"num_sentences": "count", "relation": "relation"},
    "length_constraints:number_paragraphs": {"num_paragraphs": "count"},
    "length_constraints:number_words": {"num_words": "count", "relation": "relation"},
    "length_constraints:nth_paragraph_first_word": {
        "num_paragraphs": "count", "nth_paragraph": "count", "first_word": "text",
    },
    "detectable_content:number_placeholders": {"num_placeholders": "count"},
    "detectable_content:postscript": {"postscript_marker": "text"},
    "detectable_format:number_bullet_lists": {"num_bullets": "count"},
    "detectable_format:constrained_response": {},
    "detectable_format:number_highlighted_sections": {"num_highlights": "count"},
    "detectable_format:multiple_sections": {"section_spliter": "text", "num_sections": "count"},
    "detectable_format:json_format": {},
    "detectable_format:title": {},
    "combination:two_responses": {},
    "combination:repeat_prompt": {"prompt_to_repeat": "text"},
    "startend:end_checker": {"end_phrase": "text"},
    "startend:quotation": {},
    "change_case:capital_word_frequency": {
        "capital_frequency": "count", "capital_relation": "relation",
    },
    "change_case:english_capital": {},
    "change_case:english_lowercase": {},
    "punctuation:no_comma": {},
}  # fmt: skip
"""The 25 instruction types, each with the arguments it needs, named as in the public file."""


@dataclass(frozen=True)
class Instruction:
    """One instruction: its type, and the values of its arguments (checked against `ARGUMENTS`)."""

    type: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class InstructionPrompt:
    """What a model is asked, and the instructions that its answer can be checked against."""

    key: str
    prompt: str
    instructions: tuple[Instruction, ...]


@dataclass(frozen=True)
class InstructionSet:
    """Prompts under a name; `version` is raised when an embedded set changes."""

    name: str
    version: int
    prompts: tuple[InstructionPrompt, ...]

    def fingerprint(self) -> str:
        """Return 16 hexadecimal digits that change whenever a prompt or an argument does."""
        content = [[p.key, p.prompt, [repr(i) for i in p.instructions]] for p in self.prompts]
        return hashlib.sha256(repr(content).encode()).hexdigest()[:16]

    def part(self, split: Split | None, limit: int | None = None) -> InstructionSet:
        """Return the prompts of one half, the first `limit` of them.

        Which half a prompt belongs to depends on its text alone, so that the same prompt never is
        chosen on in one run and reported in the next.

        Args:
            split: "validation", "test", or None for all.
            limit: None for all.
        """
        chosen = [p for p in self.prompts if split is None or _half(p.prompt) == split]
        if not chosen:
            raise TaskError(f"instruction set {self.name!r} has no {split} prompts; give more rows")
        return replace(self, prompts=tuple(chosen[:limit]))


def read_instructions(source: str) -> InstructionSet:
    """Read prompts in the public file's format.

    Args:
        source: a path, or `ifeval` for the public file (from the hub's cache or the hub).

    Raises:
        TaskError: naming file and line, if a row is of another form, an instruction is unknown, or
            its arguments do not fit it.
    """
    path = Path(source)
    if source == PUBLIC_SET:
        path = _download()
    prompts = [_prompt(row, where) for row, where in read_objects(path)]
    if not prompts:
        raise TaskError(f"{path}: is empty; expected one prompt with its instructions a line")
    return InstructionSet(source if source == PUBLIC_SET else path.name, 1, tuple(prompts))


def instruction(type_: str, given: Mapping[str, Any], where: str) -> Instruction:
    """Check one instruction and its arguments; None stands for an argument that is not there.

    Raises:
        TaskError: see `read_instructions`.
    """
    if type_ not in ARGUMENTS:
        listing = f"there are {len(ARGUMENTS)}, such as 'punctuation:no_comma'"
        raise TaskError(f"{where}: {unknown('instruction', type_, _by_tail(type_), listing)}")
    wanted = ARGUMENTS[type_]
    arguments = {name: value for name, value in given.items() if value is not None}
    for name in arguments.keys() - wanted.keys():
        expected = ", ".join(wanted) or "none"
        raise TaskError(
            f"{where}: instruction {type_!r} does not take {name!r}; its arguments: {expected}"
        )
    for name, kind in wanted.items():
        if name not in arguments:
            raise TaskError(f"{where}: instruction {type_!r} needs {name!r}")
        expected, fits = _KINDS[kind]
        if not fits(arguments[name]):
            raise TaskError(
                f"{where}: instruction {type_!r}: {name!r} is {arguments[name]!r}; "
                f"expected {expected}"
            )
    if arguments.get("nth_paragraph", 0) > arguments.get("num_paragraphs", 0) and (
        "nth_paragraph" in wanted
    ):
        raise TaskError(
            f"{where}: 'nth_paragraph' is {arguments['nth_paragraph']} of "
            f"{arguments['num_paragraphs']} paragraphs"
        )
    return Instruction(type_, {name: arguments[name] for name in wanted})


def _prompt(row: Mapping[str, Any], where: str) -> InstructionPrompt:
    prompt, types, given = row.get("prompt"), row.get("instruction_id_list"), row.get("kwargs")
    if not isinstance(prompt, str) or not prompt.strip():
        raise TaskError(f"{where}: field 'prompt' is missing or empty")
    if not isinstance(types, list) or not types:
        raise TaskError(f"{where}: field 'instruction_id_list' must be a list of names")
    if not isinstance(given, list) or len(cast(list[Any], given)) != len(cast(list[Any], types)):
        raise TaskError(
            f"{where}: field 'kwargs' must be a list with one object for each instruction"
        )
    pairs = zip(cast(list[Any], types), cast(list[Any], given), strict=True)
    found: list[Instruction] = []
    for type_, arguments in pairs:
        if not isinstance(type_, str) or not isinstance(arguments, Mapping | None):
            raise TaskError(f"{where}: {type_!r} with {arguments!r} is no instruction")
        found.append(instruction(type_, cast(Mapping[str, Any], arguments or {}), where))
    return InstructionPrompt(str(row.get("key", where)), prompt, tuple(found))


def _download() -> Path:
    try:
        return Path(hf_hub_download(PUBLIC_REPO, PUBLIC_FILE, repo_type="dataset"))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError):
        raise TaskError(
            f"instruction set {PUBLIC_SET!r}: {PUBLIC_FILE} of {PUBLIC_REPO} is not in the hub's "
            "local cache, and the hub cannot be reached;\ngive the path of the file, or use the "
            "embedded set"
        ) from None


def _half(prompt: str) -> Split:
    first = hashlib.sha256(prompt.encode()).digest()[0]
    return "validation" if first % 2 else "test"


def _by_tail(type_: str) -> Iterable[str]:
    """Compare with full names, or with the part after the colon where none was written."""
    return ARGUMENTS if ":" in type_ else [name.partition(":")[2] for name in ARGUMENTS]


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_text, cast(list[Any], value)))


_KINDS: dict[Kind, tuple[str, Callable[[Any], bool]]] = {
    "count": ("a whole number from 1", _is_count),
    "relation": (" or ".join(map(repr, RELATIONS)), lambda value: value in RELATIONS),
    "text": ("a text that is not empty", _is_text),
    "texts": ("a list of texts that are not empty", _are_texts),
    "letter": ("one character", lambda value: isinstance(value, str) and len(value) == 1),
    "language": (
        "a language code such as 'en'",
        lambda value: isinstance(value, str) and bool(re.fullmatch(r"[a-z]{2,3}(-[a-z]+)?", value)),
    ),
}


def types_of(prompts: Sequence[InstructionPrompt]) -> set[str]:
    """Return the instruction types that occur in `prompts`."""
    return {instruction.type for prompt in prompts for instruction in prompt.instructions}
