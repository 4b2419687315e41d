"""Where a base is kept while it works: in private memory, mapped, or streamed through memory layer by layer.

A base larger than memory trains if its layers come and go around the computation. The order is known: up through the
layers, down again in backward. So before a layer runs, hooks fetch the next ones and drop all others; its output gets a
hook that fires just before its own backward (and recomputation), and the same happens downwards. Training, evaluation
and generation go through this one seam, for every architecture.
Trap: a `Mover` that copies, where this one moves pages that come by themselves, must know that bitsandbytes' own
forward keeps the packed weight for backward outside `save_for_backward` (`bitsandbytes/autograd/_functions.py`).
Cost: memory of one layer, and of the head while it works; a base larger than RAM is read from disk up to twice a pass.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from halfbyte.errors import BaseModelError
from halfbyte.layers.experts.layout import experts_of, stacks_of
from halfbyte.models import structure
from halfbyte.models.tensors import PER_LAYER
from halfbyte.quant import bnb, formats
from halfbyte.quant.experts import stacks
from halfbyte.quant.stack import ExpertStack
from halfbyte.system import pages
from halfbyte.types import Model

# How many layers are read ahead: one is read while one computes, and the disk never waits for the second.
AHEAD = 2


class Mover:
    """Brings the weights of a group (a decoder layer, or the last group: what is around the layers) and drops them.
    They lie in mapped files: read ahead on a thread, let go page by page; what is touched comes by itself.

    Args:
        groups: tensors of each group, all mapped. They are kept alive, so that no address is ever someone else's.
        ahead: which tensors of each group are worth reading ahead; of an embedding only a few rows are touched.
    """

    def __init__(self, groups: list[list[Tensor]], ahead: list[list[Tensor]]) -> None:
        self._tensors = groups
        self._spans = [pages.whole_pages(_areas(group)) for group in groups]
        self._ahead = [pages.whole_pages(_areas(group)) for group in ahead]
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="halfbyte-read-ahead")
        self._coming: dict[int, Future[None]] = {}

    def fetch(self, group: int) -> None:
        """Begin to bring a group; returns before it is there. Again for one that is there: nothing."""
        if group not in self._coming:
            self._coming[group] = self._reader.submit(self._bring, group)

    def need(self, group: int) -> None:
        """Return when the group can be computed with: a page is waited for when it is touched."""

    def drop(self, group: int) -> None:
        """Let a group go. For one that is not there: nothing."""
        coming = self._coming.pop(group, None)
        if coming is not None:
            coming.cancel()
        for span in self._spans[group]:
            pages.release(span)

    def close(self) -> None:
        """End what runs in the background. Weights can be computed with afterwards."""
        self._reader.shutdown(wait=True, cancel_futures=True)

    def _bring(self, group: int) -> None:
        for span in self._ahead[group]:
            pages.prefetch(span)


@dataclass
class Placement:
    """A base in its place. `mapped_bytes` of `total_bytes` lie in files; `layers` come and go if it is streamed."""

    placement: str
    total_bytes: int
    mapped_bytes: int
    layers: int = 0
    stream: "LayerStream | None" = None
    experts: "ExpertReader | None" = None

    def __str__(self) -> str:
        if self.placement == "streamed":
            return f"streamed: {self.layers} layers come and go, {self.mapped_bytes / 1e9:.3f} GB of them on disk"
        if self.placement == "mapped":
            share = f"{self.mapped_bytes / 1e9:.3f} of {self.total_bytes / 1e9:.3f} GB"
            return f"mapped: {share} on disk, paged by the kernel"
        return f"resident: {self.total_bytes / 1e9:.3f} GB in memory"

    def remove(self) -> None:
        """Take the hooks off; a streamed base is a mapped one afterwards."""
        if self.stream is not None:
            self.stream.remove()
            if self.experts is not None:
                self.experts.remove()
            self.stream = self.experts = None
            self.placement, self.layers = "mapped", 0


def place_as_planned(model: Model, placement: str, *, asked: bool) -> tuple[Placement, str]:
    """Put the base where a plan says. `placement`: of the plan; `split` is over cards, where loading put it already.
    `asked`: the recipe asks for it: then what is not possible is an error. Returns where the base is, and why if that
    is not the plan's placement."""
    if placement == "split":
        return place(model, "resident"), ""
    if placement == "sharded":  # shared out after its proofs; until then it is mapped if it can be
        return place(model, "mapped" if is_mapped(model) else "resident"), ""
    if placement != "resident" and not asked and not is_mapped(model):
        private = "its weights are not on disk in the form they are computed in"
        unknown = "this system does not tell which memory is a file's"
        why = f"planned {placement}, but {private if pages.supported() else unknown}"
        return place(model, "resident"), why
    return place(model, placement), ""


