"""Parts of a module that are elsewhere than where they compute: fetched when they are used, dropped when others are.

The order of use is not known, so the last one is remembered: when a part begins, forward or backward, all others are
dropped, and the one that followed it the last time is fetched ahead.
On a CPU what is on disk lies in mapped files (`base/stream.py`): it can be read at any time; what is dropped is pages.
For a card, tensors in memory or in files are copied there and put back. Hooks are on the parts, not on the layers
inside: adapters and fused layers read a layer's weight without calling it.
Trap: a layer of bitsandbytes itself keeps its weight on the card for backward; ours do not (`quant/number_format.py`).
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import nn

from halfbyte.base.modules.places import CPU, DISK, Places
from halfbyte.base.modules.survey import Survey, tensors_of
from halfbyte.base.stream import Mover, after
from halfbyte.quant import bnb
from halfbyte.system import pages


class Copies:
    """Copies the tensors of parts to a device when they are needed; their own stay where they are. `parts`: modules;
    adapters that are put on later are moved to the device for good."""

    def __init__(self, parts: Sequence[nn.Module], device: torch.device) -> None:
        self._parts, self._device = parts, device
        self._home = [[(o, a, getattr(o, a)) for o, a in _computed_with(part)] for part in parts]
        self._present: set[int] = set()

    def fetch(self, group: int) -> None:
        if group not in self._present:
            for owner, attribute, tensor in self._home[group]:
                setattr(owner, attribute, tensor.to(self._device, non_blocking=True, copy=True))
            self._present.add(group)

    def need(self, group: int) -> None:
        for parameter in self._parts[group].parameters():
            if parameter.device != self._device:
                parameter.data = parameter.data.to(self._device)

    def drop(self, group: int) -> None:
        if group in self._present:
            for owner, attribute, tensor in self._home[group]:
                setattr(owner, attribute, tensor)
            self._present.discard(group)


def _computed_with(part: nn.Module) -> Iterator[tuple[object, str]]:
    """(owner, attribute) of every tensor that a part computes with."""
    yield from ((tensor, "data") for tensor in (*part.parameters(), *part.buffers()))
    yield from bnb.state_tensors(part)


class Recent:
    """Which part computes now, and so which are there."""

    def __init__(self, parts: Sequence[nn.Module], moves: Mover | Copies) -> None:
        self.moves, self.uses = moves, 0
        self.present: set[int] = set(range(len(parts)))
        self._last = (-1, -1)
        self._followed: dict[tuple[int, int], int] = {}
        for number, part in enumerate(parts):
            part.register_forward_pre_hook(lambda *_, number=number: self.use(number))
            part.register_forward_hook(after(partial(self.use, number)))
        self._keep(set())

    def use(self, part: int) -> None:
        """`part` is about to run, forward or backward."""
        last = self._last[1]
        if part != last:
            self.uses += 1
            self._followed[self._last] = part
            self._last = (last, part)
            wanted = {part, self._followed.get(self._last, part)}
            self._keep(wanted)
            for number in (part, *(wanted - {part})):
                self.moves.fetch(number)
            self.present |= wanted
        self.moves.need(part)

    def _keep(self, wanted: set[int]) -> None:
        for number in self.present - wanted:
            self.moves.drop(number)
        self.present &= wanted


def attach(root: nn.Module, survey: Survey, places: Places) -> Recent | None:
    """Let what is not where it computes come and go; and send each part's inputs to its card. Returns None where
    everything stays."""
    away = {DISK, CPU} if places.on_card else {DISK}
    moving = [places.part_of(t.name) for t in survey.tensors if places.device_of[t.name] in away]
    parts = [root.get_submodule(name) for name in dict.fromkeys(moving) if name is not None]
    recent = None
    if parts and places.on_card:
        recent = Recent(parts, Copies(parts, torch.device(places.main)))
    elif parts and pages.supported():
        maps = pages.FileMaps.read()
        groups = [[t for t in bnb.held_tensors(part) if maps.holds(t.data_ptr(), t.nbytes)] for part in parts]
        recent = Recent(parts, Mover(groups, groups))
    if places.on_card:
        _move_buffers(root, places)
        _send_inputs(root, places)
    return recent


def _move_buffers(root: nn.Module, places: Places) -> None:
    """Buffers that no checkpoint holds go where their module computes."""
    of_part = {part: place for name, place in places.device_of.items() if (part := places.part_of(name)) is not None}
    for name, buffer in tensors_of(root, persistent=False).items():
        place = of_part.get(places.part_of(name) or "", places.main)
        buffer.data = buffer.data.to(places.main if place in (CPU, DISK) else place)


def _send_inputs(root: nn.Module, places: Places) -> None:
    """Inputs of each part go to where its weights are at that moment; results come back to where the inputs were. The
    whole module's by accelerate's hook on its `forward`, which PEFT before 0.21 calls past torch's hooks."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module
    from accelerate.utils import send_to_device

    def before(module: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object]) -> object:
        tensor = next((t for t in (*module.parameters(), *module.buffers())), None)
        device = torch.device(places.main) if tensor is None else tensor.device
        return send_to_device(args, device), send_to_device(kwargs, device)

    for name in filter(None, places.parts):
        root.get_submodule(name).register_forward_pre_hook(before, with_kwargs=True)
    add_hook_to_module(root, AlignDevicesHook(execution_device=places.main, io_same_device=True))
