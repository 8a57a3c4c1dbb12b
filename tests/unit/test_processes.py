"""Training in processes that are killed, and in two that share each batch."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from keepshot.models.loading import save
from pico import pico_model

FSDP = Path(__file__).parents[2] / "recipes" / "launch" / "fsdp.yaml"
KILLED = """
import os, random, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from safetensors.torch import save_file
from keepshot.prompts import Example
from keepshot.tuning.keep import L2SP
from keepshot.tuning.method_specs import LoRA
from keepshot.tuning.recipe import Recipe
from keepshot.tuning.tokenised import Extra
from keepshot.tuning.train import train
from pico import pico_model

place = Path(sys.argv[1])
rows = [Example(word, word[0].upper()) for word in ("fig", "pea", "oat", "rye", "nut", "yam")]
recipe = Recipe(data="x", method=LoRA(rank=2), keep=(L2SP(),), steps=16, batch_size=4,
                learning_rate=1e-2, save_every=1)

def run(name, state_dir):
    model = pico_model("llama")
    train(recipe, model, rows, None, extra=Extra(state_dir=state_dir))
    weights = {key: p.detach().clone() for key, p in model.module.named_parameters()}
    save_file(weights, place / name)

def latest_state():
    states = [path.name for path in (place / "state").glob("checkpoint-*")]
    return max((int(name.rpartition("-")[2]) for name in states), default=0)

def forked(name, state_dir, last_state, delay):
    # Nothing has started a thread by now, so that a fork is a whole process.
    child = os.fork()
    if child == 0:
        run(name, state_dir)
        os._exit(0)
    while latest_state() < last_state:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

began = time.perf_counter()
run("whole.safetensors", None)
step = (time.perf_counter() - began) / recipe.steps
random.seed(int(sys.argv[2]))
killed = []
for last_state in sorted(random.sample(range(1, recipe.steps - 2), 3)):
    delay = random.uniform(0, 2 * step)
    if forked("killed.safetensors", place / "state", last_state, delay) == -signal.SIGKILL:
        killed.append(latest_state())
finished = forked("killed.safetensors", place / "state", recipe.steps + 1, 0.0)
assert finished == 0, finished
same = (place / "whole.safetensors").read_bytes() == (place / "killed.safetensors").read_bytes()
print(killed, same)
"""

JOINED = """
import os, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from datasets import Dataset
from safetensors.torch import save_file
from transformers import Trainer, TrainingArguments
from keepshot.tuning.join import keep_close
from keepshot.tuning.keep import KL
from pico import pico_model

place, port = Path(sys.argv[1]), sys.argv[2]

def collate(rows):
    ids = torch.tensor([row["input_ids"] for row in rows])
    return {"input_ids": ids, "labels": ids}

def run(rank, world):
    if world > 1:  # as torchrun sets them
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
                       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    model = pico_model("llama")
    rows = Dataset.from_list([{"input_ids": [3 + n, 4 + n, 5, 6 + n, 7]} for n in range(24)])
    args = TrainingArguments(
        output_dir=str(place / "out"), max_steps=4, per_device_train_batch_size=6 // world,
        learning_rate=1e-2, lr_scheduler_type="constant", optim="sgd", save_strategy="no",
        report_to=[], use_cpu=True, disable_tqdm=True, logging_steps=1, seed=0,
    )
    trainer = Trainer(model=model.module, args=args, train_dataset=rows, data_collator=collate,
                      processing_class=model.tokenizer)
    keep_close(trainer, KL(prompts=8, weight=5.0, shots=(1, 2), tasks="upper-case"))
    trainer.train()
    assert trainer.accelerator.num_processes == world
    assert trainer.state.log_history[-2]["keep/kl"] > 0.0
    weights = {name: p.detach().clone() for name, p in model.module.named_parameters()}
    save_file(weights, place / f"{world}-{rank}.safetensors")

for world in (1, 2):
    children = []
    for rank in range(world):
        if (child := os.fork()) == 0:
            run(rank, world)
            os._exit(0)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * world
"""


def environment(tmp_path: Path) -> dict[str, str]:
    tests = str(Path(__file__).parents[1])
    paths = [tests, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths),
        "KEEPSHOT_CACHE": str(tmp_path / "cache"),
    }  # fmt: skip


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_sigkill_at_any_moment_ends_with_the_same_bits(tmp_path: Path) -> None:
    """Killed thrice, each time a drawn moment after a drawn state: in a step, or in writing one."""
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), "0"],
        env=environment(tmp_path), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    killed, same = done.stdout.splitlines()[-1].rsplit(" ", 1)
    assert same == "True"
    steps = json.loads(killed)
    assert len(steps) >= 1
    assert 0 < steps[0] < 16, "no kill came between the first state and the last"
    assert steps == sorted(steps)


def test_two_processes_tune_as_one_does(tmp_path: Path) -> None:
    """Real torchrun, two gloo processes on the CPU; launchers that start one would be noticed."""
    save(pico_model("llama"), tmp_path / "model")
    rows = [{"input": "x" * (1 + n % 9), "output": str(n % 3)} for n in range(40)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    kl = "[{name: kl, prompts: 6, prompts_per_step: 1, shots: [2, 3], tasks: upper-case}]"
    sets = [f"keep={kl}", "steps=6", "batch_size=8", "learning_rate=0.01", "accumulate=2"]
    command = ["tune", "--model", str(tmp_path / "model"), "--data", str(file), "--json"]
    command += [part for value in sets for part in ("--set", value)]
    launchers = {
        1: [sys.executable, "-m", "keepshot"],
        2: [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2",
            "--master_port", "29518", "-m", "keepshot"],
    }  # fmt: skip
    documents: dict[int, Any] = {}
    for size, launcher in launchers.items():
        out = ["--keep", "none", "--out", str(tmp_path / f"run-{size}")]
        # On the CPU this is plain data parallelism, which must be said.
        out += ["--set", f"fsdp={FSDP}"] if size == 2 else []
        done = subprocess.run(
            [*launcher, *command, *out], env=environment(tmp_path), capture_output=True,
            text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        documents[size] = json.loads(done.stdout)
        told = "nothing is divided on the CPU: each of the 2 processes holds the whole model"
        assert done.stderr.count(told) == size - 1
    one, two = documents[1], documents[2]
    assert (one["cost"]["processes"], two["cost"]["processes"]) == (1, 2)
    for row, other in zip(one["training"][0]["losses"], two["training"][0]["losses"], strict=True):
        assert other == pytest.approx(row, abs=1e-6)
    assert one["training"][0]["losses"][0]["loss"] > one["training"][0]["losses"][-1]["loss"]
    assert (tmp_path / "run-2" / "adapter" / "adapter_model.safetensors").exists()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_the_joined_term_is_the_same_in_two_processes(tmp_path: Path) -> None:
    """Anyone's Trainer in two gloo processes, each with half of every batch."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    done = subprocess.run(
        [sys.executable, "-c", JOINED, str(tmp_path), str(port)],
        env=environment(tmp_path), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    one, first, second = (
        load_file(tmp_path / f"{name}.safetensors") for name in ("1-0", "2-0", "2-1")
    )
    for name, weight in one.items():
        assert torch.allclose(weight, first[name], atol=1e-6), name
        assert torch.equal(first[name], second[name]), name
