"""Every kind of adapter at lambda is base + lambda * (merged - base), on disk and in memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import AdaLoraConfig, IA3Config, LoraConfig, OFTConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

from keepshot.blending.adapter import dora_at
from keepshot.blending.planning import Writing
from keepshot.blending.sweep import rescale_adapter
from keepshot.blending.write import verify, write
from keepshot.errors import ModelError
from keepshot.models.adapter import merge_adapter
from keepshot.models.loading import LanguageModel

Build = Callable[..., LanguageModel]
LAMS = [0.0, 0.3, 0.5, 1.0, 1.2, -0.2]
WEIGHTS = "adapter_model.safetensors"
LLAMA = ["q_proj", "down_proj"]
CONFIGS = {
    "lora": ("llama", LoraConfig(r=4, lora_alpha=12, target_modules=LLAMA)),
    "rslora": ("llama", LoraConfig(r=4, lora_alpha=12, target_modules=LLAMA, use_rslora=True)),
    "dora": ("llama", LoraConfig(r=4, lora_alpha=12, target_modules=LLAMA, use_dora=True)),
    "dora, rslora": (
        "qwen2",
        LoraConfig(r=3, lora_alpha=6, target_modules=LLAMA, use_dora=True, use_rslora=True),
    ),
    "dora, conv1d": (
        "gpt2",
        LoraConfig(r=4, target_modules=["c_attn"], use_dora=True, fan_in_fan_out=True),
    ),
    "ia3": ("llama", IA3Config(target_modules=LLAMA, feedforward_modules=["down_proj"])),
    "ia3, conv1d": (
        "gpt2",
        IA3Config(target_modules=["c_attn"], feedforward_modules=[], fan_in_fan_out=True),
    ),
}


def trained(model: LanguageModel, config: object) -> PeftModel:
    torch.manual_seed(5)
    module = get_peft_model(model.module, config)  # type: ignore[arg-type]
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                parameter.normal_(0.0, 0.1)
            elif "magnitude" in name or "ia3" in name:
                parameter.mul_(1.0 + 0.2 * torch.randn_like(parameter))
    return module.eval()


def merged(adapted: PeftModel) -> dict[str, Tensor]:
    module: nn.Module = adapted.merge_and_unload()
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("kind", CONFIGS)
def test_on_disk_and_in_memory_it_is_the_path_between_base_and_merged(
    kind: str, fresh_pico: Build, tmp_path: Path
) -> None:
    family, config = CONFIGS[kind]
    trained(fresh_pico(family), config).save_pretrained(tmp_path / "adapter")
    fresh_pico(family).module.save_pretrained(tmp_path / "base")
    base = {n: t.clone() for n, t in fresh_pico(family).module.state_dict().items()}
    ids = torch.arange(3, 30)[None]

    def adapted(directory: Path) -> PeftModel:
        return PeftModel.from_pretrained(fresh_pico(family).module, directory).eval()

    live = adapted(tmp_path / "adapter")
    before = {name: tensor.clone() for name, tensor in live.state_dict().items()}
    end = merged(adapted(tmp_path / "adapter"))
    changed = [name for name in base if not torch.equal(base[name], end[name])]
    assert changed
    for number, lam in enumerate(LAMS):
        out = tmp_path / f"out{number}"
        record = write(tmp_path / "base", tmp_path / "adapter", lam, out)
        assert (record.kind, record.lam) == ("adapter", lam)
        assert verify(out) == record
        found = merged(adapted(out))
        for name in base:
            expected = base[name].double() + lam * (end[name].double() - base[name].double())
            torch.testing.assert_close(found[name].double(), expected, rtol=1e-5, atol=2e-6)
        with torch.no_grad(), rescale_adapter(live, lam):
            torch.testing.assert_close(
                live(ids).logits, adapted(out)(ids).logits, rtol=1e-4, atol=1e-4
            )
    after = live.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    first, whole = fresh_pico(family).module(ids).logits, live(ids).logits
    assert not torch.allclose(first, whole, atol=1e-2)
    torch.testing.assert_close(adapted(tmp_path / "out0")(ids).logits, first, rtol=1e-4, atol=1e-4)
    assert torch.equal(adapted(tmp_path / "out3")(ids).logits, whole)


@pytest.mark.parametrize("targets", [["q_proj", "embed_tokens"], ["q_proj", "lm_head"]])
def test_what_is_written_of_adapted_embeddings_or_head_is_loaded(
    targets: list[str], fresh_pico: Build, tmp_path: Path
) -> None:
    """Beside the factors peft stores the base's own embeddings, and they were taken for odd."""
    config = LoraConfig(r=4, lora_alpha=12, target_modules=targets)
    adapted = get_peft_model(fresh_pico("llama").module, config)
    torch.manual_seed(7)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(0.0, 0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    base = fresh_pico("llama").module
    base.save_pretrained(tmp_path / "base")
    write(tmp_path / "base", tmp_path / "adapter", 0.4, tmp_path / "out")
    assert any(".base_layer." in name for name in load_file(tmp_path / "out" / WEIGHTS))
    start, end = base.state_dict(), merged(adapted)
    found = merge_adapter(fresh_pico("llama").module, tmp_path / "out", "base").state_dict()
    for name, weight in start.items():
        expected = weight.double() + 0.4 * (end[name].double() - weight.double())
        torch.testing.assert_close(found[name].double(), expected, rtol=1e-5, atol=2e-6)
    other = fresh_pico("llama", seed=1).module
    with pytest.raises(ModelError, match=f"holds '.*{targets[1]}.weight' beside its factors"):
        merge_adapter(other, tmp_path / "out", "other")


def test_an_adapter_of_a_tied_head_is_of_no_other_base(fresh_pico: Build, tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj", "lm_head"])
    trained(fresh_pico("qwen2"), config).save_pretrained(tmp_path / "adapter")
    fresh_pico("qwen2").module.save_pretrained(tmp_path / "base")
    with pytest.raises(
        ModelError, match=r"(?s)'lm_head'.* untie the base first.* merge the adapter"
    ):
        write(tmp_path / "base", tmp_path / "adapter", 0.4, tmp_path / "out")
    with pytest.raises(ModelError, match=r"is tied to 'model.embed_tokens.weight'.*untie the base"):
        merge_adapter(fresh_pico("qwen2").module, tmp_path / "adapter", "base")


def test_a_dora_adapter_of_16_bits_is_rounded_as_asked(fresh_pico: Build, tmp_path: Path) -> None:
    family, config = CONFIGS["dora"]
    live = trained(fresh_pico(family), config)
    live.to(torch.bfloat16).save_pretrained(tmp_path / "adapter")
    fresh_pico(family).module.save_pretrained(tmp_path / "base")

    def written(name: str, **options: Any) -> dict[str, torch.Tensor]:
        out = tmp_path / name
        write(tmp_path / "base", tmp_path / "adapter", 0.3, out, Writing(**options))
        return load_file(out / "adapter_model.safetensors")

    nearest = written("nearest")
    (first, second) = (written(str(n), rounding="stochastic", seed=n) for n in range(2))
    for name, values in nearest.items():
        assert values.dtype == torch.bfloat16
        alike = [torch.equal(values, other[name]) for other in (first, second)]
        assert all(alike) if "lora_A" in name else not any(alike), name
        step = 2.0**-7 * values.abs() + 1e-30
        assert bool(((first[name] - values).abs() <= step).all())
        assert torch.equal(first[name], second[name]) == ("lora_A" in name)


@given(lam=st.floats(-0.5, 1.5), seed=st.integers(0, 10**6), rank=st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_dora_at_lambda_is_the_line_between_base_and_merged(lam, seed, rank) -> None:
    generator = np.random.default_rng(seed)
    weight = generator.normal(size=(6, 5))
    up, down = generator.normal(size=(6, rank)), generator.normal(size=(rank, 5))
    magnitude = np.abs(generator.normal(size=6)) + 0.1

    def merge(up: np.ndarray, magnitude: np.ndarray) -> np.ndarray:
        moved = weight + up @ down
        return magnitude[:, None] * moved / np.linalg.norm(moved, axis=1)[:, None]

    found = dora_at(weight, up @ down, magnitude, lam)
    if found is None:
        return
    factor, size = found
    expected = weight + lam * (merge(up, magnitude) - weight)
    np.testing.assert_allclose(merge(factor[:, None] * up, size), expected, rtol=1e-6, atol=1e-7)


def test_a_row_without_base_weight_is_no_dora_adapter() -> None:
    """1 - lambda + lambda m / c = 0: nothing of W is left, and a DoRA row always holds W."""
    weight = np.array([[1.0, 0.0]])
    assert dora_at(weight, np.zeros((1, 2)), np.array([0.5]), 2.0) is None


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (OFTConfig(r=4, oft_block_size=0, target_modules=["q_proj"]), "type 'OFT' cannot be"),
        (
            AdaLoraConfig(target_modules=["q_proj"], total_step=10, tinit=1, tfinal=1),
            "type 'ADALORA' cannot be",
        ),
        (LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]), "whole modules"),
        (LoraConfig(target_modules=["q_proj"], bias="all"), "biases were trained"),
        (LoraConfig(target_modules=["q_proj"], init_lora_weights="pissa"), "changed base weights"),
        (
            LoraConfig(target_modules=["q_proj"], use_dora=True, alpha_pattern={"q_proj": 3}),
            "DoRA with a scale per module",
        ),
        (IA3Config(target_modules=["k_proj"], feedforward_modules=[], modules_to_save=["lm_head"]),
         "whole modules"),
    ],
)  # fmt: skip
def test_what_has_no_exact_rule_is_refused_by_name(
    config: object, message: str, fresh_pico: Build, tmp_path: Path
) -> None:
    fresh_pico("llama").module.save_pretrained(tmp_path / "base")
    get_peft_model(fresh_pico("llama").module, config).save_pretrained(tmp_path / "a")  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=message):
        write(tmp_path / "base", tmp_path / "a", 0.5, tmp_path / "out")
    assert not (tmp_path / "out").exists()