def place(model: Model, placement: str, *, mover: Mover | None = None) -> Placement:
    """Put a base where it is wanted, before or after its adapters. Adapters and whatever trains stay in memory.

    Args:
        model: a causal LM of transformers, plain or with PEFT around it, as `base.open_base` opens it. An earlier
            placement of the same model must have been removed.
        placement: `resident` copies a mapped base into private memory, tensor by tensor (one whose layers are there
            already stays as it is); `mapped` leaves it to the kernel; `streamed` bounds it to a layer or two at a time.
        mover: for `streamed`, how layers come and go; default: over the mapped files.

    Raises:
        BaseModelError: `mapped` or `streamed` is asked of a base that lies in private memory, or of a system that
            cannot let pages go.
    """
    tensors = bnb.held_tensors(model)
    total = _bytes(tensors)
    maps = pages.FileMaps.read()
    if placement == "resident":
        if is_mapped(model, maps):
            _into_memory(model, maps, pages.Arena(_bytes(tensors) + pages.PAGE * len(tensors)))
        return Placement("resident", total, _bytes(t for t in bnb.held_tensors(model) if _is_mapped(t, maps)))
    where = next(model.parameters()).device
    if mover is None and where.type != "cpu":
        raise BaseModelError(
            f"quant.placement {placement} keeps the base in RAM, and this one is on a card ({where}).",
            fix="--set quant.placement=auto; or CUDA_VISIBLE_DEVICES= in front of the command, to compute on the CPU",
        )
    if mover is None and not is_mapped(model, maps):
        raise BaseModelError(
            f"quant.placement {placement} needs a base whose weights are opened from a file as they are; these were "
            "quantised or converted while loading and lie in private memory.",
            fix="`halfbyte quantize MODEL` writes a 4-bit base to disk, or --set quant.placement=resident",
        )
    mapped = _bytes(t for t in tensors if _is_mapped(t, maps))
    if placement == "mapped":
        return Placement("mapped", total, mapped)
    if mover is None and not pages.supported():
        raise BaseModelError(
            "quant.placement streamed needs Linux with a readable /proc/self/pagemap: a page that was written to must "
            "not be let go.",
            fix="--set quant.placement=mapped leaves the paging to the system",
        )
    layers = structure.decoder_layers(model)
    experts = None
    if mover is None:
        experts = ExpertReader(model, maps)
        mover = Mover(*_groups(model, layers, maps, {t.data_ptr() for s in experts.stacks for t in s.tensors}))
    return Placement("streamed", total, mapped, len(layers), LayerStream(layers, mover), experts)


_STREAMS: "WeakKeyDictionary[nn.Module, LayerStream]" = WeakKeyDictionary()


def before_layers(layer: nn.Module) -> Callable[[int], None] | None:
    """What is to be called before layer 0, 1, ... runs by other means than its forward; None if it is not streamed."""
    stream = _STREAMS.get(layer)
    return None if stream is None else stream.upwards


