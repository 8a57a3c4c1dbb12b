"""How far tuning moves a model: its divergence from the untuned model, on unseen prompts.

On few-shot prompts it is what the `kl` term holds down, read on other tasks. On the questions of
the target it is what forgetting was found to go with (arXiv 2509.04259).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from keepshot.models.loading import LanguageModel
from keepshot.tasks.task import Task
from keepshot.tuning.anchors import AnchorKL, cache_teacher, draw_prompts
from keepshot.tuning.batch import Sample
from keepshot.tuning.data import encode_few_shot
from keepshot.tuning.keep import KL
from keepshot.tuning.live import evaluating

READ = KL(prompts=40, prompts_per_step=1, shots=(2, 4), top_k=256)
"""Forty prompts at most, compared at every token of an answer and its end. The 256 likeliest tokens
are kept apart, and what is left as one: at most the divergence over the vocabulary."""


class Drift:
    """Holds what the untuned model says to some prompts.

    Args:
        model: the untuned model.
        prompts: tokenised; read where their answers are.
    """

    def __init__(self, model: LanguageModel, prompts: Sequence[Sample]) -> None:
        with evaluating(model.module):
            head = model.module.get_output_embeddings()
            self._pool = cache_teacher(model, prompts, READ, head=head)

    def read(self, model: LanguageModel) -> list[float]:
        """Return KL(untuned || model as it is now) of each prompt, in nats a token.

        They are in the order of the prompts' lengths.
        """
        head = model.module.get_output_embeddings()
        term = AnchorKL(READ.name, 1.0, self._pool, "forward", seed=0)
        with evaluating(model.module), torch.no_grad():
            return [float(term.read(model.module, n, head)) for n in range(len(self._pool.batches))]


def few_shot_prompts(model: LanguageModel, tasks: Sequence[Task]) -> list[Sample]:
    """Draw lists of two to four demonstrations and one more, the tasks in turn.

    Raises:
        ConfigError: if a task gives no such prompt within the model's context.
    """
    return draw_prompts(model, tasks, READ, max_length=model.context_length, seed=0)


def questions(model: LanguageModel, task: Task) -> list[Sample]:
    """Return a task's first questions that choices are made on, with their right answers."""
    asked = task.validation[: READ.prompts]
    samples = [encode_few_shot(model, task.template, [], example) for example in asked]
    return [sample for sample in samples if len(sample) <= model.context_length]
