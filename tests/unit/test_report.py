"""The report: what it says, what it escapes, and that its pictures are whole.

All figures here are invented; only what the report makes of them is tested.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import random
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from rich.console import Console

from keepshot.errors import ConfigError
from keepshot.records import (
    Cost,
    ItemResult,
    ModelRecord,
    PathPoint,
    PickRecord,
    ResultDocument,
    SummaryRow,
    TrainingRecord,
    write_items,
)
from keepshot.report import compare, headline, trajectory_chart, view, write_report
from keepshot.report.labels import Box, Wish, place
from keepshot.report.terminal import path_table, scores_table, summary_table
from keepshot.report.words import percent, score, visible
from keepshot.scoring.summary import path_points, scores, summarise

HOSTILE = "<script>alert(1)</script>"
TASKS = {
    "antonym": 0.0, "country-capital": 0.0, "english-french": 0.0, "present-past": 0.0,
    "boolean": 0.5, "spam": 0.5, "emotion": 0.25, "intent": 1 / 7, "city": 0.0,
    "arithmetic": 0.0, "letter-rule": 0.0, "question-kind": 1 / 6,
}  # fmt: skip
CLASSES = ["refund", "delivery", "password", "billing", "cancel", "other"]
ABILITY = {"before": 0.62, "plain": 0.1, "gentle": 0.54, "kept": 0.61, "blended": 0.42}
TARGET = {"before": 0.02, "plain": 0.93, "gentle": 0.78, "kept": 0.91, "blended": 0.85}


def draw_items(
    arm: str,
    ability: float,
    target: float | None,
    *,
    lam: float | None = None,
    split: str = "test",
    num_items: int = 20,
    model: str = "smollm2-135m-instruct",
) -> list[ItemResult]:
    """Invent one arm's rows: the same questions for every arm, answered as well as `ability`."""
    rows: list[ItemResult] = []
    cells = [
        (t, c, k, s) for t, c in TASKS.items() for k in (0, 4) for s in ((0, 1) if k else (0,))
    ]
    if target is not None:
        cells.append(("support", 1 / 6, 0, 0))
    for task, chance, shots, seed in cells:
        for number in range(num_items):
            key = f"{task}-{split}-{number}"
            luck = random.Random(f"{key}-{shots}-{seed}").random()
            skill = target if task == "support" else ability * (0.35 if shots == 0 else 1.0)
            assert skill is not None
            right = luck < chance + (1 - chance) * skill
            choices = CLASSES if chance else []
            gold = CLASSES[number % 6] if chance else f"answer {number}"
            wrong = CLASSES[(number + 1) % 6] if chance else ["refund", "", "no idea"][number % 3]
            rows.append(
                ItemResult(
                    arm=arm, model=model, lam=lam, task=task,
                    split="test" if split == "test" else "validation", shots=shots, seed=seed,
                    item=hashlib.sha256(key.encode()).hexdigest()[:12],
                    question=f"{task} question {number}", gold=gold,
                    answer=gold if right else wrong, choices=choices,
                    log_likelihoods=[-1.0] * len(choices), correct=float(right),
                    correct_per_character=None, format_failure=float(not right and not choices),
                    label_leakage=float(not right and not choices and number % 3 == 0),
                )
            )  # fmt: skip
    return rows


@dataclass
class Run:
    """A document and its rows, ready to be written as a run directory."""

    document: ResultDocument
    items: list[ItemResult] = field(default_factory=list)

    def write(self, run_dir: Path) -> Path:
        run_dir.mkdir(parents=True)
        (run_dir / "results.json").write_text(self.document.to_json(), encoding="utf-8")
        if self.items:
            write_items(self.items, run_dir / "items.parquet")
        return run_dir


def invent_path() -> list[PathPoint]:
    rows = {
        lam: draw_items("path", 0.62 - 0.52 * lam**1.5, 0.02 + 0.91 * min(1, lam * 1.8) ** 0.7,
                        lam=lam, split="validation")
        for lam in (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)
    }  # fmt: skip
    return path_points(rows, rows[0.0], target="support", split="validation")


