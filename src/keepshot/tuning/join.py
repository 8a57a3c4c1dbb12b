"""The KL term for anyone's trainer: transformers' Trainer, TRL's SFTTrainer, DPOTrainer and others.

    from keepshot.tuning.join import keep_close
    keep_close(trainer)
    trainer.train()

The untuned model's probabilities are read once, when the term joins; no second model is held.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

from keepshot.errors import ConfigError
from keepshot.tasks.task import Task
from keepshot.tuning.anchors import AnchorKL, cache_teacher, draw_prompts
from keepshot.tuning.keep import KL, OWN
from keepshot.tuning.live import evaluating, live_model, named_tasks, unwrapped
from keepshot.tuning.own_anchors import write_tasks


def keep_close(
    trainer: Any,
    term: KL | None = None,
    *,
    tasks: str | Sequence[str | Task] | None = None,
    seed: int = 0,
) -> None:
    """Add the divergence from the untuned model on few-shot prompts to a trainer's training loss.

    Call it before `trainer.train()`. The model as it is then is the one to stay close to; of a
    model with a peft adapter, the one under the adapter. Evaluation losses stay as they were, and
    logs of the training loss get a row `keep/kl`. The term is computed once in each optimiser step,
    however many batches are accumulated.

    Args:
        trainer: has a causal language model and its tokenizer as `processing_class`.
        term: weight, direction, prompts and shots; left out, the defaults.
        tasks: what prompts are made of, instead of `term.tasks`: suites, tasks or files by name,
            `Task` objects, or `self`, for which the untuned model writes them.
        seed: of the prompts and their order.

    Raises:
        ConfigError: if the trainer has no tokenizer or such a term already, nothing trains that the
            term could reach, or no prompt fits the model's context.
        TaskError: if a task is unknown or cannot be used.
    """
    if isinstance(getattr(trainer.compute_loss, "__self__", None), _Joined):
        raise ConfigError("the trainer has a kl term already; join it once")
    term = term or KL()
    model = live_model(trainer.model, trainer.processing_class)
    module = unwrapped(trainer.model)
    count = sum(1 for _ in module.parameters())
    if not any(parameter.requires_grad for parameter in module.parameters()):
        raise ConfigError(
            f"the kl term would reach nothing: it looked for parameters that train, and none of "
            f"the {count} of {type(module).__name__} does; set requires_grad, or add an adapter"
        )
    wanted = term.tasks if tasks is None else tasks
    head: Any = model.module.get_output_embeddings()
    # In the precision that the trainer will compute in, so that both read the same at the start.
    with evaluating(model.module), _adapter_off(module), trainer.accelerator.autocast():
        anchors = write_tasks(model, seed) if wanted == OWN else named_tasks(wanted)
        prompts = draw_prompts(model, anchors, term, max_length=model.context_length, seed=seed)
        pool = cache_teacher(model, prompts, term, head=head)
    loss = AnchorKL(term.name, term.weight, pool, term.direction, seed)
    joined = _Joined(trainer, loss, head)
    trainer.compute_loss = joined.compute_loss
    trainer.log = joined.log


class _Joined:
    """Stands before a trainer's own `compute_loss` and `log`."""

    def __init__(self, trainer: Any, term: AnchorKL, head: Any) -> None:
        self._trainer, self._term, self._head = trainer, term, head
        self._compute_loss, self._log = trainer.compute_loss, trainer.log
        self._last_step = -1
        self._values: list[float] = []

    def compute_loss(
        self,
        model: Any,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Return the trainer's loss, in training with the term added."""
        result = self._compute_loss(
            model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
        )
        step = self._trainer.state.global_step
        if not model.training or step == self._last_step:
            return result
        self._last_step = step
        value = self._term(model, step, self._head)
        self._values.append(value.item())
        factor = self._term.weight_at(step)
        if not self._is_scaled(num_items_in_batch):
            # The trainer divides what it gets by the number of batches that it accumulates.
            factor *= self._trainer.current_gradient_accumulation_steps
        if return_outputs:
            return result[0] + factor * value, *result[1:]
        return result + factor * value

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, with the mean of the term since the last row about the training loss."""
        if self._values and "loss" in logs:
            logs = {**logs, "keep/kl": sum(self._values) / len(self._values)}
            self._values.clear()
        self._log(logs, *args, **kwargs)

    def _is_scaled(self, num_items_in_batch: Any) -> bool:
        # Trainer.training_step asks the same, after compute_loss.
        trainer = self._trainer
        stated = getattr(trainer, "loss_is_scaled_for_ga", None)
        if stated is not None:
            return bool(stated)
        counted = bool(trainer.model_accepts_loss_kwargs) and num_items_in_batch is not None
        return counted or trainer.compute_loss_func is not None


def _adapter_off(module: Any) -> contextlib.AbstractContextManager[Any]:
    """Switch a peft adapter off for a while; nothing happens to a model without one."""
    if hasattr(module, "get_base_model"):
        return module.disable_adapter()
    return contextlib.nullcontext()
