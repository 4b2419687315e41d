"""A frozen base shared out over the processes: each keeps a part of every decoder layer, which is whole only while it
computes.

What: FSDP2 (`fully_shard`) on each decoder layer, over the codes of its frozen matrices alone. What trains, scales,
biases, norms, embedding and head are whole in every process, so that the loss, the one all-reduce of a step and the
checkpoints know nothing of it. Each layer is a root of its own, so gathers come in the order in which layers compute.
Every pass is a collective: a process that has no micro-batch left runs a short row that counts nothing, as long as
another has one. What the first process computes alone (the proof before a checkpoint, the saved adapter's) is announced
to the others, which gather along.
Source: `torch.distributed.fsdp.fully_shard`; ZeRO-3, arXiv:1910.02054; `set_custom_all_gather` is its seam for ours.
Cost: (N - 1) / N of the layers' bytes received in a forward, and again in a backward; two copies of one layer.
"""

import contextlib
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from halfbyte.data import pack
from halfbyte.distributed.step import sums
from halfbyte.distributed.world import World
from halfbyte.errors import BaseModelError, RecipeError
from halfbyte.models import structure
from halfbyte.plan import Plan
from halfbyte.quant import bnb, experts
from halfbyte.recipe.schema import Recipe
from halfbyte.recipe.task import EMBED
from halfbyte.system import accelerator, pages
from halfbyte.types import Batch, Model
from halfbyte.upstream.torch import SHARDS

DONE = -1
PLACEMENT = "sharded"


def check(recipe: Recipe, ranks: int) -> None:
    """Refuse what cannot be trained on a sharded base, or on several processes (RecipeError)."""
    if recipe.quant.placement != PLACEMENT:
        return
    if recipe.task == EMBED:
        raise RecipeError("task embed needs the base whole in each process.", fix="--set quant.placement=auto")
    if ranks == 1:
        raise RecipeError(
            "quant.placement sharded shares the base out over several processes, and this one is alone.",
            fix="torchrun --nproc-per-node N -m halfbyte train RECIPE (docs/scale.md); or --set quant.placement=auto",
        )
    if SHARDS.reason:
        raise RecipeError(
            f"quant.placement sharded: {SHARDS.reason}.", fix="pip install -U torch; or --set quant.placement=auto"
        )
    if recipe.train.method == "kto":
        raise RecipeError(
            "train.method kto reads other answers before each step, as many as a process has rows, and with "
            "quant.placement sharded all must read alike.",
            fix="--set quant.placement=auto",
        )
    if recipe.eval.metrics:
        raise RecipeError(
            "eval.metrics are made of texts that the first process writes, and with quant.placement sharded it has a "
            "part of the base.",
            fix="--set eval.metrics=[] and `halfbyte eval RUN` afterwards; or --set quant.placement=auto",
        )


def over(world: World, plan: Plan, model: Model, note: Callable[[str, str], None]) -> "Shards | None":
    """Share a base out where the plan says so."""
    if plan.placement != PLACEMENT:
        return None
    shards = Shards(world, model)
    note("placement", str(shards))
    return shards


def settle(shards: "Shards | None") -> None:
    if shards is not None:
        shards.settle()


def first_layers_whole(shards: "Shards | None") -> Callable[[], contextlib.AbstractContextManager[object]]:
    """In which the first layers can be read without a forward."""
    return contextlib.nullcontext if shards is None else shards.first_layers_whole


