"""Blends on disk: whatever the shards, the same tensors; nothing half-written; nothing silent."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from cases import FAMILIES
from keepshot.blending import write as write_module
from keepshot.blending.blend import blend, realised_lambda, same_bits
from keepshot.blending.card import BlendRecord
from keepshot.blending.planning import Writing
from keepshot.blending.write import Watch, verify, write
from keepshot.errors import ConfigError, ModelError, OutputError
from keepshot.models.bases import BASE_RECORD
from keepshot.models.checkpoint import TensorReader
from keepshot.models.loading import LanguageModel
from keepshot.progress import Silent

LAMS = [0.0, 0.1, 0.5, 1.0, 1.3]
Build = Callable[..., LanguageModel]


def save(model: LanguageModel, directory: Path, *, shard_bytes: int | None = None) -> Path:
    options = {"max_shard_size": shard_bytes} if shard_bytes else {}
    model.module.save_pretrained(directory, **options)
    model.tokenizer.save_pretrained(directory)
    return directory


def tensors(directory: Path) -> dict[str, Tensor]:
    with TensorReader(directory) as reader:
        return {name: reader.read(name) for name in reader.names}


def assert_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if not same_bits(found[name], expected[name])] == []


def rewrite(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    file = directory / "model.safetensors"
    content = load_file(file)
    change(content)
    save_file(content, file, metadata={"format": "pt"})


@pytest.fixture
def pair(fresh_pico: Build, tmp_path: Path) -> tuple[Path, Path]:
    base = save(fresh_pico("llama", seed=0), tmp_path / "base")
    return base, save(fresh_pico("llama", seed=1), tmp_path / "tuned")


@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_is_in_memory_is_numpy(family: str, fresh_pico: Build, tmp_path: Path) -> None:
    base = save(fresh_pico(family, seed=0), tmp_path / "base")
    tuned = save(fresh_pico(family, seed=1), tmp_path / "tuned", shard_bytes=20_000)
    write(base, tuned, 0.3, tmp_path / "out")
    found, origin, end = tensors(tmp_path / "out"), tensors(base), tensors(tuned)
    assert_same_bits(found, {name: blend(origin[name], end[name], 0.3) for name in end})
    for name, tensor in found.items():
        first, last = origin[name].double().numpy(), end[name].double().numpy()
        expected = first + 0.3 * (last - first)
        np.testing.assert_allclose(tensor.numpy(), expected, rtol=2e-7, atol=2e-7)


@pytest.mark.parametrize("shards", [(None, 9_000, 15_000), (9_000, 30_000, None), (1, 1, 1)])
def test_shard_layouts_make_no_difference(
    shards: tuple[int | None, ...], fresh_pico: Build, tmp_path: Path
) -> None:
    first, last = fresh_pico("llama", seed=0), fresh_pico("llama", seed=1)
    whole = (save(first, tmp_path / "b"), save(last, tmp_path / "t"))
    base = save(first, tmp_path / "base", shard_bytes=shards[0])
    tuned = save(last, tmp_path / "tuned", shard_bytes=shards[1])
    write(*whole, 0.6, tmp_path / "plain")
    options = Writing() if shards[2] is None else Writing(max_shard_bytes=shards[2])
    record = write(base, tuned, 0.6, tmp_path / "out", options)
    assert_same_bits(tensors(tmp_path / "out"), tensors(tmp_path / "plain"))
    written = sorted(file.name for file in (tmp_path / "out").glob("*.safetensors"))
    assert (len(written) > 1) == (shards[2] is not None)
    assert set(written) <= record.output_sha256.keys()
    assert verify(tmp_path / "out") == record


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lambda_0_and_1_are_bit_equal_to_the_inputs(
    dtype: torch.dtype, fresh_pico: Build, tmp_path: Path
) -> None:
    ends = []
    for seed in (0, 1):
        model = fresh_pico("qwen2", seed=seed)
        model.module.to(dtype)
        ends.append(save(model, tmp_path / str(seed)))
    for lam in (0, 1):
        record = write(ends[0], ends[1], lam, tmp_path / f"out{lam}")
        assert_same_bits(tensors(tmp_path / f"out{lam}"), tensors(ends[lam]))
        assert record.realised.overall == pytest.approx(lam, abs=1e-6)
        assert record.dtype == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_output_loads_and_computes_as_the_blend(
    family: str, fresh_pico: Build, tmp_path: Path
) -> None:
    models = [fresh_pico(family, seed=seed) for seed in (0, 1)]
    base, tuned = (save(m, tmp_path / str(n)) for n, m in enumerate(models))
    write(base, tuned, 0.4, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", use_safetensors=True).eval()
    state, end = models[0].module.state_dict(), models[1].module.state_dict()
    models[0].module.load_state_dict({n: blend(state[n], end[n], 0.4) for n in state})
    ids = torch.tensor([models[0].encode("Q: hot\nA: cold")])
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, models[0].module(ids).logits)
    tokenizers = [AutoTokenizer.from_pretrained(place) for place in (tmp_path / "out", tuned)]
    assert tokenizers[0]("Q: x")["input_ids"] == tokenizers[1]("Q: x")["input_ids"]


def test_tokenizer_template_and_settings_are_the_tuned_sides(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    base, tuned = pair
    for directory, mark in ((base, "base"), (tuned, "tuned")):
        (directory / "chat_template.jinja").write_text(mark, encoding="utf-8")
        settings = json.dumps({"eos_token_id": [1, 5] if mark == "tuned" else 1})
        (directory / "generation_config.json").write_text(settings, encoding="utf-8")
        (directory / "training_args.bin").write_bytes(b"pickle")
        (directory / "modeling.py").write_text("raise SystemExit", encoding="utf-8")
    write(base, tuned, 0.4, tmp_path / "out")
    assert (tmp_path / "out" / "chat_template.jinja").read_text(encoding="utf-8") == "tuned"
    settings = json.loads((tmp_path / "out" / "generation_config.json").read_text("utf-8"))
    assert settings == {"eos_token_id": [1, 5]}
    assert not (tmp_path / "out" / "training_args.bin").exists()
    assert not (tmp_path / "out" / "modeling.py").exists()


def test_a_tuned_side_without_tokenizer_takes_the_bases_and_says_so(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    for file in pair[1].glob("tokenizer*"):
        file.unlink()
    record = write(*pair, 0.4, tmp_path / "out")
    assert record.notes == ("tuned has no tokenizer; base's is used",)
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_record_and_card_say_what_was_done(pair: tuple[Path, Path], tmp_path: Path) -> None:
    record = write(*pair, 0.4, tmp_path / "out")
    content = json.loads((tmp_path / "out" / "keepshot.json").read_text(encoding="utf-8"))
    assert content["lambda"] == 0.4
    assert content["schema"] == 1
    assert BlendRecord.read(tmp_path / "out") == record
    digest = write_module.sha256_of(pair[1] / "model.safetensors")
    assert record.tuned_sha256 == {"model.safetensors": digest}
    assert record.realised.overall == pytest.approx(0.4, abs=1e-6)
    assert record.realised.num_changed == sum(
        not same_bits(tensors(pair[0])[name], tensor) for name, tensor in tensors(pair[1]).items()
    )
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "# base + 0.4 x (tuned - base)" in card
    assert digest in card
    assert str(tmp_path) not in card


def test_the_card_names_what_was_hashed(pair: tuple[Path, Path], tmp_path: Path) -> None:
    record = write(*pair, 0.4, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text("utf-8")
    for digests in (record.base_sha256, record.tuned_sha256, record.output_sha256):
        assert digests["model.safetensors"] in card
    write(*pair, 0.4, tmp_path / "quick", Writing(hash_files=False))
    card = (tmp_path / "quick" / "README.md").read_text("utf-8")
    assert "Nothing was hashed" in card
    assert "verify" not in card


def test_dtype_is_converted_recorded_and_the_realised_lambda_told(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    origin = tensors(pair[0])
    noise = torch.Generator().manual_seed(0)

    def nudge(content: dict[str, Tensor]) -> None:
        for name in content:
            step = 0.004 * origin[name] * torch.randn(origin[name].shape, generator=noise)
            content[name] = origin[name] + step

    rewrite(pair[1], nudge)
    record = write(*pair, 0.1, tmp_path / "out", Writing(dtype="bfloat16"))
    found, end = tensors(tmp_path / "out"), tensors(pair[1])
    assert_same_bits(found, {n: blend(origin[n], end[n], 0.1).bfloat16() for n in origin})
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert config["dtype"] == record.dtype == "bfloat16"
    name, slope = record.realised.lowest or ("", 0.0)
    assert slope == pytest.approx(realised_lambda(found[name], origin[name], end[name]))
    assert any("lambda 0.1 was realised as" in note for note in record.notes) == (
        abs((record.realised.overall or 0.0) - 0.1) > 0.02
    )


def test_what_rounding_loses_is_told_under_a_rule_and_of_a_sum_too(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    origin = {name: tensor.bfloat16() for name, tensor in tensors(pair[0]).items()}
    noise = torch.Generator().manual_seed(0)

    def narrow(content: dict[str, Tensor]) -> None:
        content.update(origin)

    def nudge(content: dict[str, Tensor]) -> None:
        for name, start in origin.items():
            step = 1e-4 * start.float() * torch.randn(start.shape, generator=noise)
            content[name] = start.float() + step

    rewrite(pair[0], narrow)
    rewrite(pair[1], nudge)
    coarse = {"dtype": "bfloat16"}

    def told(name: str, lam: float | Callable[[str], float], **options: Any) -> list[str]:
        notes = write(*pair, lam, tmp_path / name, Writing(**coarse, **options)).notes
        return [note.partition(" was realised as ")[0] for note in notes if "realised" in note]

    def rule(name: str) -> float:
        return 0.3 if "mlp" in name else 0.0

    frozen = told("frozen", lambda _name: 0.0)
    by_name = told("rule", rule)
    by_second = told("second", 0.3, second=(pair[1], 0.1))
    assert (frozen, by_name) == ([], ["lambda 0.300 (the mean under the rule)"])
    assert by_second == ["1 x the sum of both differences"]
    wide = write(*pair, rule, tmp_path / "wide", Writing(dtype="float32"))
    assert not any("realised" in note for note in wide.notes)


def test_under_a_rule_all_tensors_have_the_wider_dtype(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    """Copies of two dtypes were loaded as one of them: the base's kept weights were rounded."""

    def narrow(content: dict[str, Tensor]) -> None:
        content.update({name: tensor.bfloat16() for name, tensor in content.items()})

    rewrite(pair[1], narrow)
    record = write(*pair, lambda name: 0.0 if "mlp" in name else 1.0, tmp_path / "out")
    found, base, tuned = (tensors(d) for d in (tmp_path / "out", *pair))
    assert record.dtype == "float32"
    assert_same_bits(found, {n: base[n] if "mlp" in n else tuned[n].float() for n in base})
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert config["dtype"] == "float32"