def invent_training(arm: str, method: str, keep: list[str], rate: float) -> TrainingRecord:
    noise = random.Random(arm)
    losses = [
        {"step": float(step), "loss": 3 * math.exp(-step / 12) + noise.random() * 0.3,
         **({"next_token": 2.6 * math.exp(-step / 12), "kl": 0.2 * noise.random()} if keep else {})}
        for step in range(1, 61)
    ]  # fmt: skip
    return TrainingRecord(
        arm=arm, method=method, keep=keep, learning_rate=rate, steps=60, seconds=81.4,
        num_trainable=134_515_008 if method == "full" else 4_884_480, losses=losses,
    )  # fmt: skip


def invent_run(
    ability: dict[str, float] = ABILITY, target: dict[str, float] = TARGET, num_items: int = 20
) -> Run:
    """Invent a whole run with five arms and a path."""
    items = [
        row
        for arm in ability
        for row in draw_items(arm, ability[arm], target[arm], num_items=num_items,
                              lam=0.4 if arm == "blended" else None)
    ]  # fmt: skip
    digest = hashlib.sha256(b"weights").hexdigest()
    document = ResultDocument(
        models=[
            ModelRecord(reference=arm, sha256=digest, num_parameters=134_515_008, dtype="float32")
            for arm in ability
        ],
        scores=scores(items, dict.fromkeys([*TASKS, "support"], 1)),
        summary=summarise(items, target="support"),
        cost=Cost(seconds=214.2, tokens_prefilled=412_339, tokens_naive=2_204_118),
        target_task="support",
        path=invent_path(),
        pick=PickRecord.model_validate(
            {"rule": "keep-target:0.9", "lambda": 0.4,
             "reason": "the largest retention among lambdas with .9 of the tuned target score"}
        ),
        training=[
            invent_training("plain", "full", [], 1e-4),
            invent_training("gentle", "full", [], 2e-5),
            invent_training("kept", "lora", ["kl"], 1e-3),
        ],
    )  # fmt: skip
    return Run(document, items)


@pytest.fixture(scope="module")
def run() -> Run:
    return invent_run()