class Shards:
    """The layers of a model, shared out. Every process calls the same methods in the same order.

    Args:
        model: the whole base with its adapters, the same in every process. Afterwards the modules of its layers hold
            this process's part, and their codes in files are let go.

    Raises:
        BaseModelError: a mixture's experts; or a layer that is not, put together, what it was.
    """

    def __init__(self, world: World, model: Model) -> None:
        if any(True for _ in experts.stacks(model)):
            raise BaseModelError(
                "quant.placement sharded knows linear layers, not the experts of a mixture.",
                fix="--set quant.placement=auto",
            )
        self.world, self.model = world, model
        self.layers: list[FSDPModule] = structure.decoder_layers(model)
        self.whole_bytes = bnb.resident_bytes(model)
        self._together = True  # whether all run the same passes now
        self._pass: list[int] = []  # the layers gathered in this pass, and in a whole one
        self._whole_pass: list[int] = []
        self.own_bytes = self.sharded_bytes = 0
        for number in range(len(self.layers)):
            self._share(number)
        self._together, self._pass = False, []

    def __str__(self) -> str:
        here = self.whole_bytes - self.sharded_bytes + self.own_bytes
        return (
            f"sharded over {self.world.size} processes: {here / 1e9:.3f} of {self.whole_bytes / 1e9:.3f} GB are here; "
            f"of {self.sharded_bytes / 1e9:.3f} GB in layers {self.own_bytes / 1e9:.3f}"
        )

    def _share(self, number: int) -> None:
        """One layer; then it is put together once and compared."""
        layer = structure.decoder_layers(self.model)[number]
        places = [
            (module, name, p)
            for module in layer.modules()
            for name, p in module.named_parameters(recurse=False)
            if not p.requires_grad and p.ndim > 1
        ]
        whole = {id(p) for *_, p in places}
        others = {p for p in layer.parameters() if id(p) not in whole}
        before = {id(p): p.data for *_, p in places}
        mesh = DeviceMesh.from_group(self.world.group, self.model.device.type)
        layer = fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=others)
        layer.set_custom_all_gather(_Gather(self, number))
        for module, name, was in places:  # what bitsandbytes keeps on its parameter
            part = getattr(module, name)
            vars(part).update(vars(was))
            self.sharded_bytes += was.nbytes
            self.own_bytes += part.to_local().untyped_storage().nbytes()
        layer.unshard()
        for module, name, was in places:
            again = getattr(module, name)
            vars(again).update(vars(was))
            if not torch.equal(again.data, before[id(was)]):
                raise BaseModelError(f"layer {number}: {name} is not what the parts of all processes give together.")
        layer.reshard()
        pages.let_go(before.values(), pages.FileMaps.read())

    def more(self, waiting: bool, *, stops: bool = False) -> bool:
        """Whether there is another pass for all: some process has a micro-batch left, and none is to stop."""
        if not self._together:
            self.settle()
            self._together = True
        waiting_processes, stopping = sums(self.world, [float(waiting), float(stops)])
        self._together = waiting_processes > 0 and not stopping
        return self._together

    def with_empty_passes(self, batches: Iterator[Batch], empty: Callable[[], object]) -> Iterator[Batch]:
        """The batches of an evaluation, with an `empty` pass wherever only others have one."""
        while True:
            batch = next(batches, None)
            if not self.more(batch is not None):
                return
            if batch is None:
                empty()
            else:
                yield batch

    @staticmethod
    def empty(lengths: pack.Sizes) -> int:
        """The row of the fewest tokens: what a pass runs that is for others alone."""
        return int(torch.as_tensor(lengths).argmin())

    @contextlib.contextmanager
    def passing(self) -> Iterator[None]:
        """Around a pass: where an allocation fails in it, the others still get this process's parts."""
        self._pass = []
        try:
            yield
            self._whole_pass = self._pass
        except (RuntimeError, MemoryError) as error:
            recovers = hasattr(self.layers[0], "reset_iter_state")  # not in torch's first versions of it
            if not accelerator.out_of_memory(error) or not self._whole_pass or not recovers:
                raise
            for layer in self.layers:
                layer.reset_iter_state()
            for number in self._whole_pass[len(self._pass) :]:
                self._along(number)
            raise

    @contextlib.contextmanager
    def first_layers_whole(self) -> Iterator[None]:
        """The model with its first layers only (`structure.shallow`), and these whole."""
        with structure.shallow(self.model):
            layers: list[FSDPModule] = structure.decoder_layers(self.model)
            for layer in layers:
                layer.unshard()
            try:
                yield
            finally:
                for layer in layers:
                    layer.reshard()

    def settle(self) -> None:
        """Wait until the first process has done what it does alone, and gather along."""
        if self.world.first:
            self._announce(DONE)
            return
        while (number := self._announce(DONE)) != DONE:
            self._along(number)

    def before(self, number: int) -> None:
        """A layer is about to be gathered."""
        self._pass.append(number)
        if not self._together and self.world.first:
            self._announce(number)

    def _along(self, number: int) -> None:
        self.layers[number].unshard()
        self.layers[number].reshard()

    def _announce(self, number: int) -> int:
        announced = torch.tensor([number])
        self.world.broadcast_(announced)
        return int(announced)


class _Gather:
    """How the parts of one layer come together, as `torch.distributed.fsdp` asks for it: on a CPU waited for in Python,
    so that a process that is gone is noticed."""

    def __init__(self, shards: Shards, number: int) -> None:
        self._shards, self._number = shards, number

    def allocate(self, size: tuple[int, ...], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> dist.Work | None:
        self._shards.before(self._number)
        if output_tensor.device.type != "cpu":
            return dist.all_gather_into_tensor(output_tensor, input_tensor, group=group, async_op=async_op)
        self._shards.world.gather_into_(output_tensor, input_tensor)
        return None
