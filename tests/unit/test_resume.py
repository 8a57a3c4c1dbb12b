"""Unfinished work is taken up by the same settings and data alone; what differs is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from keepshot.errors import ConfigError, OutputError, TrainingError
from keepshot.jobs.specs import TuneSpec
from keepshot.jobs.workspace import Workspace, example_files
from keepshot.models.loading import LanguageModel
from keepshot.progress import Silent
from keepshot.prompts import Example
from keepshot.specs import changes
from keepshot.tuning.keep import L2SP, Mix
from keepshot.tuning.method_specs import LoRA
from keepshot.tuning.recipe import Recipe
from keepshot.tuning.tokenised import Extra
from keepshot.tuning.train import train

Build = Callable[..., LanguageModel]
ROWS = [Example(word, word[0].upper()) for word in ("apple", "berry", "cherry", "date", "fig")]


def recipe(**settings: Any) -> Recipe:
    return Recipe(
        **{"data": "x", "method": LoRA(rank=2), "steps": 4, "batch_size": 2, "save_every": 2,
           "learning_rate": 1e-3, **settings}
    )  # fmt: skip


def test_what_differs_is_worded_by_dotted_key():
    before = recipe(keep=(L2SP(),)).model_dump(mode="json")
    now = recipe(keep=(L2SP(weight=2.0),), method=LoRA(rank=4), max_length=9, seed=3, epochs=1)
    assert changes(before, now.model_dump(mode="json")) == [
        "method.rank was 2, is 4", "keep.0.weight was 1.0, is 2.0",
        "epochs was 3.0, is 1.0", "max_length was not given, is 9", "1 more",
    ]  # fmt: skip
    assert changes(before, before) == []


@pytest.fixture
def killed(fresh_pico: Build, tmp_path: Path) -> Extra:
    """The states of a run of four steps that was killed in its third."""

    class Stopping(Silent):
        def update(self, done: int, total: int, detail: str = "") -> None:
            if done == 3:
                raise KeyboardInterrupt

    extra = Extra(state_dir=tmp_path / "state")
    with pytest.raises(KeyboardInterrupt):
        train(recipe(), fresh_pico("llama"), ROWS, None, progress=Stopping(), extra=extra)
    assert [path.name for path in (tmp_path / "state").glob("c*")] == ["checkpoint-2"]
    return extra


@pytest.mark.parametrize(
    ("settings", "rows", "message"),
    [
        ({"learning_rate": 2e-3}, ROWS, "learning_rate was 0.001, is 0.002;\ndelete them"),
        ({"keep": (L2SP(),)}, ROWS, "keep.0.name was not given, is l2-sp; keep.0.weight"),
        ({}, [*ROWS[:4], Example("grape", "G")], "another run:\nthe samples differ"),
    ],
)
def test_states_of_another_recipe_or_of_other_data_are_refused(
    settings: dict[str, Any], rows: list[Example], message: str, killed: Extra, fresh_pico: Build
):
    with pytest.raises(ConfigError, match=message) as error:
        train(recipe(**settings), fresh_pico("llama"), rows, None, extra=killed)
    assert len(str(error.value).splitlines()) == 3
    # Nothing of the killed run is lost, and what changes no result changes nothing here.
    told: list[int] = []

    class Listening(Silent):
        def update(self, done: int, total: int, detail: str = "") -> None:
            told.append(done)

    again = recipe(save_every=3)
    train(again, fresh_pico("llama"), ROWS, None, extra=killed, progress=Listening())
    assert told == [3, 4]


@pytest.mark.parametrize("stopped", [SystemExit(143), OSError("disk"), RuntimeError("memory")])
def test_a_run_that_was_stopped_goes_on(
    stopped: BaseException, fresh_pico: Build, tmp_path: Path
) -> None:
    """SIGTERM is a SystemExit by then; a full disk and lost memory need not be the run's end."""
    place, told = tmp_path / "state", []

    class Stopping(Silent):
        def update(self, done: int, total: int, detail: str = "") -> None:
            told.append(done)
            if told == [1, 2, 3]:
                raise stopped

    def run() -> Any:
        extra = Extra(state_dir=place)
        return train(recipe(), fresh_pico("llama"), ROWS, None, progress=Stopping(), extra=extra)

    with pytest.raises(type(stopped)):
        run()
    assert (place / "checkpoint-2").is_dir()
    assert len(run().losses) == 4
    assert told == [1, 2, 3, 3, 4]
    assert not place.exists()


