"""The claims of the theory lab, its records, its command, its page and its notebook."""

from __future__ import annotations

import io
import itertools
import json
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch

from command import status
from keepshot.errors import ConfigError
from keepshot.progress import Silent
from keepshot.report.axes import Axis, spanning
from keepshot.report.panels import bare_series, claim_chart, series_looks
from keepshot.report.theory import set_formulas
from keepshot.theory import bridge, extensions, transformer
from keepshot.theory.document import (
    DEFAULT_CLAIMS,
    ClaimRecord,
    Panel,
    Point,
    RealArm,
    TheoryDocument,
    TheorySpec,
    z_score,
)
from keepshot.theory.experiments import run_claims
from keepshot.theory.lab import Lab

KEYS = {"claim", "method", "task", "shots", "predicted", "measured", "se"}
SMALL = {"d": 3, "shots": (0, 1, 8), "num_prompts": 20_000}


def run(claim: str, **changes: object) -> ClaimRecord:
    spec = TheorySpec.model_validate({**SMALL, "claims": (claim,), **changes})
    return run_claims(spec, Silent()).claims[0]


@pytest.mark.parametrize("claim", ["pretraining", "full", "value-only", "auxiliary", "sweeps"])
def test_claim_agrees_with_its_measurement(claim: str) -> None:
    record = run(claim)
    assert record.rows
    assert record.sentences
    for row in record.rows:
        assert row.claim == claim
        assert abs(row.z) < 5, row
        assert row.se < 0.1 * row.measured
    for check in record.checks:
        if check.se is None:
            assert check.measured == pytest.approx(check.predicted, abs=2e-3, rel=2e-3), check
        else:
            assert abs(z_score(check.predicted, check.measured, check.se)) < 5, check


def rows_of(record: ClaimRecord, task: str, shots: int) -> dict[str, float]:
    return {r.method: r.predicted for r in record.rows if (r.task, r.shots) == (task, shots)}


def test_claims_say_what_the_paper_says() -> None:
    full, kept = run("full", d=5), run("value-only", d=5)
    assert rows_of(full, "target", 0)["full"] == pytest.approx(0.1)
    assert rows_of(kept, "target", 0)["value_only"] == pytest.approx(0.1 + 2 / 9)
    assert rows_of(full, "unseen", 8)["full"] > 2 * rows_of(kept, "unseen", 8)["value_only"]
    aux = run("auxiliary", d=5)
    assert rows_of(aux, "target", 8)["value_only_aux"] < rows_of(aux, "target", 8)["value_only"]
    assert rows_of(aux, "unseen", 8)["value_only_aux"] > rows_of(aux, "unseen", 8)["value_only"]


def test_spectrum_changes_the_world_but_not_the_zero_shot_floor() -> None:
    """Weighted by the covariance, everything at m = inf depends on d alone."""
    plain, skewed = run("value-only"), run("value-only", spectrum=(3.0, 1.0, 0.2))
    for one, other in zip(plain.rows, skewed.rows, strict=True):
        assert one.predicted == pytest.approx(other.predicted)
        assert abs(other.z) < 5


def test_one_input_is_a_stated_special_case() -> None:
    document = run_claims(
        TheorySpec.model_validate({**SMALL, "d": 1, "claims": ("full",)}), Silent()
    )
    assert "d = 1 is special" in document.notes[0]
    assert max(abs(row.z) for row in document.rows) < 5


def test_same_seed_same_document_and_another_seed_another() -> None:
    first, again, other = (run("value-only", seed=seed).rows for seed in (0, 0, 1))
    assert first == again
    assert [r.measured for r in first] != [r.measured for r in other]
    assert [r.predicted for r in first] == [r.predicted for r in other]


def test_a_claim_alone_gives_the_rows_that_it_gives_in_company() -> None:
    spec = TheorySpec.model_validate({**SMALL, "claims": ("full", "value-only")})
    together = [row for row in run_claims(spec, Silent()).rows if row.claim == "value-only"]
    assert together == run("value-only").rows


