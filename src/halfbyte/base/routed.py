"""Of a streamed mixture, read only the experts that tokens are sent to.

Why: a token meets k experts of E. Read ahead with its layer, all E would come from the disk.
What: a layer's stacks of experts are not read ahead. When the router has chosen, before an experts module runs, the
parts of the chosen experts are asked for, all at once and in the order in which they are computed; and again before the
module's backward. The kernel is told not to read on behind a page of a stack.
Cost: the disk is waited for where it is slower than the experts' products.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from halfbyte.layers.experts.layout import experts_of, stacks_of
from halfbyte.quant.stack import ExpertStack
from halfbyte.system import pages

if TYPE_CHECKING:
    from torch import Tensor, nn


class RoutedReader:
    """Hooks on the experts modules of a model. Take them off with `remove`.

    Args:
        maps: the file-backed memory of this process; stacks in private memory need nothing.
    """

    def __init__(self, model: nn.Module, maps: pages.FileMaps) -> None:
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="halfbyte-experts")
        self._coming: Future[None] | None = None
        self._handles = []
        self.stacks: list[ExpertStack] = []
        for _, module in experts_of(model):
            held = [getattr(module, name) for name in stacks_of(module)]
            mapped = [s for s in held if isinstance(s, ExpertStack) and maps.holds(s.data.data_ptr(), s.data.nbytes)]
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
            pages.read_ahead(span, wanted=wanted)

    def _before(self, module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        """`forward(hidden, index (T, k), weights)`, by position or by whatever name a model gives them."""
        _, index, *_ = (*args, *kwargs.values())
        self._ask(module, index.unique().tolist())

    def _after(self, module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor) -> None:
        if output.requires_grad:
            _, index, *_ = (*args, *kwargs.values())
            chosen = index.unique().tolist()
            output.register_hook(lambda gradient: self._ask(module, chosen))

    def _ask(self, module: nn.Module, chosen: Iterable[int]) -> None:
        held = [getattr(module, name) for name in stacks_of(module)]
        areas = [
            (part.data_ptr(), part.nbytes)
            for expert in chosen
            for stack in held
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
            pages.bring(pages.Span(first, -(-(start + size) // pages.PAGE) * pages.PAGE))
