"""Loading every kind of reference with pico models on disk, and encoding text."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from huggingface_hub import constants
from peft import LoraConfig, get_peft_model
from transformers import Gemma3Config, Gemma3TextConfig

from keepshot.assets import AssetStore
from keepshot.errors import ModelError, OutputError
from keepshot.models.bases import record_base
from keepshot.models.identity import directory_sha256, file_sha256
from keepshot.models.loading import LanguageModel, load, save
from pico import character_tokenizer, pico_model
from pico_gguf import write_gguf as gguf_of

IDS = torch.tensor([[5, 17, 40, 8, 21]])


@pytest.fixture
def cache(tmp_path: Path) -> AssetStore:
    return AssetStore(tmp_path / "cache")


@pytest.fixture
def saved(tmp_path: Path, pico_models: dict[str, LanguageModel]) -> Path:
    save(pico_models["llama"], tmp_path / "llama")
    return tmp_path / "llama"


def logits(model: LanguageModel) -> torch.Tensor:
    with torch.no_grad():
        return model.module(IDS).logits


def write_adapter(folder: Path, base: str, *, family: str = "llama", seed: int = 3) -> Path:
    model = pico_model(family)
    torch.manual_seed(seed)
    adapted = get_peft_model(
        model.module, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    )
    adapted.save_pretrained(folder)
    config_path = folder / "adapter_config.json"
    config = json.loads(config_path.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = base
    config_path.write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "qwen2", "gemma3", "falcon"])
def test_saved_models_load_bit_equal(tmp_path, cache, pico_models, family):
    model = pico_models[family]
    save(model, tmp_path / "m")
    loaded = load(str(tmp_path / "m"), cache)
    assert torch.equal(logits(loaded), logits(model))
    assert not loaded.module.training
    assert loaded.num_parameters == model.num_parameters
    assert loaded.context_length == 2048
    assert loaded.eos_ids == {1}
    assert loaded.encode("Q: a\nA:") == model.encode("Q: a\nA:")


def test_shards_load_as_the_whole(tmp_path, cache, saved, pico_models):
    module = pico_models["llama"].module
    module.save_pretrained(tmp_path / "shards", max_shard_size="10KB")
    pico_models["llama"].tokenizer.save_pretrained(tmp_path / "shards")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert torch.equal(
        logits(load(str(tmp_path / "shards"), cache)), logits(load(str(saved), cache))
    )


def test_save_does_not_overwrite(saved, pico_models):
    with pytest.raises(OutputError, match="already exists"):
        save(pico_models["llama"], saved)


def test_sha256_is_of_content_and_not_of_place(tmp_path, cache, saved):
    first = load(str(saved), cache).sha256
    copy = tmp_path / "elsewhere"
    shutil.copytree(saved, copy)
    assert load(str(copy), cache).sha256 == first
    config = json.loads((copy / "config.json").read_text(encoding="utf-8"))
    config["rms_norm_eps"] = 0.5
    (copy / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert directory_sha256(copy, cache) != first


def test_digests_follow_the_file(tmp_path, cache):
    path = tmp_path / "f"
    path.write_bytes(b"one")
    one = file_sha256(path, cache)
    assert one == file_sha256(path, cache)
    path.write_bytes(b"other")
    assert file_sha256(path, cache) != one
    path.unlink()
    path.symlink_to(tmp_path / "nowhere")
    with pytest.raises(ModelError, match="f: cannot be read: No such file"):
        file_sha256(path, cache)


def test_truncated_weights_are_named(cache, saved):
    weights = saved / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(ModelError, match=r"model\.safetensors: truncated"):
        load(str(saved), cache)


def test_absent_tensors_are_not_invented(cache, saved):
    config = json.loads((saved / "config.json").read_text(encoding="utf-8"))
    config["num_hidden_layers"] = 4
    config.pop("layer_types", None)
    (saved / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ModelError, match=r"model\.layers\.3\S+ is missing"):
        load(str(saved), cache)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"dtype": "float23"}, "nearest is 'float32'"),
        ({"device": "cuda:99"}, "CUDA devices"),
        ({"device": "gpu"}, "is unknown"),
    ],
)
def test_options_are_checked_first(cache, options, expected):
    with pytest.raises(ModelError, match=expected):
        load("smollm2-135m-instruct", cache, **options)


def test_dtype(cache, saved):
    model = load(str(saved), cache, dtype="bfloat16")
    assert {p.dtype for p in model.module.parameters()} == {torch.bfloat16}
    assert model.dtype == "bfloat16"


def test_adapter_on_its_base(tmp_path, cache, saved):
    base = load(str(saved), cache)
    path = write_adapter(tmp_path / "a", str(saved))
    record_base(path, base.reference, base.sha256)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = load(str(path), cache)
    adapted = write_adapter_reference(seed=3)
    assert torch.allclose(logits(model), adapted, atol=1e-5)
    assert not torch.allclose(logits(model), logits(base), atol=1e-2)
    assert model.num_parameters == base.num_parameters
    assert not any("lora" in name for name, _ in model.module.named_parameters())
    assert model.sha256 != base.sha256


def write_adapter_reference(seed: int) -> torch.Tensor:
    """Logits of the pico model with the same adapter, unmerged."""
    model = pico_model("llama")
    torch.manual_seed(seed)
    adapted = get_peft_model(
        model.module, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    )
    with torch.no_grad():
        return adapted.eval()(IDS).logits


def test_adapter_for_another_base_is_refused(tmp_path, cache, saved, pico_models):
    other = tmp_path / "qwen"
    save(pico_models["qwen2"], other)
    path = write_adapter(tmp_path / "a", str(saved))
    record_base(path, "llama", load(str(saved), cache).sha256)
    with pytest.raises(ModelError, match="was trained on 'llama'"):
        load(f"{other}+{path}", cache)
    (path / "keepshot-base.json").unlink()
    with pytest.raises(ModelError, match=r"layers\.2\S+ is not in this base"):
        load(f"{other}+{path}", cache)
    save(pico_models["gpt2"], tmp_path / "gpt2")
    with pytest.raises(ModelError, match="does not fit base"):
        load(f"{tmp_path / 'gpt2'}+{path}", cache)


def test_run_directory(tmp_path, cache, saved):
    (tmp_path / "run").mkdir()
    saved.rename(tmp_path / "run/model")
    model = load(str(tmp_path / "run"), cache)
    assert model.reference == str(tmp_path / "run")
    assert model.path == tmp_path / "run/model"


def test_hub_ids_from_the_local_cache(tmp_path, cache, saved, monkeypatch):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = tmp_path / "hub/models--org--tiny"
    (repo / "snapshots").mkdir(parents=True)
    shutil.copytree(saved, repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    for name in ("main", "v1"):
        (repo / "refs" / name).write_text(commit, encoding="utf-8")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for reference in ("org/tiny", "org/tiny@v1", f"org/tiny@{commit}"):
        model = load(reference, cache)
        assert model.path.name == commit
        assert model.module.name_or_path == reference
    for absent in ("org/tiny@v2", "org/other"):
        with pytest.raises(ModelError, match="hub cannot be reached"):
            load(absent, cache)
    (repo / "snapshots" / commit / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no config\.json with safetensors"):
        load("org/tiny", cache)


def test_remote_code_is_not_run(tmp_path, cache, saved):
    config = json.loads((saved / "config.json").read_text(encoding="utf-8"))
    config["model_type"] = "mystery"
    config["auto_map"] = {
        "AutoConfig": "mystery.MysteryConfig",
        "AutoModelForCausalLM": "mystery.Mystery",
    }
    (saved / "config.json").write_text(json.dumps(config), encoding="utf-8")
    trace = tmp_path / "ran"
    (saved / "mystery.py").write_text(f"open({str(trace)!r}, 'w')\n", encoding="utf-8")
    with pytest.raises(ModelError, match="--trust-remote-code"):
        load(str(saved), cache)
    assert not trace.exists()


def write_gguf(path: Path) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_tensor("token_embd.weight", np.zeros((16, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kept", [2, 40, -512])
def test_broken_gguf_is_named(tmp_path, cache, kept):
    path = write_gguf(tmp_path / "m.gguf")
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ModelError, match=r"m\.gguf: truncated"):
        load(str(path), cache)
    converted = cache.root / "converted"
    assert not [p for p in converted.iterdir() if not p.name.endswith(".lock")]


def test_gguf_without_a_tokenizer_is_refused(tmp_path, cache):
    path = write_gguf(tmp_path / "m.gguf")
    with pytest.raises(ModelError, match=r"m\.gguf: transformers cannot read"):
        load(str(path), cache)


@pytest.mark.parametrize(
    ("left_out", "merge", "message"),
    [
        (
            ["blk.1.ffn_up.weight"],
            "a b",
            r"tensor model\.layers\.1\.mlp\.up_proj\.weight is missing",
        ),
        ([], "\u0120 \u0120", "cannot read this GGUF: Error while initializing BPE: Token"),
    ],
)
def test_a_gguf_that_lacks_something_is_refused(
    left_out: list[str], merge: str, message: str, tmp_path: Path, cache: AssetStore
) -> None:
    """Weights would be invented, and tokenizers has an error of no class of its own."""
    path = gguf_of(pico_model("llama").module, tmp_path / "m.gguf", left_out=left_out, merge=merge)
    with pytest.raises(ModelError, match=message):
        load(str(path), cache)


def test_a_gguf_with_a_tied_head_is_whole(tmp_path: Path, cache: AssetStore) -> None:
    module = pico_model("llama").module
    path = gguf_of(module, tmp_path / "m.gguf", left_out=["output.weight"])
    loaded = load(str(path), cache).module
    assert torch.equal(loaded.lm_head.weight, module.model.embed_tokens.weight)


def with_tokenizer(*, add_bos: bool) -> LanguageModel:
    model = pico_model("llama")
    fields = {name: getattr(model, name) for name in ("reference", "module", "sha256", "path")}
    return LanguageModel(
        **fields,
        tokenizer=character_tokenizer(add_bos=add_bos),
        num_parameters=model.num_parameters,
        dtype="float32",
    )


def test_bos_is_added_exactly_where_the_tokenizer_adds_it():
    plain, with_bos = with_tokenizer(add_bos=False), with_tokenizer(add_bos=True)
    assert (plain.bos_ids, with_bos.bos_ids) == ((), (0,))
    assert with_bos.encode("ab") == [0, *plain.encode("ab")]
    assert with_bos.encode("") == [0]
    assert with_bos.encode("<s>ab") == [0, *plain.encode("ab")]
    assert with_bos.decode(with_bos.encode("a b\n")) == "a b\n"


def test_pairs_split_where_the_context_ends():
    for model in (with_tokenizer(add_bos=False), with_tokenizer(add_bos=True)):
        context, continuation = model.encode_pair("Q: x\nA:", " yes")
        assert context + continuation == model.encode("Q: x\nA: yes")
        assert model.decode(continuation) == " yes"
        assert model.encode_pair("Q: x\nA: ", "yes") == (context, continuation)
        assert model.encode_pair("", "yes") == (model.encode(""), model.encode("yes")[-3:])


def test_answers_end_at_newline_or_eos():
    model = with_tokenizer(add_bos=True)
    assert model.ends_answer(1)
    assert model.ends_answer(model.encode("\n")[-1])
    assert not model.ends_answer(model.encode("a")[-1])
    assert not model.ends_answer(model.encode(" ")[-1])


def test_an_answer_may_end_within_a_token():
    """Some tokenizers join a full stop to the newlines behind it."""
    model = with_tokenizer(add_bos=False)
    model.tokenizer.add_tokens(["!\n\n"])
    (joined,) = model.encode_plain("!\n\n")
    assert model.last_of_answer(joined) == "!"
    assert (model.last_of_answer(1), model.last_of_answer(model.encode("a")[0])) == ("", None)
    assert model.decode_answer([*model.encode(" Hi"), joined]) == " Hi!"
    assert model.decode_answer([*model.encode(" Hi\n\n")]) == " Hi\n"
    assert model.decode_answer([*model.encode(" Hi"), 1]) == " Hi"


def test_newlines_before_an_answer_stay_with_the_prompt():
    for model in (with_tokenizer(add_bos=False), with_tokenizer(add_bos=True)):
        before, answer = model.encode_answer("Say so.\nAnswer:\n", "yes")
        assert before == model.encode("Say so.\nAnswer:\n")
        assert answer == model.encode_plain("yes")
        spaced = model.encode_answer("Say so.\nAnswer:\n ", "yes")
        assert spaced == (before, model.encode_plain(" yes"))
        for context in ("A: ", "A:", ""):
            assert model.encode_answer(context, " yes") == model.encode_pair(context, " yes")


def test_what_a_text_model_within_a_larger_one_says_is_read():
    model = pico_model("llama")
    text: Any = model.module.config
    outer = Gemma3Config(text_config=Gemma3TextConfig(max_position_embeddings=77, eos_token_id=5))
    model.module.config = outer
    try:
        assert model.context_length == 77
        assert 5 in model.eos_ids
    finally:
        model.module.config = text
