"""Truncated, pruned and freed of intruders: against numpy, and through peft."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, MixtralConfig

from keepshot.blending.reshape import (
    intruders,
    prune,
    shrink_intruders,
    truncate,
    write_changed,
    write_lore,
)
from keepshot.blending.write import write
from keepshot.errors import ConfigError, ModelError
from keepshot.models.checkpoint import TensorReader
from keepshot.models.loading import LanguageModel

Build = Callable[..., LanguageModel]


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def read(directory: Path) -> dict[str, Tensor]:
    with TensorReader(directory) as reader:
        return {name: reader.read(name) for name in reader.names}


@given(seed=st.integers(0, 1000), share=st.floats(0.05, 1.0))
@settings(max_examples=50, deadline=None)
def test_the_rank_is_the_smallest_that_explains_enough(seed: int, share: float) -> None:
    delta = normal(seed, 7, 5)
    found = truncate(delta, share)
    sizes = np.linalg.svd(delta.double().numpy(), compute_uv=False) ** 2
    explained = np.cumsum(sizes) / sizes.sum()
    rank = found.up.shape[1]
    assert explained[rank - 1] >= share - 1e-9
    assert rank == 1 or explained[rank - 2] < share
    assert found.explained == pytest.approx(explained[rank - 1])
    error = (delta - found.up @ found.down).double().square().sum() / sizes.sum()
    assert float(error) == pytest.approx(1 - found.explained, abs=1e-6)


def test_no_difference_has_rank_0_and_bad_shares_are_refused() -> None:
    assert truncate(torch.zeros(3, 4), 0.5).up.shape == (3, 0)
    for share in (0.0, -1.0, 1.5, float("nan")):
        with pytest.raises(ConfigError, match="expected a number above 0"):
            truncate(torch.ones(2, 2), share)


def test_pruning_keeps_the_highest_scores() -> None:
    """S = |dW| - mean|W| * |dW| / |W|, here by hand: mean|W| is 2."""
    base = torch.tensor([[1.0, 4.0, -2.0, 1.0]])
    tuned = base + torch.tensor([[1.0, 1.0, -1.0, 0.0]])
    # scores: 1 - 2 = -1; 1 - 0.5 = 0.5; 1 - 1 = 0; 0
    assert prune(base, tuned, 0.25).tolist() == [[1.0, 5.0, -2.0, 1.0]]
    assert prune(base, tuned, 0.75).tolist() == [[1.0, 5.0, -3.0, 1.0]]
    assert torch.equal(prune(base, tuned, 1.0), tuned)
    big = normal(0, 50, 40)
    changed = (prune(big, big + normal(1, 50, 40), 0.1) != big).sum()
    assert int(changed) == 200


def test_a_planted_intruder_is_found_and_shrunk() -> None:
    base = normal(2, 60, 40)
    left, right = normal(3, 60), normal(4, 40)
    # Random vectors of a 60-dimensional space resemble no singular vector of the base much.
    left, right = left / left.norm(), right / right.norm()
    tuned = base + 100 * torch.outer(left, right)
    assert intruders(base, tuned) == [0]
    assert intruders(base, base) == []
    gone = shrink_intruders(base, tuned, 0.0)
    assert float(left @ gone @ right) == pytest.approx(0.0, abs=2.0)
    half = shrink_intruders(base, tuned, 0.5)
    top = [float(torch.linalg.matrix_norm(w, 2)) for w in (tuned, half)]
    assert top[1] == pytest.approx(top[0] / 2, rel=1e-4)
    assert torch.equal(shrink_intruders(base, tuned, 1.0), tuned)
    with pytest.raises(ConfigError, match="expected a number from 0 to 1"):
        shrink_intruders(base, tuned, 2.0)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_lore_is_an_adapter_that_peft_loads(family: str, fresh_pico: Build, tmp_path: Path) -> None:
    ends = [fresh_pico(family, seed=0), fresh_pico(family, seed=0)]
    with torch.no_grad():
        for name, parameter in ends[1].module.named_parameters():
            if (
                parameter.ndim == 2
                and "embed" not in name
                and "wte" not in name
                and "wpe" not in name
            ):
                out, inside = parameter.shape
                parameter += 0.1 * normal(1, out, 2) @ normal(2, 2, inside)
        next(p for n, p in ends[1].module.named_parameters() if p.ndim == 1).add_(0.1)
    for number, model in enumerate(ends):
        model.module.save_pretrained(tmp_path / str(number))
    base, tuned = (read(tmp_path / str(n)) for n in (0, 1))
    report = write_lore(tmp_path / "0", tmp_path / "1", 1.0 - 1e-9, tmp_path / "adapter")
    assert set(report.ranks.values()) == {2}
    assert report.left_out
    assert 0.5 < report.explained < 1.0
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text("utf-8"))
    assert (config["r"], config["lora_alpha"]) == (2, 2)
    adapted = PeftModel.from_pretrained(ends[0].module, tmp_path / "adapter")
    merged = adapted.merge_and_unload().state_dict()
    for module in report.ranks:
        name = f"{module}.weight"
        torch.testing.assert_close(merged[name], tuned[name], rtol=1e-4, atol=1e-4)
        assert not torch.equal(base[name], tuned[name])
    # It is a LoRA adapter like any other: lambda applies.
    record = write(tmp_path / "0", tmp_path / "adapter", 0.5, tmp_path / "half")
    assert record.realised.overall == pytest.approx(0.5, abs=1e-6)


def test_lore_of_different_ranks_keeps_a_scale_of_1(fresh_pico: Build, tmp_path: Path) -> None:
    ends = [fresh_pico("llama", seed=0), fresh_pico("llama", seed=1)]
    for number, model in enumerate(ends):
        model.module.save_pretrained(tmp_path / str(number))
    tuned = read(tmp_path / "1")
    report = write_lore(tmp_path / "0", tmp_path / "1", 0.6, tmp_path / "adapter")
    assert len(set(report.ranks.values())) > 1
    base = read(tmp_path / "0")
    merged = PeftModel.from_pretrained(ends[0].module, tmp_path / "adapter").merge_and_unload()
    state = merged.state_dict()
    for module in report.ranks:
        name = f"{module}.weight"
        delta = tuned[name] - base[name]
        found = truncate(delta, 0.6)
        torch.testing.assert_close(state[name] - base[name], found.up @ found.down, atol=1e-5,
                                   rtol=1e-4)  # fmt: skip
    with pytest.raises(ModelError, match="no linear layer differs"):
        write_lore(tmp_path / "0", tmp_path / "0", 0.6, tmp_path / "none")


def mixture(directory: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    config = MixtralConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=2, num_experts_per_tok=1, vocab_size=40,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return directory


def test_experts_are_pruned_and_what_is_not_is_told(tmp_path: Path) -> None:
    """Experts are stored apart and held together, so that no live module has their names."""
    ends = [mixture(tmp_path / str(seed), seed) for seed in (0, 1)]
    report = write_changed(*ends, partial(prune, share=0.1), tmp_path / "out")
    base, tuned, found = (read(tmp_path / name) for name in ("0", "1", "out"))
    experts = [name for name in base if ".experts." in name]
    assert len(experts) == 6
    for name in experts:
        assert torch.equal(found[name], prune(base[name], tuned[name], 0.1))
    assert set(report.left_out) == {"lm_head.weight", "model.embed_tokens.weight"}
    squares = {name: float((tuned[name] - base[name]).square().sum()) for name in base}
    share = sum(squares[name] for name in report.left_out) / sum(squares.values())
    assert report.share == pytest.approx(share)
    lore = write_lore(*ends, 0.5, tmp_path / "adapter")
    assert set(lore.left_out) >= {*experts, *report.left_out}


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_a_file_may_leave_out_the_outermost_module(
    prefix: str, fresh_pico: Build, tmp_path: Path
) -> None:
    for seed in (0, 1):
        fresh_pico("gpt2", seed=seed).module.save_pretrained(tmp_path / str(seed))
        content = read(tmp_path / str(seed))
        short = {f"{prefix}{n.removeprefix('transformer.')}": t for n, t in content.items()}
        save_file(short, tmp_path / str(seed) / "model.safetensors", metadata={"format": "pt"})
    report = write_changed(
        tmp_path / "0", tmp_path / "1", partial(prune, share=0.1), tmp_path / "p"
    )
    assert {f"{prefix}wte.weight", f"{prefix}wpe.weight"} <= set(report.left_out)
    assert not any("attn.c_attn.weight" in name for name in report.left_out)
    found = write_lore(tmp_path / "0", tmp_path / "1", 0.5, tmp_path / "adapter")
    assert "transformer.h.0.attn.c_attn" in found.ranks
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "0")
    PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload()
    write(tmp_path / "0", tmp_path / "adapter", 0.5, tmp_path / "half")


def test_a_tied_copy_is_no_difference(fresh_pico: Build, tmp_path: Path) -> None:
    for seed in (0, 1):
        fresh_pico("qwen2", seed=seed).module.save_pretrained(tmp_path / str(seed))
    plain = write_lore(tmp_path / "0", tmp_path / "1", 0.5, tmp_path / "plain")
    content = read(tmp_path / "1")
    content["lm_head.weight"] = content["model.embed_tokens.weight"].clone()
    save_file(content, tmp_path / "1" / "model.safetensors", metadata={"format": "pt"})
    assert write_lore(tmp_path / "0", tmp_path / "1", 0.5, tmp_path / "copied") == plain
    content["lm_head.weight"] += 1.0
    save_file(content, tmp_path / "1" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"'lm_head\.weight' is in tuned and not in base"):
        write_lore(tmp_path / "0", tmp_path / "1", 0.5, tmp_path / "odd")


def test_a_changed_model_is_written_whole(fresh_pico: Build, tmp_path: Path) -> None:
    for seed in (0, 1):
        model = fresh_pico("llama", seed=seed)
        model.module.save_pretrained(tmp_path / str(seed))
    write_changed(tmp_path / "0", tmp_path / "1", partial(prune, share=0.1), tmp_path / "out")
    base, tuned, found = (read(tmp_path / name) for name in ("0", "1", "out"))
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(found[name], prune(base[name], tuned[name], 0.1))
    assert torch.equal(found["model.embed_tokens.weight"], tuned["model.embed_tokens.weight"])
    assert found.keys() == tuned.keys()
    assert (tmp_path / "out" / "config.json").is_file()
