"""The jobs end to end through the command line, on a pico model in a directory of its own.

What a random model answers means nothing; that the parts fit, the records hold the contract, and
an interrupted run ends like an uninterrupted one does.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from coloured import write_colours
from command import status
from keepshot.assets import AssetStore, sha256_of
from keepshot.errors import GateError
from keepshot.jobs.gate import check_retention
from keepshot.jobs.ledger import Ledger
from keepshot.models.checkpoint import TensorReader
from keepshot.models.loading import LanguageModel, load, save
from keepshot.records import Cost, ItemResult, ResultDocument, SummaryRow, read_items
from pico_gguf import write_gguf

RECIPE: dict[str, Any] = {
    "name": "tiny",
    "model": "base",
    "data": "colours.jsonl",
    "measure": {"tasks": ["addition", "date-format"], "shots": [0, 2], "seeds": 2, "limit": 6},
    "arms": {
        "plain": {"method": {"name": "full"}, "learning_rate": 1e-2, "steps": 3, "batch_size": 4},
        "gentle": {"method": {"name": "full"}, "learning_rate": 1e-4, "steps": 3, "batch_size": 4},
        "kept": {
            "method": {"name": "lora", "rank": 2},
            "keep": [{"name": "kl", "prompts": 6, "prompts_per_step": 2, "shots": [1, 2]}],
            "learning_rate": 1e-3,
            "steps": 3,
            "batch_size": 4,
        },
    },
    "blended": {"lambdas": [0.5, 1.0], "pick": "keep-target:0.5", "limit": 4},
}


@pytest.fixture
def workplace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_pico: Callable[..., LanguageModel]
) -> Path:
    """A directory with two pico models, an examples file and a recipe."""
    monkeypatch.chdir(tmp_path)
    save(fresh_pico("llama", seed=0), tmp_path / "base")
    save(fresh_pico("llama", seed=1), tmp_path / "other")
    write_colours(tmp_path)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE), encoding="utf-8")
    return tmp_path


def test_measure_prints_the_result_document(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--tasks", "addition,colours.jsonl", "--shots", "0,2", "--seeds", "2"]
    assert status("measure", "base", "other", *arguments, "--limit", "5", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == 1
    assert [model["reference"] for model in document["models"]] == ["base", "other"]
    rows = {(s["model"], s["task"], s["shots"], s["seed"]): s for s in document["scores"]}
    # zero shots need one draw, two shots have two: 3 rows per model and task
    assert len(rows) == 2 * 2 * 3
    colours = rows["other", "colours.jsonl", 2, 1]
    assert colours["metric"] == "accuracy"
    assert colours["chance"] == pytest.approx(1 / 3)
    assert colours["num_items"] == 5
    assert rows["base", "addition", 0, 0]["metric"] == "exact_match"
    assert {(s["arm"], s["shots"]) for s in document["summary"]} == {
        (arm, shots) for arm in ("base", "other") for shots in (0, 2)
    }
    assert document["cost"]["tokens_prefilled"] < document["cost"]["tokens_naive"]


def test_the_same_question_twice_gets_the_same_answer(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    documents: list[dict[str, Any]] = []
    for _ in range(2):
        status("measure", "base", "--tasks", "addition", "--limit", "5", "--json")
        documents.append(json.loads(capsys.readouterr().out))
    assert documents[0]["scores"] == documents[1]["scores"]


@pytest.fixture
def finished_run(workplace: Path) -> Path:
    assert status("run", "recipe.yaml", "--out", "out") == 0
    return workplace / "out"


def test_run_writes_the_run_directory(
    finished_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {path.name for path in finished_run.iterdir()}
    assert {
        "spec.yaml", "environment.json", "results.json", "items.parquet", "report.html",
        "figures", "adapter", "model",
    } == names  # fmt: skip
    assert not list(finished_run.parent.glob(".out*"))
    document = ResultDocument.read(finished_run)
    arms = ["before", "plain", "gentle", "kept", "blended"]
    assert list(dict.fromkeys(row.arm for row in document.summary)) == arms
    assert len({row.target for row in document.summary if row.arm == "kept"}) == 1
    assert [point.lam for point in document.path] == [0.0, 0.5, 1.0]
    assert [record.arm for record in document.training] == ["plain", "gentle", "kept"]
    hashes = {model.reference: model.sha256 for model in document.models}
    assert len(hashes) == 5
    tuned = [hashes[f"base, {arm}"] for arm in ("plain", "gentle", "kept")]
    assert len({hashes["base"], *tuned}) == 4

    # The plain arm's directory is gone by now, so the record must not point there.
    record = json.loads((finished_run / "model" / "keepshot.json").read_text(encoding="utf-8"))
    assert (record["base"], record["tuned"]) == ("base", "base, plain")

    capsys.readouterr()
    assert status("verify", "out") == 0
    assert status("report", "out", "out", "--out", "both") == 0
    assert Path("both").is_dir()
    capsys.readouterr()
    assert (
        status("query", "select count(*) as n from items where arm = 'kept'", "out", "--json") == 0
    )
    # 2 tasks x 6 items x (1 draw at 0 shots + 2 at 2 shots), and 12 target items
    assert json.loads(capsys.readouterr().out) == [{"n": 2 * 6 * 3 + 12}]
    assert status("measure", "base", "out", "--tasks", "addition", "--limit", "3", "--json") == 0

    assert status("run", "recipe.yaml", "--out", "out") == 2
    assert "already exists; add --overwrite" in capsys.readouterr().err


def test_a_gate_that_does_not_hold_leaves_with_3(
    finished_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--tasks", "colours.jsonl", "--shots", "2", "--limit", "30", "--json"]
    code = status("measure", "base", "other", *arguments, "--require-retention", "99")
    assert code == 3
    assert "retention" in capsys.readouterr().err


def test_no_retention_is_as_much_as_nan() -> None:
    rows = [
        SummaryRow(
            arm=arm, model="m", shots=4, icl=0.5, icl_ci95=(0.4, 0.6), icl_gain=0.3,
            retention=retention, retention_ci95=(0.0, 0.1), num_items=9,
        )
        for arm, retention in (("before", 1.0), ("kept", 0.5))
    ]  # fmt: skip
    document = ResultDocument(models=[], scores=[], summary=rows, cost=Cost())
    check_retention(document, 0.5)
    with pytest.raises(GateError, match=r"kept: retention 0\.500 .* is below the nan"):
        check_retention(document, float("nan"))


def test_an_interrupted_run_goes_on_and_ends_like_an_uninterrupted_one(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["run", "recipe.yaml", "--out"]
    assert status(*words, "whole") == 0
    # Where the tests run in the background, Ctrl-C is ignored, and children would inherit that.
    process = subprocess.Popen(
        [sys.executable, "-m", "keepshot", *words, "out"],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    parts = workplace / ".out.unfinished" / "parts"
    deadline = time.monotonic() + 120
    while not (parts / "plain.parquet").exists():
        assert process.poll() is None, "it ended before it could be interrupted"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "goes on from what is finished" in errors
    assert not (workplace / "out").exists()
    kept_rows = (parts / "plain.parquet").stat().st_mtime_ns

    capsys.readouterr()
    assert status(*words, "out", "--seed", "1") == 2
    changed = capsys.readouterr().err
    assert "unfinished work of other settings" in changed
    assert "arms.plain.seed was 0, is 1" in changed

    assert status(*words, "out") == 0
    assert "plain: tuning" not in capsys.readouterr().err
    whole, again = (ResultDocument.read(workplace / name) for name in ("whole", "out"))
    assert kept_rows > 0
    assert again.scores == whole.scores
    assert again.summary == whole.summary
    assert again.pick == whole.pick


def test_tune_writes_an_adapter_that_measures(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sets = ["--set", "steps=2"]
    arguments = ["--model", "base", "--data", "colours.jsonl", "--keep", "none", "--out", "tuned"]
    assert status("tune", *arguments, *sets) == 0
    assert (workplace / "tuned" / "adapter" / "adapter_config.json").exists()
    notes = ResultDocument.read(workplace / "tuned").notes
    assert "on 54 rows, 2 steps" in notes[0]  # 10 % of 60 rows are held out
    capsys.readouterr()
    assert status("measure", "base", "tuned", "--tasks", "addition", "--limit", "3", "--json") == 0


def test_promot_measures_its_task_under_the_prompt_and_others_without(workplace: Path) -> None:
    sets = [f"method.{part}" for part in ("tokens=3", "prompt_steps=2", "prompt_learning_rate=1")]
    options = [word for part in ("steps=2", *sets) for word in ("--set", part)]
    arguments = ["--model", "base", "--data", "colours.jsonl", "--method", "promot"]
    assert status("tune", *arguments, "--keep", "none", "--out", "tuned", *options) == 0
    training = ResultDocument.read(workplace / "tuned").training[0]
    assert [row["step"] for row in training.losses] == [1, 2, 3, 4]
    asked = ["--tasks", "addition,colours.jsonl", "--shots", "0,2", "--limit", "3"]
    assert status("measure", "tuned", "tuned/model", *asked, "--out", "seen") == 0
    rows = {"tuned": [], "tuned/model": []}
    for row in read_items(workplace / "seen/items.parquet"):
        rows[row.arm].append((row.task, row.answer, row.log_likelihoods))
    pairs = list(zip(rows["tuned"], rows["tuned/model"], strict=True))
    assert all(one == other for one, other in pairs if one[0] == "addition")
    assert all(one != other for one, other in pairs if one[0] == "colours.jsonl")


def test_a_run_keeps_the_prompt_beside_its_adapter(workplace: Path) -> None:
    method = {"name": "promot", "tokens": 3, "prompt_steps": 2, "then": {"name": "lora", "rank": 2}}
    arms = {"kept": {"method": method, "learning_rate": 1e-3, "steps": 2, "batch_size": 4}}
    recipe = {**RECIPE, "arms": arms, "blended": None}
    (workplace / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    assert status("run", "recipe.yaml", "--out", "done") == 0
    assert (workplace / "done/prompts/0/adapter_config.json").exists()
    expected = [row for row in read_items(workplace / "done/items.parquet") if row.arm == "kept"]
    task = ["--tasks", "addition", "--shots", "2", "--seeds", "2", "--limit", "6"]
    assert status("measure", "done", *task, "--out", "again") == 0
    found = read_items(workplace / "again/items.parquet")
    expected = [row for row in expected if row.task == "addition" and row.shots == 2]
    assert [row.answer for row in found] == [row.answer for row in expected]


def test_a_file_with_a_comma_in_its_name_has_a_prompt(workplace: Path) -> None:
    """Its prompts were made for the parts of its name, and nothing trained."""
    (workplace / "colours.jsonl").rename(workplace / "a,b.jsonl")
    asked = ["--model", "base", "--data", "a,b.jsonl", "--method", "prompt-tuning"]
    sets = ("steps=2", "method.tokens=3", "learning_rate=0.1")
    options = [word for part in sets for word in ("--set", part)]
    assert status("tune", *asked, *options, "--out", "tuned") == 0
    found = json.loads((workplace / "tuned/adapter/keepshot-prompt.json").read_text("utf-8"))
    assert found == {"task": "a,b.jsonl"}


@pytest.mark.parametrize("method", ["dora", "promot"])
def test_an_adapter_is_written_merged(method: str, workplace: Path, store: AssetStore) -> None:
    asked = ["--model", "base", "--data", "colours.jsonl", "--method", method, "--keep", "none"]
    of_promot = ("method.tokens=3", "method.prompt_steps=2", "method.then={name: lora, rank: 2}")
    sets = ("steps=3", "learning_rate=0.01", *(of_promot if method == "promot" else ()))
    options = [word for part in sets for word in ("--set", part)]
    assert status("tune", *asked, *options, "--out", "apart") == 0
    assert status("tune", *asked, *options, "--merged", "--out", "whole") == 0
    assert sorted(path.name for path in (workplace / "whole").glob("[amp]*")) == (
        ["model", "prompts"] if method == "promot" else ["model"]
    )
    ids = torch.arange(3, 40)[None]
    base, apart, whole = (load(name, store) for name in ("base", "apart", "whole"))
    with torch.no_grad():
        before, expected, found = (m.module(input_ids=ids).logits for m in (base, apart, whole))
    assert not torch.allclose(before, expected, atol=1e-2)
    assert torch.allclose(found, expected, atol=1e-4)
    assert torch.equal(
        torch.tensor(whole.soft_prompt("colours.jsonl")),
        torch.tensor(apart.soft_prompt("colours.jsonl")),
    )
    card = (workplace / "whole/model/README.md").read_text("utf-8")
    assert "library_name: transformers" in card
    theirs = AutoModelForCausalLM.from_pretrained(workplace / "whole" / "model")
    with torch.no_grad():
        assert torch.allclose(theirs(input_ids=ids).logits, expected, atol=1e-4)


def test_tune_on_several_sets_with_embedded_instructions_prints_what_was_read(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mix = (
        "[{name: mix, icl_share: 0.25, shots: 2, general_share: 0.25, general_data: instructions}]"
    )
    arguments = ["--model", "base", "--data", "colours.jsonl,support", "--method", "full"]
    sets = [f"keep={mix}", "steps=2", "batch_size=8", "data_shares=[0.25, 0.75]"]
    settings = [part for value in sets for part in ("--set", value)]
    assert status("tune", *arguments, *settings, "--out", "tuned") == 0
    printed = " ".join(capsys.readouterr().out.split())
    record = json.loads((workplace / "tuned" / "tuning.json").read_text("utf-8"))
    target, few_shot, general = record["sources"]
    assert [(part["name"], part["per_step"]) for part in target["parts"]] == [
        ("colours.jsonl", 1), ("support", 3),
    ]  # fmt: skip
    assert (few_shot["per_step"], len(few_shot["parts"])) == (2, 6)
    assert (general["per_step"], general["samples"]) == (2, 2086)
    for source in (target, *target["parts"], few_shot, general):
        assert f"{source['samples']:,} samples {source['tokens']:,} tokens" in printed
        assert source["fingerprint"] in printed


def test_a_difference_is_made_smaller_before_it_is_blended(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = workplace / "new"
    blend = ("blend", "base", "other", "--lambda", "0.5", "--out", "new", "--overwrite")
    assert status(*blend, "--set", "reduce=prune:0.25") == 0
    record = json.loads((place / "keepshot.json").read_text("utf-8"))
    assert record["tuned"] == "other, prune:0.25"
    assert record["notes"][0].startswith("2 tensors with 0.")
    assert record["notes"][0].endswith(
        "of the squared difference were not reduced: embeddings, the head, and what is no matrix"
    )
    originals = {"model.safetensors": sha256_of(workplace / "other" / "model.safetensors")}
    assert record["tuned_sha256"] == originals  # not of what was made on the way
    with (
        TensorReader(place) as new,
        TensorReader(workplace / "base") as base,
        TensorReader(workplace / "other") as other,
    ):
        name = next(name for name in base.names if "up_proj" in name)
        before, after, found = (reader.read(name) for reader in (base, other, new))
    changed = found != before
    assert int(changed.sum()) == round(0.25 * before.numel())
    assert torch.allclose(found[changed], ((before + after) / 2)[changed], atol=1e-6)
    assert status(*blend, "--set", "reduce=lore:0.5") == 0
    record = json.loads((place / "keepshot.json").read_text("utf-8"))
    assert record["notes"][0].startswith("the adapter reproduces 0.")
    assert "tensors that no linear layer holds" in (place / "README.md").read_text("utf-8")
    factors = TensorReader(place)
    assert all(".lora_" in name for name in factors.names)
    assert status("measure", "new", "--tasks", "addition", "--limit", "2", "--seeds", "1") == 0
    assert [path.name for path in workplace.iterdir() if path.name.startswith(".new")] == []
    capsys.readouterr()
    assert status(*blend[:-1], "--set", "reduce=lore:0.5") == 2
    said = capsys.readouterr().err
    assert "new: already exists; add --overwrite" in said
    assert "reducing" not in said  # which can take hours


def test_a_reduced_blend_that_was_killed_goes_on(
    workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reduced model is made anew, and is no changed input for that."""
    blend = ("blend", "base", "other", "--lambda", "0.5", "--out", "new")
    half = ("--set", "reduce=prune:0.5")

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("keepshot.blending.write.write_shards", stop)
        # As after a kill, nothing is tidied.
        patch.setattr("keepshot.blending.unfinished._tidy", lambda *_: True)
        assert status(*blend, *half) == 130
    assert (workplace / ".new.partial").exists()
    (workplace / ".new.reduced").mkdir()
    (workplace / ".new.reduced" / "model-00001-of-00002.safetensors").write_bytes(b"half of it")
    capsys.readouterr()
    assert status(*blend, "--set", "reduce=prune:0.25") == 2
    assert "changed since this blend was begun" in capsys.readouterr().err
    assert status(*blend, *half) == 0
    assert [path.name for path in workplace.iterdir() if path.name.startswith(".new")] == []


