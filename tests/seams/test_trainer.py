"""What train.py and callbacks.py stand on in transformers.Trainer: the hooks, their order, and the trap in resuming."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerState

from halfbyte.adapters import lora
from tests import tiny

ROWS = [{"input_ids": torch.arange(3 + i, 9 + i), "labels": torch.arange(3 + i, 9 + i)} for i in range(4)]


def adapted() -> Any:
    torch.manual_seed(0)
    return get_peft_model(tiny.model("llama"), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))


def arguments(folder: Path, **values: Any) -> Any:
    return TrainingArguments(
        **{
            "output_dir": str(folder),
            "per_device_train_batch_size": 1,
            "max_steps": 4,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            "remove_unused_columns": False,
            "learning_rate": 0.1,
            "optim": "adamw_torch",
            **values,
        }
    )


class Hooked(Trainer):
    """Writes down every documented override that is called."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.calls: list[str] = []
        super().__init__(*args, **kwargs)

    def get_train_dataloader(self) -> Any:
        self.calls.append("get_train_dataloader")
        return super().get_train_dataloader()

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        self.calls.append("create_optimizer")
        return super().create_optimizer(*args, **kwargs)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        self.calls.append("training_step")
        return super().training_step(model, inputs, num_items_in_batch)

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        self.calls.append("evaluate")
        # the handler takes back `should_evaluate`; without it the end of the epoch would evaluate again
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, {"eval_loss": 1.0})
        return {"eval_loss": 1.0}

    def floating_point_ops(self, inputs: Any) -> Any:
        self.calls.append("floating_point_ops")
        return 0.0


class Order(TrainerCallback):
    """Writes down the events, with what there is at that moment."""

    def __init__(self, model: Any) -> None:
        self.events: list[str] = []
        self.has_optimizer: bool | None = None
        model.get_base_model().get_decoder().register_forward_pre_hook(lambda *_: self.events.append("forward"))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.events.append("train_begin")
        self.has_optimizer = kwargs["optimizer"] is not None and kwargs["lr_scheduler"] is not None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.events.append("step_begin")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.events.append("step_end")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.events.append("train_end")


def test_the_hooks_are_called(tmp_path: Path) -> None:
    values = {"eval_strategy": "steps", "eval_steps": 2}
    trainer = Hooked(adapted(), arguments(tmp_path, **values), train_dataset=ROWS, eval_dataset=[])
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.train()
    calls = trainer.calls
    assert calls.count("training_step") == calls.count("floating_point_ops") == 4
    assert calls.count("create_optimizer") == calls.count("get_train_dataloader") == 1
    assert calls.count("evaluate") == 2
    assert calls.index("create_optimizer") < calls.index("training_step")


def test_the_order_of_events(tmp_path: Path) -> None:
    model = adapted()
    order = Order(model)
    Trainer(model, arguments(tmp_path, max_steps=2), train_dataset=ROWS, callbacks=[order]).train()
    step = ["step_begin", "forward", "step_end"]
    assert order.events == ["train_begin", *step, *step, "train_end"]
    assert order.has_optimizer


def test_a_callback_stops_the_training(tmp_path: Path) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == 2

    trainer = Trainer(adapted(), arguments(tmp_path), train_dataset=ROWS, callbacks=[Stop()])
    trainer.train()
    assert trainer.state.global_step == 2


def test_the_scheduler_and_clipping_see_one_item_as_one_step(tmp_path: Path) -> None:
    trainer = Trainer(adapted(), arguments(tmp_path, max_steps=4, max_grad_norm=1.0), train_dataset=ROWS)
    trainer.train()
    assert trainer.state.global_step == 4
    assert trainer.optimizer.param_groups[0]["lr"] == 0  # linear, to the end
    rows = [row for row in trainer.state.log_history if "grad_norm" in row]
    assert all(row["grad_norm"] >= 0 for row in rows)


def test_clipping_asks_for_no_more_than_parameters(tmp_path: Path) -> None:
    """By a method of its own, which newer versions have; others never call it."""
    calls = []

    class Clips(Trainer):
        def _clip_grad_norm(self, model: torch.nn.Module) -> object:
            calls.append(self.state.global_step)
            return super()._clip_grad_norm(torch.nn.ParameterList(p for p in model.parameters() if p.requires_grad))

    norms = []
    for cls in (Trainer, Clips):
        torch.manual_seed(0)
        trainer = cls(adapted(), arguments(tmp_path, max_steps=3, max_grad_norm=0.01), train_dataset=ROWS)
        trainer.train()
        norms.append([row["grad_norm"] for row in trainer.state.log_history if "grad_norm" in row])
    assert norms[0] == norms[1]
    assert calls == ([0, 1, 2] if hasattr(Trainer, "_clip_grad_norm") else [])


def resumable(folder: Path, state: TrainerState, model: Any) -> Path:
    folder.mkdir()
    lora.writer(model, base_id="org/name", revision=None, dtype=None)(folder)
    state.save_to_json(str(folder / "trainer_state.json"))
    return folder


def test_resuming_reads_position_and_adapter_and_takes_a_fresh_optimizer(tmp_path: Path) -> None:
    """The trap: no optimizer.pt, no word. `RunCallback.on_train_begin` loads ours; this test says that it must."""
    first = Trainer(adapted(), arguments(tmp_path, max_steps=2), train_dataset=ROWS)
    first.train()
    point = resumable(tmp_path / "step-000002", first.state, first.model)
    assert not (point / "optimizer.pt").exists()

    seen: dict[str, Any] = {}

    class Look(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            model, optimizer = kwargs["model"], kwargs["optimizer"]
            seen["step"] = state.global_step
            seen["weights"] = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
            seen["optimizer"] = dict(getattr(optimizer, "optimizer", optimizer).state)

    second = Trainer(adapted(), arguments(tmp_path), train_dataset=ROWS, callbacks=[Look()])
    second.train(resume_from_checkpoint=str(point))
    assert seen["step"] == 2
    assert seen["optimizer"] == {}
    trained = {n: p for n, p in first.model.named_parameters() if p.requires_grad}
    assert seen["weights"].keys() == trained.keys()
    assert all(torch.equal(seen["weights"][n], p) for n, p in trained.items())
    assert second.state.global_step == 4


def test_a_checkpoint_without_its_state_is_refused(tmp_path: Path) -> None:
    trainer = Trainer(adapted(), arguments(tmp_path), train_dataset=ROWS)
    point = resumable(tmp_path / "step-000002", trainer.state, trainer.model)
    (point / "trainer_state.json").unlink()
    with pytest.raises((FileNotFoundError, ValueError, OSError)):
        trainer.train(resume_from_checkpoint=str(point))


def test_the_state_is_json_and_comes_back(tmp_path: Path) -> None:
    TrainerState(global_step=3, max_steps=7, epoch=0.5).save_to_json(str(tmp_path / "trainer_state.json"))
    assert json.loads((tmp_path / "trainer_state.json").read_text())["global_step"] == 3
    assert TrainerState.load_from_json(str(tmp_path / "trainer_state.json")).max_steps == 7


def test_attributes_that_are_used(tmp_path: Path) -> None:
    trainer = Trainer(adapted(), arguments(tmp_path), train_dataset=ROWS)
    assert callable(trainer.accelerator.backward) and callable(trainer.accelerator.no_sync)
    cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(trainer.args, trainer.model)
    assert cls is torch.optim.AdamW and kwargs["lr"] == 0.1
