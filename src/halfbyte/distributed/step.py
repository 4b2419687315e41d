"""The end of a step on several processes: one all-reduce of one buffer, with the gradients, the loss and the flags.

Why: each process runs its own micro-batches, as many as it likes, and may step down alone; all meet once. Whether to
stop, and who has a loss that is not finite, travels with the sum, so that all decide alike.
Source: the flat gradient buffer of Horovod and DDP (arXiv:2006.15704, section 3.2.3), without hooks in backward.
Cost: 4 bytes a trained number, which are its gradient; on the wire 2 (N - 1) / N of them, sent and received.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from halfbyte.distributed.world import World


@dataclass(frozen=True)
class StepResult:
    """What all processes know after a step."""

    loss: float  # of the whole step
    interrupted: bool  # some process has left micro-batches out, so the step does not count
    stops: bool  # a signal has come to some process
    not_finite: tuple[int, ...]  # ranks whose own loss or gradients are not finite


class StepSum:
    """The buffer, (numbers + 3 + processes,) fp32. While a step is computed its parts are the parameters' gradients."""

    def __init__(self, world: World, parameters: Iterable[Tensor]) -> None:
        self.world, self.parameters = world, [p for p in parameters if p.requires_grad]
        device = self.parameters[0].device
        self._flags = 3 + world.size
        self.flat = torch.zeros(sum(p.numel() for p in self.parameters) + self._flags, device=device)

    def begin(self) -> None:
        """Every gradient is a part of the buffer, of zeros."""
        self.flat.zero_()
        for p, part in self._parts():
            p.grad = part if p.dtype == part.dtype and p.device == part.device else None

    def reduce(self, loss: Tensor, *, interrupted: bool, stops: bool) -> StepResult:
        """Sum over all processes; afterwards each has the gradients of the whole step."""
        for p, part in self._parts():
            if p.grad is None:
                part.zero_()
            elif p.grad.data_ptr() != part.data_ptr():  # of another dtype, or put back after a failed micro-batch
                part.copy_(p.grad)
        gradients = self.flat[: -self._flags]
        finite = bool(torch.isfinite(loss)) and bool(torch.isfinite(gradients.sum()))
        bad = [float(not finite and rank == self.world.rank) for rank in range(self.world.size)]
        self.flat[-self._flags :] = torch.tensor([float(loss), float(interrupted), float(stops), *bad])
        self.world.sum_(self.flat)
        for p, part in self._parts():
            p.grad = part if p.dtype == part.dtype and p.device == part.device else part.to(p.device, p.dtype)
        total, interruptions, stopping, *flags = self.flat[-self._flags :].tolist()
        not_finite = tuple(rank for rank, flag in enumerate(flags) if flag > 0)
        return StepResult(total, interruptions > 0, stopping > 0, not_finite)

    def _parts(self) -> Iterable[tuple[Tensor, Tensor]]:
        at = 0
        for p in self.parameters:
            yield p, self.flat[at : at + p.numel()].view_as(p)
            at += p.numel()


def sums(world: World, values: Sequence[float]) -> list[float]:
    """The sum of each number over all processes."""
    flat = torch.tensor(values, dtype=torch.float64)
    world.sum_(flat)
    return flat.tolist()


def of_all(world: World, rows: Sequence[Tensor], values: Tensor) -> tuple[list[Tensor], Tensor, slice]:
    """Vectors of rows, (k, D) each, and a number of each, (rows,), of all processes; and which are this one's."""
    if world.alone:
        return [*rows], values, slice(None)
    every = world.gather([list(row.shape) for row in rows])
    counts, start = [k for part in every for k, _ in part], sum(map(len, every[: world.rank]))
    ours, at = slice(start, start + len(rows)), sum(counts[:start])
    vectors = torch.zeros(sum(counts), max((width for part in every for _, width in part), default=0))
    numbers = torch.zeros(len(counts))
    if rows:
        vectors[at : at + sum(counts[ours])], numbers[ours] = torch.cat([*rows]).cpu(), values.cpu()
    world.sum_(vectors)
    world.sum_(numbers)
    return list(vectors.to(rows[0].device if rows else vectors.device).split(counts)), numbers, ours


def same_start(world: World, parameters: Iterable[Tensor]) -> None:
    """Every process begins with what the first one has."""
    if world.alone:
        return
    with torch.no_grad():
        for p in parameters:
            if p.requires_grad:
                value = p.detach().contiguous()
                world.broadcast_(value)
                p.copy_(value)
