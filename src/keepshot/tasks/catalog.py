"""Every embedded task in one literal table, the suites, and tasks made of a user's file.

Reading the table costs nothing; examples are built, and assets fetched, by `load_task` alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

from keepshot.errors import TaskError, unknown
from keepshot.prompts import Example
from keepshot.tasks import composed, lexical, procedural, sentences, surface, targets, watched
from keepshot.tasks.lexical import AssetSource
from keepshot.tasks.pairs import cuts
from keepshot.tasks.source import SUFFIXES, read_examples_file
from keepshot.tasks.task import Kind, Task, group_by_input, seeded

if TYPE_CHECKING:
    from numpy.random import Generator

NUM_DEMONSTRATIONS = 64
NUM_VALIDATION = 100
NUM_TEST = 150

Builder: TypeAlias = "Callable[[AssetSource, Generator], Sequence[Example]]"
Role = Literal["suite", "anchor", "guard", "target"]
Sizes = tuple[int, int, int]
OF_AN_ANCHOR = {"capitals": "letter case", "twice": "repetition"}
"""Forms of composed answers that an anchor's rule makes as well."""


@dataclass(frozen=True)
class TaskEntry:
    """What is known of a task before its examples are built.

    `rule` is the kind of rule that an answer follows; anchors share none with the suites but
    `composed`, five of whose tasks have an anchor's. `assets` are the pinned packages that building
    fetches. `version` rises when questions change. `test` builds the test split where its questions
    were written apart from the others.
    """

    kind: Kind
    domain: str
    rule: str
    description: str
    source: str
    licence: str
    build: Builder
    assets: tuple[str, ...] = ()
    role: Role = "suite"
    version: int = 1
    num_validation: int = NUM_VALIDATION
    test: Builder | None = None


def _made(maker: procedural.Maker) -> Builder:
    return lambda store, generator: maker(generator)


def _read(reader: Callable[[AssetSource], list[Example]]) -> Builder:
    return lambda store, generator: reader(store)


def _translated(language: str) -> Builder:
    def build(store: AssetSource, generator: Generator) -> Sequence[Example]:
        return lexical.among_others(lexical.translations(store, language), generator)

    return build


def _written(name: str) -> Builder:
    return lambda store, generator: sentences.written(name)


def _code(
    kind: Kind, domain: str, rule: str, description: str, maker: procedural.Maker
) -> TaskEntry:
    return TaskEntry(kind, domain, rule, description, "made by code", "Apache-2.0", _made(maker))


def _anchor(rule: str, description: str, maker: procedural.Maker) -> TaskEntry:
    source, domain = "own word list, made by code", "written form"
    return TaskEntry(
        "exact", domain, rule, description, source, "Apache-2.0", _made(maker), role="anchor"
    )


def _guard(rule: str, description: str, maker: procedural.Maker) -> TaskEntry:
    return replace(_code("exact", "rewriting", rule, description, maker), role="guard")


def _instructions(description: str, maker: procedural.Maker) -> TaskEntry:
    return _target("exact", "instructions", "instructions", description, maker)


def _target(
    kind: Kind, domain: str, rule: str, description: str, maker: procedural.Maker
) -> TaskEntry:
    return TaskEntry(
        kind, domain, rule, description, "made by code", "Apache-2.0", _made(maker), role="target"
    )


def _composition(rule: composed.Rule) -> TaskEntry:
    kind: Kind = "exact" if rule.choices is None else "choice"
    named = OF_AN_ANCHOR.get(rule.name.rpartition("-")[2], "composition")
    return _code(kind, f"composed {rule.family}", named, rule.instruction, rule.questions)


def _text(domain: str, rule: str, description: str, name: str, kind: Kind = "choice") -> TaskEntry:
    source = "written for keepshot"
    return TaskEntry(kind, domain, rule, description, source, "Apache-2.0", _written(name))


