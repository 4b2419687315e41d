"""A recipe's fields and tables against the installed peft and transformers, both ways; each value arrives."""

from __future__ import annotations

import dataclasses
import inspect
import tempfile
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from transformers import TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from halfbyte.adapters import lora
from halfbyte.adapters.targets import Targets
from halfbyte.recipe import fields
from halfbyte.recipe.schema import Data, Lora, Recipe, Train
from halfbyte.runs import checkpoint
from halfbyte.system.libraries import version
from halfbyte.training.trainer import NOT_FOR_TRAINER, training_arguments
from halfbyte.upstream import peft as of_peft
from halfbyte.upstream import transformers as of_transformers
from halfbyte.upstream.bitsandbytes import CPU_OPTIMISERS
from tests import tiny
from tests.recipe.test_schema import OTHER

TABLES = {
    "LoraConfig": (peft.LoraConfig, set(Lora.model_fields), fields.LORA_REFUSED),
    "TrainingArguments": (TrainingArguments, set(Train.model_fields), fields.TRAIN_REFUSED),
}
# The newest minor version of each whose fields the tables have. Fields of a later one are refused as not known.
NEWEST: dict[str, tuple[str, tuple[int, int], Any]] = {
    "LoraConfig": ("peft", (0, 21), of_peft.lora_fields),
    "TrainingArguments": ("transformers", (5, 24), of_transformers.training_fields),
}
NEEDS_MORE = {
    "cosine_with_min_lr": {"min_lr_rate": 0.1},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1},
    "warmup_stable_decay": {"num_decay_steps": 3},
}


@pytest.mark.parametrize("name", TABLES)
def test_every_field_is_taken_or_refused_and_no_other(name: str) -> None:
    upstream, taken, refused = TABLES[name]
    library, newest, by_source = NEWEST[name]
    theirs = {field.name for field in dataclasses.fields(upstream)}
    ours, minor = fields.OURS & taken, tuple(map(int, version(library).split(".")[:2]))
    assert taken - ours - theirs == set(), "fields that the installed version has not"
    assert ours & theirs == set(), "fields marked as ours that upstream has too"
    new = theirs - taken - set(refused) - {*fields.ELSEWHERE}
    assert new <= by_source(), "fields of a newer version that would not be told from typing errors"
    if minor <= newest:
        assert new == set(), "fields of this version: take or refuse them"
    if minor == newest:
        assert set(refused) - theirs == set(), "fields that the newest version no longer has"


def test_optimisers_and_schedules_are_those_of_transformers() -> None:
    theirs = {item.value for item in OptimizerNames}
    assert {*fields.OPTIMIZERS} <= theirs
    theirs = {item.value for item in SchedulerType}
    assert {*fields.SCHEDULES} | {*fields.SCHEDULES_REFUSED} == theirs


@pytest.mark.parametrize("schedule", fields.SCHEDULES)
def test_a_schedule_takes_what_the_table_says(schedule: str) -> None:
    function = TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(schedule)]
    given = {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}
    assert set(inspect.signature(function).parameters) - given == set(fields.SCHEDULES[schedule])


@pytest.mark.parametrize("schedule", fields.SCHEDULES)
def test_a_schedule_runs_and_needs_what_the_table_says(schedule: str) -> None:
    def run(**more: Any) -> list[float]:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        steps = transformers.get_scheduler(schedule, optimizer, 2, 8, scheduler_specific_kwargs=more)
        rates = []
        for _ in range(8):
            rates.append(float(optimizer.param_groups[0]["lr"]))
            optimizer.step()
            steps.step()
        return rates

    more = NEEDS_MORE.get(schedule, {})
    assert max(run(**more)) == 1.0
    assert (schedule in fields.SCHEDULES_NEED) == bool(more)
    if more:
        with pytest.raises((TypeError, ValueError)):
            run()


def test_integrations_are_those_of_transformers() -> None:
    assert set(fields.INTEGRATIONS) == set(INTEGRATION_TO_CALLBACK)


