"""An instance gets a subclass of its own class, and its class back.

Why by instance: classes of transformers, peft and bitsandbytes are never assigned to; another model in the same process
is not touched.
Source: PEFT's own way of adding to a module (`peft/tuners/lora/`); torch documents `__class__` for parametrizations.
"""

from functools import cache
from typing import TYPE_CHECKING, Any, SupportsIndex

from torch import nn

cached: Any = cache  # mypy takes a class as a key for unhashable


class Instance:
    """A mixin for an instance; the class that it had is the second base."""

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

        def forward(self, *args: Any, **kwargs: Any) -> Any: ...

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[object, ...]:
        """Pickled by the mixin and the class below it, as no module has the class of both by its name."""
        return _empty, type(self).__bases__, self.__getstate__()


def become(module: nn.Module, mixin: type) -> None:
    """Put the mixin's forward before that of the module's class."""
    module.__class__ = _subclass(mixin, type(module))


def give_back(module: nn.Module) -> None:
    """The class that the module had before `become`."""
    module.__class__ = type(module).__bases__[1]


def of(root: nn.Module, mixin: type) -> list[Any]:
    """The modules whose class such a mixin is part of."""
    return [module for module in root.modules() if isinstance(module, mixin)]


def is_hooked(m: nn.Module, *, known: str = "") -> bool:
    """Whether a hook of torch's is on this module: one whose object does not say that it is `known`."""
    every = (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks)
    owners = (getattr(hook, "__self__", None) for hooks in every if hooks for hook in hooks.values())
    return any(not (known and getattr(owner, known, False)) for owner in owners)


def plain_class(cls: type) -> type:
    """The class of upstream's below those of ours."""
    while getattr(cls, "halfbyte_mixin", None) is cls.__bases__[0]:
        cls = cls.__bases__[1]
    return cls


def part_of(layer: nn.Module, names: tuple[str, ...]) -> nn.Module:
    """The part that has one of these names; None where there is none."""
    return next((part for name in names if (part := getattr(layer, name, None)) is not None), None)


def _empty(mixin: type, cls: type) -> object:
    """An instance without state."""
    both = _subclass(mixin, cls)
    return both.__new__(both)


@cached
def _subclass(mixin: type, cls: type) -> type:
    """Named alike, since PEFT and transformers look for words in class names."""
    about = {"__module__": cls.__module__, "__doc__": cls.__doc__, "halfbyte_mixin": mixin}
    return type(cls.__name__, (mixin, cls), about)
