"""Writing one blend: whole processes against mergekit's `linear` and `task_arithmetic`.

    python benchmarks/blending.py --mergekit /path/to/bin/mergekit-yaml [--size small|large]

mergekit pins other versions of common libraries, so give it an environment of its own:

    python -m venv /tmp/mergekit && /tmp/mergekit/bin/pip install mergekit==0.1.5

Two random Llama models are made in a temporary directory: `small` is 135 M parameters in float32
(538 MB each), `large` 2 G in bfloat16 in shards of 1 GB (4 GB each). Every program is started
anew and reads from the page cache (one untimed pass before); wall time, processor time (which
other work on the machine moves less) and peak resident memory are the operating system's. keepshot
runs with and without its checks; `cp` of one input is the floor. Prints a table with the median
and range of `--runs`, and how far the result is from mergekit's in float32.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from keepshot.models.shards import index_text, open_checkpoint, plan_shards

LAM = 0.4
SIZES = {
    "small": {"hidden": 576, "layers": 30, "mlp": 1536, "kv": 192, "vocab": 49152, "dtype": "F32"},
    "large": {
        "hidden": 2048, "layers": 32, "mlp": 8192, "kv": 512, "vocab": 32000, "dtype": "BF16",
    },
}  # fmt: skip
SHARD_BYTES = 1_000_000_000


def layout(size: dict) -> list[tuple[str, str, tuple[int, ...]]]:
    hidden, mlp, kv, kind = size["hidden"], size["mlp"], size["kv"], size["dtype"]
    parts = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden), "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (mlp, hidden), "mlp.up_proj": (mlp, hidden),
        "mlp.down_proj": (hidden, mlp), "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }  # fmt: skip
    found = [("model.embed_tokens.weight", kind, (size["vocab"], hidden))]
    for layer in range(size["layers"]):
        found += [(f"model.layers.{layer}.{n}.weight", kind, shape) for n, shape in parts.items()]
    return [*found, ("model.norm.weight", kind, (hidden,))]


def make(directory: Path, size: dict, seed: int) -> None:
    directory.mkdir(exist_ok=True)
    kind = size["dtype"]
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": size["vocab"],
        "hidden_size": size["hidden"], "intermediate_size": size["mlp"],
        "num_hidden_layers": size["layers"], "num_attention_heads": size["hidden"] // 64,
        "num_key_value_heads": size["kv"] // 64, "tie_word_embeddings": True,
        "torch_dtype": "float32" if kind == "F32" else "bfloat16", "bos_token_id": 1,
        "eos_token_id": 2, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5,
    }  # fmt: skip
    shards = plan_shards(layout(size), SHARD_BYTES, directory)
    generator = np.random.default_rng(seed)
    for shard in shards:
        with (directory / shard.name).open("wb") as stream:
            stream.write(shard.header)
            for tensor in shard.tensors.values():
                left = tensor.num_elements
                while left:
                    count = min(left, 1 << 22)
                    values = generator.standard_normal(count, dtype=np.float32) * np.float32(0.02)
                    high = (values.view(np.uint32) >> 16).astype(np.uint16)
                    stream.write((values if kind == "F32" else high).tobytes())
                    left -= count
    if len(shards) > 1:
        name = "model.safetensors.index.json"
        (directory / name).write_text(index_text(shards), encoding="utf-8")
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")


# A process inherits its parent's peak memory: a bare interpreter starts what is measured.
LAUNCHER = """
import os, sys, time
log = os.open(sys.argv[1], os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
start = time.perf_counter()
moves = [(os.POSIX_SPAWN_DUP2, log, 1), (os.POSIX_SPAWN_DUP2, log, 2)]
pid = os.posix_spawnp(sys.argv[2], sys.argv[2:], os.environ, file_actions=moves)
_, status, usage = os.wait4(pid, 0)
busy = usage.ru_utime + usage.ru_stime
print(status, time.perf_counter() - start, busy, usage.ru_maxrss / 1000)
"""


def timed(command: list[str], log: Path) -> tuple[float, float, float]:
    """Return wall seconds, processor seconds and peak resident megabytes of one process."""
    launch = [sys.executable, "-S", "-E", "-c", LAUNCHER, str(log), *command]
    status, seconds, busy, memory = subprocess.check_output(launch, text=True).split()
    if int(status):
        raise SystemExit(f"{' '.join(command)} failed:\n{log.read_text(encoding='utf-8')[-2000:]}")
    return float(seconds), float(busy), float(memory)


def difference(root: Path) -> float:
    """Return the largest difference from mergekit, in float32 steps at the inputs' own size."""
    places = [open_checkpoint(root / name).tensors for name in ("ours", "out", "base", "tuned")]
    worst = 0.0
    for name in places[0]:
        found = [place[name] for place in places]
        ours, other, base, tuned = (
            np.memmap(t.file, np.float32, "r", t.offset, (t.num_elements,)) for t in found
        )
        gap = np.abs(ours - other) / np.spacing(np.maximum(np.abs(base), np.abs(tuned)))
        worst = max(worst, float(gap.max()))
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--mergekit", help="path of mergekit-yaml; left out without it")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--no-checked", action="store_true", help="leave the checked blend out")
    parser.add_argument("--work", type=Path, help="keep the models here, and use them again")
    parser.add_argument("--make", action="store_true", help="make the models, and stop")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        root = given.work / given.size if given.work else Path(place)
        root.mkdir(parents=True, exist_ok=True)
        for seed, name in enumerate(("base", "tuned")):
            if not (root / name / "config.json").is_file():
                make(root / name, SIZES[given.size], seed)
        if not given.make:
            report(root, given)


