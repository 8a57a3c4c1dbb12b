"""The sweep in memory: equals `blend`, leaves the base as it was whatever happens."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, OFTConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, MixtralConfig

from cases import FAMILIES
from keepshot.blending.blend import blend, same_bits
from keepshot.blending.sweep import rescale_adapter, sweep, sweep_adapter
from keepshot.errors import ConfigError, ModelError
from keepshot.models.checkpoint import TensorReader
from keepshot.models.loading import LanguageModel, save
from pico import character_tokenizer

LAMS = (0.0, 0.1, 0.5, 0.9, 1.0, 1.2)
Build = Callable[..., LanguageModel]


def snapshot(model: LanguageModel) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.module.state_dict().items()}


def assert_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    different = [name for name in expected if not same_bits(found[name], expected[name])]
    assert different == []


@pytest.mark.parametrize("family", FAMILIES)
def test_each_step_is_the_blend_and_the_base_comes_back(family: str, fresh_pico: Build) -> None:
    model = fresh_pico(family, seed=0)
    base, tuned = snapshot(model), snapshot(fresh_pico(family, seed=1))
    steps = sweep(model, tuned, LAMS, lambda lam: (lam, snapshot(model)))
    assert [lam for lam, _ in steps] == list(LAMS)
    for lam, (seen, state) in steps:
        assert seen == lam
        assert_same_bits(state, {name: blend(base[name], tuned[name], lam) for name in base})
    assert_same_bits(snapshot(model), base)


def test_the_model_computes_with_the_blend(fresh_pico: Build) -> None:
    model, other = fresh_pico("llama", seed=0), fresh_pico("llama", seed=1)
    ids = torch.tensor([model.encode("Q: x")])

    def logits(of: LanguageModel) -> Tensor:
        with torch.no_grad():
            return of.module(ids).logits

    steps = dict(sweep(model, snapshot(other), (0.0, 0.4, 1.0), lambda _lam: logits(model)))
    assert torch.equal(steps[0.0], logits(model))
    assert torch.equal(steps[1.0], logits(other))
    assert not torch.allclose(steps[0.4], steps[0.0])


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_restores_the_base(error: type[BaseException], fresh_pico: Build) -> None:
    model = fresh_pico("qwen2", seed=0)
    base, tuned = snapshot(model), snapshot(fresh_pico("qwen2", seed=1))

    def measure(lam: float) -> None:
        if lam == 0.5:
            raise error("stop")

    with pytest.raises(error):
        sweep(model, tuned, LAMS, measure)
    assert_same_bits(snapshot(model), base)


def test_a_second_interrupt_while_restoring_restores_all_the_same(
    fresh_pico: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = fresh_pico("llama", seed=0)
    base, tuned = snapshot(model), snapshot(fresh_pico("llama", seed=1))
    original, calls = Tensor.copy_, []

    def interrupted(self: Tensor, source: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(self, source)

    def measure(_lam: float) -> None:
        monkeypatch.setattr(Tensor, "copy_", interrupted)
        raise RuntimeError

    with pytest.raises(KeyboardInterrupt):
        sweep(model, tuned, [0.5], measure)
    monkeypatch.undo()
    assert len(calls) > 4
    assert_same_bits(snapshot(model), base)


@pytest.mark.parametrize("lacking", ["lm_head.weight", "model.embed_tokens.weight"])
def test_tied_weights_may_be_given_under_either_name(lacking: str, fresh_pico: Build) -> None:
    model = fresh_pico("qwen2", seed=0)
    base, tuned = snapshot(model), snapshot(fresh_pico("qwen2", seed=1))
    expected = {name: blend(base[name], tuned[name], 0.3) for name in base}
    del tuned[lacking]
    ((_, state),) = sweep(model, tuned, [0.3], lambda _lam: snapshot(model))
    assert_same_bits(state, expected)
    embeddings = model.module.get_input_embeddings().weight
    assert embeddings.data_ptr() == model.module.get_output_embeddings().weight.data_ptr()


def test_weights_tied_in_the_base_alone_are_refused(fresh_pico: Build) -> None:
    model = fresh_pico("qwen2", seed=0)
    tuned = snapshot(fresh_pico("qwen2", seed=1))
    tuned["lm_head.weight"] += 1.0
    with pytest.raises(ModelError, match="are tied in the base and differ in the tuned model"):
        sweep(model, tuned, [0.5], lambda _lam: None)


def test_a_bfloat16_model_sweeps_with_one_rounding(fresh_pico: Build) -> None:
    model, other = fresh_pico("llama", seed=0), fresh_pico("llama", seed=1)
    model.module.to(torch.bfloat16)
    other.module.to(torch.bfloat16)
    base, tuned = snapshot(model), snapshot(other)
    for lam, state in sweep(model, tuned, LAMS, lambda _lam: snapshot(model)):
        assert_same_bits(state, {name: blend(base[name], tuned[name], lam) for name in base})


def test_a_narrower_tuned_model_is_copied_exactly_and_a_wider_one_refused(
    fresh_pico: Build,
) -> None:
    model = fresh_pico("llama", seed=0)
    narrow = {name: t.bfloat16() for name, t in snapshot(fresh_pico("llama", seed=1)).items()}
    ((_, state),) = sweep(model, narrow, [1.0], lambda _lam: snapshot(model))
    assert_same_bits(state, {name: tensor.float() for name, tensor in narrow.items()})
    wide = {name: tensor.double() for name, tensor in narrow.items()}
    with pytest.raises(ModelError, match="load the base with --dtype float64"):
        sweep(model, wide, [1.0], lambda _lam: None)


def refused(model: LanguageModel, tuned: dict[str, Tensor], match: str) -> None:
    base = snapshot(model)
    calls: list[float] = []
    with pytest.raises(ModelError, match=match):
        sweep(model, tuned, [0.0, 0.5], calls.append)
    assert calls == []
    assert_same_bits(snapshot(model), base)


def test_models_that_do_not_fit_are_refused_before_anything_is_measured(fresh_pico: Build) -> None:
    model = fresh_pico("llama", seed=0)
    tuned = snapshot(fresh_pico("llama", seed=1))
    first, last = min(tuned), max(tuned)
    refused(model, {**tuned, "extra": torch.zeros(1)}, "'extra': the tuned model has it, the base")
    fewer = {name: tensor for name, tensor in tuned.items() if "layers.2" not in name}
    refused(model, fewer, r"layers.2.*\(and 8 more\): the base has it, the tuned model has not")
    refused(model, {**tuned, first: torch.zeros(2, 2)}, f"{first!r}: base has shape")
    broken = tuned[last].clone()
    broken.view(-1)[-1] = math.nan
    refused(model, {**tuned, last: broken}, f"tuned tensor {last!r} holds NaN")


def test_lambdas_are_checked_before_the_models(fresh_pico: Build) -> None:
    with pytest.raises(ConfigError, match="lambda nan is not a number"):
        sweep(fresh_pico("llama"), {}, [0.0, math.nan], lambda _lam: None)


def with_adapter(model: LanguageModel, config: object) -> LanguageModel:
    torch.manual_seed(3)
    module = get_peft_model(model.module, config).eval()  # type: ignore[arg-type]
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "lora_" in name:
                parameter.normal_(0.0, 0.1)
    return dataclasses.replace(model, module=module)


def lora(**options: object) -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("use_rslora", [False, True])
def test_adapter_sweep_is_the_blend_of_the_merged_weights(
    use_rslora: bool, fresh_pico: Build
) -> None:
    plain = fresh_pico("llama", seed=0)
    base = snapshot(plain)
    merged = with_adapter(fresh_pico("llama", seed=0), lora(use_rslora=use_rslora))
    tuned = {n: t.clone() for n, t in merged.module.merge_and_unload().state_dict().items()}
    model = with_adapter(fresh_pico("llama", seed=0), lora(use_rslora=use_rslora))
    ids = torch.tensor([plain.encode("Q: hot\nA: cold")])

    def logits(of: LanguageModel) -> Callable[[float], Tensor]:
        return lambda _lam: of.module(ids).logits.detach()

    whole = dict(sweep(plain, tuned, LAMS, logits(plain)))
    scaled = dict(sweep_adapter(model, LAMS, logits(model)))
    assert_same_bits(snapshot(plain), base)
    assert torch.equal(scaled[0.0], whole[0.0])
    for lam in LAMS:
        torch.testing.assert_close(scaled[lam], whole[lam], rtol=1e-4, atol=1e-4)
    assert (whole[0.0] - whole[1.0]).abs().max() > 1e-2


def test_the_adapter_scale_is_put_back_after_an_exception(fresh_pico: Build) -> None:
    model = with_adapter(fresh_pico("llama"), lora())
    layer = model.module.base_model.model.model.layers[0].self_attn.q_proj

    def measure(lam: float) -> None:
        assert layer.scaling["default"] == lam * 2.0
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep_adapter(model, [0.25], measure)
    assert layer.scaling["default"] == 2.0


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lora(modules_to_save=["lm_head"]), "whole modules were trained beside the adapter"),
        (lora(bias="all"), "biases were trained beside the adapter"),
        (lora(init_lora_weights="pissa"), "changed base weights.*'pissa'"),
        (OFTConfig(r=4, oft_block_size=0, target_modules=["k_proj"]), "type 'OFT' cannot be"),
    ],
)
def test_adapters_that_are_not_exact_are_refused_by_name(
    config: object, message: str, fresh_pico: Build
) -> None:
    model = with_adapter(fresh_pico("llama"), config)
    with pytest.raises(ModelError, match=message), rescale_adapter(model.module, 0.5):
        pytest.fail("was not refused")


def test_a_model_without_adapter_and_a_merged_one_are_refused(fresh_pico: Build) -> None:
    with pytest.raises(ModelError, match="carries no LoRA adapter"):
        sweep_adapter(fresh_pico("llama"), [0.5], lambda _lam: None)
    model = with_adapter(fresh_pico("llama"), lora())
    model.module.merge_adapter()
    with pytest.raises(ModelError, match="is merged into the weights"):
        sweep_adapter(model, [0.5], lambda _lam: None)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("streamed", ["tuned", "both"])
def test_streaming_from_disk_is_the_same_path(
    family: str, streamed: str, fresh_pico: Build, tmp_path: Path
) -> None:
    """For models that do not fit twice: the live model alone, both ends read from disk."""
    model, other = fresh_pico(family, seed=0), fresh_pico(family, seed=1)
    for one, name in ((model, "base"), (other, "tuned")):
        save(one, tmp_path / name)
    base, tuned = snapshot(model), snapshot(other)
    in_memory = sweep(model, tuned, LAMS, lambda _: snapshot(model))
    with TensorReader(tmp_path / "base") as origin, TensorReader(tmp_path / "tuned") as end:
        where = origin if streamed == "both" else None
        found = sweep(model, end, LAMS, lambda _: snapshot(model), base=where)
    for (lam, expected), (seen, state) in zip(in_memory, found, strict=True):
        assert lam == seen
        assert_same_bits(state, expected)
    assert_same_bits(snapshot(model), base)


def test_experts_that_are_stored_apart_are_not_streamed(tmp_path: Path) -> None:
    config = MixtralConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=2, num_experts_per_tok=1, vocab_size=40,
    )  # fmt: skip
    modules: list[Any] = [AutoModelForCausalLM.from_config(config) for _ in range(2)]
    for number, module in enumerate(modules):
        module.save_pretrained(tmp_path / str(number))
    model = LanguageModel("m", modules[0], character_tokenizer(), "", tmp_path / "0", 0, "float32")
    with TensorReader(tmp_path / "0") as origin, TensorReader(tmp_path / "1") as end:
        for base in (None, origin):
            with pytest.raises(
                ModelError, match=r"experts\..*not store it as .* leave `stream` out"
            ):
                sweep(model, end, [0.5], lambda _lam: None, base=base)


def test_streaming_passes_over_what_no_model_uses(fresh_pico: Build, tmp_path: Path) -> None:
    """Old checkpoints hold buffers, such as rotary frequencies, that are computed today."""
    model, other = fresh_pico("llama", seed=0), fresh_pico("llama", seed=1)
    expected = sweep(model, snapshot(other), LAMS, lambda _: snapshot(model))
    for one, name in ((model, "base"), (other, "tuned")):
        save(one, tmp_path / name)
        file = tmp_path / name / "model.safetensors"
        old = {**load_file(file), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
        save_file(old, file, metadata={"format": "pt"})
    with TensorReader(tmp_path / "base") as origin, TensorReader(tmp_path / "tuned") as end:
        found = sweep(model, end, LAMS, lambda _: snapshot(model), base=origin)
        for (_, one), (_, two) in zip(expected, found, strict=True):
            assert_same_bits(two, one)
        with pytest.raises(
            ModelError, match=r"inv_freq'.*the tuned model has it, the base has not"
        ):
            sweep(model, end, LAMS, lambda _: None)


def test_streaming_reads_in_the_models_own_dtype(fresh_pico: Build, tmp_path: Path) -> None:
    model, other = fresh_pico("llama", seed=0), fresh_pico("llama", seed=1)
    for one, name in ((model, "base"), (other, "tuned")):
        save(one, tmp_path / name)
    for one in (model, other):
        one.module.to(torch.bfloat16)
    expected = sweep(model, snapshot(other), LAMS, lambda _: snapshot(model))
    before = snapshot(model)
    with TensorReader(tmp_path / "base") as origin, TensorReader(tmp_path / "tuned") as end:
        found = sweep(model, end, LAMS, lambda _: snapshot(model), base=origin)
        for (_, one), (_, two) in zip(expected, found, strict=True):
            assert_same_bits(two, one)
        assert_same_bits(snapshot(model), before)
        next(iter(model.module.parameters())).data += 1
        with pytest.raises(ModelError, match="does not hold it as it is in memory"):
            sweep(model, end, LAMS, lambda _: None, base=origin)
