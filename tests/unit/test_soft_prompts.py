"""Soft prompts: token ids beyond the vocabulary, used for their own task and for nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from cases import FAMILIES
from keepshot.assets import AssetStore
from keepshot.errors import ConfigError, ModelError, TrainingError
from keepshot.models.loading import LanguageModel, load, outline, save
from keepshot.models.soft_prompts import (
    SoftPrompts,
    attach_,
    attached,
    detach_,
    sample_vectors,
)
from keepshot.progress import Silent
from keepshot.prompts import Example
from keepshot.scoring.engine import Engine
from keepshot.scoring.evaluate import Plan, measure
from keepshot.tasks.task import Task
from keepshot.tuning.batch import Sample, Source, mean_loss
from keepshot.tuning.data import encode_rows
from keepshot.tuning.keep import KL, Mix
from keepshot.tuning.method_specs import BiasOnly, Full, LoRA, ProMoT, PromptTuning
from keepshot.tuning.methods import export, prepare
from keepshot.tuning.recipe import AUTO_TERM, Recipe, auto
from keepshot.tuning.stages import Work, attach_prompts, run_stages, under_prompt
from keepshot.tuning.tokenised import Extra
from keepshot.tuning.train import train

Build = Callable[..., LanguageModel]
IDS = torch.arange(3, 40).reshape(1, -1)
EXAMPLES = tuple(Example(word, word[0].upper()) for word in ("apple", "berry", "cherry", "date"))


def prompted(model: LanguageModel, tasks: tuple[str, ...] = ("a", "b"), length: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    table = sample_vectors(model.module, len(tasks) * length, generator) + 0.5
    attach_(model.module, tasks, table)
    return table


def logits(model: LanguageModel, task: str) -> Tensor:
    ids = torch.cat([torch.tensor([model.soft_prompt(task)], dtype=torch.long), IDS], dim=1)
    with torch.no_grad():
        return model.module(input_ids=ids).logits[:, -IDS.shape[1] :]


def tune(model: LanguageModel, out_dir: Path | None = None, **settings: object) -> None:
    recipe = Recipe.model_validate(
        {"data": "x", "steps": 3, "batch_size": 4, "learning_rate": 1e-2, **settings}
    )
    train(recipe, model, EXAMPLES, out_dir)


def task(name: str) -> Task:
    return Task(name, "exact", 1, "words", "", EXAMPLES, (), EXAMPLES)


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_of_a_prompt_stand_for_its_vectors(family: str, fresh_pico: Build):
    model = fresh_pico(family)
    plain = logits(model, "a")
    names = list(model.module.state_dict())
    table = prompted(model)
    embedding = model.module.get_input_embeddings()
    vectors = torch.cat([table[4:][None], embedding(IDS)], dim=1)
    with torch.no_grad():
        if family == "gemma3":
            # Its embedding layer scales by itself; vectors given are taken as they are.
            assert torch.equal(embedding(IDS), embedding.weight[IDS] * 32**0.5)
        expected = model.module(inputs_embeds=vectors).logits[:, 4:]
    assert torch.allclose(logits(model, "b"), expected, atol=1e-5)
    assert not torch.allclose(logits(model, "a"), logits(model, "b"), atol=1e-2)
    assert torch.equal(logits(model, "other"), plain)
    assert list(model.module.state_dict()) == names
    detach_(model.module)
    assert attached(model.module) is None
    assert model.soft_prompt("a") == ()


def test_the_prompt_is_asked_under_for_its_own_task_only(fresh_pico: Build):
    plain, model = fresh_pico("llama"), fresh_pico("llama")
    prompted(model)
    plan = Plan(tasks=(task("a"), task("other")), shots=(0, 2), seeds=(0,))
    before = measure(plain, plan, arm="x").items
    shared = measure(model, plan, arm="x").items
    alone = measure(model, plan, arm="x", engine=Engine(model, share=False)).items
    assert [item.answer for item in shared] == [item.answer for item in alone]
    for first, second in zip(before, shared, strict=True):
        assert (first.answer == second.answer) or first.task == "a"
    own = [(x.answer, y.answer) for x, y in zip(before, shared, strict=True) if x.task == "a"]
    assert any(x != y for x, y in own)


def test_likelihoods_under_a_prompt_are_those_of_a_plain_pass(fresh_pico: Build):
    model = fresh_pico("gpt_neox")
    prompted(model)
    choices = ("yes", "no", "maybe")
    example = Example("is it", "yes", choices)
    plan = Plan(tasks=(Task("b", "choice", 1, "", "", (), (), (example,)),), shots=(0,), seeds=(0,))
    (item,) = measure(model, plan, arm="x").items
    for choice, found in zip(choices, item.log_likelihoods, strict=True):
        context, answer = model.encode_pair("Q: is it\nA:", f" {choice}")
        ids = torch.tensor([[*model.soft_prompt("b"), *context, *answer]])
        with torch.no_grad():
            log_probs = model.module(input_ids=ids).logits[0].log_softmax(-1)
        first = ids.shape[1] - len(answer)
        expected = sum(float(log_probs[first + i - 1, t]) for i, t in enumerate(answer))
        assert found == pytest.approx(expected, abs=1e-3)


def test_peft_loads_what_prompt_tuning_writes(fresh_pico: Build, tmp_path: Path):
    model = fresh_pico("llama")
    tune(model, tmp_path, method=PromptTuning(tokens=4))
    theirs = PeftModel.from_pretrained(fresh_pico("llama").module, tmp_path / "adapter")
    with torch.no_grad():
        found = theirs(input_ids=IDS).logits[:, -IDS.shape[1] :]
    assert torch.allclose(found, logits(model, "x"), atol=1e-5)


def test_peft_loads_promots_prompt_on_the_tuned_model(fresh_pico: Build, tmp_path: Path):
    model = fresh_pico("qwen2")
    tune(model, tmp_path, method=ProMoT(tokens=4, prompt_steps=2))
    assert json.loads((tmp_path / "prompts/0/keepshot-prompt.json").read_text()) == {"task": "x"}
    tuned = load(str(tmp_path / "model"), AssetStore(tmp_path / "cache"))
    assert torch.allclose(logits(tuned, "x"), logits(model, "other"), atol=1e-5)
    theirs = PeftModel.from_pretrained(tuned.module, tmp_path / "prompts" / "0")
    with torch.no_grad():
        found = theirs(input_ids=IDS).logits[:, -IDS.shape[1] :]
    assert torch.allclose(found, logits(model, "x"), atol=1e-5)


def test_several_prompts_lie_beside_one_model(fresh_pico: Build, tmp_path: Path):
    model = fresh_pico("llama")
    prompted(model, ("support", "my.jsonl"))
    export(prepare(Full(), model.module, 0), model, tmp_path / "run")
    store = AssetStore(tmp_path / "cache")
    loaded = load(str(tmp_path / "run"), store)
    for name in ("support", "my.jsonl", "other"):
        assert torch.equal(logits(loaded, name), logits(model, name))
    light = outline(str(tmp_path / "run"), store)
    assert len(light.soft_prompt("my.jsonl")) == 4


def test_random_and_joint_controls_do_what_they_say(fresh_pico: Build):
    def table(model: LanguageModel) -> Tensor:
        prompts = attached(model.module)
        assert prompts is not None
        return prompts.table.detach().clone()

    start = sample_vectors(fresh_pico("llama").module, 3, torch.Generator().manual_seed(0))
    random, joint, trained = (fresh_pico("llama") for _ in range(3))
    tune(random, method=ProMoT(tokens=3, prompt="random"))
    tune(joint, method=ProMoT(tokens=3, prompt="joint", prompt_learning_rate=0.1))
    tune(trained, method=ProMoT(tokens=3, prompt_steps=2, prompt_learning_rate=0.1))
    assert torch.equal(table(random), start)
    assert not torch.equal(table(joint), start)
    assert not torch.equal(table(trained), start)
    # AdamW's first step is as long as the rate: the prompt has its own, ten times the model's.
    moved = (table(joint) - start).abs().max()
    assert 0.1 < moved < 0.31
    names = dict(fresh_pico("llama").module.named_parameters())
    for model in (random, joint, trained):
        weights = dict(model.module.named_parameters())
        assert all((weights[name] != value).any() for name, value in names.items())


def test_lora_in_the_second_stage_is_written_beside_the_prompt(fresh_pico: Build, tmp_path: Path):
    save(fresh_pico("llama"), tmp_path / "base")
    store = AssetStore(tmp_path / "cache")
    model = load(str(tmp_path / "base"), store)
    tune(model, tmp_path / "run", method=ProMoT(tokens=3, prompt_steps=2, then=LoRA(rank=2)))
    assert (tmp_path / "run/adapter/adapter_config.json").exists()
    loaded = load(str(tmp_path / "run"), store)
    assert torch.allclose(logits(loaded, "x"), logits(model, "x"), atol=1e-4)


@pytest.mark.parametrize(("batch_size", "accumulate"), [(10, 2), (10, 5), (4, 4), (5, 1)])
def test_the_prompts_stage_divides_what_a_mix_leaves_of_a_batch(
    batch_size: int, accumulate: int, fresh_pico: Build
):
    """Its batches are smaller, and were to be divided into the same number of parts."""
    term = Mix(icl_from="data", icl_share=0.3, shots=2)
    losses: list[list[float]] = []
    for parts in (1, accumulate):
        record = train(
            Recipe(
                data="x", steps=1, batch_size=batch_size, accumulate=parts, learning_rate=1e-3,
                method=ProMoT(tokens=3, prompt_steps=3), keep=(term,),
            ),
            fresh_pico("llama"),
            EXAMPLES,
            None,
        )  # fmt: skip
        losses.append([row["loss"] for row in record.losses])
    assert len(losses[0]) == 4
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


def test_a_rate_too_high_for_the_prompt_names_the_first_stage(fresh_pico: Build):
    model = fresh_pico("llama")
    with pytest.raises(TrainingError, match="the soft prompt's stage"):
        tune(model, method=ProMoT(tokens=3, prompt_steps=30, prompt_learning_rate=1e38))


def test_terms_that_reach_nothing_are_refused():
    for term in (KL(), Mix()):
        with pytest.raises(ConfigError, match="would reach nothing that trains"):
            Recipe.from_mapping(
                {"data": "x", "method": {"name": "prompt-tuning"}, "keep": [term.model_dump()]},
                source="r.yaml",
            )
    assert auto("x", model="m", method="prompt-tuning").keep == ()
    assert auto("x", model="m", method="promot").keep == (AUTO_TERM,)


def test_the_prompt_takes_room_from_the_context(fresh_pico: Build):
    model = fresh_pico("llama")
    recipe = Recipe(data="x", steps=1, method=PromptTuning(tokens=8), max_length=2041)
    with pytest.raises(ConfigError, match="2040 tokens after the soft prompt"):
        train(recipe, model, EXAMPLES, None, extra=Extra())


def test_prompts_that_do_not_fit_are_refused(fresh_pico: Build, tmp_path: Path):
    model = fresh_pico("llama")
    with pytest.raises(ModelError, match="width 16 does not fit LlamaForCausalLM"):
        attach_(model.module, ["x"], torch.zeros(3, 16))
    save(fresh_pico("llama"), tmp_path / "base")
    store = AssetStore(tmp_path / "cache")
    based = load(str(tmp_path / "base"), store)
    tune(based, tmp_path / "run", method=PromptTuning(tokens=3))
    (tmp_path / "run/adapter/keepshot-prompt.json").unlink()
    with pytest.raises(ModelError, match="says for which task it is"):
        load(str(tmp_path / "run"), store)


def test_each_task_trains_its_own_prompt(fresh_pico: Build):
    """Sources carry their prompts: what is read under one says nothing to another."""

    def trained(*used: str) -> SoftPrompts:
        model = fresh_pico("llama")
        recipe = Recipe(data="a,b", steps=2, batch_size=2, method=method, learning_rate=1e-2)
        prompts = attach_prompts(recipe, model.module, ["a", "b"])
        assert prompts is not None
        rows = {"a": EXAMPLES[:2], "b": EXAMPLES[2:]}
        sources = [
            Source(under_prompt(encoded(model, rows[name]), prompts.ids(name)), 2 // len(used))
            for name in used
        ]
        head = model.module.get_output_embeddings()
        work = Work(recipe, model.module, sources, len(sources), lambda _: (), head, None)
        done = run_stages(work, Silent())
        assert [row["step"] for row in done.losses] == [1, 2, 3, 4]
        return prompts

    def encoded(model: LanguageModel, rows: tuple[Example, ...]) -> tuple[Sample, ...]:
        template = task("x").template
        found = encode_rows(
            model, rows, template=template, max_length=99, long_rows="error", source="x"
        )
        return found.samples

    method = ProMoT(tokens=3, prompt_steps=2, prompt_learning_rate=0.1)
    start = sample_vectors(fresh_pico("llama").module, 6, torch.Generator().manual_seed(0))
    both, one = trained("a", "b"), trained("a")
    assert not torch.equal(both.of("a"), start[:3])
    assert not torch.equal(both.of("b"), start[3:])
    assert not torch.equal(one.of("a"), start[:3])
    assert torch.equal(one.of("b"), start[3:])


def test_held_out_rows_are_read_under_the_prompts_of_their_own_tasks(fresh_pico: Build):
    """With two data sets the loss was that without any prompt."""
    model = fresh_pico("llama")
    origins = (("a", 2), ("b", 2))
    extra = Extra(origins=origins, held_out_origins=origins)
    recipe = Recipe(data="a,b", steps=9, batch_size=4, method=PromptTuning(tokens=3))
    recipe = recipe.model_copy(update={"learning_rate": 0.3})
    record = train(recipe, model, EXAMPLES, None, validation=EXAMPLES, extra=extra)
    found = encode_rows(
        model, EXAMPLES, template=task("a").template, max_length=99, long_rows="error", source="a"
    ).samples
    under = [
        sample
        for name, part in (("a", found[:2]), ("b", found[2:]))
        for sample in under_prompt(part, model.soft_prompt(name))
    ]
    assert [len(sample.ids) for sample in under] == [len(sample.ids) + 3 for sample in found]
    assert record.validation_loss == pytest.approx(mean_loss(model, under), abs=1e-6)
    assert record.validation_loss != pytest.approx(mean_loss(model, found), abs=0.1)
    assert record.num_validation == 4


def test_two_data_sets_of_one_name_cannot_have_a_prompt_each(fresh_pico: Build):
    """Both were read under the first prompt, and the second was written untrained."""
    extra = Extra(origins=(("x/train.jsonl", 2), ("y/train.jsonl", 2)))
    recipe = Recipe(data="x/train.jsonl,y/train.jsonl", steps=2, method=PromptTuning(tokens=3))
    with pytest.raises(ConfigError, match=r"two data sets are named 'train\.jsonl'.*rename one"):
        train(recipe, fresh_pico("llama"), EXAMPLES, None, extra=extra)


def test_a_second_stage_that_trains_nothing_is_refused_before_the_first(fresh_pico: Build):
    class Never(Silent):
        def update(self, done: int, total: int, detail: str = "") -> None:
            raise AssertionError("a step was taken")

    recipe = Recipe(data="x", steps=1, batch_size=2, method=ProMoT(then=BiasOnly()))
    with pytest.raises(TrainingError, match="named `bias`"):
        train(recipe, fresh_pico("llama"), EXAMPLES, None, progress=Never())