def commands(root: Path, given: argparse.Namespace) -> dict[str, list[str]]:
    base, tuned, out = (str(root / name) for name in ("base", "tuned", "out"))
    ours = [sys.executable, "-m", "keepshot", "blend", base, tuned, "--lambda", str(LAM)]
    ours += ["--out", out]
    found = {
        "cp of one input": ["cp", "-r", base, out],
        "keepshot --no-check": [*ours, "--no-check"],
    }
    if not given.no_checked:
        found["keepshot"] = ours
    if given.mergekit:
        kind = "float32" if given.size == "small" else "bfloat16"
        tail = f"dtype: {kind}\n"
        linear = (
            f"merge_method: linear\nmodels:\n- model: {base}\n  parameters: {{weight: {1 - LAM}}}\n"
            f"- model: {tuned}\n  parameters: {{weight: {LAM}}}\n{tail}"
        )
        arithmetic = (
            f"merge_method: task_arithmetic\nbase_model: {base}\nmodels:\n- model: {tuned}\n"
            f"  parameters: {{weight: {LAM}}}\n{tail}"
        )
        for method, text in (("linear", linear), ("task_arithmetic", arithmetic)):
            (root / f"{method}.yaml").write_text(text, encoding="utf-8")
            found[f"mergekit {method}"] = [given.mergekit, str(root / f"{method}.yaml"), out]
    return found


def report(root: Path, given: argparse.Namespace) -> None:
    print(f"{given.size}: lambda {LAM}, {given.runs} runs each, {os.cpu_count()} processors")
    for name, command in commands(root, given).items():
        seconds: list[float] = []
        processor: list[float] = []
        memory = 0.0
        for run in range(given.runs + 1):
            shutil.rmtree(root / "out", ignore_errors=True)
            wall, busy, peak = timed(command, root / "log")
            if run:  # the first pass fills the page cache
                seconds.append(wall)
                processor.append(busy)
            memory = max(memory, peak)
        middle = statistics.median(seconds)
        span = f"{min(seconds):.2f} to {max(seconds):.2f}"
        work = statistics.median(processor)
        shown = f"{middle:7.2f} s ({span}), {work:6.2f} s of processor"
        print(f"{name:28} {shown}, {memory:5.0f} MB", flush=True)
        if name == "keepshot --no-check":
            shutil.rmtree(root / "ours", ignore_errors=True)
            shutil.move(root / "out", root / "ours")
        if name == "mergekit linear" and given.size == "small":
            gap = difference(root)
            print(f"{'':28} largest difference from ours: {gap:.2f} float32 steps")


if __name__ == "__main__":
    main()
