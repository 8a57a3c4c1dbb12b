"""The steps of one training run: transformers' Trainer with a loss of its own, and its guards.

Everything the Trainer would write, print or report by itself is off. A loss that is not a number
ends the run with the weights of the last good copy.
"""

from __future__ import annotations

import contextlib
import math
import shutil
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.integrations.integration_utils import get_reporting_integration_callbacks
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging as transformers_logging

from keepshot.errors import ConfigError, TrainingError
from keepshot.models.conversion import quiet_transformers
from keepshot.outputs import write_text
from keepshot.progress import Progress
from keepshot.tuning.batch import Padded, Sample, group, pad, read_logits
from keepshot.tuning.guard import ICLGuard
from keepshot.tuning.methods import Prepared, training
from keepshot.tuning.packing import pack, refuse_leaks
from keepshot.tuning.recipe import Recipe
from keepshot.tuning.resume import COMPLETE_FILE, TRAINED_FILE, last_state, states
from keepshot.tuning.sharding import sharded
from keepshot.tuning.terms import next_token

GOOD_EVERY = 10
"""Steps between copies of the weights that a failed run falls back on."""
_OF_ACCELERATE = ("forward", "_original_forward", "_is_accelerate_prepared")


class StepTerm(Protocol):
    """A keep term of one run."""

    @property
    def name(self) -> str:
        """Its name in records."""
        ...

    def weight_at(self, step: int) -> float:
        """Return its factor in the loss at a step."""
        ...

    def __call__(self, module: Any, step: int, head: Any) -> Tensor:
        """Return its value at a step, a scalar."""
        ...


@dataclass(frozen=True)
class Loop:
    """Everything that a run consists of."""

    recipe: Recipe
    """With learning rate and steps filled in."""
    prepared: Prepared
    samples: Sequence[Sample]
    """Those of all steps, `batch_size` each, in order."""
    terms: Sequence[StepTerm]
    head: Any
    state_dir: Path | None
    guard: ICLGuard | None = None
    """Watches, if there is one; needs `tokenizer`."""
    tokenizer: Any = None
    whole: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    """Filled by a run in which the model was divided among processes: all of its weights."""


def run(loop: Loop, losses: list[dict[str, float]], progress: Progress) -> None:
    """Train in place, appending one row a step to `losses`.

    Raises:
        TrainingError: if the loss or a weight is not a number, naming the step. The module then
            has the weights of the last good copy, and `losses` ends where that was taken.
        ModelError: if samples are to be packed and the model cannot keep them apart.
    """
    if loop.recipe.packing:
        refuse_leaks(loop.prepared.module, loop.head)
    module = loop.prepared.module
    config = module.config
    use_cache, verbosity = config.use_cache, transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    kept = states(loop.state_dir, loop.recipe, loop.samples)
    with quiet_transformers(), training(loop.prepared), _own_forward(module), kept as place:
        trainer = _KeepTrainer(loop, place, progress)
        try:
            trainer.train(resume_from_checkpoint=last_state(place))
            trainer.check_weights()
            loop.whole.update(trainer.gathered())
        finally:
            losses.extend(trainer.rows())
            config.use_cache = use_cache
            transformers_logging.set_verbosity(verbosity)


