"""The commands and the code of docs/guide/partial-adaptation.md run as they stand."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model

from command import status
from keepshot.blending.card import BlendRecord
from keepshot.models.loading import save
from pico import pico_model

GUIDE = Path(__file__).parents[2] / "docs" / "guide" / "partial-adaptation.md"
TEXT = GUIDE.read_text(encoding="utf-8")
FOUND = dict.fromkeys(re.findall(r"^ {4}(keepshot blend .*)|`(keepshot blend .*?)`", TEXT, re.M))
COMMANDS = [indented or quoted for indented, quoted in FOUND]
WRITING = [text for text in COMMANDS if "--lambda" in text]
SEEDS = {"BASE": 0, "TUNED": 1, "CHAT": 1, "INSTRUCT": 1, "CONTINUED": 2, "DOMAIN": 2}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("guide")
    for name, seed in SEEDS.items():
        save(pico_model("llama", seed=seed), root / name)
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    module = pico_model("llama").module
    module.name_or_path = "BASE"
    get_peft_model(module, config).save_pretrained(root / "ADAPTER")
    for name in ("base", "tuned"):
        (root / name).symlink_to(root / name.upper())
    return root


@pytest.mark.parametrize("text", WRITING)
def test_one_lambda_is_written(
    text: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    words = [word.replace("DIR", str(tmp_path / "out")) for word in shlex.split(text)[1:]]
    assert status(*words) == 0
    assert BlendRecord.read(tmp_path / "out").realised.num_changed > 0


@pytest.mark.parametrize("text", [text for text in COMMANDS if text not in WRITING])
def test_a_path_is_understood(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All but the models is there: those are looked for once the command has been read."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(GUIDE.parents[2] / "recipes")
    assert status(*shlex.split(text)[1:]) == 2
    said = capsys.readouterr().err
    assert "model 'BASE' does not exist" in said or "the hub cannot be reached" in said


def test_from_python(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    monkeypatch.chdir(tmp_path)
    for name in ("base", "tuned"):
        Path(name).symlink_to(place / name)
    exec(compile(code, str(GUIDE), "exec"), {})
    assert BlendRecord.read(tmp_path / "blend").dtype == "bfloat16"