def test_what_the_user_has_to_mend_leaves_no_states(fresh_pico: Build, tmp_path: Path) -> None:
    """The loss is no number here, whatever is gone on from."""
    extra = Extra(state_dir=tmp_path / "state")
    broken = recipe(learning_rate=1e30, warmup=0.0, max_grad_norm=1e30)
    with pytest.raises(TrainingError, match="lower learning_rate"):
        train(broken, fresh_pico("llama"), ROWS, None, extra=extra)
    assert not (tmp_path / "state").exists()


def test_a_state_that_was_never_whole_is_not_taken_up(fresh_pico: Build, tmp_path: Path):
    place = tmp_path / "state"
    (place / "checkpoint-3").mkdir(parents=True)
    (place / "recipe").write_text("another", encoding="utf-8")
    record = train(recipe(), fresh_pico("llama"), ROWS, None, extra=Extra(state_dir=place))
    assert len(record.losses) == 4


def test_what_is_read_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out" / "model").mkdir(parents=True)
    (tmp_path / "out" / "rows.jsonl").touch()
    (tmp_path / "support").mkdir()
    reads = [
        ("out/model", "rows.csv", "out"),
        ("smollm2-135m-instruct", "a.csv,out/rows.jsonl", "out"),
        ("smollm2-135m-instruct+out", "a.csv", "out"),
    ]
    for model, data, out in reads:
        spec = TuneSpec(recipe=recipe(data=data, model=model))
        with pytest.raises(OutputError, match=r"out: holds out.*, which is read"):
            Workspace(tmp_path / out, spec, overwrite=True)
        Workspace(tmp_path / "beside", spec, overwrite=True)
    # The task of that name is read, not the directory.
    spec = TuneSpec(recipe=recipe(data="support"))
    Workspace(tmp_path / "support", spec, overwrite=True).begin()


def test_unfinished_work_says_which_settings_and_files_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "b.csv", "c.jsonl"):
        Path(name).write_text(name, encoding="utf-8")
    mix = Mix(icl_share=0.0, general_share=0.1, general_data="c.jsonl")
    spec = TuneSpec(recipe=recipe(data="a.jsonl, b.csv", keep=(mix,)))
    assert example_files(spec) == {Path("a.jsonl"), Path("b.csv"), Path("c.jsonl")}
    Workspace(tmp_path / "out", spec).begin()
    Workspace(tmp_path / "out", spec)
    other = spec.model_copy(update={"recipe": recipe(data="a.jsonl, b.csv", keep=(mix,), steps=9)})
    with pytest.raises(OutputError, match=r"unfinished:\nrecipe\.steps was 4, is 9;\nadd --over"):
        Workspace(tmp_path / "out", other)
    Path("c.jsonl").write_text("other rows", encoding="utf-8")
    with pytest.raises(OutputError, match=r"unfinished:\nc\.jsonl has changed;\nadd --overwrite"):
        Workspace(tmp_path / "out", spec)
    unfinished = tmp_path / ".out.unfinished"
    (unfinished / "left").touch()
    Workspace(tmp_path / "out", spec, overwrite=True).begin()
    assert not (unfinished / "left").exists()
    Workspace(tmp_path / "out", spec)
    for _ in range(2):
        Workspace(tmp_path / "out", spec).begin({"base": "1"})
    with pytest.raises(OutputError, match=r"unfinished:\nbase has changed;\nadd --overwrite"):
        Workspace(tmp_path / "out", spec).begin({"base": "2"})
    Workspace(tmp_path / "out", spec, overwrite=True).begin({"base": "2"})
    Workspace(tmp_path / "out", spec).begin({"base": "2"})
    # Work that an earlier version began, which noted no files, goes on.
    (unfinished / "inputs.json").unlink()
    Path("c.jsonl").write_text("still other rows", encoding="utf-8")
    Workspace(tmp_path / "out", spec)
