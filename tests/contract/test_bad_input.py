"""What bad input gets: one to three lines on stderr, exit status 2, and nothing left behind.

One table for all commands, run on pico models in one directory, which must look the same after
every row as before it.
"""

from __future__ import annotations

import json
import os
import resource
import shlex
import shutil
import signal
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from coloured import write_colours
from keepshot import cli, exits
from keepshot.assets import AssetStore
from keepshot.models.loading import load, save
from keepshot.records import Cost, ResultDocument, write_items
from keepshot.tuning.anchors import AnchorKL
from keepshot.tuning.method_specs import LoRA
from keepshot.tuning.methods import export, prepare
from pico import VOCAB_SIZE, pico_model

EARLY: list[tuple[str, str]] = [
    # names that do not exist
    ("mesure base", "no such command 'mesure'. Did you mean 'measure'?"),
    ("measure base --task core", "no such option: --task (Possible options: --tasks)"),
    ("measure", "missing argument"),
    ("measure smollm2-135m-instuct", "nearest is 'smollm2-135m-instruct'"),
    ("measure ./bsae", "model './bsae' does not exist; nearest is 'base'"),
    ("measure /no/such/directory", "/no/such/directory"),
    ("measure no-such.gguf", "no-such.gguf"),
    ("measure models", "a directory without config.json"),
    ("measure base --tasks counry-capital", "nearest is 'country-capital'"),
    ("measure base --tasks colour.jsonl", "nearest in . is 'colours.jsonl'"),
    ("measure base --template plian", "templates are"),
    ("measure base --set sheeds=2", "nearest is 'seeds'"),
    ("measure base --set seeds", "expected key=value"),
    ("run recipe.yaml --set arms.plain.method.nam=full", "nearest is 'name'"),
    ("run --set blended.pick=knea", "nearest is 'knee'"),
    ("run recipe.yaml --set arms.kept.keep=[{name: kl, tasks: anchorz}]", "nearest is 'anchors'"),
    (
        "run recipe.yaml --set arms.kept.keep=[{name: mix, general_share: 0.2, "
        "general_data: colour.jsonl}]",
        "nearest in . is 'colours.jsonl'",
    ),
    (
        "run recipe.yaml --set arms.kept.keep=[{name: mix, general_share: 0.2, "
        "general_data: instructionz}]",
        "nearest is 'instructions'",
    ),
    (
        "run recipe.yaml --set arms.kept.keep=[{name: kl, tasks: addition}]",
        "anchor task 'addition' holds",
    ),
    (
        "run recipe.yaml --set measure.tasks=[few.jsonl] --set arms.kept.keep="
        "[{name: mix, general_share: 0.2, general_data: few.jsonl}]",
        "general data holds 3 of the 3 questions of measured task 'few.jsonl'",
    ),
    ("tune --data few.jsonl,absent.jsonl", "absent.jsonl: no such file"),
    ("tune --data few.jsonl --set data_shares=[0.5,0.4]", "add up to 0.9, not 1"),
    (
        "tune --model base --data few.jsonl --set data_shares=[0.5,0.5]",
        "2 shares for 1 data sets (few.jsonl)",
    ),
    ("tune --model base --data few.jsonl --keep auto,kl", "--keep 'auto,kl': 'auto' stands alone"),
    (
        "tune --model base --data few.jsonl --set auto.guard_tasks=[titel-case]",
        "nearest is 'title-case'",
    ),
    (
        "tune --model base --data few.jsonl --set auto.guard_tasks=[title-case,spell-out]",
        "anchor task 'spell-out' holds",
    ),
    (
        "tune --model base --data few.jsonl --method full --merged",
        "`merged` is for adapters, and 'full'",
    ),
    ("run absent.yaml", "absent.yaml: no such file"),
    ("tune --data few.jsonl --method lorra", "nearest is 'lora'"),
    ("tune --data few.jsonl --keep kll", "nearest is 'kl'"),
    ("models --fetch smollm", "smollm"),
    ("report nowhere", "no finished run lies here"),
    ("query 'select 1' nowhere", "no finished run to query"),
    ("query 'select nothing from items' finished", "nothing"),
    ("verify base", "no finished blend"),
    # values that cannot be
    ("measure base --shots four", "--shots 'four'"),
    ("measure base --shots=-1", "cannot be negative"),
    ("measure base --seeds 0", "`seeds` = 0"),
    ("measure base --dtype float23", "`dtype` = 'float23'"),
    ("measure base base", "'base' is named twice"),
    ("tune", "nothing to tune on"),
    ("tune --model base --data colours.jsonl --method prompt-tuning --keep kl", "'kl' would reach"),
    ("tune --data few.jsonl --set fsdp=absent.yaml", "fsdp does not go with auto"),
    ("tune --model base --data few.jsonl --keep none --set fsdp=absent.yaml", "no such file"),
    (
        "tune --model base --data few.jsonl --keep none --set fsdp=recipe.yaml",
        "recipe.yaml: key `arms` is unknown",
    ),
    ("blend base other", "--lambda"),
    ("blend base other --sweep 0:1", "0:1"),
    ("blend base other --lambda nan", "nan"),
    ("blend base other --lambda half", "'--lambda'"),
    ("blend few.jsonl --lambda 0.4", "expected BASE and TUNED, or a recipe"),
    ("blend base other --lambda 0.4 --set rule.rampe=[0,1]", "nearest is 'ramp'"),
    ("blend base other --lambda 0.4 --set rounding=up", "`rounding` = 'up'"),
    ("blend base other --sweep 0:1:1 --set second=c", "not along a --sweep"),
    ("blend base other --sweep 0:1:1 --set reduce=prune:0.1", "then --sweep that"),
    ("blend base other --lambda 1 --set reduce=lora:0.5", "nearest is 'lore'"),
    ("blend base other --lambda 1 --set reduce=prune:2", "above 0 and at most 1 after prune:"),
    ("blend base other --sweep 0,1 --tasks addition", "name one with --target"),
    ("blend base other --sweep 0,1 --target colours.jsonl --pick weighted:x", "write weighted:2"),
    ("blend base other --lambda 0.5 --tasks addition", "`tasks` is for a --sweep"),
    (
        "blend base other --sweep 0,1 --target colours.jsonl --out base/path",
        "lies inside the input base; choose another --out",
    ),
    ("blend base wider --sweep 0,1 --target colours.jsonl", "needs vocabularies of one size"),
    ("blend base other+adapter --lambda 0.5", "is an adapter on 'other', and the base given is"),
    ("blend base other+adapter --sweep 0,1 --target colours.jsonl", "'base'; give one base"),
    ("blend base bottleneck --lambda 0.5", "`peft_type` is missing"),
    ("run recipe.yaml --set measure.tasks=[upper-case]", "'upper-case' is an anchor"),
    ("run recipe.yaml --set measure.tasks=[colours.jsonl]", "'colours.jsonl' is the target"),
    ("run recipe.yaml --data country-capital", "nothing to train on"),
    # files of examples, of recipes and of results
    ("measure base --tasks broken.jsonl", "broken.jsonl line 2: is not JSON"),
    ("measure base --tasks lacking.jsonl", "lacking.jsonl line 1: field 'output' is missing"),
    ("measure base --tasks latin.jsonl", "latin.jsonl line 1: is not UTF-8"),
    ("measure base --tasks empty.jsonl", "empty.jsonl: is empty"),
    ("measure base --tasks choices.jsonl", "choices.jsonl line 1: output 'b' is not among"),
    ("measure base --tasks few.jsonl --shots 4", "few.jsonl: has 3 rows, too few for 4 shots"),
    ("measure base --tasks addition --shots 65", "fewer than the 65 shots"),
    ("tune --model base --data latin.jsonl", "latin.jsonl line 1: is not UTF-8"),
    ("tune --model base --data broken.jsonl", "broken.jsonl line 2: is not JSON"),
    ("run recipe.yaml --data choices.jsonl", "choices.jsonl line 1: output 'b' is not among"),
    ("run recipe.yaml --data few.jsonl", "too few to tune on"),
    ("run broken.yaml", "broken.yaml line"),
    ("report torn", "torn/results.json"),
    ("report torn-items", "torn-items/items.parquet"),
    ("query 'select 1' torn-items", "torn-items/items.parquet"),
    ("measure base pickled", "holds pickled weights"),
    # two models that do not belong together, or of which one is broken
    ("measure base halved --tasks addition", "halved/model.safetensors: truncated safetensors"),
    ("measure base torn.gguf --tasks addition", "torn.gguf: truncated"),
    ("measure base short --tasks long.jsonl --shots 0", "longer than the context of 'short' (64)"),
    ("blend base halved --lambda 0.5", "halved/model.safetensors: truncated safetensors"),
    ("blend base gpt2 --lambda 0.5", "base is a 'llama' model, tuned a 'gpt2' model"),
    ("blend base shallow --lambda 0.5", "tensor 'model.layers.2."),
    ("blend base shallow --sweep 0,1 --target colours.jsonl", "tensor 'model.layers.2."),
    ("blend other adapter --lambda 0.5", "was trained on 'base'"),
    ("blend other adapter --sweep 0,1 --target colours.jsonl", "was trained on 'base'"),
    ("blend base adapter --lambda 0.5 --dtype float16 --set write_dtype=float16", "one lambda"),
    (
        "blend base adapter --sweep 0,1 --target colours.jsonl --set rule.kinds.mlp=0",
        "an adapter takes one lambda",
    ),
    ("blend gpt2 unrecorded --lambda 0.5", "this adapter was trained on another base"),
    # places
    ("measure base --tasks addition --out finished", "finished: already exists; add --overwrite"),
    ("run recipe.yaml --out finished", "finished: already exists; add --overwrite"),
    ("measure base --tasks addition --out few.jsonl", "few.jsonl: is a file"),
    ("measure base --out few.jsonl/below/out", "cannot be written (Not a directory)"),
    ("tune --model base --data colours.jsonl --out few.jsonl/out", "choose another --out"),
]
"""Arguments, and what the message says; no model is loaded for any of these."""

