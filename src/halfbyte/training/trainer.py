"""The only door to transformers.Trainer: one item of the dataset is one whole optimiser step.

Why: the rows of batch x accumulation are split into padding-free micro-batches as memory allows; `training_step` sums
their loss over labelled tokens and divides it once. So any split gives the same optimisation, and the position in the
data is the step's index.
Source: `transformers/trainer.py` (`training_step`, `evaluate`, `create_optimizer`: documented overrides).
Cost: logits are made for labelled tokens only (`logits_to_keep`), one micro-batch at a time.
"""

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from operator import itemgetter
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from numpy.typing import NDArray
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerControl, TrainingArguments, get_scheduler
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import TrainOutput

from halfbyte.adapters.lora import loraplus_optimizer
from halfbyte.data import collate, pack
from halfbyte.distributed.shard import Shards
from halfbyte.distributed.step import StepSum, of_all, sums
from halfbyte.distributed.world import World
from halfbyte.errors import RecipeError, first_line
from halfbyte.layers.kernels import dropout
from halfbyte.objectives import objective as objectives
from halfbyte.objectives.objective import Objective
from halfbyte.recipe import fields
from halfbyte.recipe.method import MethodFields
from halfbyte.recipe.schema import Train
from halfbyte.system import device
from halfbyte.training import watch
from halfbyte.training.deadline import Schedule
from halfbyte.training.pace import Pace, StepRows
from halfbyte.types import Batch, Document, Model
from halfbyte.upstream.bitsandbytes import CPU_OPTIMISERS

NOT_FOR_TRAINER = fields.NOT_FOR_TRAINER.union(MethodFields.model_fields)


class OneModelArguments(TrainingArguments):
    """The Trainer wraps a model in torch's DataParallel where it sees several cards. Ours is on one, or split over them
    by its layers."""

    def __post_init__(self) -> None:
        """Without transformers' warning of a process group that it does not know: group and sum are ours."""
        logger = logging.getLogger("transformers.training_args")
        before = logger.level
        logger.setLevel(logging.ERROR)
        try:
            super().__post_init__()
        finally:
            logger.setLevel(before)

    @property
    def n_gpu(self) -> int:
        return min(1, super().n_gpu)