def optimizer_of(name: str, optim_args: str | None = None) -> tuple[torch.nn.Linear, Any, Any]:
    torch.manual_seed(0)
    model = torch.nn.Linear(128, 64)  # more than 4096 numbers: small states stay in 32 bits
    arguments = TrainingArguments(
        output_dir=tempfile.gettempdir(), optim=name, optim_args=optim_args, use_cpu=True, report_to="none"
    )
    cls, options = transformers.Trainer.get_optimizer_cls_and_kwargs(arguments, model)
    optimizer = cls(model.parameters(), **{**options, "lr": 1e-2})
    return model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)


def train(model: torch.nn.Module, optimizer: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 128, generator=generator)).pow(2).mean().backward()
        optimizer.step()


@pytest.mark.parametrize("name", fields.OPTIMIZERS)
def test_an_optimiser_trains_and_comes_back_from_a_checkpoint(name: str, tmp_path: Path) -> None:
    if optimizer_of(name)[1].__module__.startswith("bitsandbytes") and CPU_OPTIMISERS.reason:
        pytest.skip(CPU_OPTIMISERS.reason)
    model, optimizer, scheduler = optimizer_of(name)
    start = model.weight.detach().clone()
    train(model, optimizer, 1)
    assert not torch.equal(start, model.weight)
    taken = checkpoint.snapshot(
        3,
        randomness=checkpoint.Randomness.now(),
        write_adapter=lambda folder: None,
        trainer_state="{}",
        optimizer=optimizer,
        scheduler=scheduler,
        trained={},
    )
    saved = checkpoint.write(tmp_path, taken)
    other, optimizer2, scheduler2 = optimizer_of(name)
    other.load_state_dict({k: v.clone() for k, v in model.state_dict().items()})
    checkpoint.load_optimizer(saved, optimizer2, scheduler2)
    train(model, optimizer, 2)
    train(other, optimizer2, 2)
    assert torch.equal(model.weight, other.weight)


@pytest.mark.parametrize("name", [name for name, arguments in fields.OPTIMIZERS.items() if arguments])
def test_an_optimiser_reads_its_arguments(name: str) -> None:
    values = {"nesterov": "true", "centered": "true", "dampening": "0"}
    _, plain, _ = optimizer_of(name)
    for argument in fields.OPTIMIZERS[name]:
        text = f"{argument}={values.get(argument, '0.37')}" + (",momentum=0.9" if argument == "nesterov" else "")
        _, changed, _ = optimizer_of(name, text)
        assert changed.param_groups[0][argument] == {"true": True}.get(values.get(argument, ""), 0.37) or (
            argument == "dampening" and changed.param_groups[0][argument] == plain.param_groups[0][argument] == 0
        )


# --- each field reaches the class that it is named after ------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(set(Lora.model_fields) - fields.OURS))
def test_a_lora_field_reaches_the_config(name: str) -> None:
    if name == "task_type":
        assert lora.lora_config(Lora(), Targets(("q_proj",), "")).task_type == "CAUSAL_LM"
        return
    if name == "target_modules":  # chosen by `targets.py`
        assert lora.lora_config(Lora(), Targets(("v_proj",), "")).target_modules == {"v_proj"}
        return
    value, needs = OTHER[f"lora.{name}"]
    needed = {dotted.removeprefix("lora."): inner for dotted, inner in needs.items()}
    plain = lora.lora_config(Lora(**needed), Targets(("q_proj",), ""))
    changed = lora.lora_config(Lora(**needed, **{name: value}), Targets(("q_proj",), ""))
    differing = {key for key, inner in changed.to_dict().items() if inner != plain.to_dict()[key]}
    assert differing == {name}