def test_gguf_is_blended_as_the_directories_it_was_made_of(
    workplace: Path, fresh_pico: Callable[..., LanguageModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KEEPSHOT_CACHE", str(workplace / "cache"))
    for name, seed in (("base", 0), ("other", 1)):
        write_gguf(fresh_pico("llama", seed=seed).module, workplace / f"{name}.gguf")
    assert status("blend", "base.gguf", "other.gguf", "--lambda", "0.4", "--out", "file") == 0
    assert status("blend", "base", "other", "--lambda", "0.4", "--out", "folder") == 0
    with TensorReader(workplace / "file") as file, TensorReader(workplace / "folder") as folder:
        assert set(file.names) == set(folder.names)
        assert all(torch.equal(file.read(name), folder.read(name)) for name in file.names)
    assert status("measure", "file", "--tasks", "addition", "--limit", "2", "--seeds", "1") == 0


def test_a_sweep_does_not_go_on_with_another_model(
    workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Points of two models would have been put on one path."""
    asked = ["--tasks", "addition", "--shots", "2", "--limit", "2", "--seeds", "1"]
    sweep = ["--sweep", "0,1", *asked, "--pick", "best-icl", "--no-check", "--out", "path"]

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("keepshot.jobs.blend.with_interval", stop)
        assert status("blend", "base", "other", *sweep) == 130
    kept = workplace / ".path.unfinished" / "parts" / "path-1.parquet"
    written = kept.stat().st_mtime_ns
    change_weights(workplace / "other")
    capsys.readouterr()
    assert status("blend", "base", "other", *sweep) == 2
    assert "other has changed;\nadd --overwrite to discard it" in capsys.readouterr().err
    assert kept.stat().st_mtime_ns == written
    change_weights(workplace / "other")
    assert status("blend", "base", "other", *sweep) == 0


@pytest.mark.parametrize(
    "words",
    [
        # The kept rows were of the old weights, and the record carried the new weights' sha256.
        ["measure", "base", "other", "--tasks", "addition", "--limit", "2", "--out", "out"],
        # Arms tuned from new weights stood beside `before` of the old ones.
        ["run", "recipe.yaml", "--out", "out"],
    ],
    ids=lambda words: words[0],
)
def test_what_was_measured_is_not_gone_on_with_after_its_model_changed(
    words: list[str],
    workplace: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _stop_once_kept(words, monkeypatch)
    change_weights(workplace / "base")
    capsys.readouterr()
    assert status(*words) == 2
    assert "unfinished:\nbase has changed;\nadd --overwrite" in capsys.readouterr().err


def test_tuning_does_not_go_on_from_another_base(
    workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["tune", "--model", "base", "--data", "colours.jsonl", "--keep", "none", "--out", "t"]

    def stop(*_: object, **__: object) -> None:
        (workplace / ".t.unfinished" / "tuning.json").touch()  # so that there is what to go on from
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("keepshot.jobs.tune.train", stop)
        assert status(*words) == 130
    change_weights(workplace / "base")
    capsys.readouterr()
    assert status(*words) == 2
    assert "unfinished:\nbase has changed;\nadd --overwrite" in capsys.readouterr().err


def _stop_once_kept(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupt a command when the rows of its first arm are kept."""
    keep = Ledger.keep

    def keep_and_stop(self: Ledger, part: str, rows: Sequence[ItemResult]) -> None:
        keep(self, part, rows)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "keep", keep_and_stop)
        assert status(*words) == 130


def change_weights(folder: Path) -> None:
    """Change one byte of the weights; change it back the second time."""
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            "run recipe.yaml --set measure.tasks=[copy.jsonl]",
            "target 'colours.jsonl' holds 48 of the 60 questions of measured task 'copy.jsonl'",
        ),
        (
            "blend base other --sweep 0,1 --target colours.jsonl --tasks copy.jsonl",
            "target 'colours.jsonl' holds 48 of the 60 questions of measured task 'copy.jsonl'",
        ),
        (
            "run recipe.yaml --set measure.tasks=[addition,third-capitals]",
            "anchor task 'upper-case' has the rule of measured task 'third-capitals'",
        ),
        (
            "tune --model base --data colours.jsonl --set auto.guard_tasks=[second-twice]",
            "anchor task 'repeat-words' has the rule of measured task 'second-twice'",
        ),
    ],
)
def test_what_is_trained_on_is_not_measured_under_another_name(
    words: str, told: str, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(workplace / "colours.jsonl", workplace / "copy.jsonl")
    assert status(*words.split(), "--out", "out") == 2
    error = capsys.readouterr().err.replace("\n", " ")
    assert told in error
    assert "what is trained on cannot show what is kept: leave one of them out" in error


def test_blend_writes_one_point_and_sweeps_a_path(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status("blend", "base", "other", "--lambda", "0.4", "--out", "point") == 0
    point = workplace / "point"
    assert (point / "config.json").exists()  # the directory itself is the model
    record = json.loads((point / "keepshot.json").read_text("utf-8"))
    assert (record["base"], record["tuned"], record["lambda"]) == ("base", "other", 0.4)
    [checked] = record["checked"]  # without torch
    assert checked.startswith("30 tensors read again"), checked
    loaded = ["--lambda", "0.4", "--set", "check=generate", "--out", "loaded"]
    assert status("blend", "base", "other", *loaded) == 0
    record = json.loads((workplace / "loaded" / "keepshot.json").read_text("utf-8"))
    assert "loaded with transformers and continued" in record["checked"][1]
    assert status("verify", "point") == 0
    assert status("measure", "point", "--tasks", "addition", "--limit", "2", "--seeds", "1") == 0
    capsys.readouterr()
    quick = ["--no-check", "--json", "--set", "rule.kinds.value=0", "--dtype", "float32"]
    assert status("blend", "base", "other", "--lambda", "0.4", *quick, "--out", "quick") == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["directory"], printed["blend"]["output_sha256"]) == ("quick", {})
    assert status("verify", "quick") == 2
    assert "--no-check" in capsys.readouterr().err
    arguments = ["--tasks", "addition", "--shots", "2", "--limit", "4", "--seeds", "1"]
    target = ["--target", "colours.jsonl", "--pick", "keep-target:0.1"]
    target += ["--set", "resolution=0.25"]
    assert (
        status("blend", "other", "base", "--sweep", "0:1:0.5", *arguments, *target, "--out", "path")
        == 0
    )
    document = ResultDocument.read(workplace / "path")
    lams = [point.lam for point in document.path]
    assert set(lams) >= {0.0, 0.5, 1.0}
    assert document.pick is not None
    assert document.pick.lam is not None
    nearest = sorted(abs(lam - document.pick.lam) for lam in lams)[1]
    assert nearest <= 0.25  # refined around the pick
    assert document.pick.lambda_ci95 is not None
    rows = read_items(workplace / "path" / "items.parquet")
    assert {row.lam for row in rows if row.arm == "path"} == set(lams)
    assert "Questions that flip" in (workplace / "path" / "report.html").read_text("utf-8")
    record = json.loads((workplace / "path" / "model" / "keepshot.json").read_text("utf-8"))
    assert "loaded with transformers and continued" in record["checked"][1]
    again = ["--sweep", "0:1:0.5", *arguments, *target, "--set", "stream=true", "--out", "streamed"]
    assert status("blend", "other", "base", *again) == 0
    assert ResultDocument.read(workplace / "streamed").path == document.path
    kinds = [*arguments, "--no-check", "--pick", "best-icl"]
    rule = ["--sweep", "0.5,1", "--set", "rule.kinds.mlp=0", "--out", "frozen"]
    assert status("blend", "other", "base", *kinds, *rule) == 0
    capsys.readouterr()
    assert status("blend", "other", "base", *kinds, *target, *rule[:-1], "kept") == 2
    assert "keeps a share of what the tuned model does" in capsys.readouterr().err
    put_back = ["--sweep", "0", "--restore", "kinds", "--out", "restored"]
    assert status("blend", "other", "base", *kinds, *put_back) == 0
    document = ResultDocument.read(workplace / "restored")
    assert [part.part for part in document.restored][-3:] == ["norms", "embeddings", "head"]
    [alike] = [part for part in document.restored if part.part == "mlp"]
    [ruled] = [p for p in ResultDocument.read(workplace / "frozen").path if p.lam == 1.0]
    assert alike.model_dump(exclude={"part"}) == ruled.model_dump()
    assert "Where the damage sits" in (workplace / "restored" / "report.html").read_text("utf-8")
    with (
        TensorReader(workplace / "frozen" / "model") as mixed,
        TensorReader(workplace / "other") as first,
    ):
        name = next(name for name in first.names if "up_proj" in name)
        assert torch.equal(mixed.read(name), first.read(name))
    assert {row.arm for row in document.summary} >= {"base", "other"}
