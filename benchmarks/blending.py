"""Blending beside mergekit (and a path beside mergekit with lm-eval): whole processes.

    python benchmarks/blending.py --part write --mergekit PATH/bin/mergekit-yaml
    python benchmarks/blending.py --part big --mergekit PATH/bin/mergekit-yaml
    python benchmarks/blending.py --part sweep --mergekit PATH/bin/mergekit-yaml

mergekit pins other versions of common libraries, so give it an environment of its own:

    python -m venv /tmp/mergekit && /tmp/mergekit/bin/pip install mergekit==0.1.5

`write`: two random Llama models of 135 M parameters in float32 (538 MB each). `big`: 2 G parameters
in bfloat16 in shards of 1 GB (4 GB each; needs 17 GB of disk). Programs are started anew, in turns,
and read from the page cache as far as it reaches (one untimed pass before); wall time, processor
time (which other work on the machine moves less) and peak resident memory are the operating
system's. Prints the median and range of `--runs`. `cp` of one input is the floor. `write` ends with
how far both tools are from the sum in float64, and fails if that is more than rounding explains.
`sweep`: see `blending_sweep.py`; `--questions 1 --lambdas 1` tries that part out.
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
    "write": {"hidden": 576, "layers": 30, "mlp": 1536, "kv": 192, "vocab": 49152, "dtype": "F32"},
    "big": {"hidden": 2048, "layers": 32, "mlp": 8192, "kv": 512, "vocab": 32000, "dtype": "BF16"},
}
SHARD_BYTES = 1_000_000_000
NEEDED_GB = {"write": 3, "big": 17, "sweep": 3}
MOST_STEPS = {"keepshot": 1.5, "mergekit linear": 2.0, "mergekit task_arithmetic": 2.0}
"""Float32 steps, at the size of the larger end, from the sum in float64."""
MOST_APART = 2.0


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
    """Write a random model, a few megabytes of memory at a time."""
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


def merge_file(method: str, base: Path, tuned: Path, lam: float, kind: str) -> str:
    """Return mergekit's recipe for base + lam * (tuned - base)."""
    end = f"- model: {tuned}\n  parameters: {{weight: {lam}}}\ndtype: {kind}\n"
    if method == "linear":
        start = f"- model: {base}\n  parameters: {{weight: {1 - lam}}}\n"
        return f"merge_method: linear\nmodels:\n{start}{end}"
    return f"merge_method: task_arithmetic\nbase_model: {base}\nmodels:\n{end}"


def commands(root: Path, given: argparse.Namespace) -> dict[str, list[str]]:
    base, tuned, out = (str(root / name) for name in ("base", "tuned", "out"))
    ours = [sys.executable, "-m", "keepshot", "blend", base, tuned, "--lambda", str(LAM)]
    ours += ["--out", out]
    found = {
        "cp of one input": ["cp", "-r", base, out],
        "keepshot --no-check": [*ours, "--no-check"],
        "keepshot": ours,
    }
    if given.part == "write":
        found["keepshot check=generate"] = [*ours, "--set", "check=generate"]
    if given.mergekit:
        kind = "float32" if SIZES[given.part]["dtype"] == "F32" else "bfloat16"
        for method in ("linear", "task_arithmetic"):
            file = root / f"{method}.yaml"
            text = merge_file(method, root / "base", root / "tuned", LAM, kind)
            file.write_text(text, encoding="utf-8")
            found[f"mergekit {method}"] = [given.mergekit, str(file), out]
    return {name: found[name] for name in found if not given.only or name in given.only}