LATE: list[tuple[str, str]] = [
    ("measure halved --tasks addition", "halved/model.safetensors: truncated safetensors"),
    ("measure noise --tasks addition", "noise/model.safetensors: truncated or corrupted"),
    ("measure shifted --tasks addition", "shifted/model.safetensors: corrupted safetensors"),
    ("measure torn.gguf --tasks addition", "torn.gguf: truncated"),
    ("measure noise.gguf --tasks addition", "noise.gguf: truncated or corrupted GGUF"),
    ("measure mute --tasks addition", "mute holds no tokenizer.json that can be read"),
    ("measure babbling --tasks addition", "model 'babbling': babbling cannot be loaded"),
    ("measure lacking --tasks addition", "tensor model.layers.2.mlp.up_proj.weight is missing"),
    ("measure other+adapter --tasks addition", "was trained on 'base'"),
    ("measure gpt2+unrecorded --tasks addition", "does not fit base 'gpt2'"),
    ("measure base+torn-adapter --tasks addition", "truncated safetensors"),
    ("measure short --tasks long.jsonl --shots 0", "task 'long.jsonl', 0 shots"),
    ("tune --model base --data colours.jsonl --method bias-only", "named `bias`,\nand Llama"),
    ("tune --model base --data colours.jsonl --set method.rank=33", "rank 33 is above"),
    (
        "tune --model base --data colours.jsonl --method bottom-frozen --set method.blocks=3",
        "3 blocks are to be frozen and the model has 3",
    ),
    ("tune --model short --data long.jsonl", "long.jsonl: row 'x"),
    (
        "tune --model base --data long.jsonl --set max_length=20 --set long_rows=drop",
        "tokens than max_length 20; raise it, or set long_rows=cut",
    ),
    (
        "tune --model base --data long.jsonl --keep none --set max_length=20 --set long_rows=cut",
        "40 of 40 rows have no token of their answer left, more than most_unanswered 0.05",
    ),
    (
        "tune --model falcon --data colours.jsonl --keep none --set packing=true",
        "model family 'falcon' cannot be packed: a sample sees the one before it",
    ),
    ("tune --model short --data colours.jsonl", "gives no prompt of 2 demonstrations within 64"),
    (
        "run recipe.yaml --model short --set measure.tasks=[long.jsonl]",
        "longer than the context of 'short' (64)",
    ),
    (
        "run recipe.yaml --set arms.kept.max_length=10",
        "8 more than max_length 10;\nraise max_length",
    ),
    (
        "blend short short2 --sweep 0,1 --target colours.jsonl --tasks long.jsonl --shots 0",
        "longer than the context of 'short' (64)",
    ),
]
"""The same, for what shows once a model's own files are read."""

