"""What several machines bring: seconds of a step on N of them, from the plan of one and the speed of their link.

What: a step's rows are dealt out by their tokens, so the fullest share is the step; then one all-reduce of 4 bytes for
each trained number, in a ring: each process sends and receives 2 (N - 1) / N of the buffer, in 2 (N - 1) messages.
Source: Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms", 2009. The link is taken as it is given.
Cost: milliseconds; no torch.
"""

import re
from dataclasses import asdict, dataclass, replace
from itertools import islice

from halfbyte.data import pack
from halfbyte.errors import RecipeError
from halfbyte.plan import Job, Plan, plan_training
from halfbyte.plan.estimate import Estimate
from halfbyte.types import Document

DELAY_S = 0.0002  # of a message between two machines of one room; a round figure
BYTES_EACH = 4
LOOKED_AT_STEPS = 50
MOST_NODES = 4096
GAIN = 1.1  # a doubling of machines that is less faster than this is not worth it
_LINK = re.compile(
    r"(?P<size>\d+(?:\.\d+)?)\s*(?P<unit>[kMGT]?)(?P<kind>b|B|bit)(?:it)?(?:/s|ps)"
    r"(?:\s*,\s*(?P<delay>\d+(?:\.\d+)?)\s*ms)?",
    re.ASCII,
)
_UNITS = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
LINK_HELP = "1Gb/s or 100Mb/s in bits, 125MB/s in bytes; with a delay (one way): 1Gb/s,5ms"


@dataclass(frozen=True)
class Link:
    """What joins machines: bytes a second that each can send, and seconds until they arrive."""

    bytes_s: float
    delay_s: float = DELAY_S


@dataclass(frozen=True)
class OnNodes:
    """A step on so many machines of one process each, in seconds. `balance`: tokens of the fullest share over the mean
    one."""

    nodes: int
    compute_s: float
    balance: float
    reduce_s: float
    speed_up: float

    @property
    def step_s(self) -> float:
        return self.compute_s + self.reduce_s


@dataclass(frozen=True)
class ScalingEstimate:
    """What to expect of more machines. `last`: the number from which twice as many bring less than a tenth; `plan` is
    that of each process."""

    asked: OnNodes
    others: tuple[OnNodes, ...]
    last: OnNodes
    wire_bytes: int
    link: Link
    plan: Plan

    def to_json(self) -> Document:
        values = asdict(replace(self, plan=None))  # type: ignore[arg-type]
        return {**values, "memory_of_each": {"private": self.plan.private_bytes, "file": self.plan.file_bytes}}


def link_of(text: str) -> Link:
    """`1Gb/s` (bits) or `125MB/s` (bytes), with a delay `1Gb/s,5ms`. Raises RecipeError: anything else."""
    match = _LINK.fullmatch(text.strip())
    if match is None or float(match["size"]) <= 0:
        raise RecipeError(f"--link {text!r} is not a link; allowed: {LINK_HELP}.", fix="--link 1Gb/s")
    speed = float(match["size"]) * _UNITS[match["unit"]] / (1 if match["kind"] == "B" else 8)
    return Link(speed) if match["delay"] is None else Link(speed, float(match["delay"]) / 1000)


def reduce_seconds(size: int, nodes: int, link: Link) -> float:
    """Of an all-reduce of so many bytes in a ring."""
    return 0.0 if nodes == 1 else 2 * (nodes - 1) * (size / nodes / link.bytes_s + link.delay_s)


def expect(planned: Estimate, nodes: int, link: Link) -> ScalingEstimate:
    """Seconds of a step on `nodes` machines like the planned one."""
    job, size = planned.job, BYTES_EACH * planned.job.trainable
    alone = planned.plan.time.step_s

    def on(count: int) -> tuple[OnNodes, Plan]:
        plan = planned.plan
        if count > 1:
            plan = plan_training(replace(job, ranks=count), planned.device, planned.rates)
        balance = _balance(job, count)
        compute, reduce = plan.time.step_s * balance, reduce_seconds(size, count, link)
        return OnNodes(count, compute, balance, reduce, alone / max(1e-9, compute + reduce)), plan

    asked, each = on(nodes)
    every = [on(1 << doubling)[0] for doubling in range(min(MOST_NODES, job.rows_per_step).bit_length())]
    last = every[0]
    for more in every[1:]:
        if last.step_s < GAIN * more.step_s:
            break
        last = more
    return ScalingEstimate(asked, tuple(every), last, size, link, each)


def _balance(job: Job, ranks: int) -> float:
    """Tokens of the fullest share of a step over those of the mean one, by the steps that the run will take."""
    if ranks == 1:
        return 1.0
    if job.rows.assumed:
        return -(-job.rows_per_step // ranks) * ranks / job.rows_per_step
    fullest = total = 0
    for step in islice(job.order or (), LOOKED_AT_STEPS):
        rows = [row for (row,) in step.micro_batches]
        shares = pack.share(rows, job.rows.lengths, ranks)
        fullest += max(sum(int(job.rows.lengths[row]) for row in share) for share in shares)
        total += step.tokens
    return fullest * ranks / max(1, total)
