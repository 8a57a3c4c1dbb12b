"""What TRL, LLaMA-Factory and axolotl leave in an output directory measures, blends, tunes on.

TRL's is made by its real SFTTrainer. The other two save through transformers' Trainer as well; what
they put beside it is laid out by hand after their documentation. Every pickle among it is one that
would leave a mark if it were ever read.
"""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor

from command import status
from keepshot.assets import AssetStore
from keepshot.errors import ModelError
from keepshot.models.loading import load, save
from keepshot.models.reference import AdapterDirectory, LocalDirectory, parse_reference
from keepshot.records import ResultDocument
from pico import pico_model

ROWS = [{"prompt": f"Q: {word}\nA:", "completion": f" {word[0].upper()}"} for word in
        ("apple", "berry", "cherry", "date", "egg", "fig", "grape", "honey")]  # fmt: skip
PICKLED = ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth")
LLAMA_FACTORY = {
    "all_results.json": '{"train_loss": 1.0}', "train_results.json": '{"train_loss": 1.0}',
    "trainer_log.jsonl": '{"current_steps": 1}\n', "trainer_state.json": '{"log_history": []}',
    "training_loss.png": "", "README.md": "---\nlibrary_name: peft\n---\n",
}  # fmt: skip
AXOLOTL = {
    "README.md": "---\nlibrary_name: peft\n---\n", "debug.log": "", "runs/events.out.tfevents": "",
}  # fmt: skip


class Marking:
    """Leaves a file where it is unpickled."""

    def __init__(self, place: Path) -> None:
        self._place = place

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._place,)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hold a base, and beside it what each trainer writes."""
    trl = pytest.importorskip("trl")
    root = tmp_path_factory.mktemp("others")
    save(pico_model("llama"), root / "base")
    for name, peft in (
        ("trl", LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")),
        ("trl-full", None),
    ):
        settings = trl.SFTConfig(
            output_dir=str(root / name), max_steps=2, per_device_train_batch_size=4, use_cpu=True,
            learning_rate=0.05, save_steps=1, report_to=[], disable_tqdm=True, bf16=False,
            max_length=64, model_init_kwargs={"dtype": "float32"}, logging_steps=1,
        )  # fmt: skip
        trainer = trl.SFTTrainer(
            str(root / "base"), args=settings, train_dataset=Dataset.from_list(ROWS),
            peft_config=peft,
        )  # fmt: skip
        trainer.train()
        trainer.save_model()
        trainer.save_state()
    for name, beside in (("llama-factory", LLAMA_FACTORY), ("axolotl", AXOLOTL)):
        shutil.copytree(root / "trl", root / name)
        for file, text in beside.items():
            (root / name / file).parent.mkdir(exist_ok=True)
            (root / name / file).write_text(text, encoding="utf-8")
    # axolotl keeps the base's configuration beside an adapter, and merges into a subfolder.
    shutil.copy(root / "base" / "config.json", root / "axolotl" / "config.json")
    merged = load(str(root / "axolotl"), AssetStore(root / "cache"))
    save(merged, root / "axolotl" / "merged")
    pickles = [file for file in root.rglob("*") if file.name in PICKLED]
    assert {file.name for file in pickles} == set(PICKLED)
    for file in pickles:
        file.write_bytes(pickle.dumps(Marking(root / "was-read")))
    return root


@pytest.fixture
def here(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(root)
    monkeypatch.setenv("KEEPSHOT_CACHE", str(root / "cache"))
    return root


def weights(reference: str, root: Path) -> dict[str, Tensor]:
    return dict(load(reference, AssetStore(root / "cache")).module.state_dict())


ADAPTERS = ["trl", "trl/checkpoint-1", "llama-factory", "axolotl"]
MODELS = ["trl-full", "trl-full/checkpoint-2", "axolotl/merged"]


@pytest.mark.parametrize("name", [*ADAPTERS, *MODELS])
def test_it_loads_and_half_of_it_is_written(name: str, here: Path):
    kind = AdapterDirectory if name in ADAPTERS else LocalDirectory
    assert isinstance(parse_reference(name), kind)
    out = f"half-of-{name.replace('/', '-')}"
    assert status("blend", "base", name, "--lambda", "0.5", "--out", out) == 0
    base, tuned, half = (weights(reference, here) for reference in ("base", name, out))
    moved = [key for key, value in tuned.items() if not torch.equal(value, base[key])]
    assert len(moved) >= 6
    for key, value in tuned.items():
        assert torch.allclose(half[key], base[key] + 0.5 * (value - base[key]), atol=1e-6), key
    assert not (here / "was-read").exists()


def test_they_measure_beside_their_base(here: Path):
    names = ["base", "trl", "trl-full", "llama-factory", "axolotl"]
    asked = ["--tasks", "addition", "--shots", "0", "--seeds", "1", "--limit", "2"]
    assert status("measure", *names, *asked, "--out", "measured") == 0
    document = ResultDocument.read(here / "measured")
    assert [model.reference for model in document.models] == names
    # What lies beside the weights makes no other model of them.
    sums = [model.sha256 for model in document.models]
    assert sums[1] == sums[3]
    assert len({*sums[:3]}) == 3
    scores = {row.model: row.value for row in document.scores}
    assert scores["trl"] == scores["llama-factory"] == scores["axolotl"]
    assert not (here / "was-read").exists()


def test_tuning_goes_on_from_an_adapter(here: Path):
    rows = [{"input": row["prompt"], "output": row["completion"]} for row in ROWS]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (here / "rows.jsonl").write_text(text, encoding="utf-8")
    asked = ["--data", "rows.jsonl", "--keep", "none", "--method", "full", "--set", "steps=3"]
    assert status("tune", "--model", "llama-factory", *asked, "--out", "on") == 0
    before, after = weights("llama-factory", here), weights("on", here)
    rate = max((after[key] - value).abs().max().item() for key, value in before.items())
    assert 0 < rate < 1e-3
    assert not (here / "was-read").exists()


def test_an_output_that_holds_no_weights_but_pickled_ones_is_refused(
    here: Path, tmp_path: Path, fresh_pico: Callable[..., Any]
):
    place = tmp_path / "old"
    shutil.copytree(here / "trl-full", place, ignore=shutil.ignore_patterns("*.safetensors"))
    (place / "pytorch_model.bin").write_bytes(pickle.dumps(Marking(here / "was-read")))
    with pytest.raises(ModelError, match=r"pickled weights \(pytorch_model.bin\)"):
        parse_reference(str(place))
    assert not (here / "was-read").exists()
