"""The papers' own set-ups: each is read whole, and trains two steps on a pico model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from command import status
from keepshot.jobs.recipes import tune_spec
from keepshot.models.loading import LanguageModel, save
from keepshot.models.reference import HubModel, parse_reference
from keepshot.tuning.keep import FewShot, Mix, find_term
from keepshot.tuning.method_specs import LoRA, ProMoT
from keepshot.tuning.recipe import Recipe

PLACE = Path(__file__).parents[2] / "recipes" / "papers"
FILES = sorted(PLACE.glob("*.yaml"))
SMALLER: dict[str, list[str]] = {
    "lora": ["method.rank=2"],
    "promot": ["method.tokens=3", "method.prompt_steps=2", "batch_size=4", "accumulate=2"],
}


def recipe(name: str) -> Recipe:
    return tune_spec(PLACE / f"{name}.yaml", {}, {}, []).recipe


def test_the_figures_are_those_of_the_papers():
    values, auxiliary = recipe("value-only-mmlu"), recipe("auxiliary-loss-mmlu")
    for one, targets in ((values, "value"), (auxiliary, "attention")):
        assert isinstance(one.method, LoRA)
        assert (one.method.rank, one.method.targets, one.epochs) == (128, targets, 5)
        assert one.model == "Qwen/Qwen2.5-3B-Instruct"
    few_shot = find_term(auxiliary.keep, FewShot)
    assert few_shot is not None
    assert (few_shot.shots, few_shot.final_weight) == (7, 0.0)
    for name in ("promot-rte", "promot-en-fr"):
        promot = recipe(name)
        assert isinstance(promot.method, ProMoT)
        assert (promot.method.tokens, promot.method.prompt_steps) == (50, 5000)
        assert (promot.steps, promot.batch_size, promot.max_length) == (1000, 64, 1024)
    general = recipe("lora-general")
    assert isinstance(general.method, LoRA)
    assert (general.method.alpha, general.method.dropout) == (32, 0.05)
    mix = find_term(general.keep, Mix)
    assert mix is not None
    assert (mix.icl_share, mix.general_share * general.batch_size) == (0.0, 2.0)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_it_trains_two_steps_with_the_model_and_the_data_replaced(
    file: Path,
    fresh_pico: Callable[..., LanguageModel],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    written = recipe(file.stem)
    assert isinstance(parse_reference(written.model), HubModel)
    monkeypatch.chdir(tmp_path)
    save(fresh_pico("qwen2"), tmp_path / "pico")
    rows = [{"input": f"is {n} odd?", "output": str(bool(n % 2))} for n in range(24)]
    if "completion" in file.read_text(encoding="utf-8"):
        rows = [{"prompt": row["input"], "completion": f" {row['output']}"} for row in rows]
    Path(written.data).write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    sets = [*SMALLER[written.method.name], "steps=2"]
    mix = find_term(written.keep, Mix)
    if mix is not None:
        Path("general").mkdir()
        general = [{"instruction": f"say {n}", "input": "", "output": str(n)} for n in range(9)]
        text = "".join(json.dumps(row) + "\n" for row in general)
        (Path("general") / "train.jsonl").write_text(text, encoding="utf-8")
        assert mix.general_data is not None
        assert mix.general_data.startswith("hub:")
        sets.append(
            f"keep=[{mix.model_copy(update={'general_data': 'hub:./general'}).model_dump_json()}]"
        )
    asked = [part for value in sets for part in ("--set", value)]
    assert status("tune", str(file), "--model", "pico", *asked, "--out", "out") == 0
    record: dict[str, Any] = json.loads((tmp_path / "out" / "tuning.json").read_text("utf-8"))
    stages = 2 if written.method.name == "promot" else 1
    assert len(record["losses"]) == 2 * stages
    assert record["losses"][-1]["loss"] != record["losses"][-2]["loss"]
    assert record["keep"] == [term.name for term in written.keep]
    assert record["recipe"]["bf16"] is True
    assert record["recipe"]["checkpointing"] is True


def test_every_set_up_of_the_papers_is_there():
    assert [file.stem for file in FILES] == [
        "auxiliary-loss-mmlu", "lora-general", "promot-en-fr", "promot-rte", "value-only-mmlu",
    ]  # fmt: skip