def test_lambda_may_be_a_function_of_the_name(pair: tuple[Path, Path], tmp_path: Path) -> None:
    record = write(*pair, lambda name: 1.0 if "v_proj" in name else 0.0, tmp_path / "out")
    found, base, tuned = (tensors(d) for d in (tmp_path / "out", *pair))
    assert_same_bits(found, {n: tuned[n] if "v_proj" in n else base[n] for n in base})
    assert record.lam is None


def test_extrapolation_is_noted(pair: tuple[Path, Path], tmp_path: Path) -> None:
    record = write(*pair, 1.5, tmp_path / "out")
    assert "extrapolates beyond the tuned model" in record.notes[0]


def test_extrapolation_by_a_rule_is_noted_at_its_furthest(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    lams = {"mlp.up_proj": 1.25, "mlp.down_proj": 1.5, "v_proj": -0.5}

    def rule(name: str) -> float:
        return next((lam for part, lam in lams.items() if part in name), 0.5)

    notes = write(*pair, rule, tmp_path / "out").notes
    told = [note.partition(":")[0] for note in notes]
    assert told == [f"lambda {lam} lies outside 0..1" for lam in ("-0.5", "1.5")]


@pytest.mark.parametrize("side", [0, 1])
def test_a_tied_copy_stored_on_one_side_is_left_out(
    side: int, fresh_pico: Build, tmp_path: Path
) -> None:
    ends = [save(fresh_pico("qwen2", seed=n), tmp_path / str(n)) for n in (0, 1)]
    expected = {n: blend(t, tensors(ends[1])[n], 0.5) for n, t in tensors(ends[0]).items()}

    def store_twice(content: dict[str, Tensor]) -> None:
        content["lm_head.weight"] = content["model.embed_tokens.weight"].clone()

    rewrite(ends[side], store_twice)
    record = write(ends[0], ends[1], 0.5, tmp_path / "out")
    assert_same_bits(tensors(tmp_path / "out"), expected)
    assert "'lm_head.weight' is stored by" in record.notes[0]


def refused(base: Path, tuned: Path, match: str, lam: float = 0.5, error=ModelError) -> None:
    out = tuned.parent / "out"
    with pytest.raises(error, match=match):
        write(base, tuned, lam, out)
    assert sorted(p.name for p in tuned.parent.iterdir() if "out" in p.name) == []


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize(("value", "kind"), [(math.nan, "NaN"), (math.inf, "infinity")])
def test_nan_and_infinity_are_refused_and_leave_nothing(
    side: int, value: float, kind: str, pair: tuple[Path, Path]
) -> None:
    name = "model.layers.2.mlp.up_proj.weight"
    rewrite(pair[side], lambda content: content[name].view(-1)[7].fill_(value))
    refused(*pair, f"{['base', 'tuned'][side]} tensor '{name}' holds {kind}", lam=float(side))


def test_models_that_differ_are_refused_naming_the_tensor(pair: tuple[Path, Path]) -> None:
    base, tuned = pair
    name = "model.layers.1.mlp.up_proj.weight"
    rewrite(tuned, lambda content: content.pop(name))
    refused(base, tuned, f"'{name}'.*is in base and not in tuned")
    rewrite(tuned, lambda content: content.update({name: torch.zeros(3, 3)}))
    refused(base, tuned, rf"'{name}': base has shape \(48, 32\), tuned \(3, 3\)")
    rewrite(
        tuned, lambda content: content.update({name: torch.zeros(48, 32), "odd": torch.ones(1)})
    )
    refused(base, tuned, "'odd'.*is in tuned and not in base")


def test_another_architecture_is_refused(fresh_pico: Build, tmp_path: Path) -> None:
    base = save(fresh_pico("llama"), tmp_path / "base")
    tuned = save(fresh_pico("qwen2"), tmp_path / "tuned")
    refused(base, tuned, "base is a 'llama' model, tuned a 'qwen2' model")


def test_other_heads_of_the_same_shapes_are_refused(pair: tuple[Path, Path]) -> None:
    for directory, heads in zip(pair, (4, 2), strict=True):
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        config["num_attention_heads"] = heads
        (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    refused(*pair, "`num_attention_heads` is 4 in base and 2 in tuned; heads of two kinds")


def test_a_truncated_shard_is_refused_by_name(pair: tuple[Path, Path]) -> None:
    file = pair[1] / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refused(*pair, r"tuned/model.safetensors: truncated")


def test_other_settings_are_noted(pair: tuple[Path, Path], tmp_path: Path) -> None:
    config = json.loads((pair[1] / "config.json").read_text(encoding="utf-8"))
    config["rms_norm_eps"] = 0.5
    (pair[1] / "config.json").write_text(json.dumps(config), encoding="utf-8")
    notes = write(*pair, 0.5, tmp_path / "out").notes
    assert any("`rms_norm_eps` is 1e-06 in base and 0.5 in tuned" in note for note in notes)


def test_bad_requests_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    with pytest.raises(ConfigError, match="lambda nan is not a number"):
        write(nowhere, nowhere, math.nan, tmp_path / "out")
    with pytest.raises(ConfigError, match="lambda 'half' is not a number"):
        write(nowhere, nowhere, "half", tmp_path / "out")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="dtype 'bfloat1' is unknown; nearest is 'bfloat16'"):
        write(nowhere, nowhere, 0.5, tmp_path / "out", Writing(dtype="bfloat1"))
    for name, value in (("rounding", "up"), ("settings_from", "tund"), ("one_sided", "carri")):
        with pytest.raises(ConfigError, match=f"{name} '{value}' is unknown"):
            write(nowhere, nowhere, 0.5, tmp_path / "out", Writing(**{name: value}))
    with pytest.raises(ModelError, match="nowhere"):
        write(nowhere, nowhere, 0.5, tmp_path / "out")


def test_an_output_that_holds_something_or_lies_in_an_input_is_refused(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").touch()
    with pytest.raises(OutputError, match="already exists"):
        write(*pair, 0.5, tmp_path / "full")
    for out in (pair[0], pair[1] / "blend"):
        with pytest.raises(OutputError, match="lies inside the input"):
            write(*pair, 0.5, out)
    assert not (pair[1] / "blend").exists()


@pytest.mark.parametrize("reached", ["plainly", "through a link"])
def test_an_output_that_holds_an_input_is_refused(
    reached: str, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    """Replacing it would have thrown the inputs away."""
    out, before = tmp_path, tensors(pair[1])
    if reached == "through a link":
        out = tmp_path.parent / f"{tmp_path.name}-link"
        out.symlink_to(tmp_path)
    with pytest.raises(OutputError, match=r"holds the input .*base; choose another --out"):
        write(*pair, 0.5, out, Writing(overwrite=True))
    assert_same_bits(tensors(pair[1]), before)


def test_a_disk_too_full_is_told_before_writing(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage("/")._replace(free=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage)
    refused(*pair, r"needs 0.00 GB and the disk has 0.00 GB free", error=OutputError)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_interrupted_before_a_shard_is_whole_leaves_nothing(
    error: type[BaseException], pair: tuple[Path, Path]
) -> None:
    class Stopper(Silent):
        def stage(self, title: str) -> None:
            if title == "blending":
                raise error("stop")

    with pytest.raises(error, match="stop"):
        write(*pair, 0.5, pair[0].parent / "out", watch=Watch(progress=Stopper()))
    assert sorted(p.name for p in pair[0].parent.iterdir()) == ["base", "tuned"]


def test_verify_names_what_changed(pair: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    record = write(*pair, 0.5, out)
    assert verify(out) == record
    (out / "stray.safetensors").touch()
    with pytest.raises(ModelError, match=r"stray.safetensors: does not belong to this blend"):
        verify(out)
    (out / "stray.safetensors").unlink()
    rewrite(out, lambda content: content["model.norm.weight"].add_(1e-3))
    with pytest.raises(ModelError, match=r"model.safetensors: changed since it was written"):
        verify(out)
    (out / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"tokenizer.json: missing"):
        verify(out)
    with pytest.raises(ModelError, match=r"no keepshot.json, so this is no finished blend"):
        verify(pair[0])
    (out / "keepshot.json").write_text('{"schema": 1}', encoding="utf-8")
    with pytest.raises(ModelError, match="not a record of a blend"):
        verify(out)


def adapter(model: LanguageModel, directory: Path, config: object) -> Path:
    torch.manual_seed(5)
    module = get_peft_model(model.module, config)  # type: ignore[arg-type]
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "lora_" in name:
                parameter.normal_(0.0, 0.1)
    module.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_an_adapter_is_written_scaled(
    family: str, use_rslora: bool, fresh_pico: Build, tmp_path: Path
) -> None:
    base = save(fresh_pico(family), tmp_path / "base")
    targets = ["c_attn", "wte"] if family == "gpt2" else ["q_proj", "embed_tokens"]
    config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, use_rslora=use_rslora)
    tuned = adapter(fresh_pico(family), tmp_path / "adapter", config)
    (tuned / BASE_RECORD).write_text("{}", encoding="utf-8")
    ids = torch.tensor([fresh_pico(family).encode("Q: hot\nA: cold")])

    def logits(directory: Path) -> Tensor:
        module = PeftModel.from_pretrained(fresh_pico(family).module, directory).eval()
        return module(ids).logits.detach()

    whole, plain = logits(tuned), fresh_pico(family).module(ids).logits.detach()
    for lam in LAMS:
        record = write(base, tuned, lam, tmp_path / f"out{lam}")
        assert record.kind == "adapter"
        assert record.realised.overall == pytest.approx(lam, abs=1e-6)
        assert (tmp_path / f"out{lam}" / BASE_RECORD).is_file()
        assert verify(tmp_path / f"out{lam}") == record
        before = load_file(tuned / "adapter_model.safetensors")
        after = load_file(tmp_path / f"out{lam}" / "adapter_model.safetensors")
        for name, tensor in before.items():
            factor = lam if "_B" in name else 1.0
            torch.testing.assert_close(after[name], factor * tensor, rtol=2e-7, atol=0)
    assert torch.equal(logits(tmp_path / "out0.0"), plain)
    assert torch.equal(logits(tmp_path / "out1.0"), whole)
    assert not torch.allclose(whole, plain, atol=1e-2)


def test_adapters_that_do_not_fit_or_are_not_exact_are_refused(
    fresh_pico: Build, tmp_path: Path
) -> None:
    base = save(fresh_pico("llama"), tmp_path / "base")
    lora = adapter(
        fresh_pico("llama"), tmp_path / "lora", LoraConfig(r=4, target_modules=["q_proj"])
    )
    other = save(fresh_pico("gpt2"), tmp_path / "gpt2")
    refused(other, lora, "does not have; this adapter was trained on another base")
    refused(lora, lora, "is an adapter; base must be a whole model")
    with pytest.raises(ConfigError, match="an adapter takes one lambda and keeps its dtype"):
        write(base, lora, 0.5, tmp_path / "out", Writing(dtype="float16"))
