"""Many models on Ray: real workers on the CPU, held to what the local engine finds."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from command import status
from keepshot.models.loading import save
from keepshot.records import ResultDocument, read_items
from pico import pico_model

MODELS = ("llama", "gpt2", "qwen2")
ASKED = ("--tasks", "sums.jsonl", "--shots", "0,2", "--seeds", "2")
ON_RAY = ("--engine", "ray", "--workers", "2")


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for seed, family in enumerate(MODELS):
        save(pico_model(family, seed=seed), tmp_path / family)
    rows = [
        {"input": f"{n} + {n % 7}", "output": str(n % 3), "choices": ["0", "1", "2"]}
        for n in range(30)
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "sums.jsonl").write_text(text, encoding="utf-8")
    return tmp_path


def scratch_directories() -> set[Path]:
    return set(Path(tempfile.gettempdir()).glob("keepshot-ray-*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["llama", "--workers", "2"], "--workers 2 needs --engine ray"),
        (["llama", *ON_RAY, "--server", "http://localhost:1"], "serves one model to one process"),
        (["llama", "llama", *ON_RAY], "'llama' is named twice"),
        (["llama", "--engine", "rya"], "engine"),
        (["llama", "--engine", "ray", "--workers", "0"], "workers"),
    ],
)
def test_bad_settings_are_refused_before_anything_starts(
    arguments: list[str], message: str, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status("measure", *arguments, *ASKED) == 2
    complaint = capsys.readouterr().err.strip().splitlines()
    assert message in "\n".join(complaint)
    assert len(complaint) <= 3


def test_missing_ray_says_what_to_install(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert status("measure", "llama", *ASKED, *ON_RAY) == 2
    assert "pip install 'keepshot[ray]'" in capsys.readouterr().err


@pytest.mark.slow
def test_ray_equals_the_local_engine_and_goes_on_after_a_fault(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One model lacks a tensor, which only loading it shows: the others' rows are kept."""
    assert status("measure", *MODELS, *ASKED, "--out", "local") == 0
    weights = workplace / "qwen2" / "model.safetensors"
    whole, tensors = weights.read_bytes(), load_file(weights)
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, weights, metadata={"format": "pt"})
    capsys.readouterr()
    before = scratch_directories()
    asked = ["measure", *MODELS, *ASKED, "--out", "apart"]
    # One at a time, so that the order in which they end is known.
    assert status(*asked, "--engine", "ray", "--workers", "1") == 2
    complaint = capsys.readouterr().err
    line = next(line for line in complaint.splitlines() if line.startswith("keepshot: "))
    assert "up_proj" in line
    assert "Traceback" not in complaint
    parts = workplace / ".apart.unfinished" / "parts"
    assert sorted(path.name for path in parts.glob("*.parquet")) == ["0.parquet", "1.parquet"]
    weights.write_bytes(whole)
    assert status(*asked, *ON_RAY) == 0
    assert scratch_directories() == before
    local, apart = (ResultDocument.read(workplace / name) for name in ("local", "apart"))
    assert apart.scores == local.scores
    assert apart.summary == local.summary
    assert [(m.reference, m.sha256, m.num_parameters) for m in apart.models] == [
        (m.reference, m.sha256, m.num_parameters) for m in local.models
    ]
    assert apart.models[2].sharing == local.models[2].sharing
    assert apart.cost.tokens_naive == local.cost.tokens_naive / 3, "two models came from parts"
    ours = read_items(workplace / "apart" / "items.parquet")
    theirs = read_items(workplace / "local" / "items.parquet")
    assert len(ours) == len(theirs) > 0
    for own, other in zip(ours, theirs, strict=True):
        assert (own.arm, own.item, own.answer) == (other.arm, other.item, other.answer)
        assert own.log_likelihoods == pytest.approx(other.log_likelihoods, abs=1e-6)


@pytest.mark.slow
def test_stopping_leaves_no_process_and_no_file(workplace: Path) -> None:
    """Ctrl-C while workers are at it (a terminal sends it to the whole process group)."""
    before = scratch_directories()
    process = subprocess.Popen(
        [sys.executable, "-m", "keepshot", "measure", *MODELS, *ASKED, *ON_RAY, "--out", "run"],
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert process.stderr is not None
    while "workers of Ray" not in (line := process.stderr.readline()):
        assert line, "it ended before any worker was started"
    deadline = time.monotonic() + 60
    while not (new := scratch_directories() - before) and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(5)  # past the start of the cluster, into that of the workers
    os.killpg(process.pid, signal.SIGINT)
    _, rest = process.communicate(timeout=60)
    assert process.returncode == 130, rest
    assert len(new) == 1
    assert scratch_directories() == before
    commands = [
        path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if readable(path)
    ]
    assert not any(str(next(iter(new))).encode() in command for command in commands)
    assert not (workplace / "run").exists()


def readable(path: Path) -> bool:
    try:
        path.read_bytes()
    except OSError:
        return False
    return True
