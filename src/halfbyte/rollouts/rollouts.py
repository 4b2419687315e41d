"""A step of a run that learns from rewards: what its answers are worth, and the rows that train.

What: the trainer asks `begin` before a step's forward and `end` after its backward; it, its pace and its checkpoints
know rows alone. Rewards are taken in the first process, of all answers at once, so a
user's function is called once a step. An answer with the advantage 0, or one that was cut off and is left out, moves
nothing and is not computed again.
Cost: a forward of one group more, for the divergence from the base.

Answers are drawn with the adapter of that step, up to 16 texts side by side, by a tape of the weights that train now
(`inference.batch`); a prompt is read once for its group. Of several processes each writes its share, and has all
answers afterwards. Each text draws from its own generator, seeded by (seed, step, row, number in the group): a resumed
run, and any number of processes, write the same. Cost: see `writing/`; a token reads the base once for all texts.
"""

import logging
import math
import time
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from halfbyte.adapters import lora
from halfbyte.base import load
from halfbyte.data import collate, pack, prefixes
from halfbyte.data.encoding.examples import IGNORED, Example
from halfbyte.data.reading import read
from halfbyte.distributed.world import World
from halfbyte.errors import DataError, TrainError
from halfbyte.inference import batch
from halfbyte.inference.generate import stop_ids
from halfbyte.layers.kernels import dropout
from halfbyte.layers.kernels.pool import POOL
from halfbyte.models.context import context_of
from halfbyte.models.structure import evaluating
from halfbyte.objectives import grpo
from halfbyte.objectives.grpo import Grpo, WrittenRow
from halfbyte.plan import sequences_beside
from halfbyte.recipe.rewards import REWARD
from halfbyte.scoring import intervals
from halfbyte.scoring.rewards import Attempt, RewardFunction, Rewards
from halfbyte.system import usage
from halfbyte.training.pace import Pace
from halfbyte.training.setup import Setup
from halfbyte.training.trainer import StepInterrupted
from halfbyte.types import Document, Model
from halfbyte.writing import writer
from halfbyte.writing.sampling import SamplingParams
from halfbyte.writing.text import Text

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TextSample:
    """A text that was drawn. `cut_off`: it is as long as may be. `drawn`: of each token, as of `Sampler`."""

    tokens: list[int]
    cut_off: bool
    drawn: list[tuple[float, float, float]]


@dataclass(frozen=True)
class GroupWriter:
    """`count`: answers to each prompt. `ends`: tokens that end one. `at_once`: most texts in one batch."""

    model: Model
    world: World
    params: SamplingParams
    count: int
    ends: Collection[int]
    at_once: int

    def write(self, asking: Sequence[Example], seeds: Sequence[int], look: batch.Progress) -> list[TextSample]:
        """An answer to each: prompts as often as their group is large, in a row. `seeds`: of each group, as often.
        Raises StepInterrupted: `look`, which is told after each token, has raised it, here or in another process."""
        make_room()
        share = np.array_split(np.arange(len(asking)), self.world.size)[self.world.rank].tolist()

        def begun(*, by_tape: bool) -> list[Text]:
            each = ((i, replace(self.params, seed=seeds[i])) for i in share)
            return [Text(asking[i].prompt_ids, params, self.ends, index=i % self.count) for i, params in each]

        answers: list[tuple[list[int], bool, list[tuple[float, float, float]]]] | None = None
        with suppress(StepInterrupted):
            # each prompt by itself, so that what is read of it is there for all of its group
            texts = batch.write(self.model, begun, at_once=self.at_once, packed=False, progress=look) if share else []
            if (error := next((text.error for text in texts if text.error is not None), None)) is not None:
                raise TrainError(f"an answer has failed: {error}.") from error
            answers = [(text.tokens, text.finish == "length", text.sampler.drawn) for text in texts]
        parts = self.world.gather(answers)
        if any(part is None for part in parts):
            raise StepInterrupted
        return [TextSample(*answer) for part in parts for answer in part or ()]


def make_room() -> None:
    """What a micro-batch had is for answers now."""
    POOL.give_back()
    usage.trim()