class LayerStream:
    """The cursor over the layers: which one computes now, and so which is fetched and which is dropped. The group after
    the last layer is what is around them: embedding, last norm, head."""

    def __init__(self, layers: list[nn.Module], mover: Mover) -> None:
        self.mover = mover
        self.count = len(layers)
        self.present: set[int] = set(range(self.count + 1))
        self.visits = 0
        self._descending: int | None = None  # the layer whose backward began last, until another runs forward
        self._handles = [x.register_forward_hook(after(partial(self.downwards, n))) for n, x in enumerate(layers)]
        for number, layer in enumerate(layers):
            self._handles.append(layer.register_forward_pre_hook(lambda *_, number=number: self.upwards(number)))
            _STREAMS[layer] = self
        self._drop_all_but(set())

    def upwards(self, layer: int) -> None:
        """`layer` is about to run forward. Some versions of transformers call hooks in a recomputation too; then the
        layers below come next."""
        if layer and self._descending == layer:
            return
        self._descending = None
        self._move(layer, range(layer + 1, min(layer + 1 + AHEAD, self.count + 1)))

    def downwards(self, layer: int) -> None:
        """`layer` is about to run backward; below the first one the next forward begins, with the first one."""
        self._descending = layer
        self._move(layer, range(layer - 1, max(-1, layer - 1 - AHEAD), -1))

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for layer in [x for x, stream in _STREAMS.items() if stream is self]:
            del _STREAMS[layer]
        self.mover.close()

    def _move(self, layer: int, following: range) -> None:
        self.visits += 1
        self._drop_all_but({layer, *following})
        for group in (layer, *following):
            self.mover.fetch(group)
            self.present.add(group)
        self.mover.need(layer)

    def _drop_all_but(self, wanted: set[int]) -> None:
        for group in self.present - wanted:
            self.mover.drop(group)
        self.present &= wanted


def after(backward: Callable[[], None]) -> Callable[..., None]:
    """A forward hook of one layer, by whose output `backward` is called just before the layer's own backward."""

    def hook(module: nn.Module, args: object, output: Tensor | Iterable[object]) -> None:
        if torch.is_grad_enabled():
            tensors = (output,) if isinstance(output, Tensor) else output
            hidden = next((t for t in tensors if isinstance(t, Tensor) and t.requires_grad), None)
            if hidden is not None:
                hidden.register_hook(lambda gradient: backward())

    return hook


def is_mapped(model: Model, maps: pages.FileMaps | None = None) -> bool:
    """Whether most of the layers' weights lie in a file: of the quantised ones where there are some, else of all."""
    maps = maps or pages.FileMaps.read()
    modules = [m for layer in structure.decoder_layers(model) for m in layer.modules()]
    packed = [m.weight.data for m in modules if formats.is_quantised(m)]
    packed += [stack.data for layer in structure.decoder_layers(model) for _, stack in stacks(layer)]
    weights = packed or [p.data for m in modules for p in m.parameters(recurse=False)]
    return 2 * _bytes(t for t in weights if _is_mapped(t, maps)) > _bytes(weights)


def _groups(
    model: Model, layers: list[nn.Module], maps: pages.FileMaps, chosen: set[int]
) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
    """Mapped tensors of each layer and of the rest; and the same without an embedding that is not the head too, and
    without what comes when it is `chosen` (addresses)."""
    # also what trains: before an adapter is put on, everything says that it does, and what is written to stays private
    groups = [[t for t in bnb.held_tensors(layer) if _is_mapped(t, maps)] for layer in layers]
    inside = {t.data_ptr() for group in groups for t in group}
    rest = [t for t in bnb.held_tensors(model) if _is_mapped(t, maps) and t.data_ptr() not in inside]
    head = model.get_output_embeddings()
    whole = {p.data_ptr() for p in head.parameters()} if head is not None else set()
    rows = {p.data_ptr() for p in model.get_input_embeddings().parameters()} - whole
    ahead = [[t for t in group if t.data_ptr() not in chosen] for group in groups]
    return [*groups, rest], [*ahead, [t for t in rest if t.data_ptr() not in rows]]


