"""Model references: what each form means, and what is said of those that mean nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from keepshot.assets import AssetStore
from keepshot.errors import ModelError
from keepshot.models.reference import (
    EMBEDDED,
    AdapterDirectory,
    Embedded,
    GGUFFile,
    HubModel,
    LocalDirectory,
    RunDirectory,
    list_models,
    parse_reference,
)


def write_model(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}", encoding="utf-8")
    (folder / "model.safetensors").write_bytes(b"")
    return folder


def write_adapter(folder: Path, base: str | None = "org/base") -> Path:
    folder.mkdir(parents=True)
    config = {"peft_type": "LORA", "base_model_name_or_path": base}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "adapter_model.safetensors").write_bytes(b"")
    return folder


def test_embedded_names():
    for name in ("smollm2-135m-instruct", "gemma-3-270m"):
        assert parse_reference(name) == Embedded(name, EMBEDDED[name])


@pytest.mark.parametrize(
    ("text", "repo", "revision"),
    [
        ("org/name", "org/name", None),
        ("org/name-1.5B@v1.0", "org/name-1.5B", "v1.0"),
        ("org/name@refs/pr/3", "org/name", "refs/pr/3"),
    ],
)
def test_hub_ids(text, repo, revision):
    assert parse_reference(text) == HubModel(text, repo, revision)


def test_directories(tmp_path):
    path = write_model(tmp_path / "m")
    assert parse_reference(str(path)) == LocalDirectory(str(path), path)


def test_a_directory_wins_over_a_hub_id(tmp_path, monkeypatch):
    write_model(tmp_path / "org/name")
    monkeypatch.chdir(tmp_path)
    assert parse_reference("org/name") == LocalDirectory("org/name", Path("org/name"))


def test_gguf_files(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF")
    assert parse_reference(str(path)) == GGUFFile(str(path), path)
    assert parse_reference(str(tmp_path)) == GGUFFile(str(tmp_path), path)
    (tmp_path / "n.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"holds 2 \.gguf files"):
        parse_reference(str(tmp_path))


def test_adapters_with_recorded_and_given_base(tmp_path):
    path = write_adapter(tmp_path / "a")
    assert parse_reference(str(path)) == AdapterDirectory(str(path), path, "org/base")
    text = f"smollm2-135m-instruct+{path}"
    assert parse_reference(text) == AdapterDirectory(text, path, "smollm2-135m-instruct")


def test_adapters_that_cannot_be_used(tmp_path):
    with pytest.raises(ModelError, match="name the base"):
        parse_reference(str(write_adapter(tmp_path / "a", base=None)))
    path = write_adapter(tmp_path / "b")
    (path / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match="is missing"):
        parse_reference(str(path))
    (path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match="pickled"):
        parse_reference(str(path))
    (path / "adapter_config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ModelError, match=r"adapter_config\.json: cannot be read"):
        parse_reference(str(path))


def test_run_directories(tmp_path):
    model = write_model(tmp_path / "r/model")
    text = str(tmp_path / "r")
    assert parse_reference(text) == RunDirectory(text, tmp_path / "r", LocalDirectory(text, model))
    adapter = write_adapter(tmp_path / "r/adapter")
    found = parse_reference(text)
    assert isinstance(found, RunDirectory)
    assert found.inner == AdapterDirectory(text, adapter, "org/base")


def test_pickles_are_refused_with_what_to_do(tmp_path):
    path = write_model(tmp_path / "m")
    (path / "model.safetensors").unlink()
    (path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match="save_pretrained") as caught:
        parse_reference(str(path))
    assert "pytorch_model.bin" in str(caught.value)
    with pytest.raises(ModelError, match="is a pickle"):
        parse_reference(str(path / "pytorch_model.bin"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("smollm2-135m", "nearest is 'smollm2-135m-instruct'"),
        ("Gemma-3-270M", "nearest is 'gemma-3-270m'"),
        ("", "does not exist"),
        ("~no-such-user/model", "does not exist"),
        ("x" * 300, "does not exist"),
        ("x" * 300 + "/model.gguf", "does not exist"),
        ("base+" + "x" * 300, "does not exist"),
        ("./nowhere", "does not exist"),
        ("org/../name", "does not exist"),
        ("absent/model.gguf", "does not exist"),
    ],
)
def test_what_does_not_exist(text, expected):
    with pytest.raises(ModelError, match=expected) as caught:
        parse_reference(text)
    assert repr(text) in str(caught.value)
    assert str(caught.value).count("\n") <= 2


def test_a_misspelt_path_gets_its_neighbour(tmp_path):
    write_model(tmp_path / "my-model")
    with pytest.raises(ModelError, match=r"nearest is .*my-model"):
        parse_reference(str(tmp_path / "my-modle"))


def test_files_and_directories_that_are_no_model(tmp_path):
    (tmp_path / "m.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match="give its directory"):
        parse_reference(str(tmp_path / "m.safetensors"))
    (tmp_path / "notes.txt").write_bytes(b"")
    with pytest.raises(ModelError, match="no known kind"):
        parse_reference(str(tmp_path / "notes.txt"))
    with pytest.raises(ModelError, match="without config"):
        parse_reference(str(tmp_path))


def test_listing_an_empty_cache(tmp_path):
    rows = list_models(AssetStore(tmp_path / "none"))
    assert [row["name"] for row in rows] == ["smollm2-135m-instruct", "gemma-3-270m"]
    assert [row["num_parameters"] for row in rows] == [134_515_008, 268_098_176]
    assert [row["path"] for row in rows] == [None, None]
    assert not (tmp_path / "none").exists()