CATALOG: dict[str, TaskEntry] = {
    "country-capital": TaskEntry(
        "exact", "knowledge", "recall", "a country -> its capital",
        "countryinfo 1.0.1", "MIT", _read(lexical.capitals), ("countryinfo",),
    ),
    "country-demonym": TaskEntry(
        "exact", "knowledge", "recall", "a country -> its people",
        "countryinfo 1.0.1", "MIT", _read(lexical.demonyms), ("countryinfo",),
    ),
    "country-continent": TaskEntry(
        "choice", "knowledge", "recall", "a country -> its continent",
        "countryinfo 1.0.1", "MIT", _read(lexical.continents), ("countryinfo",),
    ),
    "english-french": TaskEntry(
        "choice", "translation", "translation", "an English noun -> French, one of four words",
        "emoji 2.16.0 (Unicode CLDR names)", "BSD-3-Clause, Unicode-3.0", _translated("fr"),
        ("emoji",),
    ),
    "english-spanish": TaskEntry(
        "choice", "translation", "translation", "an English noun -> Spanish, one of four words",
        "emoji 2.16.0 (Unicode CLDR names)", "BSD-3-Clause, Unicode-3.0", _translated("es"),
        ("emoji",),
    ),
    "past-tense": TaskEntry(
        "exact", "morphology", "inflection", "a verb -> its past tense",
        "lemminflect 0.2.3", "MIT", _read(lexical.past_tenses), ("lemminflect",),
    ),
    "plural": TaskEntry(
        "exact", "morphology", "inflection", "a noun -> its plural",
        "lemminflect 0.2.3", "MIT", _read(lexical.plurals), ("lemminflect",),
    ),
    "comparative": TaskEntry(
        "exact", "morphology", "inflection", "an adjective -> its comparative",
        "lemminflect 0.2.3", "MIT", _read(lexical.comparatives), ("lemminflect",),
    ),
    "word-feeling": TaskEntry(
        "choice", "feeling", "classification", "a word -> positive or negative",
        "vaderSentiment 3.3.2", "MIT", _read(lexical.word_feelings), ("vaderSentiment",),
    ),
    "sentence-language": TaskEntry(
        "choice", "language", "classification", "a sentence -> its language (6)",
        "chatterbot-corpus 1.3.3", "BSD-3-Clause", _read(lexical.sentence_languages),
        ("chatterbot-corpus",),
    ),
    "addition": _code(
        "exact", "arithmetic", "arithmetic", "two digits plus one", procedural.addition
    ),
    "private-concatenation": _code(
        "exact", "arithmetic", "unknown sign", "digits side by side under an unknown sign",
        procedural.private_concatenation,
    ),
    "largest": _code(
        "exact", "arithmetic", "comparison", "three numbers -> the largest", procedural.largest
    ),
    "date-format": _code(
        "exact", "format", "reformatting", "2012-06-14 -> !06!14!2012!", procedural.date_format
    ),
    "reference-format": _code(
        "exact", "format", "reformatting", "page 17 of part 4 -> 4:17", procedural.reference_format
    ),
    "second-item": _code(
        "exact", "position", "position", "three words -> the second", procedural.second_item
    ),
    "last-item": _code(
        "exact", "position", "position", "a list -> its last item", procedural.last_item
    ),
    "look-up": _code(
        "exact", "extraction", "look-up", "a small table and a key -> the value",
        procedural.look_up,
    ),
    "pick-animal": _code(
        "exact", "selection", "selection by meaning", "three words -> the animal",
        procedural.pick_animal,
    ),
    "pick-colour": _code(
        "exact", "selection", "selection by meaning", "three words -> the colour",
        procedural.pick_colour,
    ),
    "word-group": _code(
        "choice", "word meaning", "classification", "a word -> its group (7)",
        procedural.word_groups,
    ),
    "number-name": _code(
        "exact", "numerals", "numerals", "forty-two -> 42", procedural.number_names
    ),
    "number-spelling": _code(
        "exact", "numerals", "numerals", "42 -> forty-two", procedural.number_spelling
    ),
    "extract-phone": _code(
        "exact", "extraction", "extraction", "a note -> the telephone number in it",
        procedural.phone_extraction,
    ),
    "extract-town": _code(
        "exact", "extraction", "extraction", "a note -> the town in it", procedural.town_extraction
    ),
    "extract-day": _code(
        "exact", "extraction", "extraction", "a note -> the day of the week in it",
        procedural.day_extraction,
    ),
    "sentence-topic": _text(
        "topic", "classification", "a sentence -> sport, weather, money, health or travel", "topic"
    ),
    "sentence-feeling": _text(
        "feeling", "classification", "a remark -> positive or negative", "feeling"
    ),
    "short-facts": _text("knowledge", "recall", "a question -> a word or two", "facts", "exact"),
    "opposite": _text("word meaning", "recall", "a word -> its opposite", "opposites", "exact"),
    "support": TaskEntry(
        "choice", "customer messages", "classification", "a message to a shop -> its class (6)",
        "written for keepshot", "Apache-2.0", _written("support"), role="target", version=2,
        num_validation=300, test=_written("support-test"),
    ),
    "instructions": _instructions("an instruction -> its answer (30 kinds)", cuts.diverse),
    "instructions-homogeneous": _instructions(
        "words to sort -> sorted (the same number, one kind)", cuts.homogeneous
    ),
    "request-letters": _target(
        "choice", "customer messages", "classification",
        "a letter of five sentences -> what is asked for (5)", targets.request_letters,
    ),
    "worked-sums": _target(
        "exact", "word problems", "reasoning", "a story with numbers -> the working and the result",
        targets.worked_sums,
    ),
    "compositions": _target(
        "exact", "compositions", "composition", "composed instructions, none of those measured",
        composed.training_questions,
    ),
    **{rule.name: _composition(rule) for rule in composed.measured_rules()},
    "upper-case": _anchor("letter case", "a word -> in capitals", surface.upper_case),
    "repeat-words": _anchor("repetition", "two words -> the same twice", surface.repeat_words),
    "title-case": _anchor("letter case", "two words -> each with a capital", surface.title_case),
    "drop-vowels": _anchor("letter deletion", "a word -> its consonants", surface.drop_vowels),
    "spell-out": _anchor("spelling", "a word -> its letters", surface.spell_out),
    "link-words": _anchor("conjunction", "two words -> joined by and", surface.link_words),
    "add-article": _guard("article", "a thing -> with a or an", watched.add_article),
    "exchange": _guard("exchange", "two things -> the other way round", watched.exchange),
    "initials": _guard("abbreviation", "a name -> its initials", watched.initials),
    "negate": _guard("negation", "a sentence -> denied", watched.negate),
    "ask-back": _guard("question", "a sentence -> as a question", watched.ask_back),
}  # fmt: skip

