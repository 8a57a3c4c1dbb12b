"""Any layouts, dtypes and rules: the stream is the sum in memory is the oracle, however stopped."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from keepshot.blending.arithmetic import RowLambda, dice_for, narrow, widen
from keepshot.blending.blend import blend_, blended_dtype, realised_lambda, same_bits
from keepshot.blending.card import BlendRecord
from keepshot.blending.planning import Writing
from keepshot.blending.unfinished import unfinished_path
from keepshot.blending.write import Watch, write
from keepshot.errors import ModelError, OutputError
from keepshot.models.checkpoint import TensorReader
from keepshot.models.shards import plan_shards, read_header
from keepshot.progress import Silent

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
HALF_ULP = {
    torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8,
    torch.float32: 2.0**-24, torch.float64: 2.0**-53,
}  # fmt: skip
CONFIG = {"model_type": "llama", "tie_word_embeddings": True}


def save(content: dict[str, Tensor], directory: Path, shards: int, **config: object) -> Path:
    """Write a checkpoint in `shards` files, tensors dealt out in turn."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps({**CONFIG, **config}), encoding="utf-8")
    if shards == 1:
        save_file(content, directory / "model.safetensors", metadata={"format": "pt"})
        return directory
    names = list(content)
    places = {name: f"part-{number % shards}.safetensors" for number, name in enumerate(names)}
    for file in set(places.values()):
        part = {name: content[name] for name in names if places[name] == file}
        save_file(part, directory / file, metadata={"format": "pt"})
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}), encoding="utf-8")
    return directory


def read(directory: Path) -> dict[str, Tensor]:
    with TensorReader(directory) as reader:
        return {name: reader.read(name) for name in reader.names}