class Page(HTMLParser):
    """What a browser would make of the page: elements, tables by id, text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.text = ""
        self.source = ""
        self._table: list[list[str]] | None = None
        self._in_cell = self._in_style = False

    @classmethod
    def read(cls, path: Path) -> Page:
        page = cls()
        page.source = path.read_text(encoding="utf-8")
        page.feed(page.source)
        page.close()
        page.path = path
        return page

    path: Path

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._in_style = tag == "style"
        if tag == "table":
            self._table = self.tables.setdefault(dict(attrs).get("id") or "", [])
        elif tag == "tr" and self._table is not None:
            self._table.append([])
        elif tag in ("td", "th") and self._table:
            self._table[-1].append("")
            self._in_cell = True

    def handle_endtag(self, tag: str) -> None:
        if tag == "table":
            self._table = None
        if tag in ("td", "th"):
            self._in_cell = False

    def handle_data(self, data: str) -> None:
        if self._in_style:
            return
        self.text += data
        if self._in_cell and self._table:
            self._table[-1][-1] += data if not data.startswith("[") else f" {data}"

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


@pytest.fixture(scope="module")
def page(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Page:
    """Write the report of a whole run whose model wrote mischief, and parse it."""
    spoiled = [
        replace(
            item,
            question=f"{HOSTILE} {item.question}",
            answer=f"{HOSTILE}\n\x1b[31m\u202e" + "x" * 500 if item.arm == "plain" else item.answer,
        )
        for item in run.items
    ]
    run_dir = Run(run.document, spoiled).write(tmp_path_factory.mktemp("report") / "run")
    (run_dir / "spec.yaml").write_text(f"name: demo\nnote: '{HOSTILE}'\n", encoding="utf-8")
    environment = {"python": "3.11", "packages": {"torch": "2.13.0"}, "odd": HOSTILE}
    (run_dir / "environment.json").write_text(json.dumps(environment), encoding="utf-8")
    path = write_report(run_dir)
    assert path == run_dir / "report.html"
    return Page.read(path)


def test_what_a_model_wrote_is_shown_and_never_run(page: Page) -> None:
    assert page.named("script") == []
    assert HOSTILE not in page.source
    shown = page.text.count(HOSTILE)
    assert shown >= 20 + 20 + 2  # questions, plain's answers, spec and environment
    assert "\u23ce" in page.text
    assert "\u241b[31m<U+202E>" in page.text
    assert "\x1b" not in page.source
    assert "\u202e" not in page.source
    written = len(HOSTILE) + 1 + 6 + 500
    assert f"(+{written - 160} characters)" in page.text
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)


def test_page_loads_nothing(page: Page) -> None:
    for tag, attrs in page.tags:
        assert tag not in ("link", "iframe", "object", "embed", "img", "base")
        assert "src" not in attrs
        if "href" in attrs:
            assert tag == "a"
            assert str(attrs["href"]).startswith("https://arxiv.org/abs/")
    assert "@import" not in page.source
    assert "url(http" not in page.source
    (policy,) = [m["content"] for m in page.named("meta") if "http-equiv" in m]
    assert policy is not None
    assert policy.startswith("default-src 'none'")


def test_summary_table_repeats_the_document(page: Page, run: Run) -> None:
    table = page.tables["summary"]
    rows = {cells[0]: cells for cells in table[1:]}
    assert list(rows) == ["before", "plain", "gentle", "kept", "blended"]
    for row in run.document.summary:
        cells = rows[row.arm]
        low, high = row.icl_ci95
        column = {4: 3, 0: 4}[row.shots]
        assert cells[column] == f"{score(row.icl)} [{score(low)}, {score(high)}]"
        assert row.target_ci95 is not None
        assert cells[2].startswith(score(row.target))
        if row.shots == 4:
            assert cells[5].startswith("" if row.arm == "before" else percent(row.changed)[:-2])
            assert cells[6] == str(row.num_items) == "480"
            assert cells[1].replace("\u00a0", " ").startswith(percent(row.retention))
    assert rows["plain"][7] == "full fine-tuning, learning rate 1e-4, 60 steps"
    assert rows["kept"][7] == "LoRA, learning rate 1e-3, 60 steps, keep terms: kl"
    assert "untuned + 0.4 x (plain - untuned)" in rows["blended"][7]


def test_formats_path_and_cost_repeat_the_document(page: Page, run: Run) -> None:
    plain = [i for i in run.items if i.arm == "plain" and i.shots == 4]
    failure = sum(item.format_failure for item in plain) / len(plain)
    leakage = sum(item.label_leakage for item in plain) / len(plain)
    row = next(cells for cells in page.tables["format"] if cells[0] == "plain")
    shown = [cell.replace("\u00a0", " ") for cell in row]
    assert shown == ["plain", percent(failure), percent(leakage), "480"]
    picked = [cells for cells in page.tables["path"] if "picked" in cells[0]]
    assert [cells[0] for cells in picked] == ["0.4 (picked)"]
    assert len(page.tables["path"]) == 1 + 9
    assert "412,339 tokens" in page.text
    assert "5.3 times as many" in page.text
    assert run.document.models[0].sha256 in page.text
    best = max(p.retention or 0 for p in run.document.path if p.lam > 0)
    assert f"any blend on the path kept is {percent(best)}" in page.text.replace("\u00a0", " ")


def test_figures_are_svg_with_descriptions(page: Page) -> None:
    folder = page.path.parent / "figures"
    names = {path.name for path in folder.iterdir()}
    assert names == {
        f"{name}{width}.svg"
        for name in ("trajectory", "tasks", "tasks-along", "conduct", "training")
        for width in ("", "-narrow")
    }
    for path in folder.iterdir():
        root = ElementTree.parse(path).getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert root.get("viewBox")
        assert root.get("role") == "img"
        assert len(root.get("aria-label", "")) > 20
    text = "".join(ElementTree.parse(folder / "trajectory.svg").getroot().itertext())
    for label in ("before", "plain", "gentle", "kept", "blended", "\u03bb 0", "\u03bb 1"):
        assert label in text
    assert "plain: kept 2" in text  # hover title with the figures
    drawn = [attrs.get("class") for attrs in page.named("svg")]
    assert drawn.count("wide") == drawn.count("narrow") == 5
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))


def test_tasks_are_sorted_by_loss(run: Run) -> None:
    rows = view.task_scores(run.document)
    by_task: dict[str, dict[str, float]] = {}
    for row in rows:
        by_task.setdefault(row.task, {})[row.arm] = row.value
    losses = [values["before"] - values["plain"] for values in by_task.values()]
    assert losses == sorted(losses, reverse=True)
    assert set(by_task) == set(TASKS)  # the target is no task that could be lost
    assert all(row.num_draws == 2 and row.num_items == 20 for row in rows)


def test_twenty_answers_lost_by_plain_take_turns(run: Run) -> None:
    found = view.changes(run.document, run.items)
    assert found is not None
    assert (found.before, found.after, len(found.shown)) == ("before", "plain", 20)
    rows = {(i.arm, i.task, i.item): i for i in run.items if i.shots == 4 and i.seed == 0}
    keys = [(task, item) for arm, task, item in rows if arm == "before"]
    before = [rows["before", *key].correct for key in keys]
    plain = [rows["plain", *key].correct for key in keys]
    pairs = list(zip(before, plain, strict=True))
    assert found.num_compared == len(pairs) == 240
    assert found.num_lost == pairs.count((1.0, 0.0))
    assert found.num_gained == pairs.count((0.0, 1.0))
    assert len({changed.task for changed in found.shown[: len(TASKS)]}) == len(TASKS)
    for changed in found.shown:
        assert [arm for arm, _, _ in changed.answers] == list(ABILITY)
        assert [correct for _, _, correct in changed.answers[:2]] == [True, False]


def row(
    arm: str, retention: float, target: float, half: float = 0.03, lam: float | None = None
) -> SummaryRow:
    return SummaryRow.model_validate(
        {
            "arm": arm, "model": "m", "lambda": lam, "shots": 4, "icl": retention / 2,
            "icl_ci95": (retention / 2 - half, retention / 2 + half), "icl_gain": 0.2,
            "retention": retention, "retention_ci95": (retention - half, retention + half),
            "target": target, "target_ci95": (target - half, target + half), "num_items": 960,
        }
    )  # fmt: skip


def of_rows(*rows: SummaryRow) -> ResultDocument:
    return ResultDocument(models=[], scores=[], summary=list(rows), cost=Cost())


def test_headline_of_a_run_where_everything_differs() -> None:
    text = headline(
        of_rows(
            row("before", 1.0, 0.02), row("plain", 0.12, 0.91), row("gentle", 0.7, 0.8),
            row("kept", 0.99, 0.9), row("blended", 0.6, 0.84, lam=0.4),
        )
    )  # fmt: skip
    assert text.startswith(
        "Plain fine-tuning kept 12 % [9, 15] of few-shot ability; keepshot's recipe kept 99 % "
        "[96, 102], at a similar target score (.90 against .91, not significantly different)."
    )
    assert (
        "Gentle fine-tuning kept 70 % [67, 73] at a target score of .80: "
        "less few-shot ability than keepshot's recipe, and a lower target score."
    ) in text
    assert "(lambda = 0.4) kept 60 % [57, 63] at a target score of .84" in text
    assert "without further training: more than plain." in text
    assert text.endswith("4 examples (n = 960); brackets are 95 % intervals.")


def test_headline_claims_no_difference_that_was_not_found() -> None:
    text = headline(
        of_rows(row("before", 1, 0), row("plain", 0.95, 0.9), row("gentle", 0.99, 0.9),
                row("kept", 0.98, 0.89), row("blended", 0.97, 0.88, lam=0.4))
    )  # fmt: skip
    assert text.count("not significantly different") == 5
    for claim in ("less", "more", "lower", "higher", "same"):
        assert f" {claim} " not in text


def test_headline_says_so_when_gentle_is_better() -> None:
    text = headline(
        of_rows(row("before", 1, 0), row("plain", 0.3, 0.9), row("gentle", 0.95, 0.91),
                row("kept", 0.8, 0.7))
    )  # fmt: skip
    assert "at a lower target score (.70 against .90)" in text
    assert "more few-shot ability than keepshot's recipe, and a higher target score." in text


def test_headline_of_measured_models() -> None:
    first, second, third = (
        row(name, kept, 0.0).model_copy(update={"target": None, "target_ci95": None})
        for name, kept in (("org/one", 1.0), ("runs/a/model", 0.4), ("three", 0.99))
    )
    alone = headline(of_rows(first))
    assert alone.startswith("one scores .50 [.47, .53] with 4 examples, .20 more than with none.")
    text = headline(of_rows(first, second, third))
    assert text.startswith(
        "a/model has 40 % [37, 43] of the few-shot ability of one (.20 [.17, .23] against "
        ".50 [.47, .53])."
    )
    assert "three has 99 % [96, 102]" in text
    assert text.count("not significantly different") == 1


def test_headline_of_a_blend(run: Run) -> None:
    blend = of_rows(
        row("base", 1.0, 0.0, lam=0),
        row("tuned", 0.1, 0.9, lam=1),
        row("blended", 0.6, 0.8, lam=0.4),
    ).model_copy(update={"path": run.document.path, "pick": run.document.pick})
    text = headline(blend)
    assert "(lambda = 0.4) kept 60 % [57, 63] at a target score of .80" in text
    assert "more than the tuned model, which kept 10 % [7, 13] at a target score of .90." in text
    assert "The rule keep-target:0.9 picked this lambda." in text
    from_path = headline(blend.model_copy(update={"summary": []}))
    point = next(p for p in run.document.path if p.lam == 0.4)
    assert f"Blended at lambda = 0.4, the model has {percent(point.retention)}" in from_path
    assert "Figures are from validation items." in from_path


def test_headline_of_nothing() -> None:
    assert headline(of_rows()) == "Nothing was measured."


def test_headline_of_less_usual_runs(run: Run) -> None:
    before, plain = row("before", 1, 0), row("plain", 0.2, 0.9)
    alone = headline(of_rows(before, plain))
    assert alone.startswith(
        "Plain fine-tuning kept 20 % [17, 23] of few-shot ability at a target score of .90."
    )
    none = PickRecord.model_validate({"rule": "knee", "lambda": None, "reason": "the path is flat"})
    unpicked = of_rows(before, plain).model_copy(update={"pick": none})
    assert "No lambda on the path was picked: the path is flat." in headline(unpicked)
    unknown = {"retention": None, "retention_ci95": None}
    at_chance = of_rows(*(r.model_copy(update=unknown) for r in (before, plain)))
    assert "kept a few-shot score of .10 [.07, .13]" in headline(at_chance)
    tuned = of_rows().model_copy(update={"training": run.document.training})
    assert headline(tuned) == "Tuned for 60 steps (LoRA); few-shot ability was not measured."
    no_pick = of_rows().model_copy(update={"path": run.document.path, "pick": none})
    assert "the most on the path above 0 is" in headline(no_pick)
    assert headline(no_pick).endswith("No lambda was picked: the path is flat.")
    assert headline(no_pick).startswith("At lambda = 1 the model has ")
    beyond = [p.model_copy(update={"lam": p.lam + 0.5}) for p in run.document.path if p.lam == 1.0]
    further = no_pick.model_copy(update={"path": [*run.document.path, *beyond]})
    assert headline(further).startswith("At lambda = 1 the model has ")


def test_report_of_measured_models_without_target_path_or_items(tmp_path: Path) -> None:
    items = [
        item for model, ability in (("a", 0.6), ("b<i>", 0.2))
        for item in draw_items(model, ability, None, model=model, num_items=6)
    ]  # fmt: skip
    document = ResultDocument(
        models=[], scores=scores(items, dict.fromkeys(TASKS, 1)), summary=summarise(items),
        cost=Cost(seconds=1.0),
    )  # fmt: skip
    assert trajectory_chart(document) is None
    page = Page.read(write_report(Run(document).write(tmp_path / "run")))
    assert [cells[0] for cells in page.tables["summary"][1:]] == ["a", "b<i>"]
    assert "path" not in page.tables
    assert "Answers that changed" not in page.text
    assert {path.name for path in (page.path.parent / "figures").iterdir()} == {
        "tasks.svg",
        "tasks-narrow.svg",
    }


def test_trajectory_without_path_and_with_both_splits(run: Run) -> None:
    bare = run.document.model_copy(update={"path": [], "pick": None})
    chart = trajectory_chart(bare, "narrow")
    assert chart is not None
    assert "validation items" not in json.dumps(chart.to_dict())
    on_test = [point.model_copy(update={"split": "test"}) for point in run.document.path]
    both = run.document.model_copy(update={"path": [*run.document.path, *on_test]})
    chart = trajectory_chart(both)
    assert chart is not None
    dashes = [
        layer["mark"]["strokeDash"]
        for layer in chart.to_dict()["layer"]
        if layer["mark"]["type"] == "line" and "strokeDash" in layer["mark"]
    ]
    assert dashes == [[6, 4], [1, 0]]


def test_labels_keep_clear_of_each_other() -> None:
    wishes = [Wish(f"label {n}", 200 + 3 * n, 150, 12) for n in range(6)]
    frame = Box(0, 0, 640, 400)
    places = place(wishes, [], frame)
    boxes = [Box(p.x - 0.3 * 12 * 7, p.y - 7.2, p.x + 0.3 * 12 * 7, p.y + 7.2) for p in places]
    for index, box in enumerate(boxes):
        assert box.overlap(frame) == pytest.approx((box.right - box.left) * (box.bottom - box.top))
        assert sum(box.overlap(other) for other in boxes[:index]) == pytest.approx(0)


def test_compare_puts_every_arm_of_every_run_on_one_page(run: Run, tmp_path: Path) -> None:
    dirs = [Run(run.document).write(tmp_path / name) for name in ("one", "two")]
    page = Page.read(compare(dirs, tmp_path / "out"))
    rows = page.tables["summary"][1:]
    assert [(cells[0], cells[1]) for cells in rows] == [
        (name, arm) for name in ("one", "two") for arm in ABILITY
    ]
    kept = next(r for r in run.document.summary if r.arm == "kept" and r.shots == 4)
    assert rows[3][3].replace("\u00a0", " ").startswith(percent(kept.retention))
    assert "not measured on the same tasks" not in page.text
    text = "".join(
        ElementTree.parse(tmp_path / "out" / "figures" / "compare.svg").getroot().itertext()
    )
    assert "kept, one" in text
    assert "kept, two" in text


def test_unfinished_or_broken_run_directories_are_refused(run: Run, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no finished run"):
        write_report(tmp_path)
    run_dir = Run(run.document).write(tmp_path / "run")
    (run_dir / "environment.json").write_text("{", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"environment\.json: not valid JSON"):
        write_report(run_dir)
    assert not (run_dir / "report.html").exists()


def test_terminal_tables_fit_and_carry_the_figures(run: Run) -> None:
    console = Console(width=100, record=True, file=io.StringIO())
    for table in (summary_table, path_table, scores_table):
        console.print(table(run.document))
    text = console.export_text()
    assert all(len(line) <= 100 for line in text.splitlines())
    assert "\u2026" not in text
    kept = next(r for r in run.document.summary if r.arm == "kept" and r.shots == 4)
    assert kept.retention_ci95 is not None
    line = next(line for line in text.splitlines() if line.startswith("kept"))
    for part in (score(kept.icl), percent(kept.retention), str(kept.num_items)):
        assert part in line
    assert "* 0.4" in text
    hostile = run.document.model_copy(
        update={"summary": [run.document.summary[0].model_copy(update={"arm": "[red]x"})]}
    )
    console.print(summary_table(hostile))
    assert "[red]x" in console.export_text()  # user text is no markup


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.914, ".91"), (1.0, "1.00"), (0.999, "1.00"), (0.0, ".00"), (-0.001, ".00"), (-0.05, "-.05"),
     (None, "n/a")],
)  # fmt: skip
def test_scores_are_written_short(value: float | None, text: str) -> None:
    assert score(value) == text


def test_unseen_characters_are_shown() -> None:
    assert (
        visible("a\tb\x00\x7f\u200b\ud800\ufffe")
        == "a\u2409b\u2400<U+007F><U+200B><U+D800><U+FFFE>"
    )
    assert visible("naive \u00e9 \u4e2d \U0001f468\u200d\U0001f469") == (
        "naive \u00e9 \u4e2d \U0001f468\u200d\U0001f469"
    )
    assert visible("abcdef", limit=4) == "abcd \u2026 (+2 characters)"