def check_trackers(recipe: Recipe) -> None:
    """See that the trackers of `report_to` are known and installed.

    Raises:
        ConfigError: if not.
    """
    try:
        for callback in get_reporting_integration_callbacks(list(recipe.report_to)):
            callback()
    except (ValueError, RuntimeError, ImportError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise ConfigError(
            f"report_to {list(recipe.report_to)}: {reason}; install the tracker, or leave it out"
        ) from error


@contextlib.contextmanager
def _own_forward(module: Any) -> Generator[None]:
    """Take off again what accelerate puts on a module: autocast around its forward, and a mark.

    The mark says that this was done, so that a later run of the same module would go without.
    """
    own = vars(module)
    before = {name: own[name] for name in _OF_ACCELERATE if name in own}
    try:
        yield
    finally:
        for name in _OF_ACCELERATE:
            own.pop(name, None)
        own.update(before)


class _Samples(Dataset[Sample]):
    def __init__(self, samples: Sequence[Sample]) -> None:
        self._samples = samples

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Sample:
        return self._samples[index]


class _KeepTrainer(Trainer):
    """The loss over read positions with the keep terms added."""

    def __init__(self, loop: Loop, place: Path, progress: Progress) -> None:
        callback = _EachStep(self, progress)
        super().__init__(
            model=loop.prepared.module,
            args=_arguments(loop, place),
            train_dataset=_Samples(loop.samples),
            data_collator=_pack if loop.recipe.packing else _collate,
            callbacks=[callback],
            processing_class=loop.tokenizer,
        )
        self.remove_callback(PrinterCallback)
        if loop.guard is not None:
            loop.guard.watch(self)
        self.loop = loop
        self.latest: dict[str, float] = {}
        self.model_accepts_loss_kwargs = False
        self._good: tuple[int, list[Tensor]] | None = None

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Return cross-entropy over the batch's targets plus the weighted keep terms."""
        step = self.state.global_step
        parts: list[dict[str, Tensor]] = inputs["parts"]
        logits_NV = torch.cat(
            [
                read_logits(model, part["ids"], part["read"], self.loop.head, part.get("positions"))
                for part in parts
            ]
        )
        loss = next_token(logits_NV, torch.cat([part["targets"] for part in parts]))
        # Of the step's tokens some may be in other parts of the batch, or in other processes.
        loss = loss * (len(logits_NV) / self._num_targets(step))
        row = {"next_token": self._summed(loss)}
        loss = loss * self.accelerator.num_processes
        if step + 1 != self.latest.get("step"):
            self.latest = {"step": step + 1, "loss": 0.0, "next_token": 0.0}
            # A term's prompts are the same in every process, so its mean over them is its value.
            for term in self.loop.terms:
                value = term(model, step, self.loop.head)
                row[term.name] = value.item()
                loss = loss + term.weight_at(step) * value
                self.latest["loss"] += term.weight_at(step) * value.item()
        self.latest |= {**row, "next_token": self.latest["next_token"] + row["next_token"]}
        self.latest["loss"] += row["next_token"]
        if not math.isfinite(self.latest["loss"]):
            self._fail(f"the loss is {self.latest['loss']} at step {step + 1}")
        if step % GOOD_EVERY == 0:
            self._good = (step, [p.detach().clone() for p in self._trained()])
        # The Trainer divides by the parts of a batch, and processes take the mean.
        return loss * self.loop.recipe.accumulate

    def _num_targets(self, step: int) -> int:
        """Return how many tokens are learned in a step, in all its parts and processes."""
        size = self.loop.recipe.batch_size
        return sum(len(s.read) for s in self.loop.samples[step * size : (step + 1) * size])

    def _summed(self, value: Tensor) -> float:
        if self.accelerator.num_processes == 1:
            return value.item()
        total: Any = self.accelerator.reduce(value.detach().double(), reduction="sum")
        return float(total)

    def check_weights(self) -> None:
        """Check what the last step left, which no loss has seen."""
        if not all(bool(torch.isfinite(parameter).all()) for parameter in self._trained()):
            self._fail(f"a weight is not a number after step {self.state.global_step}")

    def gathered(self) -> dict[str, Tensor]:
        """Return all weights by name where the model is divided among processes; else nothing."""
        if not self.is_fsdp_enabled:
            return {}
        gathered: Any = self.accelerator.get_state_dict(self.model_wrapped)
        return gathered

    def rows(self) -> list[dict[str, float]]:
        """Return one row a step, those before a resume included."""
        history: list[dict[str, Any]] = self.state.log_history
        return [row["keepshot"] for row in history if "keepshot" in row]

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write what trains into a resume state, and nothing else: no pickled arguments."""
        assert output_dir is not None
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        trained = {name: p.detach().contiguous() for name, p in self._named()}
        save_file(trained, Path(output_dir) / TRAINED_FILE)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        # The Trainer's own rotation would delete the last good state before this one is complete.
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if not self.args.should_save:
            return
        place = Path(self.args.output_dir or "")
        state = place / f"checkpoint-{self.state.global_step}"
        write_text("", state / COMPLETE_FILE)
        for older in set(place.glob("checkpoint-*")) - {state}:
            shutil.rmtree(older, ignore_errors=True)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        # The Trainer's own would look up weights under the names that save_pretrained gives them,
        # which for some families are not those of the live module, and go on without.
        trained = load_file(Path(resume_from_checkpoint) / TRAINED_FILE)
        with torch.no_grad():
            for name, parameter in self._named():
                parameter.copy_(trained[name])

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Count nothing: the Trainer's estimate does not know these inputs."""
        return 0

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        """Leave partly trained parameters to `_decay_trained_part`."""
        names: list[str] = super().get_decay_parameter_names(model)
        return [name for name in names if name not in self.loop.prepared.masks]

    def create_optimizer(self, model: Any = None) -> Optimizer:
        """Create AdamW, with weight decay of partly trained parameters held to that part."""
        optimizer = super().create_optimizer(model)
        for name, rate in self.loop.prepared.rates.items():
            parameter = self.loop.prepared.parameters[name]
            for others in optimizer.param_groups:
                others["params"] = [p for p in others["params"] if p is not parameter]
            optimizer.add_param_group({"params": [parameter], "lr": rate, "weight_decay": 0.0})
        if self.loop.recipe.weight_decay > 0.0:
            optimizer.register_step_pre_hook(self._decay_trained_part)
        return optimizer

    def _decay_trained_part(self, optimizer: Optimizer, *_: Any) -> None:
        rate = optimizer.param_groups[0]["lr"] * self.loop.recipe.weight_decay
        prepared = self.loop.prepared
        with torch.no_grad():
            for name, mask in prepared.masks.items():
                # Of matrices alone, as of parameters that train as a whole.
                if prepared.parameters[name].ndim > 1:
                    prepared.parameters[name].mul_(1.0 - rate * mask)

    def _trained(self) -> list[Tensor]:
        return [parameter for _, parameter in self._named()]

    def _named(self) -> list[tuple[str, Tensor]]:
        # Where a model is divided among processes, its parameters are other ones by now.
        prepared = self.loop.prepared
        return [(n, p) for n, p in prepared.module.named_parameters() if n in prepared.parameters]

    def _fail(self, what: str) -> None:
        rate = self.loop.recipe.learning_rate
        good, weights = self._good or (0, [])
        with torch.no_grad():
            for parameter, weight in zip(self._trained(), weights, strict=False):
                parameter.copy_(weight)
        kept = f"the weights after step {good} are kept" if good else "no step is kept"
        history = self.state.log_history
        self.state.log_history = [row for row in history if row.get("step", 0) <= good]
        raise TrainingError(f"{what}; {kept}; lower learning_rate (now {rate:g}) or raise warmup")


class _EachStep(TrainerCallback):
    def __init__(self, trainer: _KeepTrainer, progress: Progress) -> None:
        self._trainer = trainer
        self._progress = progress

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        latest = self._trainer.latest
        if self._trainer.loop.recipe.report_to:
            terms = {term.name for term in self._trainer.loop.terms}
            self._trainer.log(
                {
                    f"keep/{key}" if key in terms else key: value
                    for key, value in latest.items()
                    if key != "step"
                }
            )
        # The Trainer keeps this list in its resume state.
        state.log_history.append({"step": state.global_step, "keepshot": latest})
        if state.global_step >= state.max_steps:
            control.should_save = False
        detail = f"loss {latest['loss']:.3f}"
        self._progress.update(state.global_step, state.max_steps, detail)


def _collate(samples: Sequence[Sample]) -> dict[str, Any]:
    return {"parts": [_tensors(pad(part)) for part in group(samples)]}


def _pack(samples: Sequence[Sample]) -> dict[str, Any]:
    return {"parts": [_tensors(row) for row in pack(samples)]}


def _tensors(padded: Padded) -> dict[str, Tensor]:
    tensors = {"ids": padded.ids_BT, "read": padded.read_N, "targets": padded.targets_N}
    if padded.positions_BT is not None:
        tensors["positions"] = padded.positions_BT
    return tensors


def num_processes() -> int:
    """Return how many processes share each batch."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def _arguments(loop: Loop, place: Path) -> TrainingArguments:
    recipe = loop.recipe
    processes = num_processes()
    at_once, left = divmod(recipe.batch_size, recipe.accumulate * processes)
    if left:
        raise ConfigError(
            f"batch_size {recipe.batch_size} cannot be divided among {processes} processes in "
            f"{recipe.accumulate} parts each; give a multiple of {recipe.accumulate * processes}"
        )
    assert recipe.steps is not None
    assert recipe.learning_rate is not None
    schedulers = {
        "constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"
    }  # fmt: skip
    on_cpu = next(loop.prepared.module.parameters()).device.type == "cpu"
    divided = sharded(recipe, on_cpu=on_cpu, processes=processes)
    # A resume state holds whole weights, which no process has then.
    saves = loop.state_dir is not None and not divided
    return TrainingArguments(
        output_dir=str(place),
        **divided,
        max_steps=recipe.steps,
        per_device_train_batch_size=at_once,
        gradient_accumulation_steps=recipe.accumulate,
        **_checkpointing(recipe),
        bf16=recipe.bf16,
        # Processes call the model as often as their own rows ask for, and must not wait then.
        ddp_broadcast_buffers=False,
        ddp_find_unused_parameters=False,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type=schedulers[recipe.scheduler],
        # The first step of a warmup has a rate of zero: the only step must be none of it.
        warmup_steps=min(math.ceil(recipe.warmup * recipe.steps), recipe.steps - 1),
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm,
        optim="adamw_torch_fused",
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        dataloader_num_workers=0,
        dataloader_pin_memory=False,
        use_cpu=on_cpu,
        seed=recipe.seed,
        save_strategy="steps" if saves else "no",
        save_steps=recipe.save_every,
        eval_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        report_to=list(recipe.report_to),
    )


def _checkpointing(recipe: Recipe) -> dict[str, Any]:
    """Return the setting under the name that this version of transformers has for it."""
    if not recipe.checkpointing:
        return {}
    known = TrainingArguments.__dataclass_fields__
    names = ("activation_checkpointing", "gradient_checkpointing")
    return {next(name for name in names if name in known): True}
