"""Answers do not depend on how requests are batched, ordered, grouped, resumed or shared out."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_engine import assert_same, other_pico, some_requests
from transformers import BambaConfig, MambaConfig, PretrainedConfig

from keepshot.errors import ConfigError
from keepshot.models.loading import LanguageModel, save
from keepshot.scoring.engine import Engine, Shape, shape_of, tokens_that_fit
from keepshot.scoring.forward import Trunk
from keepshot.scoring.head import read_hidden, read_logits
from keepshot.scoring.processes import ALONE, join_processes, shares
from keepshot.scoring.request import Request
from pico import PICO_CONFIGS, SHARED, pico_model

SAME: dict[str, Any] = dict(SHARED)
NO_SHARING: dict[str, PretrainedConfig] = {
    "mamba": MambaConfig(hidden_size=32, num_hidden_layers=2, state_size=8, **SAME),
    "bamba": BambaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, attn_layer_indices=[1], mamba_n_heads=4, mamba_d_head=16,
        mamba_d_state=8, mamba_chunk_size=8, mamba_expand=2, **SAME,
    ),
}  # fmt: skip
"""Recurrent, and half recurrent: neither may share."""
FAMILIES = [*PICO_CONFIGS, *NO_SHARING]


def any_pico(family: str) -> LanguageModel:
    return other_pico(NO_SHARING[family]) if family in NO_SHARING else pico_model(family)


@pytest.mark.parametrize("family", FAMILIES)
def test_batches_order_grouping_and_resumption(family: str) -> None:
    model = any_pico(family)
    requests = some_requests(6, seed=3)
    expected = Engine(model, share=False).run(requests)
    engine = Engine(model)
    assert engine.sharing == (
        "plain" if family in NO_SHARING else "rows" if family == "falcon" else "packed"
    )
    for batch_tokens in (24, 300):
        order = list(range(len(requests)))
        random.Random(batch_tokens).shuffle(order)
        sized = Engine(model, batch_tokens=batch_tokens)
        found = sized.run([requests[i] for i in order])
        assert_same(found, [expected[i] for i in order], [requests[i] for i in order])
    middle = len(requests) // 3
    resumed = engine.run(requests[:middle]) + engine.run(requests[middle:])
    assert_same(resumed, expected, requests)


def test_bf16_does_not_depend_on_sharing_beyond_its_rounding() -> None:
    model = pico_model("llama")
    module: Any = model.module
    module.to(torch.bfloat16)
    requests = some_requests(6)
    engine = Engine(model)
    assert engine.sharing == "packed"
    for result, reference in zip(
        engine.run(requests), Engine(model, share=False).run(requests), strict=True
    ):
        if hasattr(result, "log_likelihood"):
            assert result.log_likelihood == pytest.approx(reference.log_likelihood, abs=0.5)


@pytest.mark.parametrize("num_shares", [1, 2, 3, 7])
def test_shares_are_even_and_keep_prefixes_together(num_shares: int) -> None:
    generator = random.Random(0)
    prompts = [tuple(generator.randrange(50) for _ in range(100)) for _ in range(6)]
    sequences = [
        (*prompts[n % 6], *(generator.randrange(50) for _ in range(5))) for n in range(120)
    ]
    parts = shares(sequences, num_shares)
    assert sorted(number for part in parts for number in part) == list(range(120))
    sizes = [len(part) for part in parts]
    assert max(sizes) <= 120 / num_shares + 20
    homes = [sum(any(n % 6 == p for n in part) for part in parts) for p in range(6)]
    assert sum(homes) <= 6 + num_shares - 1, "each cut divides one prompt's questions at most"
    assert shares([(1, 2)], 3) == [[], [0], []] or shares([(1, 2)], 3)[0] == [0]


def test_join_processes_reads_what_torchrun_sets() -> None:
    assert join_processes({}) == ALONE
    assert join_processes({"WORLD_SIZE": "1", "RANK": "0"}) == ALONE
    for environ in ({"WORLD_SIZE": "2"}, {"WORLD_SIZE": "two"}, {"WORLD_SIZE": "2", "RANK": "x"}):
        with pytest.raises(ConfigError, match="torchrun --nproc_per_node") as caught:
            join_processes(environ)
        assert f"WORLD_SIZE='{environ['WORLD_SIZE']}'" in str(caught.value)


def test_two_processes_give_the_document_of_one(tmp_path: Path) -> None:
    """Real torchrun, two gloo processes on the CPU; launchers that start one would be noticed."""
    save(pico_model("llama"), tmp_path / "model")
    rows = [
        {"input": f"{n} + {n % 7}", "output": str(n % 3), "choices": ["0", "1", "2"]}
        for n in range(40)
    ]
    file = tmp_path / "sums.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    command = ["measure", str(tmp_path / "model"), "--tasks", str(file), "--shots", "0,2"]
    command += ["--seeds", "2", "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "KEEPSHOT_CACHE": str(tmp_path / "cache")}
    launchers = {
        1: [sys.executable, "-m", "keepshot"],
        2: [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2",
            "--master_port", "29517", "-m", "keepshot"],
    }  # fmt: skip
    documents: dict[int, Any] = {}
    for size, launcher in launchers.items():
        out = ["--out", str(tmp_path / f"run-{size}")]
        done = subprocess.run(
            [*launcher, *command, *out], env=environment, capture_output=True, text=True, check=True
        )
        documents[size] = json.loads(done.stdout)
    one, two = documents[1], documents[2]
    assert (one["cost"]["processes"], two["cost"]["processes"]) == (1, 2)
    assert two["scores"] == one["scores"]
    assert two["summary"] == one["summary"]
    assert two["cost"]["tokens_naive"] == one["cost"]["tokens_naive"]
    # What the two have in common is computed twice, nothing else.
    prefilled = two["cost"]["tokens_prefilled"]
    assert one["cost"]["tokens_prefilled"] <= prefilled < 1.5 * one["cost"]["tokens_prefilled"]
    assert two["models"][0]["sharing"] == "packed"


def test_memory_decides_how_many_tokens_fit(pico_models: dict[str, LanguageModel]) -> None:
    shape = shape_of(Trunk(pico_models["llama"].module, share=False))
    assert (shape.width, shape.inner, shape.heads, shape.itemsize) == (32, 48, 4, 4)
    assert shape.key_value == 3 * 2 * 2 * 8  # layers, keys and values, groups, head width
    per_token = shape.bytes_per_token
    assert tokens_that_fit(shape, 1000 * per_token) == 1000
    assert tokens_that_fit(shape, 1) == 1
    large = Shape(width=4096, inner=14336, key_value=2 * 32 * 1024, heads=32, itemsize=2)
    assert 2000 < tokens_that_fit(large, 2**30) < 8000


def test_head_in_slices_reads_what_all_logits_say() -> None:
    torch.manual_seed(0)
    head = torch.nn.Linear(16, 5000)
    hidden = torch.randn(700, 16) * 3
    generator = random.Random(0)
    pairs = [(generator.randrange(700), generator.randrange(5000)) for _ in range(900)]

    def capped(logits: torch.Tensor) -> torch.Tensor:
        return torch.tanh(logits / 5.0) * 5.0

    with torch.inference_mode():
        likeliest, log_probs = read_hidden(head, capped, hidden, pairs)
        expected, expected_log_probs = read_logits(capped(head(hidden)), pairs)
        assert likeliest == expected
        assert log_probs == pytest.approx(expected_log_probs, abs=1e-4)
        ties = torch.nn.Linear(16, 5000)
        ties.weight.zero_()
        ties.bias.zero_()
        assert read_hidden(ties, capped, hidden[:3], [])[0] == [0, 0, 0]


def test_reference_path_is_asked_for_by_no_share(pico_models: dict[str, LanguageModel]) -> None:
    requests: list[Request] = some_requests(3)
    assert Engine(pico_models["llama"], share=False).sharing == "plain"
    assert_same(
        Engine(pico_models["llama"], share=False).run(requests),
        Engine(pico_models["llama"]).run(requests),
        requests,
    )