CORE = (
    "country-capital", "short-facts", "past-tense", "english-french", "word-feeling",
    "sentence-topic", "addition", "number-name", "extract-town", "look-up", "date-format",
    "reference-format", "private-concatenation", "second-item", "last-item",
)  # fmt: skip
SUITES: dict[str, tuple[str, ...]] = {
    "core": CORE,
    "full": (
        *CORE, "country-demonym", "country-continent", "english-spanish", "plural", "comparative",
        "opposite", "word-group", "sentence-feeling", "sentence-language", "largest",
        "number-spelling", "pick-animal", "pick-colour", "extract-phone",
        "extract-day",
    ),
    "composed": tuple(rule.name for rule in composed.measured_rules()),
    "anchors": tuple(name for name, entry in CATALOG.items() if entry.role == "anchor"),
    "guard": tuple(name for name, entry in CATALOG.items() if entry.role == "guard"),
}  # fmt: skip
TUNABLE: tuple[str, ...] = (
    *(name for name, entry in CATALOG.items() if entry.role == "target"),
    "extract-phone", "number-spelling", "sentence-language",
)  # fmt: skip
"""What can be tuned for: targets, and tasks outside `core` that hold more rows than they ask."""


def list_tasks() -> list[dict[str, str | list[str]]]:
    """List the embedded tasks, with the suites that each belongs to."""
    return [
        {
            "name": name, "kind": entry.kind, "domain": entry.domain,
            "suites": [suite for suite, members in SUITES.items() if name in members],
            "source": entry.source, "licence": entry.licence, "description": entry.description,
        }
        for name, entry in CATALOG.items()
    ]  # fmt: skip


def load_task(
    name_or_path: str,
    store: AssetSource,
    *,
    seed: int = 0,
    shots: int = 0,
    validation_share: float = 0.0,
    to_tune: bool = False,
) -> Task:
    """Build an embedded task, or the task that an examples file makes.

    Embedded tasks are split once for all; the keywords bear on files alone (`task_from_file`),
    but for `to_tune`: what no split of a `TUNABLE` task holds becomes its `train`.

    Raises:
        TaskError: if there is no such task or file, or the file cannot be used.
        AssetError: if a pinned package cannot be had.
    """
    if is_path(name_or_path):
        return task_from_file(
            Path(name_or_path), seed=seed, shots=shots, validation_share=validation_share
        )
    if name_or_path not in CATALOG:
        listing = "`keepshot tasks` lists all, and an examples file is named by its path"
        raise TaskError(unknown("task", name_or_path, [*CATALOG, *SUITES], listing))
    entry = CATALOG[name_or_path]
    trains = entry.role == "target" or (to_tune and name_or_path in TUNABLE)
    return _embedded(name_or_path, entry, store, trains=trains)


def resolve_tasks(
    names: Sequence[str],
    store: AssetSource,
    seed: int = 0,
    *,
    shots: int = 0,
    validation_share: float = 0.0,
) -> list[Task]:
    """Build the tasks that `names` stand for: suites, tasks and paths, also joined by commas.

    Each comes once, in the order of first mention. Names and files are checked before any asset is
    fetched.

    Args:
        names: Such as `["core,my.jsonl"]`.
        store: Gives the pinned packages.
        seed: For the split of files.
        shots: The most shots that will be asked of a file; see `task_from_file`.
        validation_share: Share of a file's questions to choose on; see `task_from_file`.

    Raises:
        TaskError: as `load_task`, and if nothing is named.
    """
    mentioned = [part.strip() for name in names for part in name.split(",") if part.strip()]
    wanted = dict.fromkeys(one for name in mentioned for one in SUITES.get(name, (name,)))
    if not wanted:
        raise TaskError(f"no task is named; name suites ({', '.join(SUITES)}), tasks or files")
    files = {
        name: load_task(name, store, seed=seed, shots=shots, validation_share=validation_share)
        for name in wanted
        if name not in CATALOG
    }
    _check_file_names(list(files))
    return [files[name] if name in files else load_task(name, store) for name in wanted]