RECIPE: dict[str, Any] = {
    "name": "tiny",
    "model": "base",
    "data": "colours.jsonl",
    "measure": {"tasks": ["addition"], "shots": [0, 2], "seeds": 1, "limit": 4},
    "arms": {
        "plain": {"method": {"name": "full"}, "learning_rate": 1e-2, "steps": 3, "batch_size": 4},
        "kept": {
            "method": {"name": "lora", "rank": 2},
            "keep": [{"name": "kl", "prompts": 6, "prompts_per_step": 2, "shots": [1, 2]}],
            "learning_rate": 1e-3, "steps": 20, "batch_size": 4,
        },
    },
    "blended": None,
}  # fmt: skip
EMPTY = ResultDocument(models=[], scores=[], summary=[], cost=Cost())
ROW = '{"input": "a", "output": "b"}\n'


def status(arguments: str) -> int:
    # A value with spaces, as in `--set key=[{name: kl}]`, is one argument.
    words = shlex.split(arguments.replace("[{", "'[{").replace("}]", "}]'"))
    return exits.status(lambda: cli.app(words, standalone_mode=False))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with good models and files, and every kind of bad one."""
    root = tmp_path_factory.mktemp("bad-input")
    for name, family, seed in (("base", "llama", 0), ("other", "llama", 1), ("gpt2", "gpt2", 0),
                               ("falcon", "falcon", 0)):  # fmt: skip
        save(pico_model(family, seed=seed), root / name)
    _write_files(root)
    _write_broken_models(root)
    _write_adapters(root)
    return root


def _write_files(root: Path) -> None:
    write_colours(root)
    long = [{"input": f"{'x' * 80} {number}", "output": "y"} for number in range(40)]
    texts = {
        "long.jsonl": "".join(json.dumps(row) + "\n" for row in long),
        "few.jsonl": ROW + ROW.replace('"a"', '"c"') + ROW.replace('"a"', '"d"'),
        "broken.jsonl": ROW + "{not json\n",
        "lacking.jsonl": '{"input": "a"}\n',
        "empty.jsonl": "",
        "choices.jsonl": '{"input": "a", "output": "b", "choices": ["c", "d"]}\n',
        "broken.yaml": "name: [1\n",
        "recipe.yaml": yaml.safe_dump(RECIPE),
        "finished/results.json": EMPTY.to_json(),
        "torn/results.json": '{"schema": 1, "mod',
        "pickled/config.json": "{}",
        "pickled/pytorch_model.bin": "",
        "bottleneck/adapter_config.json": '{"config": {"reduction_factor": 16}}',
        "models/readme.txt": "",
    }
    for name, text in texts.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    write_items([], root / "finished" / "items.parquet")
    shutil.copytree(root / "finished", root / "torn-items")
    (root / "torn-items" / "items.parquet").write_bytes(b"PAR1")
    (root / "latin.jsonl").write_bytes(b'{"input": "caf\xe9", "output": "b"}\n')


def _write_broken_models(root: Path) -> None:
    def copied(name: str, **settings: object) -> Path:
        shutil.copytree(root / "base", root / name)
        path = root / name / "config.json"
        content = json.loads(path.read_text(encoding="utf-8")) | settings
        path.write_text(json.dumps(content), encoding="utf-8")
        return root / name

    weights = (root / "base" / "model.safetensors").read_bytes()
    header = int.from_bytes(weights[:8], "little")
    noise = np.random.default_rng(0).bytes(4000)
    for name, content in (
        ("halved", weights[: len(weights) // 2]),
        ("noise", noise),
        # Every tensor's place is named in the header; here two of them overlap.
        ("shifted", weights[: 8 + header].replace(b"[0,", b"[8,", 1) + weights[8 + header :]),
    ):
        (copied(name) / "model.safetensors").write_bytes(content)
    (copied("mute") / "tokenizer.json").unlink()
    tokenizer = copied("babbling") / "tokenizer.json"
    text = tokenizer.read_text(encoding="utf-8")
    tokenizer.write_text(text.replace('"BPE"', '"Babble"'), encoding="utf-8")
    copied("short", max_position_embeddings=64)
    copied("short2", max_position_embeddings=64)
    _drop(copied("lacking"), "model.layers.2.mlp.up_proj.weight")
    wider = copied("wider", vocab_size=VOCAB_SIZE + 1) / "model.safetensors"
    grown = {
        name: torch.cat([tensor, tensor[:1]]) if len(tensor) == VOCAB_SIZE else tensor
        for name, tensor in load_file(wider).items()
    }
    save_file(grown, wider, metadata={"format": "pt"})
    _drop(copied("shallow", num_hidden_layers=2), "model.layers.2.")
    writer = gguf.GGUFWriter(root / "whole.gguf", "llama")
    writer.add_tensor("token_embd.weight", np.zeros((64, 64), dtype=np.float32))
    for step in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{step}_to_file")()
    writer.close()
    (root / "torn.gguf").write_bytes((root / "whole.gguf").read_bytes()[:-5000])
    (root / "noise.gguf").write_bytes(noise)


def _drop(model: Path, prefix: str) -> None:
    kept = load_file(model / "model.safetensors")
    kept = {name: tensor for name, tensor in kept.items() if not name.startswith(prefix)}
    save_file(kept, model / "model.safetensors", metadata={"format": "pt"})


def _write_adapters(root: Path) -> None:
    base = load(str(root / "base"), AssetStore(root / "cache"))
    written = export(prepare(LoRA(rank=2), base.module, 0), base, root)
    config = written / "adapter_config.json"
    record = written / "keepshot-base.json"
    for path, key in ((config, "base_model_name_or_path"), (record, "reference")):
        content = json.loads(path.read_text(encoding="utf-8")) | {key: "base"}
        path.write_text(json.dumps(content), encoding="utf-8")
    shutil.copytree(written, root / "unrecorded")
    (root / "unrecorded" / "keepshot-base.json").unlink()
    torn = shutil.copytree(written, root / "torn-adapter") / "adapter_model.safetensors"
    torn.write_bytes(torn.read_bytes()[:-100])


@pytest.fixture
def here(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(place)
    monkeypatch.setenv("KEEPSHOT_CACHE", str(place / "cache"))
    return place


def listing(root: Path) -> list[str]:
    found = (path.relative_to(root) for path in root.rglob("*"))
    return sorted(str(path) for path in found if path.parts[0] != "cache")


def refused(arguments: str, root: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Run what must be refused without a trace; return what was said, progress included."""
    before = listing(root)
    capsys.readouterr()
    assert status(arguments) == 2
    output = capsys.readouterr()
    assert output.out == ""
    complaint = output.err[output.err.index("keepshot: ") :]
    assert len(complaint.splitlines()) <= 3, complaint
    assert [line for line in output.err.splitlines() if line.startswith("keepshot: ")]
    assert "Traceback" not in output.err
    assert listing(root) == before
    return output.err