Floats = NDArray[np.float64]


def _mean(values: Floats) -> float:
    """Of those that are known; NaN where none is."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else math.nan


class Rollouts:
    """The answers of a run's steps, and those to its held-out rows. Raises DataError: a reward has nothing to compare
    with in the rows, or an answer may be longer than what the model reads."""

    def __init__(self, setup: Setup) -> None:
        self.setup, self.prepared = setup, setup.run.prepared
        recipe = setup.start.recipe
        self.train, self.settings = recipe.train, recipe.eval
        self.model, self.tokenizer = setup.model.assembled.model, self.prepared.tokenizer
        rows = [e for part in (self.prepared.train, self.prepared.evaluation) if part for e in part.examples]
        if (asks_nothing := next((e.where for e in rows if not e.completion), None)) is not None:
            raise DataError(f"{asks_nothing} is plain text: it asks nothing, so there is nothing to reward.")
        longest, most = max(len(e.prompt_ids) for e in rows), self.train.max_completion_length or 1
        context = context_of(self.prepared.config)
        if context is not None and context.left(longest) < most:
            what = f"prompts of up to {longest:,} tokens and answers of {most:,} are more than the {context.tokens:,}"
            raise DataError(f"{what} that the model reads ({context.why}).", fix="lower train.max_completion_length")
        self.rewards = Rewards.of(self.train, self.settings, [e.completion for e in rows])
        functions = any(isinstance(part, RewardFunction) for part in self.rewards.parts.values())
        names = [name for name in (recipe.data.train, recipe.data.eval_names) if name and functions]
        self.asked = {where: asked for name in names for where, asked in read.questions(name, recipe.data)}
        self.most, self.count = most, self.train.num_generations or 1
        self.at_once = sequences_beside(setup.run.job, setup.run.plan.micro_batch_bytes, longest + most)
        params = SamplingParams(most, self.train.temperature or 1.0, repetition_penalty=1.0, records=True)
        ends = stop_ids(self.model, self.tokenizer)
        self.groups = GroupWriter(self.model, setup.world, params, self.count, ends, self.at_once)
        self.notes = Document()
        self.idle = set[str]()  # what was said already: parts that apply to nothing, why a step learns nothing

    def joined(self) -> Setup:
        """The run's setup with these in it."""
        scores = self.setup.answer_scores
        return replace(self.setup, rollouts=self, answer_scores=lambda: scores() | self.held_out())

    def begin(self, step: pack.Step, pace: Pace, look: batch.Progress) -> collate.StepItem:
        """A step's rows in micro-batches, of several processes those of this one. `look` is told after each token, and
        may raise. Raises RewardError."""
        began = time.monotonic()
        numbers = [number for number in self.setup.steps.rows(step.index) for _ in range(self.count)]
        asking = [self.prepared.train.examples[number] for number in numbers]
        seeds = [dropout.number(self.train.seed, step.index, number) >> 8 for number in numbers]
        answers, wrote = self.groups.write(asking, seeds, look), time.monotonic()
        attempts = self._attempts(asking, [answer.tokens for answer in answers])
        worth = self.setup.world.from_first(lambda: [array.tolist() for array in self.rewards.score(attempts)])
        rewards, parts = (np.array(each, np.float64) for each in worth)
        groups = rewards.reshape(-1, self.count)
        advantages = grpo.advantages(groups, self.train.method, scales=self.train.scale_rewards == "group").ravel()
        self.notes = {"writing_seconds": wrote - began, "reward_seconds": time.monotonic() - wrote}
        self.notes |= self._figures(answers, groups, parts, advantages)
        self.notes["sample"] = self._sample(asking[0], attempts[: self.count], advantages[: self.count])
        step = self._arranged(step, rows := self._rows(asking, answers, attempts, advantages), pace)
        if not rows and self.setup.world.first:
            self._tell_idle(step.index + 1, same=not advantages.any())
        if rows and self.setup.world.first:
            self.notes["kl"] = self._divergence(rows, pace)
        return {"step": step, "micro_batches": collate.Batches(rows, step.micro_batches, self.prepared.lay_out)}

    def _tell_idle(self, step: int, *, same: bool) -> None:
        """Why a step learns nothing, each reason once."""
        if same:
            why = "the answers to each prompt have the same reward; rewards that tell them apart, "
            why += "a higher train.temperature, or more train.num_generations"
        else:
            why = f"its answers are cut off at train.max_completion_length {self.most}, and those are left out; "
            why += "a longer one, or --set train.mask_truncated_completions=false"
        if why not in self.idle:
            self.idle.add(why)
            _log.warning(f"step {step} learns nothing: {why}")

    def _rows(
        self, asking: Sequence[Example], answers: Sequence[TextSample], attempts: Sequence[Attempt], advantages: Floats
    ) -> list[WrittenRow]:
        """The answers of a step that are trained."""
        train, rows = self.train, list[WrittenRow]()
        counts = [0 if train.mask_truncated_completions and a.cut_off else len(a.tokens) for a in answers]
        size, loss_type = train.per_device_train_batch_size, train.loss_type or "grpo"
        weights = grpo.token_weights(counts, loss_type, most_tokens=self.most, batch=size)
        for i in np.flatnonzero(np.array(counts) * advantages).tolist():
            e, ids = asking[i], tuple(answers[i].tokens)
            labels, logps = (IGNORED,) * len(e.prompt_ids) + ids, tuple(logp for logp, *_ in answers[i].drawn)
            row = WrittenRow((*e.prompt_ids, *ids), labels, e.where, e.prompt_ids, attempts[i].text)
            rows.append(replace(row, advantage=float(advantages[i]), weight=weights[i], logps=logps))
        return rows

    def _arranged(self, step: pack.Step, rows: Sequence[WrittenRow], pace: Pace) -> pack.Step:
        """The step with these rows in micro-batches; `pace` is told of their tokens."""
        world, arrays = self.setup.world, [np.array(row.input_ids, np.uint32) for row in rows]
        pace.lengths = np.array([*map(len, arrays)], np.int64)
        pace.ids = arrays.__getitem__ if self.prepared.shares else None
        limits = pace.tokens, pace.examples_per_micro_batch, pace.ids
        shares = pack.share(range(len(rows)), pace.lengths, world.size, pace.ids)
        parts = [pack.arrange(share, pace.lengths, *limits, padded=pace.padded) for share in shares]
        computed = sum(prefixes.computed(few, pace.lengths, pace.ids) for part in parts for few in part)
        counts = {"tokens": int(np.sum(pace.lengths)), "labelled_tokens": sum(len(row.logps) for row in rows)}
        return replace(step, micro_batches=parts[world.rank], weight=1.0, computed=computed, **counts)

    def end(self, row: Document) -> Document:
        """What a step's `row` of the metrics says besides. Raises TrainError: answers were not drawn by the
        probabilities that they have in training, within what rounding explains."""
        error = math.sqrt(row.pop("logp_error", 0.0))
        # A tape's logits may be so far apart from a forward's, relative to their deviation about their mean; a
        # log-probability is one of them less a mean of all.
        layers, dtype = len(writer.layers_of(self.model)), load.DTYPES[self.setup.model.assembled.base.compute_dtype]
        allowed = math.sqrt(2) * writer.tolerance(layers, dtype, read=True) * self.notes["logit_spread"]
        if not error <= allowed:
            raise TrainError(
                f"log-probabilities of the answers were {error:.3g} apart when they were drawn and in training, at "
                f"step {row['step']}; rounding explains {allowed:.3g}: another adapter wrote them, or other tokens.",
                fix="report it with the recipe",
            )
        return {**self.notes, "logp_error": error}

    def held_out(self) -> dict[str, float]:
        """What greedy answers to the held-out rows are worth; nothing where there are none."""
        if self.prepared.evaluation is None:
            return {}
        asking = self.prepared.evaluation.examples[: self.settings.rows]
        make_room()
        prompts, limits = [e.prompt_ids for e in asking], [self.most] * len(asking)
        answers = batch.answers(self.model, self.tokenizer, prompts, limits, at_once=self.at_once)
        ids = self.tokenizer(answers, add_special_tokens=False).input_ids
        return self._summary(*self.rewards.score(self._attempts(asking, ids)))

    def _divergence(self, rows: Sequence[WrittenRow], pace: Pace) -> float:
        """How far the adapter is from the base, in nats a token, by answers to the first of these prompts, as many as
        a micro-batch may hold: the mean of their log-probabilities, with which the adapter drew them, less the base's.
        """
        objective = self.prepared.objective
        assert isinstance(objective, Grpo)
        group = [rows[number] for number in self._group(rows, pace)]
        with lora.base_alone(self.model, self.setup.model.assembled.own_biases), evaluating(self.model):
            base = objective.logps(self.model, self.prepared.lay_out(group)).double().cpu().numpy()
        return float(np.mean(np.concatenate([row.logps for row in group]) - base))

    @staticmethod
    def _group(rows: Sequence[WrittenRow], pace: Pace) -> list[int]:
        """The first answers to the first prompt, by their numbers, that go into one micro-batch; at least one."""
        group = [number for number, row in enumerate(rows) if row.prompt_ids == rows[0].prompt_ids]
        group = group[: pace.examples_per_micro_batch or len(group)]
        while len(group) > 1 and pace.largest([tuple(group)]) > pace.tokens:
            group.pop()
        return group

    def _sample(self, asked: Example, group: Sequence[Attempt], advantages: Floats) -> Document:
        """For the page, of a group: what was asked, its best answer and its worst one with their advantages."""
        answers = [(group[i].text, float(advantages[i])) for i in (int(advantages.argmax()), int(advantages.argmin()))]
        prompt = self.tokenizer.decode(asked.prompt_ids, skip_special_tokens=True)
        return {"prompt": prompt, "expected": asked.completion, "answers": answers}

    def _attempts(self, asking: Sequence[Example], tokens: Sequence[Sequence[int]]) -> list[Attempt]:
        texts = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        asked = [self.asked.get(e.where, ("", {})) for e in asking]
        each = zip(asking, texts, tokens, asked, strict=True)
        return [Attempt(e.completion, text, ids, record, prompt) for e, text, ids, (prompt, record) in each]

    def _summary(self, rewards: Floats, parts: Floats) -> dict[str, float]:
        """The mean of rewards (n,) with its interval, and that of each part (answers, parts); NaN of what applies to
        none of them, which is warned of once."""
        known, settings = rewards[~np.isnan(rewards)].tolist(), self.settings
        summary = {REWARD: _mean(rewards)}
        rows = intervals.RowSums.mean(known)
        if known and (limits := intervals.interval(rows, resamples=settings.resamples, seed=settings.seed)):
            summary |= {f"{REWARD}_low": limits[0], f"{REWARD}_high": limits[1]}
        for name, column in zip(self.rewards.parts, parts.T, strict=True):
            summary[f"{REWARD}_{Path(name).name}"] = mean = _mean(column)
            if math.isnan(mean) and name not in self.idle and self.setup.world.first:
                self.idle.add(name)
                _log.warning(f"the reward {name} applies to none of {len(column)} answers, so it does not count")
        return summary

    def _figures(self, answers: Sequence[TextSample], groups: Floats, parts: Floats, advantages: Floats) -> Document:
        """What a step's row says of its answers; the interval of the reward is that of the groups' means."""
        drawn = np.array([each for answer in answers for each in answer.drawn])  # (tokens, 3)
        means = np.array([_mean(group) for group in groups])
        return {
            **self._summary(means, parts),
            "no_difference": float((advantages.reshape(groups.shape) == 0).all(1).mean()),
            "written_tokens": len(drawn),
            "answer_tokens": len(drawn) / len(answers),
            "cut_off": sum(answer.cut_off for answer in answers) / len(answers),
            "entropy": float(drawn[:, 1].mean()),
            "logit_spread": float(drawn[:, 2].mean()),
        }