@pytest.mark.parametrize("name", sorted(set(Train.model_fields) - NOT_FOR_TRAINER))
def test_a_train_field_reaches_the_arguments(name: str, tmp_path: Path) -> None:
    value, needs = OTHER[f"train.{name}"]
    needed = {dotted.removeprefix("train."): inner for dotted, inner in needs.items() if dotted.startswith("train.")}
    value = ("tensorboard",) if name == "report_to" else value  # "all" of what is installed may be nothing

    def arguments(**changed: Any) -> dict[str, Any]:
        made = training_arguments(
            Train(**needed).model_copy(update=changed),
            folder=tmp_path,
            total_steps=7,
            fp16=False,
            use_cpu=True,
            eval_steps=0,
        )
        return {field.name: getattr(made, field.name) for field in dataclasses.fields(made)}

    plain, changed = arguments(), arguments(**{name: value})
    assert changed[name] != plain[name]
    followed = {"logging_strategy"} if name == "report_to" else set()  # lines are made only where someone reads them
    assert {key for key in plain if plain[key] != changed[key]} == {name} | followed


def test_the_names_that_never_reach_the_trainer_are_fields() -> None:
    assert set(Train.model_fields) >= NOT_FOR_TRAINER >= fields.OURS - lora.OWN_FIELDS
    assert set(Lora.model_fields) & fields.OURS == lora.OWN_FIELDS


# --- what is refused, and why ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def four_bit(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tiny") / "llama"
    tiny.save(folder, "llama")

    def load() -> Any:
        config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
        return transformers.AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=config, device_map={"": "cpu"}
        )

    return load


def test_peft_knows_the_initialisations_of_the_table() -> None:
    annotation = str(peft.LoraConfig.__dataclass_fields__["init_lora_weights"].type)
    theirs = {word for word in annotation.replace("'", " ").split() if word.isidentifier()} - {"bool", "of", "Literal"}
    later = {"mica"} if "kasa_config" not in peft.LoraConfig.__dataclass_fields__ else set()  # of 0.21
    for name in {*fields.INIT_NAMES, *fields.INIT_REFUSED} - fields.OURS_OF_INIT - later:
        assert name in annotation or name == "lora_ga", (name, theirs)
    assert not fields.OURS_OF_INIT & theirs


@pytest.mark.parametrize("name", ["pissa", "corda", "mica", "orthogonal"])
def test_an_initialisation_that_peft_cannot_do_on_four_bits(name: str, four_bit: Any) -> None:
    config = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=name)
    with pytest.raises((TypeError, RuntimeError, ValueError)):
        peft.get_peft_model(four_bit(), config)


def test_olora_changes_the_four_bit_base(four_bit: Any) -> None:
    """PEFT does it without a word; the saved adapter would no longer fit the base it names."""
    model = four_bit()
    name = "model.layers.0.self_attn.q_proj"
    before = model.get_submodule(name).weight.data.clone()
    config = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights="olora")
    peft.get_peft_model(model, config)
    after = model.get_submodule(name).base_layer.weight.data
    assert before.shape != after.shape or not torch.equal(before, after)


def test_contradictions_among_lora_fields_are_those_of_peft() -> None:
    """Each of these is refused by PEFT only once the base is loaded; the recipe refuses it before."""
    for values in (
        {"lora_bias": True, "use_dora": True},
        {"lora_bias": True, "init_lora_weights": "gaussian"},
        {"layers_pattern": "layers"},
        {"layers_to_transform": [0], "target_modules": ".*q_proj"},
    ):
        with pytest.raises(ValueError):
            peft.LoraConfig(**{"target_modules": ["q_proj"], **values})
        with pytest.raises(ValueError):
            Recipe(model="m", data=Data(train="t"), lora=Lora(**values))


def test_training_arguments_read_steps_below_one_as_a_share(tmp_path: Path) -> None:
    made = training_arguments(
        Train(warmup_steps=0.1), folder=tmp_path, total_steps=50, fp16=False, use_cpu=True, eval_steps=0
    )
    assert made.get_warmup_steps(50) == 5