def _into_memory(model: nn.Module, maps: pages.FileMaps, arena: pages.Arena) -> None:
    """Copy every mapped tensor into private memory; the file's pages are let go tensor by tensor. A table of per-layer
    embeddings stays where it is: gigabytes, of which a batch reads some rows."""
    copies: dict[int, Tensor] = {}

    def copied(tensor: Tensor) -> Tensor:
        if not _is_mapped(tensor, maps):
            return tensor
        address = tensor.data_ptr()
        if address not in copies:
            copies[address] = arena.copy(tensor)
            pages.let_go([tensor], maps)
        return copies[address]

    for name, parameter in model.named_parameters():
        if PER_LAYER not in name:
            parameter.data = copied(parameter.data)
    for owner, name in bnb.state_tensors(model):
        setattr(owner, name, copied(getattr(owner, name)))
    for buffer in model.buffers():
        buffer.data = copied(buffer.data)


def _is_mapped(tensor: Tensor, maps: pages.FileMaps) -> bool:
    return tensor.device.type == "cpu" and maps.holds(tensor.data_ptr(), tensor.nbytes)


def _areas(tensors: Iterable[Tensor]) -> list[tuple[int, int]]:
    return [(t.data_ptr(), t.nbytes) for t in tensors]


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.nbytes for t in tensors)


class ExpertReader:
    """Hooks on the experts modules of a streamed mixture, by which only the experts that tokens are sent to are read.
    Take them off with `remove`.

    Why: a token meets k experts of E. Read ahead with its layer, all E would come from the disk.
    What: a layer's stacks of experts are not read ahead. When the router has chosen, before an experts module runs, the
    parts of the chosen experts are asked for, all at once and in the order in which they are computed; and again before
    the module's backward. The kernel is told not to read on behind a page of a stack.
    Cost: the disk is waited for where it is slower than the experts' products.

    Args:
        maps: the file-backed memory of this process; stacks in private memory need nothing.
    """

    def __init__(self, model: nn.Module, maps: pages.FileMaps) -> None:
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="halfbyte-experts")
        self._coming: Future[None] | None = None
        self._handles = []
        self.stacks: list[ExpertStack] = []
        for _, module in experts_of(model):
            every = [getattr(module, name) for name in stacks_of(module)]
            mapped = [s for s in every if isinstance(s, ExpertStack) and maps.holds(s.data.data_ptr(), s.data.nbytes)]
            if mapped:
                self.stacks += mapped
                self._handles.append(module.register_forward_pre_hook(self._before, with_kwargs=True))
                self._handles.append(module.register_forward_hook(self._after, with_kwargs=True))
        self._read_ahead(wanted=False)

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._reader.shutdown(wait=True, cancel_futures=True)
        self._read_ahead(wanted=True)

    def _read_ahead(self, *, wanted: bool) -> None:
        for span in pages.whole_pages((t.data_ptr(), t.nbytes) for stack in self.stacks for t in stack.tensors):
            pages.read_ahead(span, on=wanted)

    def _before(self, module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        self._ask(module, _chosen(args, kwargs))

    def _after(self, module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor) -> None:
        if output.requires_grad:
            chosen = _chosen(args, kwargs)
            output.register_hook(lambda gradient: self._ask(module, chosen))

    def _ask(self, module: nn.Module, chosen: Iterable[int]) -> None:
        parameters = [getattr(module, name) for name in stacks_of(module)]
        areas = [
            (part.data_ptr(), part.nbytes)
            for expert in chosen
            for stack in parameters
            if isinstance(stack, ExpertStack) and expert < len(stack)
            for part in stack.of_expert(expert)
        ]
        if self._coming is not None:
            self._coming.cancel()
        self._coming = self._reader.submit(self._bring, areas)

    @staticmethod
    def _bring(areas: list[tuple[int, int]]) -> None:
        for start, size in areas:
            first = start // pages.PAGE * pages.PAGE  # with the pages that it shares with its neighbours
            pages.prefetch(pages.Span(first, -(-(start + size) // pages.PAGE) * pages.PAGE))


def _chosen(args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> list[int]:
    """The experts in `forward(hidden, index (T, k), weights)`, by position or by whatever name a model gives them."""
    return list((*args, *kwargs.values())[1].unique().tolist())
