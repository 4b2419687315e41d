"""A source's tensors in pieces, as safetensors and torch read them whole; what changes meanwhile is noticed."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from halfbyte.base.store.reading import PickledSource, Source, unsafe_pickle
from halfbyte.errors import StoreError
from tests.base.store.helpers import checkpoint

TENSORS = {
    "a.weight": torch.arange(77, dtype=torch.float32).reshape(7, 11),
    "b.bias": torch.linspace(-2, 2, 9).to(torch.bfloat16),
    "c.codes": torch.arange(130, dtype=torch.uint8),
}


def saved(folder: Path, kind: type[Source]) -> Path:
    file = folder / ("model.safetensors" if kind is Source else "model.bin")
    write: Callable[[Any, Path], object] = save_file if kind is Source else torch.save
    write(TENSORS, file)
    return file


@pytest.mark.parametrize("kind", [Source, PickledSource])
@pytest.mark.parametrize("piece", [4, 52, 10**6])
def test_pieces_make_the_tensor(tmp_path: Path, kind: type[Source], piece: int) -> None:
    with kind([saved(tmp_path, kind)]) as source:
        assert source.tensors.keys() == TENSORS.keys()
        for name, wanted in TENSORS.items():
            tensor = source.tensors[name]
            assert (tensor.shape, tensor.nbytes) == (tuple(wanted.shape), wanted.nbytes)
            got = bytearray(tensor.nbytes)
            for start in reversed(range(0, tensor.nbytes, piece)):
                source.read(tensor, start, memoryview(got)[start : start + piece])
            assert bytes(got) == wanted.contiguous().view(torch.uint8).numpy().tobytes()


def test_what_is_cut_or_changed_meanwhile_is_noticed(tmp_path: Path) -> None:
    file = saved(tmp_path, Source)
    with Source([file]) as source:
        assert source.changed() == []
        os.truncate(file, file.stat().st_size - 3)
        assert source.changed() == [file]
        last = max(source.tensors.values(), key=lambda tensor: tensor.start)
        with pytest.raises(StoreError, match=f"is cut short: {last.name} ends 3 bytes too early"):
            source.read(last, 0, memoryview(bytearray(last.nbytes)))


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("code ran",)


def test_a_pickle_that_holds_more_is_not_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"a": torch.zeros(2), "b": Evil()}, tmp_path / "model.bin")
    with pytest.raises(pickle.UnpicklingError) as refused:
        PickledSource([tmp_path / "model.bin"])
    said = str(unsafe_pickle(checkpoint(tmp_path), refused.value))
    assert "hold more than tensors" in said and "print" in said and "\n  fix: use a copy" in said
    assert capsys.readouterr().out == ""