def training_arguments(
    train: Train, *, folder: Path, total_steps: int, fp16: bool, use_cpu: bool, eval_steps: int
) -> TrainingArguments:
    """The recipe's `train:` as TrainingArguments for a run of `total_steps` items.

    Args:
        fp16: loss scaling, for a card without bf16; autocast itself is switched off in `adapters.dropin`.
        eval_steps: 0 for none; epochs are turned into steps by the caller, as the Trainer sees one epoch of all steps.
    """
    values = train.model_dump(exclude=set(NOT_FOR_TRAINER), exclude_none=True)
    values = {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
    if use_cpu and train.optim == "adamw_torch":  # one call for all adapters; else some of torch's for each
        values["optim"] = "adamw_torch_fused"
    return OneModelArguments(
        **values, metric_for_best_model=train.metric_for_best_model, greater_is_better=train.best_is_greatest,
        output_dir=str(folder), per_device_train_batch_size=1, gradient_accumulation_steps=1, max_steps=total_steps,
        save_strategy="no",
        # its own lines go to `report_to` alone, and it waits twice for a card to make one
        logging_strategy="steps" if train.report_to not in (None, "none", (), []) else "no",
        eval_strategy="steps" if eval_steps else "no", eval_steps=eval_steps or None, fp16=fp16, use_cpu=use_cpu,
        remove_unused_columns=False, dataloader_num_workers=0, disable_tqdm=True, logging_nan_inf_filter=False,
        average_tokens_across_devices=True, log_level="error",
    )  # fmt: skip


def check_arguments(train: Train, *, total_steps: int) -> None:
    """Make the optimiser and the schedule of the recipe on one number, before anything is loaded or written. Raises
    RecipeError: arguments that they do not take."""
    try:
        where = Path("unused")
        args = training_arguments(train, folder=where, total_steps=total_steps, fp16=False, use_cpu=True, eval_steps=0)
        cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(args)
        if cls.__module__.startswith("bitsandbytes") and device.detect().kind == "cpu" and CPU_OPTIMISERS.reason:
            raise RecipeError(
                f"train.optim {train.optim} needs a card here: {CPU_OPTIMISERS.reason}.",
                fix="--set train.optim=adamw_torch; or pip install -U bitsandbytes",
            )
        optimizer = cls([torch.nn.Parameter(torch.zeros(1))], **kwargs)
        get_scheduler(
            args.lr_scheduler_type,
            optimizer,
            num_warmup_steps=args.get_warmup_steps(total_steps),
            num_training_steps=total_steps,
            scheduler_specific_kwargs=args.lr_scheduler_kwargs,
        )
    except (ValueError, TypeError, KeyError, ImportError, RuntimeError) as error:
        raise RecipeError(
            f"train: optimiser {train.optim} and schedule {train.lr_scheduler_type} cannot be made as asked: "
            f"{first_line(error)}.",
            fix="look at train.optim_args and train.lr_scheduler_kwargs",
        ) from error


class StepInterrupted(Exception):
    """A step was ended between two micro-batches, before it changed anything."""


@dataclass(frozen=True)
class RunHooks:
    """What the steps ask the run, and report to it."""

    stops_step: Callable[[], bool] = lambda: False
    """Whether a step is to end with the micro-batch under way, and training with it."""
    stops_evaluation: Callable[[], bool] = lambda: False  # the same of an evaluation
    on_stop: Callable[[], None] = lambda: None  # called when some process was asked to stop: the run ends
    on_evaluation: Callable[[], None] = lambda: None
    answer_scores: Callable[[], dict[str, float]] = dict  # scores of what the model writes to the held-out rows
    rollouts: StepRows | None = None  # of a run that writes what it learns from


class StepTrainer(Trainer):
    """A Trainer whose dataset yields `{"step": Step, "micro_batches": [batch, ...]}`, each a whole optimiser step.

    `pace` splits steps anew when memory runs short; `last` is the row in `metrics.jsonl` of the last step. In a `world`
    of several processes each has its own micro-batches; one all-reduce ends the step.
    """

    optimizer: Optimizer
    control: TrainerControl

    def __init__(
        self, model: Model, args: TrainingArguments, *, train_dataset: collate.StepDataset,
        eval_batches: collate.Batches, objective: Objective, loraplus_lr_ratio: float | None, pace: Pace,
        hooks: RunHooks, world: World | None = None, shards: Shards | None = None, ends_with_evaluation: bool = False,
        schedule: Schedule | None = None, sources: Mapping[str, NDArray[np.int64]] = MappingProxyType({}),
    ) -> None:  # fmt: skip
        self.sources, self.schedule = sources, schedule
        self.objective, self.pace = objective, pace
        self.ends_with_evaluation, self._checked_first = ends_with_evaluation, False
        self.hooks, self.shards = hooks, shards
        self.world = world or World()
        self._sum = None if self.world.alone else StepSum(self.world, model.parameters())
        self._sites = dropout.sites_of(model)
        self.eval_batches, self.loraplus_lr_ratio = eval_batches, loraplus_lr_ratio
        self.last, self._steps_down = Document(), 0
        self.evaluated: tuple[int, NDArray[np.float64]] = -1, np.empty((0, 0))  # the last evaluation's step and rows
        super().__init__(model=model, args=args, train_dataset=train_dataset, eval_dataset=[])
        self.loss_is_scaled_for_ga = True
        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)
        self._ended = time.perf_counter()

    @property
    def scaler(self) -> torch.amp.GradScaler | None:
        return getattr(self.accelerator, "scaler", None)

    def get_train_dataloader(self) -> DataLoader[Document]:
        """Items in their order, one at a time: the order was drawn when the steps were planned."""
        return DataLoader(self.train_dataset, batch_size=1, shuffle=False, collate_fn=itemgetter(0))

    def train(self, *args: object, **kwargs: object) -> TrainOutput:
        """While it lasts the model clears the gradients of what trains alone, as `_clip_grad_norm` clips them."""
        self.model.__dict__["zero_grad"] = self._trained.zero_grad
        try:
            return super().train(*args, **kwargs)
        finally:
            del self.model.__dict__["zero_grad"]

    def create_optimizer(self, model: torch.nn.Module | None = None) -> Optimizer:
        if self.loraplus_lr_ratio is None or self.optimizer is not None:
            return super().create_optimizer(model)
        cls, kwargs = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        self.optimizer = loraplus_optimizer(self.model, cls, self.loraplus_lr_ratio, self.args.weight_decay, kwargs)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LRScheduler:
        """The recipe's own, or one that ends at a time."""
        schedule = self.schedule
        if schedule is None or getattr(self, "lr_scheduler", None) is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        self.lr_scheduler = LambdaLR(optimizer or self.optimizer, lambda step: schedule.share(step))
        return self.lr_scheduler

    @property
    def is_done(self) -> bool:
        """Whether no step follows."""
        return self.state.global_step >= self.state.max_steps or (self.schedule is not None and self.schedule.over)

    def training_step(self, model: Model, inputs: Document, num_items_in_batch: object = None) -> torch.Tensor:
        """Forward and backward over every micro-batch of one step. Returns its loss for a labelled token, a scalar.

        Raises:
            StepInterrupted: the run is to end, and there are micro-batches left.
            TrainError: the loss or a gradient is not finite (names the rows), or an adapter got no gradient.
        """
        if not (model.training and self._checked_first):  # it goes through all modules: 2% of a small step
            model.train()
        getattr(self.optimizer, "train", lambda: None)()
        if self.hooks.rollouts is not None:
            inputs = {**self.hooks.rollouts.begin(inputs["step"], self.pace, self._look)}
        step, micro_batches = inputs["step"], inputs["micro_batches"]
        total = torch.zeros((), device=self.args.device)
        parts: list[tuple[pack.MicroBatch, torch.Tensor]] = []
        waiting, done = self.pace.between(step.micro_batches), 0
        watches = self.objective.watches
        watched, of_step = np.zeros((len(watches), 2)), self._step_sums(model, inputs, waiting)
        if self._sum is not None:
            self._sum.begin()
        while self._another(waiting, done):
            if not waiting:
                self._run_empty(model, micro_batches)
                continue
            before = self.pace.gradients_to_restore(model)
            try:
                batch: Batch = {**micro_batches.of(waiting[0]), **of_step, "watched": {}}
                with self._dropout_of(step, waiting[0], batch), self._sharded_pass():
                    part: torch.Tensor | None = self._run_micro_batch(model, batch, step.weight)
            except (RuntimeError, MemoryError) as error:
                waiting, part = self.pace.after_failure(error, model, before, waiting), None
            if part is None:
                of_step = of_step or self._step_sums(model, inputs, waiting)
                continue
            total += part.to(total.device)
            watched += [batch["watched"][name] for name in watches] if watches else 0.0
            parts.append((waiting[0], part))
            done, waiting = done + 1, self.pace.between(waiting[1:])
        total, bad = self._over_all(total, interrupted=bool(waiting))
        (value, norm), at = self._loss_and_norm(total), self.state.global_step + 1
        if not (math.isfinite(value) and math.isfinite(norm or 0.0)) and self.world.rank != min(bad, default=0):
            self.world.await_failure()
        watch.check(model, Path(self.args.output_dir), at, micro_batches, parts, total=value, norm=norm or 0.0)
        if not self._checked_first and (step.micro_batches or self.hooks.rollouts is None):
            self._checked_first = True
            watch.check_first(self.model, self.pace.largest([(r,) for rows in step.micro_batches for r in rows]))
        self._record(step, value, norm, done)
        sums_of = np.reshape(self._sums(watched.ravel().tolist()), watched.shape)
        self.last |= {name: a / n for name, (a, n) in zip(watches, sums_of.tolist(), strict=True) if n}
        if self.hooks.rollouts is not None:
            self.last |= self.hooks.rollouts.end(self.last)
        return total

    def _look(self, *_: int) -> None:
        if self.hooks.stops_step():
            raise StepInterrupted

    def _step_sums(self, model: Model, item: Document, waiting: list[pack.MicroBatch]) -> Batch:
        """What the loss of each micro-batch must know of the whole step, where the objective asks for something."""
        step, micro_batches = item["step"], item["micro_batches"]
        if self.objective.coupled:
            if len(waiting) == 1 and self.world.alone:  # a micro-batch is the step
                return {}
            parts = ((rows, micro_batches.of(rows)) for rows in waiting)
            every = (lambda *of: self._dropout_of(step, *of)), (lambda *of: of_all(self.world, *of))
            return {"step": self.objective.step_of(model, parts, *every)}
        if not (names := self.objective.step_names):
            return {}
        model.eval()
        with torch.no_grad():
            sums = self.objective.step_sums(model, micro_batches)
        model.train()
        return {"step": dict(zip(names, self._sums([sums[name] for name in names]), strict=True))}

    def _sums(self, values: Sequence[float]) -> Sequence[float]:
        return values if self.world.alone or not values else sums(self.world, values)

    def _another(self, waiting: list[pack.MicroBatch], done: int) -> bool:
        """Whether a micro-batch follows, in this process or, of a sharded base, in any."""
        stops = done > 0 and self.hooks.stops_step()
        return bool(waiting) and not stops if self.shards is None else self.shards.more(bool(waiting), stops=stops)

    def _sharded_pass(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self.shards is None else self.shards.passing()

    def _run_empty(self, model: Model, micro_batches: collate.Batches) -> None:
        """A pass that counts nothing, beside those of other processes."""
        assert self.shards is not None
        with self.shards.passing():
            row = micro_batches.of((self.shards.empty(self.pace.lengths),))
            self.accelerator.backward(0.0 * objectives.micro_batch_loss(self.objective, model, row))

    @contextlib.contextmanager
    def _dropout_of(self, step: pack.Step, rows: pack.MicroBatch, batch: Batch) -> Iterator[None]:
        """What is random in a micro-batch depends on the seed, the step and its rows, not on what ran before it."""
        torch.manual_seed(dropout.number(self.args.seed, step.index, rows[0]))
        where = {"seed": self.args.seed, "step": step.index, "anywhere": not self.world.alone}
        with dropout.row_masks(self._sites, batch["beginnings"], **where):
            yield

    def _over_all(self, total: torch.Tensor, *, interrupted: bool) -> tuple[torch.Tensor, tuple[int, ...]]:
        """The loss of the whole step, and which processes have one that is not finite; StepInterrupted where any of
        them was interrupted."""
        if self._sum is None:
            if interrupted:
                raise StepInterrupted
            return total, ()
        result = self._sum.reduce(total, interrupted=interrupted, stops=self.hooks.stops_step())
        if result.stops:
            self.hooks.on_stop()
        if result.interrupted:
            raise StepInterrupted
        return total.new_tensor(result.loss), result.not_finite

    def _run_micro_batch(self, model: Model, batch: Batch, step_weight: float) -> torch.Tensor:
        """Forward and backward of one micro-batch; its share of the step's loss."""
        self.pace.expect(batch["input_ids"].numel())
        part = objectives.micro_batch_loss(self.objective, model, batch) / step_weight
        self.accelerator.backward(part)
        return part.detach()

    def evaluate(
        self, eval_dataset: object = None, ignore_keys: object = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The objective's scores of the held-out rows; weights and random state stay as they are. An interrupted
        evaluation is not reported."""
        self.hooks.on_evaluation()
        last = self.is_done or isinstance(self.lr_scheduler, ReduceLROnPlateau)
        rows, stopped = self.row_sums(self.eval_batches, np.arange(len(self.eval_batches.examples)), whole=last)
        scores, self.evaluated = objectives.scores_of(self.objective, rows), (self.state.global_step, rows)
        for name, numbers in self.sources.items():
            of_source = objectives.scores_of(self.objective, rows[numbers])
            scores |= {f"{name}_{k}": v for k, v in of_source.items() if isinstance(v, float) and k != "perplexity"}
        if last or not stopped:
            scores |= self.world.from_first(self.hooks.answer_scores)
        self._ended = time.perf_counter()
        if not last and (self.hooks.stops_evaluation() if self.world.alone else stopped):
            self.control.should_training_stop, self.control.should_evaluate = True, False
            return {f"{metric_key_prefix}_loss": math.inf}  # the Trainer looks for it; it is not reported
        metrics = {f"{metric_key_prefix}_{k}": v for k, v in scores.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def row_sums(
        self, batches: collate.Batches, numbers: NDArray[np.int64], *, whole: bool = False,
        objective: Objective | None = None,
    ) -> tuple[NDArray[np.float64], bool]:  # fmt: skip
        """What the objective's evaluation adds up of each row, over all processes, and whether one of them was asked
        to stop; then rows may be missing, which are zeros, unless they are asked for as a `whole`.

        Args:
            batches: this process's share of them. numbers: all the rows, ascending: (n,). objective: another one.
        """
        objective = objective or self.objective
        parts: Iterable[Batch] = batches
        if not whole:
            parts = takewhile(lambda _: not self.hooks.stops_evaluation(), batches)
        if self.shards is not None:
            lengths = [len(example.labels) for example in batches.examples]
            row = batches.of((self.shards.empty(lengths),))
            parts = self.shards.with_empty_passes(iter(parts), lambda: objective.text_sums(self.model, row))
        texts = objectives.evaluate(objective, self.model, parts, lambda *every: of_all(self.world, *every))
        rows = np.zeros((len(numbers), texts.shape[1]))
        self._ended = time.perf_counter()
        np.add.at(rows, np.searchsorted(numbers, batches.text_rows[: len(texts)]), texts)
        if self.world.alone:
            return rows, self.hooks.stops_evaluation()
        *totals, stops = sums(self.world, [*rows.ravel().tolist(), float(self.hooks.stops_evaluation())])
        if stops:
            self.hooks.on_stop()
        return np.array(totals).reshape(rows.shape), stops > 0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As the Trainer's, whose one epoch is the whole run: here `epoch` counts passes over the data."""
        self.state.epoch = self.last.get("epoch", self.train_dataset.steps.passes(self.state.global_step))
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: Document) -> float:
        """4 FLOP a base parameter and token: forward and the gradient of the input; a frozen weight needs no third."""
        return 4.0 * self._numbers * int(self.last["tokens"])

    @cached_property
    def _numbers(self) -> int:
        """Of all parameters."""
        return int(self.model.get_nb_trainable_parameters()[1])

    def _loss_and_norm(self, total: torch.Tensor) -> tuple[float, float | None]:
        """The loss, and the norm of all gradients as the optimiser will see them; a card is waited for once. No norm
        where it is not finite and that is loss scaling's: it leaves the step out, and scales less."""
        grads = [p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        size = torch.nn.utils.get_total_norm(grads) if grads else torch.zeros(())
        value, norm = torch.stack([total, size.to(total.device, total.dtype)]).tolist()
        if self.scaler is None:
            return value, norm
        scale = float(self.scaler.get_scale())
        return value, None if scale > 1 and not math.isfinite(norm) else norm / scale

    @cached_property
    def _trained(self) -> torch.nn.Module:
        return torch.nn.ParameterList(p for p in self.model.parameters() if p.requires_grad)

    def _clip_grad_norm(self, model: Model) -> object:
        """Of what trains alone, without a look through all modules of the base in each step."""
        return super()._clip_grad_norm(self._trained)

    def _record(self, step: pack.Step, value: float, norm: float | None, micro_batches: int) -> None:
        began, self._ended = self._ended, time.perf_counter()
        downs, self._steps_down = self.pace.downs[self._steps_down :], len(self.pace.downs)
        self.last = {
            "step": self.state.global_step + 1,
            "epoch": self.train_dataset.steps.passes(self.state.global_step + 1),
            "loss": value,
            "learning_rate": float(self.optimizer.param_groups[0]["lr"]),
            "grad_norm": norm,
            "tokens": step.tokens,
            **({"computed_tokens": step.computed} if step.computed != step.tokens else {}),
            "labelled_tokens": step.labelled_tokens,
            "micro_batches": micro_batches,
            "seconds": self._ended - began,
            "tokens_per_second": step.tokens / max(self._ended - began, 1e-9),
            **({"stepped_down": downs} if downs else {}),
        }