def write_part(root: Path, given: argparse.Namespace) -> None:
    seconds: dict[str, list[float]] = {}
    processor: dict[str, list[float]] = {}
    memory: dict[str, float] = {}
    listed = commands(root, given)
    kept = ("keepshot", "mergekit linear", "mergekit task_arithmetic")
    for run in range(given.runs + 1):
        for name, command in listed.items():
            shutil.rmtree(root / "out", ignore_errors=True)
            wall, busy, peak = timed(command, root / "log")
            if run:  # the first pass fills the page cache
                seconds.setdefault(name, []).append(wall)
                processor.setdefault(name, []).append(busy)
            elif given.part == "write" and name in kept:
                shutil.move(root / "out", root / f"result {name}")
            memory[name] = max(peak, memory.get(name, 0.0))
    floor = statistics.median(seconds.get("cp of one input", [float("nan")]))
    print("| program | seconds | times `cp` | processor seconds | MB |\n|---|---|---|---|---|")
    for name, walls in seconds.items():
        middle, work = statistics.median(walls), statistics.median(processor[name])
        span = f"{middle:.2f} ({min(walls):.2f} to {max(walls):.2f})"
        print(f"| {name} | {span} | {middle / floor:.1f} | {work:.2f} | {memory[name]:.0f} |")
    if given.part == "write":
        compare(root, [name for name in kept if name in listed])
        for name in kept:
            shutil.rmtree(root / f"result {name}", ignore_errors=True)


def compare(root: Path, names: list[str]) -> None:
    """Say how far results are from the sum in float64 and from each other, in float32 steps.

    A step is that between neighbours at the size of the larger end: the sum of two weights of
    opposite sign can be as small as it likes, and its own steps are then no measure of rounding.
    """
    places = [open_checkpoint(root / name).tensors for name in ("base", "tuned")]
    results = {name: open_checkpoint(root / f"result {name}").tensors for name in names}
    worst = dict.fromkeys(names, 0.0)
    squares = dict.fromkeys(names, 0.0)
    apart = dict.fromkeys(names, 0.0)
    count = 0
    for tensor in places[0]:
        base, tuned = (mapped(place[tensor]) for place in places)
        found = {name: mapped(result[tensor]) for name, result in results.items()}
        for start in range(0, len(base), 1 << 20):
            part = slice(start, start + (1 << 20))
            origin, end = base[part].astype(np.float64), tuned[part].astype(np.float64)
            step = np.spacing(np.maximum(np.abs(base[part]), np.abs(tuned[part])))
            errors = {
                n: (f[part] - (origin + LAM * (end - origin))) / step for n, f in found.items()
            }
            count += len(origin)
            for name, error in errors.items():
                worst[name] = max(worst[name], float(np.abs(error).max()))
                squares[name] += float(np.square(error).sum())
                gap = float(np.abs(error - errors[names[0]]).max())
                apart[name] = max(apart[name], gap)
    for name in names:
        mean = (squares[name] / count) ** 0.5
        print(
            f"{name}: {worst[name]:.2f} float32 steps from float64 at most, root mean square "
            f"{mean:.3f}; {apart[name]:.2f} from {names[0]} at most"
        )
        assert worst[name] <= MOST_STEPS[name], f"{name}: further from float64 than by rounding"
        assert apart[name] <= MOST_APART + 1e-6, f"{name}: further from ours than by rounding"


def mapped(tensor) -> np.ndarray:
    return np.memmap(tensor.file, np.float32, "r", tensor.offset, (tensor.num_elements,))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--part", choices=NEEDED_GB, default="write")
    parser.add_argument("--mergekit", help="path of mergekit-yaml; left out without it")
    parser.add_argument("--runs", type=int, default=3, help="of write and big")
    parser.add_argument("--only", type=lambda text: text.split(","), help="these rows, by comma")
    parser.add_argument("--questions", type=int, default=20, help="per task, in sweep")
    parser.add_argument("--lambdas", type=int, default=3, help="measured the other way, in sweep")
    parser.add_argument("--work", type=Path, help="keep the models here, and use them again")
    parser.add_argument("--make", action="store_true", help="make the models, and stop")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        root = given.work / given.part if given.work else Path(place)
        root.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(root).free / 1e9
        if free < NEEDED_GB[given.part]:
            raise SystemExit(f"{root}: {free:.1f} GB free, needed are {NEEDED_GB[given.part]}")
        print(
            f"{given.part}: {os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}", flush=True
        )
        if given.part == "sweep":
            from blending_sweep import sweep_part

            return sweep_part(root, given)
        for seed, name in enumerate(("base", "tuned")):
            if not (root / name / "config.json").is_file():
                make(root / name, SIZES[given.part], seed)
        if not given.make:
            write_part(root, given)


if __name__ == "__main__":
    main()
