"""Lambda by block and by kind of module: the right rows get the right number, in every family."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from keepshot.blending.arithmetic import RowLambda
from keepshot.blending.blend import blend, same_bits
from keepshot.blending.parts import check_covers, parts_of, parts_of_directory
from keepshot.blending.rules import LambdaMap, LambdaRule, Part, by_part, restoring, shares
from keepshot.blending.sweep import sweep
from keepshot.blending.write import write
from keepshot.errors import ConfigError
from keepshot.models.anatomy import anatomy
from keepshot.models.checkpoint import TensorReader
from keepshot.models.loading import LanguageModel
from keepshot.models.shards import open_checkpoint
from pico import PICO_CONFIGS

Build = Callable[..., LanguageModel]
FAMILIES = sorted(PICO_CONFIGS)
PLAIN = {f"b.{n}.w": (Part("mlp", n),) for n in range(5)} | {
    "embed": (Part("embeddings", None),),
    "norm": (Part("norms", None),),
}


def rule(**content: object) -> LambdaMap:
    return LambdaMap.from_mapping(content, source="rule")


def test_a_ramp_is_lines() -> None:
    """LiNeS: alpha + beta * (l - 1) / (L - 1) in block l of L (arXiv 2410.17146)."""
    lookup = by_part(rule(ramp=[0.2, 1.0]), 1.0, PLAIN)
    found = [lookup(f"b.{n}.w") for n in range(5)]
    assert found == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert (lookup("embed"), lookup("norm")) == (0.2, 1.0)


def test_a_block_list_is_cut_into_even_groups() -> None:
    lookup = by_part(rule(blocks=[0.1, 0.9]), 1.0, PLAIN)
    assert [lookup(f"b.{n}.w") for n in range(5)] == [0.1, 0.1, 0.1, 0.9, 0.9]
    with pytest.raises(ConfigError, match="6 groups for a model of 5 blocks"):
        by_part(rule(blocks=[0.1] * 6), 0.5, PLAIN)


def test_kinds_come_first_and_other_is_the_rest() -> None:
    lookup = by_part(rule(kinds={"mlp": 0.0}), 0.5, PLAIN)
    assert (lookup("b.1.w"), lookup("embed"), lookup("never heard of")) == (0.0, 0.5, 0.5)
    lookup = by_part(rule(kinds={"norms": 1.0, "other": 0.0}), 1.0, PLAIN)
    assert (lookup("b.1.w"), lookup("norm"), lookup("never heard of")) == (0.0, 1.0, 0.0)
    with pytest.raises(ConfigError, match=r"rule.kinds.value: this model has no such weights"):
        by_part(rule(kinds={"value": 1.0}), 0.5, PLAIN)


def test_a_rule_is_made_of_factors_so_that_lambda_0_is_the_base() -> None:
    mixed = rule(ramp=[0.2, 1.0], kinds={"norms": 0.5})
    for lam in (0.0, 0.5, 1.0):
        lookup = by_part(mixed, lam, PLAIN)
        found = [lookup(name) for name in ("b.0.w", "b.4.w", "norm", "never heard of")]
        assert found == pytest.approx([0.2 * lam, lam, 0.5 * lam, lam])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "is empty"),
        ({"ramp": [0, 1], "blocks": [1]}, "either `ramp` or `blocks`"),
        ({"ramp": [0, float("nan")]}, "not a number"),
        ({"kinds": {"values": 1}}, "kinds.values"),
        ({"rampe": [0, 1]}, "nearest is 'ramp'"),
    ],
)
def test_bad_rules_are_refused(content: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        rule(**content)


@pytest.mark.parametrize("family", FAMILIES)
def test_values_alone_move_where_asked_and_nothing_else(family: str, fresh_pico: Build) -> None:
    base, tuned = fresh_pico(family, seed=0), fresh_pico(family, seed=1)
    with torch.no_grad():
        for parameter in tuned.module.parameters():  # norms and biases differ as well
            parameter.add_(0.1 * torch.randn_like(parameter))
    before = {n: p.clone() for n, p in base.module.state_dict().items()}
    end = {n: p.clone() for n, p in tuned.module.state_dict().items()}
    parts = parts_of(base.module)
    only = rule(kinds={"value": 1.0, "other": 0.0})
    values = {block.value.parameter: block.value for block in anatomy(base.module).blocks}
    biases = {piece.bias: piece for piece in values.values() if piece.bias}

    def check(_lam: float) -> None:
        for name, now in base.module.state_dict().items():
            if name in values:
                rows = values[name]
                assert same_bits(rows.of(now), rows.of(end[name])), name
                moved = (now != before[name]).sum()
                assert moved == (rows.of(before[name]) != rows.of(end[name])).sum()
            elif name in biases and name not in values:
                continue
            else:
                assert same_bits(now, before[name]), name

    sweep(base, end, [1.0], check, lambda lam: by_part(only, lam, parts))
    assert all(same_bits(now, before[n]) for n, now in base.module.state_dict().items())


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_put_back_is_one_block_or_kind_and_all_of_it(
    family: str, fresh_pico: Build
) -> None:
    module = fresh_pico(family).module
    parts, state = parts_of(module), module.state_dict()

    def put_back(lookup: LambdaRule) -> dict[str, torch.Tensor]:
        """Return, of every parameter, which elements come from the base."""
        found: dict[str, torch.Tensor] = {}
        for name in parts:
            lam, shape = lookup(name), tuple(state[name].shape)
            if isinstance(lam, RowLambda):
                lam = torch.from_numpy(lam.at(0, state[name].numel(), shape).copy()).reshape(shape)
            found[name] = 1.0 - torch.as_tensor(lam).expand(shape)
        return found

    size = sum(state[name].numel() for name in parts)
    blocks = [restoring(share, parts) for share in shares(parts, "blocks")]
    assert len(blocks) == len(anatomy(module).blocks)
    outside = sum(state[n].numel() for n, own in parts.items() if own[0].block is None)
    every = [put_back(lookup) for lookup in blocks]
    assert sum(int(mask.sum()) for masks in every for mask in masks.values()) == size - outside
    kinds = {share.label: put_back(restoring(share, parts)) for share in shares(parts, "kinds")}
    count = {kind: sum(int(mask.sum()) for mask in masks.values()) for kind, masks in kinds.items()}
    projections = ("query", "key", "value", "output")
    assert count["attention"] == sum(count[kind] for kind in projections)
    assert sum(count.values()) - count["attention"] == size
    value = anatomy(module).blocks[0].value
    found = kinds["value"][value.parameter]
    assert bool((value.of(found) == 1).all())
    assert int(found.sum()) == value.of(found).numel()


@pytest.mark.parametrize("family", FAMILIES)
def test_disk_and_memory_agree_under_a_rule(family: str, fresh_pico: Build, tmp_path: Path) -> None:
    ends = [fresh_pico(family, seed=seed) for seed in (0, 1)]
    for number, model in enumerate(ends):
        model.module.save_pretrained(tmp_path / str(number))
    parts = parts_of_directory(tmp_path / "0")
    assert parts.items() >= parts_of(ends[0].module).items()
    mixed = rule(ramp=[0.1, 0.9], kinds={"value": 0.0, "norms": 1.0, "mlp": 0.25})
    lookup = by_part(mixed, 0.5, parts)
    write(tmp_path / "0", tmp_path / "1", lookup, tmp_path / "out")
    with TensorReader(tmp_path / "out") as reader:
        check_covers(parts, reader.names, tmp_path)
    copies = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    state = ends[1].module.state_dict()

    def compare(_lam: float) -> None:
        live = ends[0].module.state_dict()
        assert [name for name in live if not same_bits(copies[name], live[name])] == []

    sweep(ends[0], state, [0.5], compare, lambda lam: by_part(mixed, lam, parts))


def test_a_tied_copy_that_is_stored_goes_by_the_rule_of_its_weight(
    fresh_pico: Build, tmp_path: Path
) -> None:
    for name, seed in (("base", 0), ("tuned", 1)):
        fresh_pico("qwen2", seed=seed).module.save_pretrained(tmp_path / name)
        file = tmp_path / name / "model.safetensors"
        content = load_file(file)
        content["lm_head.weight"] = content["model.embed_tokens.weight"].clone()
        save_file(content, file, metadata={"format": "pt"})
    parts = parts_of_directory(tmp_path / "base")
    stored = open_checkpoint(tmp_path / "base").tensors
    check_covers(parts, stored, tmp_path / "base")
    lookup = by_part(rule(kinds={"embeddings": 0.25, "other": 0.5}), 1.0, parts)
    write(tmp_path / "base", tmp_path / "tuned", lookup, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    base, tuned = (load_file(tmp_path / n / "model.safetensors") for n in ("base", "tuned"))
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        assert torch.equal(found[name], blend(base[name], tuned[name], 0.25))


def test_rows_of_a_fused_projection_may_lie_apart() -> None:
    parts = {
        "qkv": (Part("query", 0, (0, 1)), Part("key", 0, (2, 4)), Part("value", 0, (3, 5))),
        "same": (Part("query", 0, (0,)), Part("key", 0, (1,)), Part("value", 0, (2,))),
    }
    lookup = by_part(rule(kinds={"value": 0.9, "attention": 0.1}), 1.0, parts)
    found = lookup("qkv")
    assert isinstance(found, RowLambda)
    assert found.values == (0.1, 0.1, 0.1, 0.9, 0.1, 0.9)
    assert by_part(rule(kinds={"attention": 0.3}), 1.0, parts)("same") == 0.3
