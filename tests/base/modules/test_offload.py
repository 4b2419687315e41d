"""Parts of a module that come and go: which are there, whose pages are let go, and copies for another device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import halfbyte
from halfbyte.base.modules import offload, places, settings
from halfbyte.base.modules.survey import survey
from halfbyte.system import device as machine
from halfbyte.system import pages
from tests.base.modules.helpers import empty, made, output, quantised, save

pytestmark = pytest.mark.filterwarnings("ignore:.*stay as they are, being no plain linear layers")


class Noted:
    """Notes what is asked of it."""

    def __init__(self) -> None:
        self.there: set[int] = set()
        self.needed: list[int] = []
        self.most = 0

    def fetch(self, group: int) -> None:
        self.there.add(group)

    def need(self, group: int) -> None:
        assert group in self.there
        self.needed.append(group)
        self.most = max(self.most, len(self.there))

    def drop(self, group: int) -> None:
        self.there.discard(group)


def test_what_computes_is_there_forward_and_backward_and_the_next_one_with_it() -> None:
    layers = nn.Sequential(*(nn.Linear(4, 4) for _ in range(5)))
    moves = Noted()
    recent = offload.Recent(list(layers), moves)
    x = torch.randn(2, 4, requires_grad=True)
    for _ in range(3):
        layers(x).sum().backward()
    assert moves.needed == [0, 1, 2, 3, 4, 4, 3, 2, 1, 0] * 3
    assert moves.most == 2
    before = recent.uses
    seen: list[set[int]] = []
    layers[2].register_forward_hook(lambda *_: seen.append(set(moves.there)))
    layers(x)
    assert seen == [{2, 3}] and recent.uses > before  # the next one is fetched ahead, as it was the last time


def test_a_part_that_is_used_alone_and_one_that_is_used_twice() -> None:
    a, b = nn.Linear(4, 4), nn.Linear(4, 4)
    moves = Noted()
    offload.Recent([a, b], moves)
    with torch.no_grad():
        a(a(b(torch.zeros(1, 4))))
    assert moves.needed == [1, 0, 0] and moves.there >= {0}


@pytest.mark.skipif(not pages.supported(), reason="pages cannot be looked up here")
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_pages_of_parts_on_disk_are_let_go(kind: str, tmp_path: Path) -> None:
    """After a forward pass the last layer is there, and in later ones what backward began with the last time."""
    torch.manual_seed(0)
    module = nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(6)))
    held = halfbyte.quantize_model(module, quant=kind, dtype="fp32", device_map={"": "disk"}, offload_folder=tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == 6 and len(quantised(held)) == 6
    maps = pages.FileMaps.read()
    codes = [m.weight.data for m in held]
    assert all(maps.holds(t.data_ptr(), t.nbytes) for t in codes)
    x = torch.randn(2, 1024, requires_grad=True)
    for again in (False, True):
        y = held(x)
        assert [present(t) > 0.5 for t in codes] == [False] * 4 + [again, True]
        y.sum().backward()
        assert [present(t) > 0.5 for t in codes[2:]] == [False] * 4 and present(codes[0]) > 0.5


def present(tensor: Tensor) -> float:
    """The share of a tensor's whole pages that are in this process's memory."""
    (span,) = pages.whole_pages([(tensor.data_ptr(), tensor.nbytes)])
    with open("/proc/self/pagemap", "rb") as file:
        file.seek(span.start // pages.PAGE * 8)
        raw = file.read(span.bytes // pages.PAGE * 8)
    return sum(raw[at + 7] >> 7 for at in range(0, len(raw), 8)) / (len(raw) // 8)


def test_copies_come_and_go_and_the_own_tensors_are_as_they_were() -> None:
    """What a card does, with the CPU as the card."""
    held: Any = halfbyte.quantize_model(made("llama"), dtype="fp32")
    wanted = output(held, "llama")
    layers = list(held.model.layers)
    state = {key: t.data_ptr() for key, t in held.named_parameters()}
    copies = offload.Copies(layers, torch.device("cpu"))
    offload.Recent(layers, copies)
    where: list[bool] = []
    inner = held.model.layers[1].mlp.up_proj
    scales = inner.weight.quant_state.absmax.data_ptr()
    inner.register_forward_pre_hook(
        lambda m, _: where.append(
            m.weight.data_ptr() != state["model.layers.1.mlp.up_proj.weight"]
            and m.weight.quant_state.absmax.data_ptr() != scales
        )
    )
    for _ in range(2):
        assert torch.equal(output(held, "llama"), wanted)
    assert where == [True, True]
    for group in range(3):
        copies.drop(group)
    assert {key: t.data_ptr() for key, t in held.named_parameters()} == state
    assert inner.weight.quant_state.absmax.data_ptr() == scales


def test_an_automatic_map_fills_what_there_is_room_for(tmp_path: Path) -> None:
    folder = save(made("llama"), tmp_path / "weights")
    whole = halfbyte.quantize_model(empty("llama"), folder, device_map="auto", dtype="fp32")
    asked = settings.read("nf4", "fp32")
    of_layer = [s.nbytes(asked) for s in survey(empty("llama"), asked).tensors if ".layers.0." in s.name]
    room = whole.model.embed_tokens.weight.nbytes + int(2.5 * sum(of_layer))
    held = halfbyte.quantize_model(
        empty("llama"),
        folder,
        device_map="auto",
        dtype="fp32",
        max_memory={"cpu": room},
        offload_folder=tmp_path / "off",
    )
    names = sorted(p.stem for p in (tmp_path / "off").iterdir())
    assert names == ["lm_head", "model.layers.2", "model.norm"]
    assert torch.equal(output(held, "llama"), output(whole, "llama"))
    some = halfbyte.quantize_model(
        empty("llama"), folder, device_map="auto", dtype="fp32", max_memory={"cpu": "1KB"},
        offload_folder=tmp_path / "all", no_split_module_classes=["LlamaModel"],
    )  # fmt: skip
    assert sorted(p.stem for p in (tmp_path / "all").iterdir()) == ["lm_head", "model"]
    assert torch.equal(output(some, "llama"), output(whole, "llama"))


@pytest.mark.parametrize(
    ("how", "wanted"), [("sequential", ["cuda:0"] * 3 + ["cuda:1"] * 3), ("balanced", ["cuda:0"] * 3 + ["cuda:1"] * 3)]
)
def test_cards_are_filled_before_memory(how: str, wanted: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    module = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(6)))
    asked = settings.read("int8")
    found = survey(module, asked)
    size = found.tensors[0].nbytes(asked)
    room = {0: 3 * size, 1: 9 * size, "cpu": 99} if how == "sequential" else {0: 9 * size, 1: 9 * size}
    if how == "balanced":
        wanted = ["cuda:0"] * 4 + ["cuda:1"] * 2  # a share and the largest part
    put = places.resolve(module, found, asked, how, max_memory=room)
    assert list(put.device_of.values()) == wanted and put.main == "cuda:0" and put.on_card


def test_without_a_map_everything_is_in_memory_here() -> None:
    asked = settings.read("nf4")
    put = places.resolve(made("llama"), survey(made("llama"), asked), asked, None)
    card = machine.detect().kind == "cuda"
    assert set(put.device_of.values()) == ({"cuda:0"} if card else {"cpu"})
