"""What is written is hashed meanwhile and read again: damage on the way is found, nothing kept."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from keepshot.blending.hashing import Hashing, Mark
from keepshot.blending.planning import Writing, plan_blend
from keepshot.blending.reread import reread
from keepshot.blending.stream import CHUNK
from keepshot.blending.unfinished import unfinished_path
from keepshot.blending.write import Watch, write
from keepshot.errors import ModelError
from keepshot.models.shards import open_checkpoint
from keepshot.progress import Silent

SHAPES = {"w0": (300, 500), "w1": (40, 30), "norm": (30,), "w2": (CHUNK + 7,)}


def pair(root: Path, shards: bool = False) -> tuple[Path, Path]:
    """Two checkpoints of one model; the tensors of the tuned one in another order if sharded."""
    generator = torch.Generator().manual_seed(5)
    base = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    noise = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    tuned = {name: tensor + 0.1 * noise[name] for name, tensor in base.items()}
    places: list[Path] = []
    for name, content in (("base", base), ("tuned", tuned)):
        place = root / name
        place.mkdir(parents=True)
        (place / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
        if shards and name == "tuned":
            where = {key: f"{len(content) - n}.safetensors" for n, key in enumerate(content)}
            for key, file in where.items():
                save_file({key: content[key]}, place / file)
            index = json.dumps({"weight_map": where})
            (place / "model.safetensors.index.json").write_text(index, encoding="utf-8")
        else:
            save_file(content, place / "model.safetensors")
        places.append(place)
    return places[0], places[1]


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


class At(Silent):
    """Does something when a stage begins."""

    def __init__(self, stage: str, action: Callable[[], object]) -> None:
        self.wanted, self.action = stage, action

    def stage(self, name: str) -> None:
        if name == self.wanted:
            self.action()


@pytest.mark.parametrize("shard_bytes", [10**9, 200_000])
def test_the_record_holds_the_sha256_of_every_file(shard_bytes: int, tmp_path: Path) -> None:
    base, tuned = pair(tmp_path, shards=True)
    options = Writing(max_shard_bytes=shard_bytes, second=(tuned, 0.5))
    record = write(base, tuned, 0.3, tmp_path / "out", options)
    read = {file.name: sha256(file) for file in tuned.glob("*.safetensors")}
    assert len(read) == 4
    assert record.tuned_sha256 == record.second_sha256 == read
    assert record.base_sha256 == {"model.safetensors": sha256(base / "model.safetensors")}
    written = {f.name: sha256(f) for f in (tmp_path / "out").iterdir() if f.name != "keepshot.json"}
    assert record.output_sha256 == written
    assert record.checked[0].startswith("4 tensors read again, 2334 of their weights recomputed")


@pytest.mark.parametrize("name", SHAPES)
def test_a_weight_that_is_not_the_blend_is_found(name: str, tmp_path: Path) -> None:
    base, tuned = pair(tmp_path)
    plan = plan_blend(base, tuned, 0.3, Writing(), tmp_path)
    write(base, tuned, 0.3, tmp_path / "out")
    reread(tmp_path / "out", plan.tensors)
    tensor = open_checkpoint(tmp_path / "out").tensors[name]
    last = tensor.offset + tensor.num_bytes - 4
    with tensor.file.open("r+b") as stream:  # one weight off by a thousandth
        stream.seek(last)
        value = np.frombuffer(stream.read(4), np.float32)[0] * np.float32(1.001)
        stream.seek(last)
        stream.write(value.tobytes())
    with pytest.raises(ModelError, match=rf"element {tensor.num_elements - 1} of tensor '{name}'"):
        reread(tmp_path / "out", plan.tensors)


def test_what_is_lost_on_the_way_leaves_nothing(tmp_path: Path) -> None:
    base, tuned = pair(tmp_path)
    out = tmp_path / "out"

    def lose() -> None:
        [file] = unfinished_path(out).glob("*.safetensors")
        size = file.stat().st_size
        with file.open("r+b") as stream:
            stream.truncate(size - 4000)
            stream.truncate(size)  # a hole, as of a disk that forgot a page

    with pytest.raises(ModelError, match=r"is 0\.0, where the inputs give"):
        write(base, tuned, 0.3, out, watch=Watch(progress=At("reading again", lose)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "tuned"]


def test_an_input_that_is_touched_while_it_is_read_leaves_nothing(tmp_path: Path) -> None:
    base, tuned = pair(tmp_path)
    touch = (tuned / "model.safetensors").touch
    with pytest.raises(ModelError, match=r"tuned/model.safetensors: changed while it was read"):
        write(base, tuned, 0.3, tmp_path / "out", watch=Watch(progress=At("reading again", touch)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "tuned"]


def test_a_shard_whose_data_was_lost_is_written_again(tmp_path: Path) -> None:
    base, tuned = pair(tmp_path)
    options = Writing(max_shard_bytes=200_000, dtype="bfloat16", rounding="stochastic")
    write(base, tuned, 0.3, tmp_path / "whole", options)

    class Stop(Silent):
        def update(self, done: int, total: int, detail: str = "") -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(base, tuned, 0.3, tmp_path / "out", options, Watch(progress=Stop()))
    [shard] = unfinished_path(tmp_path / "out").glob("*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-8:] = bytes(8)
    shard.write_bytes(content)
    write(base, tuned, 0.3, tmp_path / "out", options)
    for file in (tmp_path / "whole").iterdir():
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


def test_hashing_goes_on_where_it_was_and_names_what_differs(tmp_path: Path) -> None:
    file = tmp_path / "a"
    content = np.random.default_rng(0).bytes(3_000_000)
    file.write_bytes(content)
    prefix = hashlib.sha256(content[:1_000_001]).hexdigest()
    with Hashing({"a": file}) as hashing:
        assert hashing.differing({"a": Mark(1_000_001, prefix)}) is None
        hashing.start()
        reached = hashing.reached({"a": 2_000_000})["a"]
        assert reached.position >= 2_000_000
        assert reached.sha256 == hashlib.sha256(content[: reached.position]).hexdigest()
        assert hashing.digests() == {"a": hashlib.sha256(content).hexdigest()}
    changed = bytearray(content)
    changed[1_000_000] ^= 1
    file.write_bytes(changed)
    with Hashing({"a": file}) as hashing:
        assert hashing.differing({"a": Mark(1_000_000, sha256_of_prefix(content))}) is None
        assert hashing.differing({"a": Mark(1_000_001, prefix)}) == "a"
    with Hashing({"a": file}) as hashing:
        assert hashing.differing({"a": Mark(3_000_001, prefix)}) == "a"


def sha256_of_prefix(content: bytes) -> str:
    return hashlib.sha256(content[:1_000_000]).hexdigest()


def test_a_file_that_becomes_shorter_is_named_and_threads_end(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_bytes(bytes(3_000_000))
    before = threading.active_count()
    with Hashing({"a": file}) as hashing:
        os.truncate(file, 2_000_000)
        hashing.start()
        with pytest.raises(ModelError, match="became shorter while it was read"):
            hashing.reached({"a": 3_000_000})
    assert threading.active_count() == before
