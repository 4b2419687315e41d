"""What a run is planned to be, from its rows and the layers that get an adapter: a job, and the plan of it.

Why: `data check` needs the plan alone. Of a known architecture the names of the tensors tell which layers get an
adapter, so no model is built, and neither PEFT nor a Trainer is imported (a second and a half of three).
Cost: the headers of the checkpoint.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from halfbyte.data import pack
from halfbyte.data.prefixes import Tokens, Tree
from halfbyte.errors import RecipeError
from halfbyte.models import tensors
from halfbyte.plan import FAMILIES, Job, Plan, Rows, calibrate, plan_training
from halfbyte.plan.layer import PADDED
from halfbyte.plan.timing import Rates
from halfbyte.recipe.schema import Lora, Recipe, Train
from halfbyte.system.device import Device
from halfbyte.training.comparison import base_text_s, verdict_s
from halfbyte.training.prepare import Prepared, why_not_shared
from halfbyte.training.schedule import count_evaluations, count_steps, plan_steps
from halfbyte.types import Model

# Each has a row in metrics.jsonl, and the report reads all of them.
MAX_STEPS = 1_000_000
LOOKED_AT = 64  # steps, for what their rows have in common
# Under `train:`, what transformers and torch may refuse; under `lora:`, what asks nothing of a built model.
_THEIRS = ("optim", "optim_args", "lr_scheduler_type", "lr_scheduler_kwargs", "report_to")
_PLAIN = ("r", "lora_alpha", "lora_dropout", "use_rslora", "save_dtype")


def check_steps(total: int) -> None:
    """A RecipeError where there are more than can be planned."""
    if total > MAX_STEPS:
        raise RecipeError(
            f"train: {total:,} steps are more than the {MAX_STEPS:,} that one run can have.",
            fix="lower train.max_steps or train.num_train_epochs",
        )


def asks_theirs(train: Train) -> bool:
    """Whether an optimiser, a schedule or an integration is asked for that transformers or torch might refuse."""
    plain = Train()
    return any(getattr(train, name) != getattr(plain, name) for name in _THEIRS)


def job_of(
    prepared: Prepared, machine: Device, *, model: "Model | None" = None, targets: Sequence[str] | str | None = None,
    ranks: int = 1, done: int = 0,
) -> Job:  # fmt: skip
    """The job of rows that are prepared.

    Args:
        model, targets: without weights, and the modules that get an adapter; None where their names tell.
        ranks: processes that share the rows of a step. done: steps that earlier processes have made.
    """
    held_out = prepared.evaluation.lengths if prepared.evaluation is not None else ()
    labelled = prepared.objective.labels(prepared.train)
    lengths = prepared.train.lengths
    if prepared.flow is not None:  # a row of a later window may be as long as rows may be
        lengths = lengths.copy()
        lengths[plan_steps(prepared, 1, 1).rows(0)[0]] = prepared.recipe.data.max_length
    rows = Rows(lengths, labelled, held_out, mixture=prepared.mixture)
    if (train := prepared.recipe.train).draws:
        rows = rows.in_groups(train.num_generations or 1, train.max_completion_length or 1)
    job = Job.of_checkpoint(prepared.recipe, prepared.checkpoint, model, rows, machine, targets=targets)
    written = job.tokenizer_json_bytes if prepared.chatml is not None else None
    job = replace(job, tokenizer_bytes=written or 0, ranks=ranks, objective=prepared.objective.cost, done=done)
    return replace(job, evaluations=count_evaluations(prepared, done), trees=trees(prepared, job, machine))


def settle(prepared: Prepared, machine: Device, job_for: Callable[[Prepared], Job]) -> tuple[Prepared, Job]:
    """Rows as far as they, or their texts, share their beginnings on this machine; and the job of them."""
    job = job_for(prepared)
    if prepared.train.shared is None:
        return replace(prepared, shares=bool(job.trees)), job
    if not _why_not_shared(prepared, job, machine):
        return prepared, job
    return prepared.apart, job_for(prepared.apart)


def _why_not_shared(prepared: Prepared, job: Job, machine: Device) -> str:
    """As `prepare.why_not_shared`, with what is known of model and machine before a weight is loaded."""
    if machine.kind != "cpu":
        return "it is for CPUs"
    text = prepared.config.get_text_config()
    kinds = getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None) or ()
    if any(kind == "linear_attention" or "attention" not in kind for kind in kinds):
        return "its recurrent layers carry a state from token to token"
    if job.layer.pairs in PADDED or getattr(text, "alibi", False):
        return "this architecture's layers take rows, not segments (ALiBi, or a state)"
    return why_not_shared(prepared.recipe, prepared.objective)


def trees(prepared: Prepared, job: Job, machine: Device) -> tuple[Tree, ...]:
    """What the rows of some steps have in common; empty where that is nothing, or is not shared."""
    texts = prepared.train.shared is not None  # of a row; rows are not looked at
    if texts or not prepared.shares or _why_not_shared(prepared, job, machine) or not job.steps:
        return ()
    steps, draws = plan_steps(prepared, 1, 1), prepared.recipe.train.draws
    looked_at = [*_group_trees(prepared, steps)] if draws else steps.trees(LOOKED_AT)
    return tuple(looked_at) if any(any(tree.shared) for tree in looked_at) else ()


def _group_trees(prepared: Prepared, steps: pack.Steps) -> Iterator[Tree]:
    """The same of answers that a run writes: as long as the expected ones, and alike up to their middle, as those of a
    trained model are (docs/log)."""
    count = prepared.recipe.train.num_generations or 1
    for index in range(min(len(steps), LOOKED_AT)):
        texts = list[Tokens]()
        for e in (prepared.train.examples[number] for number in steps.rows(index)):
            middle = (len(e.prompt_ids) + len(e.input_ids)) // 2
            ends = ([number] * (len(e.input_ids) - middle) for number in range(count))
            texts += [np.array([*e.input_ids[:middle], *end], np.uint32) for end in ends]
        yield Tree.of(texts)


def sharing_note(prepared: Prepared, job: Job, plan: Plan, machine: Device) -> str:
    """What rows have in common, in words."""
    if prepared.train.shared is not None:
        shared, tokens = int(prepared.train.shared.sum()), int(prepared.train.lengths.sum())
        share = shared / (shared + tokens)
        return f"the texts of a row share their beginning: {tokens:,} tokens are computed, {share:.0%} less"
    if not job.trees:
        why = _why_not_shared(prepared, job, machine) or "rows of a step begin differently"
        return f"no beginnings are shared: {why}"
    share, rows = job.computed_share(plan.max_tokens_per_micro_batch), job.rows.mean * job.mean_rows_per_step
    return (
        f"rows of a step begin alike: of {rows:,.0f} tokens {rows * share:,.0f} are computed, {1 - share:.0%} less "
        "(data.share_prefixes: auto)"
    )


def plan_of(prepared: Prepared, job: Job, machine: Device, rates: Rates | None) -> Plan:
    """The plan of a job, the seconds of its verdict included."""
    plan = plan_training(job, machine, rates)
    around = {**plan.time.around, "verdict": verdict_s(prepared, plan, machine)}
    around["base text"] = base_text_s(prepared, plan, machine)
    if prepared.recipe.train.referenced and not plan.time.done:
        sets = [rows for rows in (prepared.train, prepared.evaluation) if rows is not None]
        around["reference"] = plan.time.forward_s * sum(int(rows.lengths.sum()) for rows in sets)
    return replace(plan, time=replace(plan.time, around=around))


def plan_by_names(prepared: Prepared, machine: Device) -> tuple[Prepared, Job, Plan] | None:
    """Rows, job and plan that a run will make, without building its model; None where only a built one tells."""
    check_steps(count_steps(prepared))
    config = tensors.read_config(prepared.checkpoint.path)
    if not _is_plain(prepared.recipe) or config.get("model_type") not in FAMILIES:
        return None
    if prepared.checkpoint.pickle or tensors.is_quantised(config):
        return None
    prepared, job = settle(prepared, machine, partial(job_of, machine=machine))
    return prepared, job, plan_of(prepared, job, machine, calibrate.cached(machine, job.dtype))


def _is_plain(recipe: Recipe) -> bool:
    """Whether the recipe asks nothing that a model, PEFT or transformers might refuse."""
    lora = Lora(target_modules=recipe.lora.target_modules)
    return (
        not recipe.trust_remote_code
        and not asks_theirs(recipe.train)
        and recipe.lora.target_modules in ("auto", "all-linear")
        and recipe.lora.model_copy(update={name: getattr(lora, name) for name in _PLAIN}) == lora
    )
