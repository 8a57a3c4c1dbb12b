"""What the figures along lambda show: the numbers of the document, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from keepshot.records import (
    Cost,
    InstructionScore,
    ItemResult,
    PickRecord,
    RestoredPart,
    ResultDocument,
    write_items,
    write_text,
)
from keepshot.report import compare, write_report
from keepshot.report.along import conduct_chart, relative_chart, tasks_along_chart
from keepshot.report.figures import trajectory_chart
from keepshot.report.flips import flips
from keepshot.report.following import following_chart
from keepshot.report.restored import restored_chart
from keepshot.scoring.summary import path_points, summarise


def item(lam: float, number: int, correct: bool, *, task: str = "words", seed: int = 0):
    return ItemResult(
        arm="path", model="m", lam=lam, task=task, split="validation",
        shots=0 if task == "target" else 4, seed=seed, item=f"{number:02d}",
        question=f"question <{number}>", gold="gold", answer="gold" if correct else "wrong answer",
        choices=[], log_likelihoods=[], correct=float(correct), correct_per_character=None,
        format_failure=float(not correct and lam == 1.0), label_leakage=0.0,
    )  # fmt: skip


def rows() -> dict[float, list[ItemResult]]:
    """Twenty questions: 16, 12 and 4 right at lambda 0, 0.5 and 1; the target 2, 14 and 16."""
    found: dict[float, list[ItemResult]] = {}
    for lam, right, hits in ((0.0, 16, 2), (0.5, 12, 14), (1.0, 4, 16)):
        found[lam] = [item(lam, n, n < right, seed=s) for n in range(20) for s in (0, 1)]
        found[lam] += [item(lam, n, n < hits, task="target") for n in range(20)]
    return found


def document(lam: float | None = 0.5) -> ResultDocument:
    found = rows()
    ends = [
        ItemResult(**{**vars(row), "arm": arm, "split": "test"})
        for arm, at in (("base", 0.0), ("tuned", 1.0))
        for row in found[at]
    ]
    return ResultDocument(
        models=[],
        scores=[],
        summary=summarise(ends, target="target"),
        cost=Cost(),
        target_task="target",
        path=path_points(found, found[0.0], target="target", split="validation"),
        pick=PickRecord.model_validate(
            {"rule": "knee", "lambda": lam, "reason": "r", "pareto": [0.0, 0.5, 1.0],
             "lambda_ci95": (0.5, 0.5), "share_same": 0.9, "share_none": 0.0}
        ),
    )  # fmt: skip


def values(chart: object) -> list[dict]:
    """All rows of all data in a chart."""
    datasets = chart.to_dict()["datasets"]  # type: ignore[attr-defined]
    return [row for found in datasets.values() for row in found]


def test_flips_are_counted_by_step() -> None:
    found = flips([row for own in rows().values() for row in own])
    assert found is not None
    assert found.steps == [(0.0, 0.5, 4, 0), (0.5, 1.0, 8, 0)]
    assert (found.num_flipped, found.num_back, found.num_questions) == (12, 0, 20)
    assert [flip.places for flip in found.shown][:2] == [[(0.5, 1.0, False)]] * 2
    back = [item(lam, 0, right) for lam, right in ((0.0, True), (0.5, False), (1.0, True))]
    again = flips(back)
    assert again is not None
    assert again.steps == [(0.0, 0.5, 1, 0), (0.5, 1.0, 0, 1)]
    assert again.num_back == 1
    assert flips([]) is None
    assert flips(back[:1]) is None


def test_every_task_is_drawn_with_its_own_scores() -> None:
    chart = tasks_along_chart(document())
    drawn = [(row["x"], row["y"], row["below"]) for row in values(chart) if "below" in row]
    points = [(0.0, 0.8, False), (0.5, 0.6, True), (1.0, 0.2, True)]
    assert set(drawn) == set(points)
    assert {row["x"] for row in values(chart) if "y" not in row} == {0.5}  # the pick
    assert {"x": 0.5} not in values(tasks_along_chart(document(lam=None)))


def test_tasks_are_sorted_by_their_loss_from_the_base_also_where_a_path_begins_below_it() -> None:
    shares = {-0.5: (4, 18), 0.0: (18, 16), 1.0: (8, 14)}  # questions right, of two tasks
    found = {
        at: [item(at, n, n < right, task=task) for task, right in zip("ab", own, strict=True)
             for n in range(20)]
        for at, own in shares.items()
    }  # fmt: skip
    points = path_points(found, found[0.0], target=None, split="validation")
    chart = tasks_along_chart(document().model_copy(update={"path": points}))
    assert chart is not None
    assert [panel["title"]["text"] for panel in chart.to_dict()["concat"]] == ["a", "b"]


def test_conduct_is_the_documents() -> None:
    drawn = values(conduct_chart(document()))
    failures = {row["x"]: row["y"] for row in drawn if row.get("kind") == "no possible answer"}
    assert failures == {0.0: 0.0, 0.5: 0.0, 1.0: pytest.approx(0.8)}
    lengths = {row["x"]: row["y"] for row in drawn if "low" in row}
    assert lengths == {
        0.0: pytest.approx(0.8 * 4 + 0.2 * 12),
        0.5: pytest.approx(0.6 * 4 + 0.4 * 12),
        1.0: pytest.approx(0.2 * 4 + 0.8 * 12),
    }


def test_recall_is_drawn_with_its_interval() -> None:
    points = [
        point.model_copy(update={"recall": 0.5 - 0.1 * n, "recall_ci95": (0.3 - 0.1 * n, 0.6)})
        for n, point in enumerate(document().path)
    ]
    drawn = values(conduct_chart(document().model_copy(update={"path": points})))
    found = [(row["x"], row["y"], row["low"], row["high"]) for row in drawn if "low" in row]
    recall = [row for row in found if row[3] == 0.6]
    assert [row[:2] for row in recall] == [(0.0, 0.5), (0.5, 0.4), (1.0, pytest.approx(0.3))]
    assert [row[2] for row in recall] == [0.3, pytest.approx(0.2), pytest.approx(0.1)]


def followed(share: float, **changes: object) -> InstructionScore:
    names = ("prompt_strict", "prompt_loose", "instruction_strict", "instruction_loose")
    content: dict[str, object] = {
        "arm": "path", "model": "m", "prompt_set": "set", "split": "validation", "variant": "plain",
        "style": "chat", "num_prompts": 40, "num_instructions": 50, "truncated": 0.0,
        **dict.fromkeys(names, share), **{f"{n}_ci95": (share - 0.1, share + 0.1) for n in names},
    }  # fmt: skip
    return InstructionScore.model_validate(content | changes)


def test_few_shot_against_instructions_has_its_own_pareto_set() -> None:
    """Scores .8, .6, .2 along lambda; with .5, .4 and .7 followed, the middle one is beaten."""
    shares = {0.0: 0.5, 0.5: 0.4, 1.0: 0.7}
    rows = [followed(share, **{"lambda": lam}) for lam, share in shares.items()]
    noise = [
        followed(0.9, **{"lambda": 0.5, "split": "test"}),
        followed(0.9, **{"lambda": 0.5, "prompt_set": "another"}),
        followed(0.9, arm="tuned", **{"lambda": 1.0}),
    ]
    whole = document(lam=None).model_copy(update={"instructions": [*rows, *noise]})
    drawn = values(following_chart(whole))
    path = {(row["x"], row["y"]) for row in drawn if "hover" in row}
    assert path == {(0.5, 0.8), (0.4, 0.6), (0.7, 0.2)}
    rings = {(row["x"], row["y"]) for row in drawn if row.keys() == {"x", "y"}}
    assert rings == {(0.5, 0.8), (0.7, 0.2)}
    assert following_chart(document()) is None
    assert following_chart(whole.model_copy(update={"instructions": rows[:1]})) is None


def test_parts_put_back_are_drawn_between_their_two_ends() -> None:
    found = document()
    middle = found.path[1].model_dump()
    parts = [RestoredPart(part=name, **middle) for name in ("block 0", "block 1", "mlp")]
    drawn = restored_chart(found.model_copy(update={"restored": parts}))
    shown = {(row["part"], row["value"]) for row in values(drawn) if "part" in row}
    expected = (middle["icl"], middle["target"])
    assert shown == {(part.part, value) for part in parts for value in expected}
    ends = [row["at"] for row in values(drawn) if "at" in row]
    assert sorted(set(ends)) == pytest.approx([0.1, 0.2, 0.8])  # 2, 4, 16 and 16 of 20
    assert restored_chart(found) is None


def test_pairs_are_drawn_against_their_own_tuned_model() -> None:
    drawn = values(relative_chart({"one": document()}))
    changes = {row["x"]: row["y"] for row in drawn if "run" in row}
    assert changes == {0.0: pytest.approx(3.0), 0.5: pytest.approx(2.0), 1.0: pytest.approx(0.0)}
    assert relative_chart({"none": document().model_copy(update={"path": []})}) is None


def test_the_pick_has_a_star_and_the_pareto_set_rings() -> None:
    star = "\u2605"
    assert star in str(trajectory_chart(document()).to_dict())  # type: ignore[union-attr]
    assert star not in str(trajectory_chart(document(lam=None)).to_dict())  # type: ignore[union-attr]


def test_the_page_holds_them_all(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_text(document().to_json(), tmp_path / name / "results.json")
        write_items([r for own in rows().values() for r in own], tmp_path / name / "items.parquet")
    page = write_report(tmp_path / "one").read_text("utf-8")
    assert "Of 20 questions (one draw of demonstrations), 12 are answered right" in page
    assert "question &lt;5&gt;" in page
    assert "the choice falls between" in page
    for name in ("tasks-along", "conduct", "trajectory"):
        assert (tmp_path / "one" / "figures" / f"{name}-narrow.svg").is_file()
    both = compare([tmp_path / "one", tmp_path / "two"], tmp_path / "both").read_text("utf-8")
    assert "Every path against its own &lambda; = 1" in both
