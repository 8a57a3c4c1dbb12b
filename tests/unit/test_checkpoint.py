"""Reading and writing safetensors, against the safetensors library."""

from __future__ import annotations

import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from keepshot.errors import ModelError
from keepshot.models.checkpoint import (
    TensorInfo,
    TensorReader,
    TensorWriter,
    layout_of,
    without_tied,
)


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "a": torch.randn(3, 4, generator=generator),
        "b": torch.randn(5, generator=generator).to(torch.bfloat16),
        "c": torch.arange(6).reshape(2, 3),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        "flag": torch.tensor([True, False, True]),
    }


def test_reads_what_safetensors_wrote(tmp_path, tensors):
    save_file(tensors, tmp_path / "model.safetensors")
    with TensorReader(tmp_path) as reader:
        assert set(reader.names) == set(tensors)
        for name, tensor in tensors.items():
            assert reader.shape(name) == tuple(tensor.shape)
            assert reader.dtype(name) == tensor.dtype
            assert torch.equal(reader.read(name), tensor)
        with pytest.raises(ModelError, match="no tensor 'zzz'"):
            reader.read("zzz")


@pytest.mark.parametrize("shard_bytes", [10**9, 64, 1])
def test_safetensors_reads_what_was_written(tmp_path, tensors, shard_bytes):
    layout = layout_of(tensors)
    with TensorWriter(tmp_path, layout, shard_bytes=shard_bytes) as writer:
        for name in reversed(tensors):
            writer.write(name, tensors[name])
    files = sorted(tmp_path.glob("*.safetensors"))
    found = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert set(found) == set(tensors)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    with TensorReader(tmp_path) as reader:
        assert set(reader.layout) == set(layout)
    assert (tmp_path / "model.safetensors.index.json").is_file() == (len(files) > 1)
    assert not list(tmp_path.glob(".*"))


def test_non_contiguous_tensors_are_written_as_they_read(tmp_path):
    tensor = torch.arange(12.0).reshape(3, 4).T
    with TensorWriter(tmp_path, layout_of({"t": tensor})) as writer:
        writer.write("t", tensor)
    assert torch.equal(load_file(tmp_path / "model.safetensors")["t"], tensor)


def test_an_error_leaves_nothing_half_written(tmp_path, tensors):
    def fail() -> None:
        with TensorWriter(tmp_path, layout_of(tensors)) as writer:
            writer.write("a", tensors["a"])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_resuming_keeps_whole_shards(tmp_path, tensors):
    layout = layout_of(tensors)
    first = TensorWriter(tmp_path, layout, shard_bytes=60)
    for name in ("a", "b", "c"):  # a and b fill the first shard, c only begins the second
        first.write(name, tensors[name])
    first.abandon()
    second = TensorWriter(tmp_path, layout, shard_bytes=60, resume=True)
    assert second.pending == ("c", "scalar", "empty", "flag")
    for name in second.pending:
        second.write(name, tensors[name])
    second.finish()
    with TensorReader(tmp_path) as reader:
        assert all(torch.equal(reader.read(name), tensor) for name, tensor in tensors.items())


def test_what_does_not_fit_the_plan_is_our_bug(tmp_path):
    writer = TensorWriter(tmp_path, [TensorInfo("a", (2,), torch.float32)])
    with pytest.raises(AssertionError, match="a"):
        writer.write("a", torch.zeros(3))
    with pytest.raises(AssertionError, match="never written"):
        writer.finish()


def test_tied_weights_are_kept_once():
    weight = torch.randn(4, 2)
    state = {"embed": weight, "norm": torch.ones(2), "head": weight, "part": weight[:2]}
    assert list(without_tied(state)) == ["embed", "norm", "part"]


@pytest.mark.parametrize("length", [0, 4, 8, 40, -1])
def test_truncation_names_the_file(tmp_path, tensors, length):
    path = tmp_path / "model.safetensors"
    save_file(tensors, path)
    content = path.read_bytes()
    path.write_bytes(content[:length])
    with pytest.raises(ModelError, match=r"model\.safetensors: truncated"):
        TensorReader(tmp_path)


def broken_headers() -> dict[str, bytes]:
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    texts = {
        "not JSON": b"{nonsense",
        "not an object": b"[1]",
        "wrong size": json.dumps({"a": {**entry, "shape": [3]}}).encode(),
        "unknown dtype": json.dumps({"a": {**entry, "dtype": "F7"}}).encode(),
        "no offsets": json.dumps({"a": {"dtype": "F32", "shape": [2]}}).encode(),
        "gap": json.dumps({"a": {**entry, "data_offsets": [4, 12]}}).encode(),
    }
    return {name: struct.pack("<Q", len(text)) + text + b"\0" * 8 for name, text in texts.items()}


@pytest.mark.parametrize("kind", broken_headers())
def test_corruption_names_the_file(tmp_path, kind):
    (tmp_path / "model.safetensors").write_bytes(broken_headers()[kind])
    with pytest.raises(ModelError, match=r"model\.safetensors: .*corrupted"):
        TensorReader(tmp_path)


def test_missing_shard_and_wrong_index(tmp_path, tensors):
    with TensorWriter(tmp_path, layout_of(tensors), shard_bytes=60) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text(encoding="utf-8"))
    assert content["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    content["weight_map"]["ghost"] = content["weight_map"]["a"]
    index.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ModelError, match="'ghost' is not in"):
        TensorReader(tmp_path)
    sorted(tmp_path.glob("*.safetensors"))[-1].unlink()
    with pytest.raises(ModelError, match="is missing"):
        TensorReader(tmp_path)


def test_pickles_and_empty_directories_are_refused(tmp_path):
    with pytest.raises(ModelError, match="no weights"):
        TensorReader(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin.*only safetensors"):
        TensorReader(tmp_path)
    with pytest.raises(ModelError, match="no directory"):
        TensorReader(tmp_path / "absent")
