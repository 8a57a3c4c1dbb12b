"""A stock lm-eval task through our command line and through `--model hf`; a real server."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from keepshot.assets import AssetStore
from keepshot.models.loading import LanguageModel, load
from keepshot.scoring.engine import Engine
from keepshot.scoring.request import GreedyMatch, GreedyMatchResult
from keepshot.scoring.server import ServedEngine, Server
from keepshot.tasks.catalog import load_task

pytestmark = pytest.mark.real
NUM_ITEMS = 6


@pytest.fixture(scope="module")
def smollm2(store: AssetStore) -> LanguageModel:
    return load("smollm2-135m-instruct", store)


def write_task(folder: Path, store: AssetStore) -> Path:
    task = load_task("english-french", store)
    for name, examples in (("test", task.test[:NUM_ITEMS]), ("shots", task.demonstrations[:8])):
        rows = [
            {"q": e.input, "choices": list(e.choices or ()), "a": (e.choices or ()).index(e.output)}
            for e in examples
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    path = folder / "words.yaml"
    path.write_text(
        f"""task: words_local
dataset_path: json
dataset_kwargs:
  data_files:
    test: {folder / "test.jsonl"}
    validation: {folder / "shots.jsonl"}
output_type: multiple_choice
test_split: test
fewshot_split: validation
fewshot_config:
  sampler: first_n
doc_to_text: "Q: {{{{q}}}}\\nA:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: a
metric_list:
  - metric: acc
  - metric: acc_norm
""",
        encoding="utf-8",
    )
    return path


def test_same_results_as_hf(smollm2: LanguageModel, store: AssetStore, tmp_path: Path) -> None:
    """As a chat, which raw prompts (`test_lm_eval_parity`) have no need of."""
    task = write_task(tmp_path, store)
    flags = ["--tasks", str(task), "--num_fewshot", "4", "--log_samples", "--device", "cpu"]
    flags += ["--apply_chat_template", "--fewshot_as_multiturn"]
    found: dict[str, Any] = {}
    samples: dict[str, list[Any]] = {}
    for model, where in (("hf", str(smollm2.path)), ("keepshot", "smollm2-135m-instruct")):
        out = tmp_path / model
        command = [sys.executable, "-m", "keepshot", "lm-eval", "run", "--model", model]
        command += ["--model_args", f"pretrained={where},dtype=float32", *flags]
        subprocess.run([*command, "--output_path", str(out)], check=True, capture_output=True)
        found[model] = json.loads(next(out.rglob("results_*.json")).read_text("utf-8"))
        lines = next(out.rglob("samples_*.jsonl")).read_text("utf-8").splitlines()
        samples[model] = sorted(map(json.loads, lines), key=lambda sample: sample["doc_id"])
    assert found["keepshot"]["results"] == found["hf"]["results"]
    assert found["keepshot"]["n-samples"] == found["hf"]["n-samples"]
    for ours, theirs in zip(samples["keepshot"], samples["hf"], strict=True):
        assert ours["arguments"] == theirs["arguments"]
        sums = [float(answer[0][0]) for answer in ours["resps"]]
        assert sums == pytest.approx([float(a[0][0]) for a in theirs["resps"]], abs=1e-3)
    prompt = json.dumps(samples["keepshot"][0]["arguments"])
    assert "<|im_start|>" in prompt


def test_transformers_serve_generates_what_we_would(
    smollm2: LanguageModel, store: AssetStore
) -> None:
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).with_name("transformers")), "serve", str(smollm2.path)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    process = subprocess.Popen(
        [*command, "--dtype", "float32"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    try:
        wait_for(f"{url}/health", process)
        task = load_task("country-capital", store)
        shown = task.draw(4, 0)
        requests = [
            GreedyMatch(
                *map(
                    tuple,
                    smollm2.encode_pair(
                        task.template.context(shown, example),
                        task.template.continuation(example.output),
                    ),
                ),
                max_new_tokens=8,
            )
            for example in task.test[:6]
        ]
        expected = Engine(smollm2).run(requests)
        server = Server(url, model=str(smollm2.path), timeout=120.0, in_flight=2)
        found = ServedEngine(smollm2, server).run(requests)
    finally:
        process.terminate()
        process.wait(30)
    assert any(isinstance(result, GreedyMatchResult) and result.correct for result in expected)
    for ours, theirs in zip(expected, found, strict=True):
        assert isinstance(ours, GreedyMatchResult)
        assert isinstance(theirs, GreedyMatchResult)
        assert (theirs.correct, theirs.text.strip()) == (ours.correct, ours.text.strip())


def wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    for _ in range(240):
        assert process.poll() is None, "the server ended by itself"
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except OSError:
            time.sleep(0.5)
    raise AssertionError("the server did not come up in two minutes")