def test_command_writes_record_and_page_and_prints_rows_of_exactly_these_keys(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "theory"
    options = ["--d", "2", "--shots", "0,4", "--pretrain-shots", "6", "--set", "num_prompts=2000"]
    assert status("theory", "--claim", "value-only", *options, "--out", str(out), "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert {frozenset(row) for row in printed["rows"]} == {frozenset(KEYS)}
    assert {row["method"] for row in printed["rows"]} == {"pretrained", "value_only"}
    assert json.loads((out / "theory.json").read_text(encoding="utf-8")) == printed
    document = TheoryDocument.read(out / "theory.json")
    assert json.loads(document.to_json()) == printed
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "Why value-only tuning keeps" in page
    assert "<script" not in page
    assert (out / "figures" / "value-only.svg").exists()
    assert status("theory", "--claim", "value-only", *options, "--out", str(out)) == 2
    assert "already exists" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--claim", "value-onli"], "nearest is 'value-only'"),
        (["--d", "0"], "`d` = 0"),
        (["--sigma2=-0.1"], "`sigma2` = -0.1"),
        (["--shots=0,-3"], "--shots -3: a number of shots cannot be negative"),
        (["--spectrum", "1,0"], "--spectrum 0: the covariance is not positive definite"),
        (["--spectrum", "1,x"], "--spectrum '1,x': expected numbers"),
        (["--spectrum", "1,2", "--d", "3"], "2 eigenvalues for --d 3"),
        (["--set", "covariance=[[1,2],[2,1]]"], "not positive definite"),
        (["--pretrain-shots=-1"], "--pretrain-shots -1"),
        (["--pretrain-shots=2.5"], "--pretrain-shots 2.5"),
        (["--dtype", "float32"], "`dtype` = 'float32'"),
        (["--device", "abacus"], "--device 'abacus'"),
        (["--claim", "value-only", "--set", "step_size=1"], "the largest stable one is 0.0159"),
        (["--set", "step_siz=1"], "nearest is 'step_size'"),
    ],
)
def test_bad_input(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    few = ["--set", "num_prompts=200", "--shots=0"]
    few = few[:2] if any(a.startswith("--shots") for a in arguments) else few
    assert status("theory", *arguments, *few) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len([line for line in error.splitlines() if line.startswith("keepshot:")]) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_covariance_given_in_full_is_used() -> None:
    given = run("value-only", covariance=((2.0, 0.5, 0.0), (0.5, 1.0, 0.0), (0.0, 0.0, 3.0)))
    assert max(abs(row.z) for row in given.rows) < 5
    with pytest.raises(ConfigError, match="give one of them"):
        TheorySpec.model_validate({"covariance": ((1.0,),), "spectrum": (1.0,), "d": 1})


def looks_of(*series: str) -> dict[str, tuple[str, str]]:
    points = [Point(panel="p", series=name, x=1.0, predicted=1.0) for name in series]
    return series_looks(ClaimRecord(claim="full", sentences=[], rows=[], points=points))


def test_methods_look_the_same_in_every_figure() -> None:
    looks = looks_of("something", "full", "another", "value_only")
    assert looks["full"] == looks_of("full")["full"]
    assert looks["value_only"] == looks_of("value-only")["value_only"]
    assert len(set(looks.values())) == 4
    record = run("auxiliary")
    (row,) = claim_chart(record).to_dict()["vconcat"]
    assert len(row["hconcat"]) == 3
    assert bare_series(record) == {"m = n", "m = inf"}


def labels_of(layers: list[dict[str, Any]], chart: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of the layer that writes labels."""
    (text,) = [
        layer
        for layer in layers
        if layer["mark"]["type"] == "text" and "stroke" not in layer["mark"]
    ]
    return chart["datasets"][text["data"]["name"]]


def test_a_figure_of_many_arms_names_each_beside_it_and_no_two_names_overlap() -> None:
    """Fourteen arms, some on top of each other, as a study of learning rates gives them."""
    arms = [(f"recipe-{i} learning_rate={10.0**-i:g}", 0.6 + 0.01 * (i % 3), 0.02 * i)
            for i in range(14)]  # fmt: skip
    points = [
        Point(panel="real", series=name, x=x, predicted=None, measured=y, se=0.04, x_se=0.03)
        for name, x, y in arms
    ]
    panel = Panel(name="real", x_title="gained", y_title="lost", axes="a", labelled=True)
    record = ClaimRecord(claim="bridge", sentences=[], rows=[], panels=[panel], points=points)
    for width, size in (("wide", 12.0), ("narrow", 11.0)):
        chart = claim_chart(record, width).to_dict()  # type: ignore[arg-type]
        drawn = chart["vconcat"][0]["hconcat"][0]
        rows = labels_of(drawn["layer"], chart)
        assert {row["label"] for row in rows} == {
            name.replace("learning_rate=", "lr ") for name, _, _ in arms
        }
        x, y = (
            Axis(*drawn["layer"][1]["encoding"][axis]["scale"]["domain"], drawn[side])
            for axis, side in (("x", "width"), ("y", "height"))
        )
        boxes = [
            (x.pixel(row["x"]), y.pixel(row["y"]), 0.5 * size * len(row["label"]) / 2, size / 2)
            for row in rows
        ]
        for one, other in itertools.combinations(boxes, 2):
            apart = abs(one[0] - other[0]) > one[2] + other[2] or (
                abs(one[1] - other[1]) > 0.95 * size
            )
            assert apart, (width, one, other)


def test_axes_go_both_ways_and_their_ticks_keep_apart() -> None:
    for kind, values in (("linear", (-1.0, 3.0)), ("log", (0.01, 100.0)), ("symlog", (0.0, 100.0))):
        axis = spanning(values, 200, kind, 0.05)  # type: ignore[arg-type]
        for value in (*values, 0.7):
            assert axis.value(axis.pixel(value)) == pytest.approx(value, abs=1e-9)
        assert 0 < axis.pixel(values[0]) < axis.pixel(values[1]) < 200
    ticks = spanning((0.0, 100.0), 200, "symlog").ticks((0, 1, 2, 5, 10, 20, 50, 100))
    assert ticks[0] == 0
    assert ticks[-1] == 100
    few = spanning((0.0, 100.0), 70, "symlog").ticks((0, 1, 2, 5, 10, 20, 50, 100))
    assert 2 <= len(few) < len(ticks)


def test_formulas_are_set_in_the_page_alone() -> None:
    assert (
        set_formulas("|theta_0|^2 + sigma2 at 10^6")
        == "|\u03b8\u2080|\u00b2 + \u03c3\u00b2 at 10\u2076"
    )


def test_default_claims_are_the_six() -> None:
    assert DEFAULT_CLAIMS == (
        "pretraining", "full", "value-only", "auxiliary", "sweeps", "extensions",
    )  # fmt: skip


def test_the_notebook_runs() -> None:
    path = Path(__file__).parents[2] / "examples" / "theory.ipynb"
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    names: dict[str, object] = {}
    with redirect_stdout(io.StringIO()) as printed:
        for cell in cells:
            if cell["cell_type"] == "code":
                exec("".join(cell["source"]), names)
    assert "predicted" in printed.getvalue()


def test_extensions_agree_with_sampling_and_the_path_has_the_right_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(extensions, "TUNING_TIME", 2.0)
    record = run("extensions", d=2, num_prompts=5000)
    assert max(abs(row.z) for row in record.rows) < 5
    panel = "path to full tuning"
    path = {(p.x, p.series): p.predicted for p in record.points if p.panel == panel}
    lab = Lab.of(TheorySpec(d=2))
    assert path[0.0, "target, 0 shots"] == pytest.approx(1.1)
    assert path[1.0, "target, 0 shots"] == pytest.approx(0.1)
    assert path[0.0, "unseen, 20 shots"] == pytest.approx(lab.error(lab.pretrained(), "unseen", 20))
    held = sorted(
        (p for p in record.points if p.panel == "KL term, value-only"), key=lambda point: point.x
    )
    few = [p.predicted for p in held if p.series == "unseen, 20 shots"]
    zero = [p.predicted for p in held if p.series == "target, 0 shots"]
    assert few == sorted(few, reverse=True)  # a heavier term keeps more and gains less
    assert zero == sorted(zero)


def test_bridge_shows_the_arms_that_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bridge, "PRETRAIN_STEPS", 2)
    monkeypatch.setattr(bridge, "TUNE_STEPS", 1)
    monkeypatch.setattr(bridge, "NUM_SEEDS", 2)
    arms = [
        RealArm(group="m for t", name="plain", gained=0.9, lost=0.7, se=0.05),
        RealArm(group="m for t", name="kept", gained=0.8, lost=0.1, se=0.05),
    ]
    spec = {**SMALL, "claims": ("bridge",), "num_prompts": 1000, "num_numbers": 200_000}
    record = run_claims(TheorySpec.model_validate(spec), Silent(), arms).claims[0]
    assert [panel.name for panel in record.panels][2:] == ["m for t"]
    real = [p for p in record.points if p.panel == "m for t"]
    assert [(p.series, p.x, p.measured) for p in real] == [
        ("plain", 0.9, 0.7), ("kept", 0.8, 0.1), ("untuned", 0.0, 0.0),
    ]  # fmt: skip
    assert "plain loses 70 % (s.e. 5) for a gain of 90 %" in record.sentences[-1]
    assert {panel.axes for panel in record.panels} == {"shares"}
    linear = {p.series: p for p in record.points if p.panel == "linear attention"}
    assert linear["full"].x == pytest.approx(1.0, abs=1e-6)
    assert linear["full"].predicted > 1.0 > 0.1 > linear["value_only"].predicted
    assert linear["full, held"].predicted < 0.1
    softmax = {p.series: p for p in record.points if p.panel == "softmax transformer"}
    assert softmax.pop("untuned").measured == 0.0
    assert sorted(softmax) == ["full", "full, held", "full, lambda 0.5", "value_only"]
    assert all(point.se is not None and point.se > 0 for point in softmax.values())
    assert all(point.x_se is not None and point.x_se > 0 for point in softmax.values())


def test_half_way_between_two_transformers() -> None:
    torch.manual_seed(0)
    first, last = transformer.Regressor(2, width=8), transformer.Regressor(2, width=8)
    half = transformer.blended(first, last, 0.5)
    for a, b, middle in zip(*(m.parameters() for m in (first, last, half)), strict=True):
        torch.testing.assert_close(middle, (a + b) / 2)
    assert transformer.blended(first, last, 0.0) is not first