def everything(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


@st.composite
def models(draw: st.DrawFn) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Two models of the same names and shapes, each tensor of its own dtypes."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    base: dict[str, Tensor] = {}
    tuned: dict[str, Tensor] = {}
    for number in range(draw(st.integers(1, 6))):
        shape = draw(st.lists(st.integers(0, 9), min_size=0, max_size=3))
        start = 0.02 * torch.randn(shape, generator=generator, dtype=torch.float64)
        step = draw(st.sampled_from([0.0, 1e-3, 0.05, 2.0])) * 0.02
        end = start + step * torch.randn(shape, generator=generator, dtype=torch.float64)
        base[f"layer.{number}.w"] = start.to(draw(st.sampled_from(DTYPES)))
        tuned[f"layer.{number}.w"] = end.to(draw(st.sampled_from(DTYPES)))
    if draw(st.booleans()):
        base["ids"] = torch.arange(5)
        tuned["ids"] = torch.arange(5)
    for content in draw(st.sampled_from([(), (base,), (tuned,), (base, tuned)])):
        content["head.w"] = content["layer.0.w"].clone()
    return base, tuned


LAMS = st.one_of(st.sampled_from([0.0, 1.0, 0.5]), st.floats(-0.5, 1.5))


@given(
    pair=models(),
    layouts=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    lams=st.lists(LAMS, min_size=6, max_size=6),
    shard_bytes=st.sampled_from([1, 200, 10**9]),
)
@settings(max_examples=60, deadline=None)
def test_streamed_is_in_memory_is_the_oracle_within_one_rounding(pair, layouts, lams, shard_bytes):
    base, tuned = pair
    rule = {f"layer.{number}.w": lam for number, lam in enumerate(lams)} | {"ids": lams[0]}
    rule["head.w"] = lams[0]  # a tied copy, if there is one
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        ends = [
            save(content, root / name, count)
            for content, name, count in zip(pair, ("base", "tuned"), layouts, strict=True)
        ]
        options = Writing(max_shard_bytes=shard_bytes, hash_files=False)
        record = write(*ends, rule.__getitem__, root / "out", options)
        found = read(root / "out")
        sums = record.realised.by_tensor
    assert found.keys() == base.keys() & tuned.keys()
    left_out = base.keys() ^ tuned.keys()
    assert [note.partition(" is ")[0] for note in record.notes if "tied" in note] == [
        f"tensor {name!r}" for name in left_out
    ]
    for name, out in found.items():
        lam, origin, end = rule[name], base[name], tuned[name]
        if not origin.is_floating_point():
            assert torch.equal(out, end)
            continue
        # Under a rule copies, too, have the wider dtype.
        assert out.dtype == blended_dtype(origin.dtype, end.dtype, 0.5)
        expected = torch.empty_like(out)
        blend_(expected, origin, end, lam)
        assert same_bits(out, expected), name
        delta = end.double() - origin.double()
        oracle = origin.double() + lam * delta
        largest = origin.double().abs() + 3 * delta.abs()
        wide = torch.float64 if torch.float64 in (origin.dtype, end.dtype) else torch.float32
        smallest = torch.finfo(out.dtype).smallest_normal * torch.finfo(out.dtype).eps
        tolerance = HALF_ULP[out.dtype] * oracle.abs() * 1.001
        tolerance += 3 * HALF_ULP[wide] * largest + smallest
        assert bool(((out.double() - oracle).abs() <= tolerance).all())
        if (slope := realised_lambda(out, origin, end)) is not None:
            assert sums[name] == pytest.approx(slope, rel=1e-4, abs=1e-4)


class StopAfter(Silent):
    """Ctrl-C when so many shards are whole."""

    def __init__(self, count: int) -> None:
        self.count = count

    def update(self, done: int, total: int, detail: str = "") -> None:
        self.count -= 1
        if self.count <= 0:
            raise KeyboardInterrupt


@given(pair=models(), stops=st.lists(st.integers(1, 4), max_size=3), torn=st.booleans())
@settings(max_examples=30, deadline=None)
def test_interrupted_and_resumed_is_byte_for_byte_the_uninterrupted(pair, stops, torn):
    options = Writing(max_shard_bytes=100, rounding="stochastic", dtype="bfloat16", seed=3)
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        ends = save(pair[0], root / "base", 2), save(pair[1], root / "tuned", 1)
        write(*ends, 0.3, root / "whole", options)
        for count in stops:
            try:
                write(*ends, 0.3, root / "out", options, Watch(progress=StopAfter(count)))
            except KeyboardInterrupt:
                left = unfinished_path(root / "out")
                if torn and left.exists():
                    shard = next(iter(sorted(left.glob("*.safetensors"))), None)
                    if shard:
                        shard.write_bytes(shard.read_bytes()[:-1])
                continue
            break
        if not (root / "out").exists():
            write(*ends, 0.3, root / "out", options)
        whole, out = everything(root / "whole"), everything(root / "out")
        assert not unfinished_path(root / "out").exists()
    assert out == whole


KILLED = """
import sys
from pathlib import Path
from keepshot.blending.planning import Writing
from keepshot.blending.write import write
assert "torch" not in sys.modules
base, tuned, out = map(Path, sys.argv[1:])
write(base, tuned, 0.3, out, Writing(max_shard_bytes=2_000_000, dtype="bfloat16",
      rounding="stochastic"))
assert "torch" not in sys.modules
"""


@pytest.mark.parametrize("after", [2, 6])
def test_killed_and_run_again_gives_the_same_bytes(after: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = {f"layer.{number}.w": torch.randn(1000, 1000) for number in range(12)}
    tuned = {name: tensor + 0.01 * torch.randn_like(tensor) for name, tensor in base.items()}
    ends = save(base, tmp_path / "base", 3), save(tuned, tmp_path / "tuned", 2)
    options = Writing(max_shard_bytes=2_000_000, dtype="bfloat16", rounding="stochastic")
    write(*ends, 0.3, tmp_path / "whole", options)
    out = tmp_path / "out"
    command = [sys.executable, "-c", KILLED, *map(str, (*ends, out))]
    process = subprocess.Popen(command, env=dict(os.environ))
    left = unfinished_path(out)
    deadline = time.monotonic() + 60
    while len(list(left.glob("*.sums"))) < after and not out.exists():
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    kept = {file.name: file.stat().st_ino for file in left.glob("*.safetensors")}
    assert len(kept) >= after
    subprocess.run(command, check=True)
    assert everything(out) == everything(tmp_path / "whole")
    again = {name: (out / name).stat().st_ino for name in kept}
    assert sum(again[name] == kept[name] for name in kept) >= after


def started(tmp_path: Path, options: Writing) -> tuple[Path, Path]:
    """Interrupt a write after its first shard."""
    torch.manual_seed(1)
    base = {f"w{number}": torch.randn(20, 20) for number in range(4)}
    tuned = {name: tensor + 0.1 for name, tensor in base.items()}
    ends = save(base, tmp_path / "base", 1), save(tuned, tmp_path / "tuned", 1)
    with pytest.raises(KeyboardInterrupt):
        write(*ends, 0.3, tmp_path / "out", options, Watch(progress=StopAfter(1)))
    return ends


@pytest.mark.parametrize("hash_files", [True, False])
def test_an_input_that_changed_since_the_start_is_named(hash_files: bool, tmp_path: Path) -> None:
    options = Writing(max_shard_bytes=2000, hash_files=hash_files)
    ends = started(tmp_path, options)
    file = ends[1] / "model.safetensors"
    status = file.stat()
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    if hash_files:  # its time of change does not tell, its content does
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(ModelError, match=r"tuned/model.safetensors: changed since this blend was"):
        write(*ends, 0.3, tmp_path / "out", options)
    again = Writing(max_shard_bytes=2000, hash_files=hash_files, overwrite=True)
    write(*ends, 0.3, tmp_path / "out", again)
    assert (tmp_path / "out" / "keepshot.json").is_file()


def test_unfinished_work_of_other_settings_is_not_gone_on_with(tmp_path: Path) -> None:
    ends = started(tmp_path, Writing(max_shard_bytes=2000))
    with pytest.raises(OutputError, match="an unfinished blend of other settings"):
        write(*ends, 0.4, tmp_path / "out", Writing(max_shard_bytes=2000))
    with pytest.raises(OutputError, match="an unfinished blend of other settings"):
        write(*ends, 0.3, tmp_path / "out", Writing(max_shard_bytes=2000, dtype="float16"))


def test_two_processes_do_not_write_one_blend(tmp_path: Path) -> None:
    options = Writing(max_shard_bytes=2000)
    ends = started(tmp_path, options)
    left = unfinished_path(tmp_path / "out")
    before = sorted(file.name for file in left.iterdir())
    with FileLock(left / ".lock"), pytest.raises(OutputError, match="another process is writing"):
        write(*ends, 0.3, tmp_path / "out", options)
    assert sorted(file.name for file in left.iterdir()) == before
    write(*ends, 0.3, tmp_path / "out", options)


def test_the_type_of_a_reordered_shard_follows_its_header(tmp_path: Path) -> None:
    """Names order the data, not the other way round: the same tensors in another order blend."""
    base = {"a": torch.randn(3, 4), "b": torch.randn(5)}
    tuned = {name: base[name] + 1 for name in ("b", "a")}
    ends = save(base, tmp_path / "base", 1), save(tuned, tmp_path / "tuned", 1)
    write(*ends, 0.5, tmp_path / "out")
    for name, tensor in read(tmp_path / "out").items():
        torch.testing.assert_close(tensor, base[name] + 0.5)


def test_added_vocabulary_rows_are_the_tuned_sides(tmp_path: Path) -> None:
    torch.manual_seed(2)
    base = {"embed.weight": torch.randn(10, 4), "w": torch.randn(4, 4)}
    tuned = {"embed.weight": torch.randn(13, 4), "w": torch.randn(4, 4)}
    ends = (
        save(base, tmp_path / "base", 1, vocab_size=10),
        save(tuned, tmp_path / "tuned", 1, vocab_size=13),
    )
    record = write(*ends, 0.25, tmp_path / "out")
    found = read(tmp_path / "out")["embed.weight"]
    assert same_bits(found[10:], tuned["embed.weight"][10:])
    expected = torch.empty(10, 4)
    blend_(expected, base["embed.weight"], tuned["embed.weight"][:10].clone(), 0.25)
    assert same_bits(found[:10].clone(), expected)
    assert any("rows 10 to 12 are taken from tuned" in note for note in record.notes)
    assert record.realised.by_tensor["embed.weight"] == pytest.approx(0.25, abs=1e-6)
    # The other way round: what only the base has is left out, and said so.
    back = write(ends[1], ends[0], 0.25, tmp_path / "back")
    assert read(tmp_path / "back")["embed.weight"].shape == (10, 4)
    assert any("rows 10 to 12 are in base alone" in note for note in back.notes)
    with pytest.raises(ModelError, match="the base's tokenizer was asked for"):
        write(ends[1], ends[0], 0.25, tmp_path / "no", Writing(settings_from="base"))


def test_a_vocabulary_that_config_json_does_not_confirm_is_refused(tmp_path: Path) -> None:
    ends = (
        save({"w": torch.zeros(4, 2)}, tmp_path / "base", 1, vocab_size=9),
        save({"w": torch.zeros(5, 2)}, tmp_path / "tuned", 1, vocab_size=9),
    )
    with pytest.raises(ModelError, match=r"'w': base has shape \(4, 2\), tuned \(5, 2\)"):
        write(*ends, 0.5, tmp_path / "out")


def test_tokens_that_mean_something_else_are_told_or_refused(tmp_path: Path) -> None:
    ends = [save({"w": torch.zeros(2) + n}, tmp_path / str(n), 1) for n in (0, 1)]

    def tokenizer(directory: Path, renamed: int) -> None:
        vocabulary = {f"t{n}" if n >= renamed else f"other{n}": n for n in range(40)}
        content = {"model": {"vocab": vocabulary}, "added_tokens": []}
        (directory / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")

    tokenizer(ends[0], 0)
    tokenizer(ends[1], 2)
    notes = write(*ends, 0.5, tmp_path / "out").notes
    assert any("2 token numbers mean other tokens" in note for note in notes)
    tokenizer(ends[1], 20)
    with pytest.raises(ModelError, match="20 of 40 token numbers mean other tokens"):
        write(*ends, 0.5, tmp_path / "no")


def test_one_sided_tensors_are_carried_by_rule_only(tmp_path: Path) -> None:
    base = {"w": torch.zeros(3), "old": torch.ones(2)}
    tuned = {"w": torch.ones(3), "bias": torch.full((2,), 5.0)}
    ends = save(base, tmp_path / "base", 1), save(tuned, tmp_path / "tuned", 1)
    with pytest.raises(ModelError, match=r"'old'.*is in base and not in tuned"):
        write(*ends, 0.5, tmp_path / "no")
    record = write(*ends, 0.5, tmp_path / "out", Writing(one_sided="carry"))
    found = read(tmp_path / "out")
    assert found.keys() == {"w", "bias"}
    assert torch.equal(found["bias"], tuned["bias"])
    assert torch.equal(found["w"], torch.full((3,), 0.5))
    assert record.realised.by_tensor == {"w": 0.5}
    assert len([note for note in record.notes if "alone" in note]) == 2


@pytest.mark.parametrize("one_sided", ["refuse", "carry"])
def test_what_is_mostly_of_one_side_is_no_blend(one_sided, tmp_path: Path) -> None:
    """GPT-2 lies on the hub without the prefix that saving it again puts before every name.

    Carried over, the tuned model as it is was written as the blend at lambda 0.5.
    """
    plain = {"h.w": torch.zeros(3), "h.ln.w": torch.ones(2), "wte": torch.zeros(5)}
    longer = {f"model.{name}": tensor + 1.0 for name, tensor in plain.items()}
    longer["lm_head"] = torch.ones(5)
    short, long = save(plain, tmp_path / "short", 1), save(longer, tmp_path / "long", 1)
    options = Writing(one_sided=one_sided)
    for ends in ((short, long), (long, short)):
        with pytest.raises(
            ModelError, match=r"begin with 'model\.' in .*long and without"
        ) as error:
            write(*ends, 0.5, tmp_path / "no", options)
        assert "carry" not in str(error.value)
    few = save({"h.w": torch.zeros(3), "x": torch.zeros(8)}, tmp_path / "few", 1)
    with pytest.raises(ModelError, match="have 3 of 11 weights under one name"):
        write(short, few, 0.5, tmp_path / "no", options)
    assert not (tmp_path / "no").exists()


def test_a_second_difference_is_added(tmp_path: Path) -> None:
    """RE-Adapt, arXiv 2405.15007, eq. 4: base + alpha * delta + beta * psi."""
    torch.manual_seed(4)
    sides = [{"w": torch.randn(30, 7)} for _ in range(3)]
    ends = [save(content, tmp_path / str(n), 1) for n, content in enumerate(sides)]
    record = write(*ends[:2], 0.5, tmp_path / "out", Writing(second=(ends[2], 0.25)))
    base, instruct, domain = (side["w"].double() for side in sides)
    expected = base + 0.5 * (instruct - base) + 0.25 * (domain - base)
    found = read(tmp_path / "out")["w"].double()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert record.realised.overall == pytest.approx(1.0, abs=1e-6)
    assert BlendRecord.read(tmp_path / "out") == record


@pytest.mark.parametrize("last", ["embed", "w"])
def test_a_second_difference_is_added_beside_new_vocabulary_rows(last: str, tmp_path: Path) -> None:
    """Reading again looked for the new rows in the second model, which has none of them.

    It then read past its file, or the next tensor's data, and threw the blend away.
    """
    torch.manual_seed(6)
    shapes = {"embed": (40, 30), "w": (30, 7)}
    shapes = {name: shapes[name] for name in sorted(shapes, key=lambda name: name == last)}
    sides = [{name: torch.randn(shape) for name, shape in shapes.items()} for _ in range(3)]
    sides[1]["embed"] = torch.randn(60, 30)
    ends = [
        save(content, tmp_path / str(n), 1, vocab_size=len(content["embed"]))
        for n, content in enumerate(sides)
    ]
    record = write(*ends[:2], 0.5, tmp_path / "out", Writing(second=(ends[2], 0.25)))
    assert record.checked[0].startswith("2 tensors read again")
    base, tuned, domain = (side["embed"].double() for side in sides)
    expected = base + 0.5 * (tuned[:40] - base) + 0.25 * (domain - base)
    found = read(tmp_path / "out")["embed"]
    torch.testing.assert_close(found[:40].double(), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(found[40:], sides[1]["embed"][40:])


@pytest.mark.parametrize("beta", [0.0, 0.5])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_a_second_model_holds_is_not_laid_on_the_blend(
    beta: float, value: float, tmp_path: Path
) -> None:
    contents = [{"w": torch.randn(4, 4)} for _ in range(3)]
    contents[2]["w"][1, 1] = value
    base, tuned, other = (
        save(content, tmp_path / str(number), 1) for number, content in enumerate(contents)
    )
    with pytest.raises(ModelError, match=r"second tensor 'w' holds (NaN|infinity); this check"):
        write(base, tuned, 0.5, tmp_path / "out", Writing(second=(other, beta)))


def test_extrapolating_by_the_second_model_is_noted(tmp_path: Path) -> None:
    ends = [save({"w": torch.randn(4, 4)}, tmp_path / str(number), 1) for number in range(3)]
    record = write(*ends[:2], 0.5, tmp_path / "out", Writing(second=(ends[2], 2.0)))
    assert record.notes[0].startswith("beta 2 lies outside 0..1")


@pytest.mark.parametrize("axis", [0, -1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lambda_by_row_is_the_same_in_memory_and_on_disk(axis, dtype, tmp_path: Path) -> None:
    torch.manual_seed(5)
    base = {"w": torch.randn(6, 5).to(dtype), "b": torch.randn(6).to(dtype)}
    tuned = {name: tensor + torch.randn_like(tensor) for name, tensor in base.items()}
    ends = save(base, tmp_path / "base", 1), save(tuned, tmp_path / "tuned", 1)
    rows = RowLambda(axis, (0.0, 0.3, 1.0, 0.7, 0.3) + ((0.0,) if axis == 0 else ()))
    bias = RowLambda(0, (0.0, 1.0, 0.2, 0.2, 0.9, 0.5))
    write(*ends, {"w": rows, "b": bias}.__getitem__, tmp_path / "out")
    for name, rule in (("w", rows), ("b", bias)):
        expected = torch.empty_like(base[name])
        blend_(expected, base[name], tuned[name], rule)
        assert same_bits(read(tmp_path / "out")[name], expected)
        lam = torch.tensor(rule.values, dtype=torch.float64)
        lam = lam[:, None] if name == "w" and axis == 0 else lam
        oracle = base[name].double() + lam * (tuned[name].double() - base[name].double())
        torch.testing.assert_close(expected.double(), oracle, rtol=2.0**-8, atol=1e-6)


@pytest.mark.parametrize("kind", ["BF16", "F16"])
def test_stochastic_rounding_is_unbiased_and_only_to_neighbours(kind: str) -> None:
    """200 draws of 2000 values: the mean error is within 5 standard errors of 0 (p < 1e-6)."""
    values = np.random.default_rng(0).normal(0, 0.02, 2000).astype(np.float32)
    values[:4] = [0.0, -0.0, 1.0, -0.5]
    nearest = narrow(values, kind)
    total = np.zeros(values.size)
    for seed in range(200):
        raw = narrow(values, kind, dice_for(seed, "w", 0))
        found = widen(raw.view(np.uint8), kind, np.float32, np.empty_like(values))
        total += found
        gap = np.abs(values) * (2.0**-7 if kind == "BF16" else 2.0**-10) + 6e-8
        assert (np.abs(found - values) <= gap).all()
    exact = widen(nearest.view(np.uint8), kind, np.float32, np.empty_like(values)) == values
    assert (total[exact] == 200 * values[exact].astype(np.float64)).all()
    step = np.abs(values) * (2.0**-7 if kind == "BF16" else 2.0**-10) + 6e-8
    relative = ((total / 200 - values) / step).mean()
    assert abs(relative) < 5 * 0.5 / math.sqrt(200 * 2000)
    assert np.array_equal(
        narrow(values, kind, dice_for(7, "w", 0)), narrow(values, kind, dice_for(7, "w", 0))
    )


def test_stochastic_rounding_keeps_lambda_where_nearest_loses_it(tmp_path: Path) -> None:
    torch.manual_seed(6)
    base = {"w": (0.02 * torch.randn(700, 700)).bfloat16()}
    tuned = {"w": (base["w"].float() + 0.02 * 0.005 * torch.randn(700, 700)).bfloat16()}
    ends = save(base, tmp_path / "base", 1), save(tuned, tmp_path / "tuned", 1)
    nearest = write(*ends, 0.1, tmp_path / "nearest")
    dice = write(*ends, 0.1, tmp_path / "dice", Writing(rounding="stochastic", seed=1))
    assert nearest.realised.overall is not None
    assert nearest.realised.overall < 0.05
    assert dice.realised.overall == pytest.approx(0.1, abs=0.003)
    assert any("was realised as" in note for note in nearest.notes)
    assert not any("was realised as" in note for note in dice.notes)


@pytest.mark.parametrize("kind", ["F16", "BF16"])
def test_rounding_is_torchs(kind: str) -> None:
    dtype = torch.float16 if kind == "F16" else torch.bfloat16
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(10_000, generator=generator) * torch.logspace(-9, 4, 10_000)
    expected = values.to(dtype).view(torch.int16).numpy()
    assert np.array_equal(narrow(values.numpy(), kind).view(np.int16), expected)


def test_a_full_disk_keeps_what_is_whole_and_says_where(tmp_path: Path) -> None:
    """A file system of 400 kB, where one can be mounted."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(place)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        base = {f"w{number}": torch.zeros(25_000) for number in range(5)}
        tuned = {name: tensor + 1 for name, tensor in base.items()}
        ends = save(base, tmp_path / "base", 1), save(tuned, tmp_path / "tuned", 1)
        with pytest.raises(OutputError, match=r"needs 0.00 GB and the disk has 0.00 GB free"):
            write(*ends, 0.5, place / "out")
        with pytest.MonkeyPatch.context() as patch:
            usage = shutil.disk_usage("/")._replace(free=10**9)
            patch.setattr(shutil, "disk_usage", lambda _path: usage)  # someone else fills it up
            with pytest.raises(OutputError, match=r"disk is full.*\n.*what is whole lies in"):
                write(*ends, 0.5, place / "out", Writing(max_shard_bytes=100_000))
        assert len(list(unfinished_path(place / "out").glob("*.sums"))) == 3
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_planned_headers_are_read_back(tmp_path: Path) -> None:
    layout = [("a", "F32", (3, 4)), ("b", "BF16", (5,)), ("empty", "F32", (0, 4)), ("c", "I64", ())]
    shards = plan_shards(layout, 50, tmp_path)
    assert [list(shard.tensors) for shard in shards] == [["a"], ["b", "empty", "c"]]
    for shard in shards:
        file = tmp_path / shard.name
        file.write_bytes(shard.header + bytes(shard.num_bytes - len(shard.header)))
        assert {t.name: t for t in read_header(file)} == shard.tensors
