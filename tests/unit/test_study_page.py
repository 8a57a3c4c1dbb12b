"""The page of a study: its words and marks are those of its findings, and nothing else gets in."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from cohorts import made_items
from command import status
from keepshot.report.answer import sentences
from keepshot.report.study import read_study, write_study_report
from keepshot.study.document import StudyArm, StudyDocument
from keepshot.study.findings import findings
from keepshot.study.tables import markdown


def arm(recipe: str | None, target: float, retention: float) -> StudyArm:
    return StudyArm(
        model="small", target="support", recipe=recipe, lam=None, ask="few-shot", split="test",
        shots=4, icl=0.5, icl_ci95=(0.4, 0.6), retention=retention,
        retention_ci95=(retention - 0.1, retention + 0.1), target_score=target,
        target_ci95=(target - 0.05, target + 0.05), target_num_items=150, format_failure=0.0,
        label_leakage=0.0, num_tasks=3, num_items=48, num_seeds=1, tuning_seconds=None,
    )  # fmt: skip


def document(**changes: object) -> StudyDocument:
    content = {
        "name": "made", "question": "Is <b>this</b> so?", "total": 10, "done": 8, "failed": 1,
        "arms": [], "failures": [
            {"unit": "u", "label": "tune <i>x</i>", "reason": "it broke", "trace": "<script>"}
        ], **changes,
    }  # fmt: skip
    return StudyDocument.model_validate(content)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    found = findings(made_items(15, 5, 6, families=5, degraded=4), {"task-00": "first kind"})
    (folder / "study.json").write_text(document(findings=found).to_json(), encoding="utf-8")
    write_study_report(folder)
    return folder


def test_the_page_says_what_was_found(place: Path):
    page = (place / "report.html").read_text("utf-8")
    found = read_study(place).findings
    whole = next(c for c in found.correlations if (c.role, c.models) == ("question", "all"))  # type: ignore[union-attr]
    (first, *_) = said = sentences(found)
    assert first.startswith("Over 15 tuned models of 5 families")
    assert f"{whole.value:.2f}"[1:] in first
    assert any("for models not degraded (n = 11)" in one for one in said)
    assert any(one.startswith("The control: with \u201cbase direct\u201d") for one in said)
    assert first in page
    assert "n = 15 tuned models, 5 tasks, 30 items" in page
    assert "8 of 10 units done, 1 failed, 1 left" in page


def test_nothing_is_said_of_degraded_models_where_there_are_none(place: Path, tmp_path: Path):
    words = ("hollow", "by construction")
    assert all(word in (place / "report.html").read_text("utf-8") for word in words)
    found = findings(made_items(10, 5, 4, families=5), {})
    (tmp_path / "study.json").write_text(document(findings=found).to_json(), encoding="utf-8")
    write_study_report(tmp_path)
    assert not any(word in (tmp_path / "report.html").read_text("utf-8") for word in words)


def test_every_model_is_a_mark_and_degraded_ones_are_hollow(place: Path):
    figures = {path.stem for path in (place / "figures").iterdir()}
    names = ("models", "tasks", "by-task", "shares", "matrix")
    assert figures == {name + width for name in names for width in ("", "-narrow")}
    marks = re.findall(r"<path([^>]*)>\s*<title>model-\d+", svg(place, "models"))
    assert len(marks) == 15
    assert sum(" fill=" not in mark for mark in marks) == 4
    tasks = re.findall(r"<title>task-\d+: ", svg(place, "tasks"))
    assert len(tasks) == 5
    assert svg(place, "matrix").count("<title>spearman") == 6
    assert svg(place, "by-task").count('fill="white" stroke="#') == 4 * 5


def svg(place: Path, name: str) -> str:
    return (place / "figures" / f"{name}.svg").read_text("utf-8")


def test_a_page_stands_alone_and_shows_what_users_wrote_as_text(place: Path):
    page = (place / "report.html").read_text("utf-8")
    assert "Is &lt;b&gt;this&lt;/b&gt; so?" in page
    assert "<script" not in page
    assert "<i>x" not in page
    assert not re.findall(r'(?:src|href)="(?!#)', page)
    assert "default-src 'none'" in page


def test_recipes_and_targets_are_drawn_against_what_is_kept(tmp_path: Path):
    arms = [arm(None, 0.3, 1.0), arm("plain", 0.8, 0.2), arm("held", 0.78, 0.97)]
    (tmp_path / "study.json").write_text(document(arms=arms).to_json(), encoding="utf-8")
    assert status("report", str(tmp_path)) == 0
    drawn = svg(tmp_path, "kept-1")
    assert all(name in drawn for name in ("untuned", "plain", "held", "100%"))
    page = (tmp_path / "report.html").read_text("utf-8")
    assert "n = 48 items of 3 tasks, and 150 of the target" in page
    assert "Do tuned models do" not in page


def test_a_document_from_before_there_were_findings_is_read(tmp_path: Path):
    content = json.loads(document(arms=[arm("plain", 0.8, 0.2)]).to_json())
    assert "findings" not in content
    del content["arms"][0]["target_num_items"]
    (tmp_path / "study.json").write_text(json.dumps(content), encoding="utf-8")
    assert read_study(tmp_path).findings is None
    assert write_study_report(tmp_path).exists()


def test_what_cannot_be_read_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "study.json").write_text("{}", encoding="utf-8")
    assert status("report", str(tmp_path)) == 2
    assert "study.json: not a study's document" in capsys.readouterr().err


def test_the_report_has_a_short_table(place: Path):
    text = markdown(read_study(place))
    rows = [line for line in text.splitlines() if line.startswith("| tuned direct / base gold")]
    assert len(rows) == 8, "two kinds; all, not degraded, and with and without one tag"
    assert "| 15 (5) |" in rows[0]
    assert "share of the variance between models: base few-shot score" in text
