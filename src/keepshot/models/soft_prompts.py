"""Soft prompts: trained vectors that stand before the tokens of the tasks they were made for.

Each vector has a token id of its own, beyond the vocabulary, which the embedding layer looks up in
a table beside its weights. So a prompt is a prefix of token ids like any other: it is trained,
shared and cached as such, and what does not carry its ids does not see it. Written as peft's prompt
tuning adapters, one directory for each task. Knows nothing of training.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PromptTuningConfig, TaskType
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from keepshot.errors import ModelError
from keepshot.models.reference import ModelReference, RunDirectory, read_json
from keepshot.outputs import write_text

WEIGHTS = "adapter_model.safetensors"
TENSOR = "prompt_embeddings"
TASK_FILE = "keepshot-prompt.json"
"""Beside a prompt, for which task it is."""
PROMPTS_DIR = "prompts"
"""Beside a tuned model or adapter, one directory for each prompt."""


@dataclass(frozen=True, eq=False)
class SoftPrompts:
    """Prompts of the same length, one for each task.

    Axes: N tasks, P tokens of a prompt, D width.
    """

    tasks: tuple[str, ...]
    table: nn.Parameter
    """(N * P, D), in the order of `tasks`."""
    first_id: int
    """The id of the first vector; the vocabulary ends before it."""

    @property
    def length(self) -> int:
        """Tokens in each prompt, P."""
        return self.table.shape[0] // len(self.tasks)

    def ids(self, task: str) -> tuple[int, ...]:
        """Return the ids that stand before every text of `task`; none if it has no prompt."""
        if task not in self.tasks:
            return ()
        start = self.first_id + self.tasks.index(task) * self.length
        return tuple(range(start, start + self.length))

    def of(self, task: str) -> Tensor:
        """Return the prompt (P, D) of one task."""
        start = self.tasks.index(task) * self.length
        return self.table.detach()[start : start + self.length]


@dataclass(frozen=True, eq=False)
class _Lookup:
    """An embedding layer's forward pass with ids beyond its vocabulary."""

    own: Callable[..., Tensor]
    prompts: SoftPrompts

    def __call__(self, ids_BT: Tensor) -> Tensor:
        virtual_BT = ids_BT >= self.prompts.first_id
        if not bool(virtual_BT.any()):
            return self.own(ids_BT)
        plain_BTD = self.own(ids_BT.masked_fill(virtual_BT, 0))
        found = self.prompts.table[ids_BT[virtual_BT] - self.prompts.first_id]
        return plain_BTD.index_put((virtual_BT,), found.to(plain_BTD.dtype))


def attach_(module: Any, tasks: Sequence[str], table: Tensor) -> SoftPrompts:
    """Let `module` look up soft prompts, in place of any it had; none of its weights changes.

    Args:
        module: the causal language model.
        tasks: what the prompts are for.
        table: (N * P, D) vectors, as the embedding layer would give them.

    Raises:
        ModelError: if the vectors have another width than the model.
    """
    detach_(module)
    embedding: Any = module.get_input_embeddings()
    width = int(embedding.weight.shape[1])
    if table.shape[1] != width:
        raise ModelError(
            f"a soft prompt of width {table.shape[1]} does not fit {type(module).__name__}, whose "
            f"embeddings have {width}; it was trained on another model"
        )
    values = table.detach().to(embedding.weight.device, torch.float32)
    trained = nn.Parameter(values, requires_grad=False)
    prompts = SoftPrompts(tuple(tasks), trained, int(embedding.weight.shape[0]))
    # Set on the instance, so that no parameter gets another name and nothing more is saved.
    embedding.forward = _Lookup(embedding.forward, prompts)
    return prompts


def attached(module: Any) -> SoftPrompts | None:
    """Return the prompts that `module` looks up, or None."""
    forward: Any = vars(module.get_input_embeddings()).get("forward")
    return forward.prompts if isinstance(forward, _Lookup) else None


def detach_(module: Any) -> None:
    """Take the prompts away from `module`, if there are any."""
    if attached(module) is not None:
        del module.get_input_embeddings().forward


def sample_vectors(module: Any, count: int, generator: torch.Generator) -> Tensor:
    """Return the embeddings (count, D) of tokens drawn from the vocabulary."""
    embedding: Any = module.get_input_embeddings()
    ids = torch.randint(0, int(embedding.weight.shape[0]), (1, count), generator=generator)
    with torch.no_grad():
        return embedding(ids.to(embedding.weight.device))[0].float()


def save_prompt(prompts: SoftPrompts, task: str, folder: Path, base: str | None) -> None:
    """Write one prompt into `folder` as an adapter that peft loads.

    Args:
        prompts: where it is.
        task: which of them.
        folder: exists.
        base: reference of the model it belongs to, if that has a name.
    """
    vectors = prompts.of(task)
    config: Any = PromptTuningConfig(
        task_type=TaskType.CAUSAL_LM,
        num_virtual_tokens=len(vectors),
        token_dim=vectors.shape[1],
        num_transformer_submodules=1,
        base_model_name_or_path=base,
        inference_mode=True,
    )
    config.save_pretrained(str(folder))
    save_file({TENSOR: vectors.cpu().contiguous()}, folder / WEIGHTS, metadata={"format": "pt"})
    write_text(json.dumps({"task": task}) + "\n", folder / TASK_FILE)


def own_prompt(adapter_dir: Path) -> list[Path]:
    """Return the directory itself if the adapter in it is a soft prompt."""
    config = read_json(adapter_dir / "adapter_config.json")
    return [adapter_dir] if config.get("peft_type") == "PROMPT_TUNING" else []


def prompts_beside(reference: ModelReference) -> list[Path]:
    """Return the directories of the soft prompts that a keepshot run wrote beside its model."""
    if not isinstance(reference, RunDirectory):
        return []
    return sorted(path.parent for path in reference.path.glob(f"{PROMPTS_DIR}/*/{TASK_FILE}"))


def load_prompts_(module: Any, folders: Sequence[Path]) -> None:
    """Attach the prompts of `folders` to `module`.

    Raises:
        ModelError: if one cannot be read, is for no known task, or does not fit.
    """
    if not folders:
        return
    tasks: list[str] = []
    tables: list[Tensor] = []
    for folder in folders:
        if not (folder / TASK_FILE).is_file():
            raise ModelError(
                f"{folder}: a soft prompt without {TASK_FILE}, which says for which task it is;\n"
                'write it there: {"task": NAME}, a task or an examples file\'s name'
            )
        tasks.append(str(read_json(folder / TASK_FILE).get("task", "")))
        stored = load_file(folder / WEIGHTS)
        if TENSOR not in stored or stored[TENSOR].ndim != 2:
            raise ModelError(f"{folder / WEIGHTS}: holds no prompt named {TENSOR}")
        tables.append(stored[TENSOR])
    if len({len(table) for table in tables}) > 1:
        raise ModelError(
            f"{folders[0].parent}: prompts of different lengths cannot be used at once"
        )
    attach_(module, tasks, torch.cat(tables))
