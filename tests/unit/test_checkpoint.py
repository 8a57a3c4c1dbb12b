"""Reading and writing safetensors, against the safetensors library."""

from __future__ import annotations

import json
import struct

import pytest
import torch
from safetensors.torch import save_file

from keepshot.errors import ModelError
from keepshot.models.checkpoint import TensorReader, without_tied


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
        "no offsets": json.dumps({"a": {"dtype": "F32", "shape": [2]}}).encode(),
        "gap": json.dumps({"a": {**entry, "data_offsets": [4, 12]}}).encode(),
    }
    return {name: struct.pack("<Q", len(text)) + text + b"\0" * 8 for name, text in texts.items()}


@pytest.mark.parametrize("kind", broken_headers())
def test_corruption_names_the_file(tmp_path, kind):
    (tmp_path / "model.safetensors").write_bytes(broken_headers()[kind])
    with pytest.raises(ModelError, match=r"model\.safetensors: .*corrupted"):
        TensorReader(tmp_path)


def test_a_type_that_is_not_read_is_no_corruption(tmp_path):
    """Getting the file again, which the message once said, mends nothing."""
    entry = {"dtype": "U32", "shape": [2], "data_offsets": [0, 8]}
    text = json.dumps({"a": entry}).encode()
    content = struct.pack("<Q", len(text)) + text + b"\0" * 8
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match=r"tensor 'a' is of type 'U32'.* must be dequantised"):
        TensorReader(tmp_path)


def test_missing_shard_and_wrong_index(tmp_path, tensors):
    index = tmp_path / "model.safetensors.index.json"
    content = {"weight_map": {name: f"part-{name == 'b'}.safetensors" for name in tensors}}
    for file in set(content["weight_map"].values()):
        part = {name: t for name, t in tensors.items() if content["weight_map"][name] == file}
        save_file(part, tmp_path / file)
    index.write_text(json.dumps(content), encoding="utf-8")
    assert set(TensorReader(tmp_path).names) == set(tensors)
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
