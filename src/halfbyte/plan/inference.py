"""The plan of a finished run's use: where its base is kept, and how much an evaluation or a generation takes at once.

Why: what fitted while training must fit afterwards. So the choices are those of `choose.py`, on the same lines of
memory, without gradients and optimiser; and an evaluation's micro-batch is never larger than the training's was.
Cost: a few milliseconds; no torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Self

from halfbyte.plan import base_memory, choose, memory
from halfbyte.plan.job import Job
from halfbyte.plan.result import Line, Placement
from halfbyte.system.device import Device
from halfbyte.types import Document

MAX_COPIED_BYTES = 10**9  # bytes of a base: a second or two; a step of a larger one gains little (docs/log)
RESIDENT_SHARE = 0.25  # of free memory that the copy may take, which the kernel cannot drop
SEQUENCES = (16, 8, 4, 2, 1)  # to try at once; more generate no faster, they only take memory


@dataclass(frozen=True)
class RunChoices:
    """What a run's own plan chose, and how much of the free memory it needed."""

    placement: str
    evaluation_tokens: int
    needed_bytes: int
    available_bytes: int

    @classmethod
    def from_json(cls, plan: Document) -> Self | None:
        """From `plan.json`; None where it is from another version."""
        names = [field.name for field in fields(cls)]
        return cls(**{name: plan[name] for name in names}) if set(names) <= set(plan) else None


@dataclass(frozen=True)
class InferencePlan:
    """Placement of the base, tokens of an evaluation's micro-batch, and how many sequences are generated together.

    `lines` are in memory all the time; `evaluating_bytes` and `generating_bytes` must be in memory at the peak of each,
    pages that the kernel may drop not counted.
    """

    placement: Placement
    reason: str
    max_tokens_per_micro_batch: int
    sequences: int
    lines: tuple[Line, ...]
    evaluating_bytes: int
    generating_bytes: int
    available_bytes: int

    @property
    def needed_bytes(self) -> int:
        return max(self.evaluating_bytes, self.generating_bytes)


def plan_inference(
    job: Job, device: Device, trained: RunChoices | None = None, *, placement: Placement | None = None,
    generated_tokens: int = choose.GENERATED_TOKENS, lasting: bool = False,
) -> InferencePlan:  # fmt: skip
    """Choose for the rows of `job`: the first placement whose base stays in memory, with micro-batches as in training.

    Args:
        trained: the run's own plan; None for micro-batches as large as is useful.
        placement: where the base is already; None to choose.
        generated_tokens: of a sequence: its prompt and what is written.
        lasting: many answers will be written, so a small base is worth being copied into large pages.
    """
    places = (placement,) if placement else _open_placements(job, device, trained)
    plans = [_with_base(job, device, trained, where, generated_tokens) for where in places]
    stays = [plan for plan in plans if _stays(plan, job)]
    fitting = [plan for plan in stays or plans[-1:] if plan.needed_bytes <= plan.available_bytes]
    chosen = (fitting or plans[-1:])[0]
    if lasting and placement is None and chosen.placement == "mapped" and job.recipe.quant.placement == "auto":
        copied = _with_base(job, device, trained, "resident", generated_tokens)
        small = job.base_bytes <= min(MAX_COPIED_BYTES, RESIDENT_SHARE * copied.available_bytes)
        if small and device.large_pages and copied.needed_bytes <= copied.available_bytes:
            return replace(copied, reason="it is small, and is read faster in pages of 2 MB")
    return chosen


def _open_placements(job: Job, device: Device, trained: RunChoices | None) -> tuple[Placement, ...]:
    """Placements to try, the fastest first; `streamed` alone where training streamed with as much memory as now."""
    places = choose.placements(job, device)
    if trained is None or trained.placement not in places or trained.placement != "streamed":
        return places
    return ("streamed",) if choose.available_bytes(device) <= trained.available_bytes else places


def _with_base(
    job: Job, device: Device, trained: RunChoices | None, placement: Placement, tokens: int
) -> InferencePlan:
    available, longest = choose.available_bytes(device), job.rows.longest
    budget, max_tokens = round((1 - choose.MARGIN) * available), choose.MAX_TOKENS_PER_MICRO_BATCH
    if trained is not None:
        max_tokens = trained.evaluation_tokens
        if trained.needed_bytes <= available:  # training, too, went without the margin
            budget = max(budget, trained.needed_bytes)
    lines, busy_bytes = _static_lines(job, device, placement)
    fixed = sum(line.bytes for line in lines if line.where != "file") + busy_bytes
    sizes = [
        (n, fixed + memory.evaluating_bytes(job, n))
        for n in choose.micro_batch_sizes(longest, max(longest, max_tokens))
    ]
    streamed = placement == "streamed"
    counts = [(n, fixed + memory.generating_bytes(job, tokens, n, streamed=streamed)) for n in SEQUENCES]
    micro_batch, evaluating = _largest(sizes, budget)
    sequences, generating = _largest(counts, budget)
    why = choose.placement_reason(placement, job, available)
    return InferencePlan(placement, why, micro_batch, sequences, lines, evaluating, generating, available)


def _static_lines(job: Job, device: Device, placement: Placement) -> tuple[tuple[Line, ...], int]:
    """What is in memory whatever is done, where it computes; and the bytes of the base's pages that must be too."""
    where = choose.compute_memory(device)
    cards = max(1, len(device.cards)) if placement == "split" else 1
    around, _ = choose.process_lines(job, device)
    adapters = [line for line in memory.training_lines(job, where, "none") if line.name.startswith("adapters")]
    cache = choose.page_cache_bytes((*around, *adapters), choose.available_bytes(device))
    in_files = placement in ("mapped", "streamed")
    base = base_memory.base_lines(job, placement, cards, where, cache)
    return (*around, *base, *adapters), base_memory.busy_file_bytes(job) if in_files else 0


def _largest(sizes: Sequence[tuple[int, int]], budget: int) -> tuple[int, int]:
    """The first (size, bytes) within a budget; the last, which is the smallest, if none is."""
    return next((size for size in sizes if size[1] <= budget), sizes[-1])


def sequences_beside(job: Job, free_bytes: int, tokens: int) -> int:
    """How many sequences of so many tokens can be generated together in `free_bytes`; at least one."""
    return _largest([(n, memory.generating_bytes(job, tokens, n)) for n in SEQUENCES], free_bytes)[0]


def _stays(plan: InferencePlan, job: Job) -> bool:
    """Whether all of a mapped base stays in memory at the peak; another placement does not need it."""
    if plan.placement != "mapped" or job.recipe.quant.placement == "mapped":
        return True
    droppable = job.base_bytes - base_memory.busy_file_bytes(job)
    return plan.needed_bytes + droppable <= choose.CACHE_SHARE * plan.available_bytes