def _check_file_names(paths: Sequence[str]) -> None:
    seen: dict[str, str] = {}
    for path in paths:
        other = seen.setdefault(Path(path).name, path)
        if other != path:
            raise TaskError(
                f"{path} and {other} have the same file name, which results go under; rename one"
            )


def task_from_file(
    path: Path, *, seed: int = 0, validation_share: float = 0.0, shots: int = 0
) -> Task:
    """Make a task of an examples file, used whole: a pool of demonstrations, the rest is test.

    The pool is at most 64 rows and half of the file at most, unless `shots` needs more. Rows that
    ask the same thing stay on one side. It is a choice task if the rows have choices.

    Args:
        path: JSONL, CSV or parquet.
        seed: Of the split.
        validation_share: Share of the rows outside the pool that become validation, not test.
        shots: How many demonstrations will be asked for at most.

    Raises:
        TaskError: if the file cannot be used, or has no more rows than shots.
    """
    assert 0 <= validation_share < 1
    content = read_examples_file(path)
    num_rows = len(content.examples)
    if num_rows <= shots:
        raise TaskError(
            f"{path}: has {num_rows} rows, too few for {shots} shots and a question; "
            "ask for fewer shots or give more rows"
        )
    num_pool = min(NUM_DEMONSTRATIONS, max(num_rows // 2, shots))
    groups = group_by_input(content.examples)
    order = seeded("file", seed).permutation(len(groups))
    shuffled = [groups[int(index)] for index in order]
    pool, rest = take_groups(shuffled, num_pool)
    num_rest = sum(map(len, rest))
    validation, test = take_groups(rest, round(num_rest * validation_share))
    return Task(
        name=path.name,
        kind="exact" if content.examples[0].choices is None else "choice",
        version=1,
        domain="file",
        description=f"rows of {path.name}",
        demonstrations=_flat(pool),
        validation=_flat(validation),
        test=_flat(test),
        template=content.template,
    )


def _embedded(name: str, entry: TaskEntry, store: AssetSource, *, trains: bool) -> Task:
    generator = seeded(name, entry.version)
    groups = group_by_input(entry.build(store, generator))
    pool = [groups[int(index)][0] for index in generator.permutation(len(groups))]
    apart = tuple(entry.test(store, generator)) if entry.test else ()
    num_test = 0 if apart else NUM_TEST
    demonstrations, validation, test = _sizes(len(pool), entry.num_validation, num_test)
    ends = demonstrations, demonstrations + validation, demonstrations + validation + test
    return Task(
        name=name,
        kind=entry.kind,
        version=entry.version,
        domain=entry.domain,
        description=entry.description,
        demonstrations=tuple(pool[: ends[0]]),
        validation=tuple(pool[ends[0] : ends[1]]),
        test=apart or tuple(pool[ends[1] : ends[2]]),
        train=tuple(pool[ends[2] :]) if trains else (),
    )


def _sizes(available: int, num_validation: int, num_test: int) -> Sizes:
    """Split a source: the full sizes if it holds enough, else the same proportions, at least 32."""
    wanted = NUM_DEMONSTRATIONS + num_validation + num_test
    if available >= wanted:
        return NUM_DEMONSTRATIONS, num_validation, num_test
    demonstrations = min(NUM_DEMONSTRATIONS, max(32, available * NUM_DEMONSTRATIONS // wanted))
    validation = (available - demonstrations) * num_validation // (num_validation + num_test)
    return demonstrations, validation, available - demonstrations - validation


def take_groups(
    groups: Sequence[list[Example]], count: int
) -> tuple[list[list[Example]], list[list[Example]]]:
    """Take whole groups, in order, until `count` rows are reached; return taken and left."""
    taken: list[list[Example]] = []
    left: list[list[Example]] = []
    room = count
    for group in groups:
        fits = len(group) <= room
        (taken if fits else left).append(group)
        room -= len(group) if fits else 0
    return taken, left


def _flat(groups: Sequence[list[Example]]) -> tuple[Example, ...]:
    return tuple(example for group in groups for example in group)


def is_path(text: str) -> bool:
    """Say whether `text` is meant as the path of an examples file, not as an embedded task."""
    if text in CATALOG:
        return False
    return text.endswith(SUFFIXES) or "/" in text or "\\" in text or is_file(text)


def is_file(text: str) -> bool:
    """Say whether a file lies at `text`; what is too long for a path names none."""
    try:
        return Path(text).is_file()
    except OSError:
        return False