@pytest.mark.parametrize(("arguments", "message"), EARLY, ids=[row[0] for row in EARLY])
def test_it_is_refused_before_any_model_is_loaded(
    arguments: str, message: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(arguments, here, capsys)
    assert message in said
    assert "loading" not in said


@pytest.mark.parametrize(("arguments", "message"), LATE, ids=[row[0] for row in LATE])
def test_it_is_refused_when_the_model_is_read(
    arguments: str, message: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(arguments, here, capsys)
    assert message in said
    assert "before: measuring" not in said


def test_only_an_existing_place_can_be_made_into_a_directory(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if os.geteuid() == 0:
        locked = "/proc/keepshot"
    else:
        (here / "locked").mkdir(mode=0o500)
        locked = "locked/out"
    said = refused(f"measure base --tasks addition --out {locked}", here, capsys)
    assert "choose another --out" in said


# -- a full disk ---------------------------------------------------------------------------------


@contextmanager
def largest_file(num_bytes: int) -> Generator[None]:
    """Let no file grow beyond this, which fails where it is written, as a full disk does."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


STEPS = "--set steps=4 --set save_every=2 --set batch_size=4 --keep none"
FULL_DISK = [
    ("measure base --tasks addition --limit 3 --shots 0", 1000),
    ("measure base --tasks addition --limit 3 --shots 0", 4500),
    ("blend base other --lambda 0.5", 20_000),
    (f"tune --model base --data colours.jsonl {STEPS}", 4500),
    (f"tune --model base --data colours.jsonl {STEPS}", 20_000),
    (f"tune --model base --data colours.jsonl --method full {STEPS}", 50_000),
    ("run recipe.yaml --set arms.plain.steps=1", 20_000),
]
"""What is done, and the size in bytes at which writing fails: each in another place."""


@pytest.mark.parametrize(("arguments", "room"), FULL_DISK)
def test_a_full_disk_is_told_and_what_was_finished_is_gone_on_from(
    arguments: str, room: int, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with largest_file(room):
        assert status(f"{arguments} --out out") == 2
    complaint = capsys.readouterr().err.partition("keepshot: ")[2]
    assert "the disk is full; free some space" in complaint
    assert len(complaint.splitlines()) <= 3
    assert not (here / "out").exists()
    assert status(f"{arguments} --out out") == 0
    # One lambda that is written is a model, with the record of a blend.
    record = "keepshot.json" if "--lambda" in arguments else "results.json"
    assert (here / "out" / record).exists()
    assert not list(here.glob(".out.*"))
    shutil.rmtree(here / "out")


# -- Ctrl-C --------------------------------------------------------------------------------------


def interrupted(arguments: str, once: Callable[[], bool]) -> int:
    """Run, and press Ctrl-C as soon as `once` holds; return the exit status."""
    done = threading.Event()

    def press() -> None:
        while not done.is_set():
            if once():
                os.kill(os.getpid(), signal.SIGINT)
                return
            time.sleep(0.002)

    # Where the tests run in the background, Ctrl-C would be ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    watcher = threading.Thread(target=press)
    watcher.start()
    try:
        return status(arguments)
    finally:
        done.set()
        watcher.join()
        signal.signal(signal.SIGINT, before)


def test_ctrl_c_while_measuring_leaves_no_record_and_goes_on(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = "measure base other --tasks addition --shots 4 --seeds 3"
    first = here / ".out.unfinished" / "parts" / "0.parquet"
    assert interrupted(f"{arguments} --out out", first.exists) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert not (here / "out").exists()
    assert not list((here / ".out.unfinished").glob("results.json"))
    assert status(f"{arguments} --out out") == 0
    assert "base: measuring" not in capsys.readouterr().err
    assert {score.model for score in ResultDocument.read(here / "out").scores} == {"base", "other"}
    shutil.rmtree(here / "out")


def test_ctrl_c_while_tuning_goes_on_to_the_same_bits(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (
        "tune --model base --data colours.jsonl --keep none --set steps=60 --set save_every=5"
    )
    state = here / ".out.unfinished" / "parts" / "state"

    def saved() -> bool:
        return any(state.glob("checkpoint-*/complete"))

    assert interrupted(f"{arguments} --out out", saved) == 130
    assert not (here / "out").exists()
    assert saved()
    torn = state / "checkpoint-59"
    torn.mkdir(exist_ok=True)
    (torn / "trainer_state.json").write_text("")
    assert status(f"{arguments} --out out") == 0
    assert status(f"{arguments} --out whole") == 0
    again, whole = (
        load_file(here / name / "adapter" / "adapter_model.safetensors")
        for name in ("out", "whole")
    )
    assert all(again[name].equal(whole[name]) for name in whole)
    for name in ("out", "whole"):
        shutil.rmtree(here / name)


def test_ctrl_c_before_anything_is_finished_leaves_nothing(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = listing(here)
    begun = here / ".out.unfinished" / "spec.yaml"
    arguments = "measure base --tasks addition,look-up --shots 4 --seeds 3 --out out"
    assert interrupted(arguments, begun.exists) == 130
    assert listing(here) == before


# -- a loss that is not a number -----------------------------------------------------------------


class Breaking(AnchorKL):
    """A term that is not a number from the fourteenth step on."""

    def __call__(self, module: Any, step: int, head: Any) -> Tensor:
        value = super().__call__(module, step, head)
        return value * float("nan") if step >= 13 else value


KEEP = "[{name: kl, prompts: 6, prompts_per_step: 2, shots: [1, 2]}]"
NOT_A_NUMBER = [
    ("run recipe.yaml", "parts/kept/adapter", "keepshot: kept: the loss is nan"),
    (
        "tune --model base --data colours.jsonl --method full --set steps=20 --set batch_size=4 "
        f"--set keep={KEEP}",
        "model",
        "keepshot: the loss is nan",
    ),
]


@pytest.mark.parametrize(("arguments", "kept", "message"), NOT_A_NUMBER)
def test_a_loss_that_is_not_a_number_stops_and_keeps_the_last_good_state(
    arguments: str,
    kept: str,
    message: str,
    here: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("keepshot.tuning.train.AnchorKL", Breaking)
    good = here / ".out.unfinished" / kept
    for _ in range(2):  # a second start fails the same way, on what the first has left
        assert status(f"{arguments} --out out") == 2
        complaint = capsys.readouterr().err
        assert f"{message} at step 14; the weights after step 10 are kept" in complaint
        assert f"the last good state lies in {good}" in complaint
        assert not (here / "out").exists()
    weights = load_file(next(good.glob("*.safetensors")))
    assert all(tensor.isfinite().all() for tensor in weights.values())
    shutil.rmtree(here / ".out.unfinished")
