"""What a sharded base stands on: FSDP2's `fully_shard` over uint8 parameters that do not train."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from halfbyte.distributed import world as worlds
from halfbyte.upstream.torch import SHARDS
from tests.distributed import together


class Layer(nn.Module):
    """Codes that are frozen, and a factor that trains."""

    def __init__(self) -> None:
        super().__init__()
        self.codes = nn.Parameter(torch.arange(6, dtype=torch.uint8).view(6, 1), requires_grad=False)
        self.factor = nn.Parameter(torch.ones(1))
        self.fails = False

    def forward(self, x: Tensor) -> Tensor:
        if self.fails:
            raise MemoryError
        return x * self.factor * self.codes.float().sum()


class Gather:
    def __init__(self, here: Any) -> None:
        self.here, self.calls = here, 0

    def allocate(self, size: tuple[int, ...], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False) -> None:
        self.calls += 1
        self.here.gather_into_(output_tensor, input_tensor)


def sharded() -> dict[str, Any]:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    with worlds.open_world() as here:
        layer: Any = Layer()
        factor, gather = layer.factor, Gather(here)
        fully_shard(
            layer, mesh=DeviceMesh.from_group(here.group, "cpu"), reshard_after_forward=True, ignored_params={factor}
        )
        layer.set_custom_all_gather(gather)
        part = layer.codes
        said = {"ignored": layer.factor is factor, "part": part.to_local().flatten().tolist()}
        layer.unshard()
        again = layer.codes
        vars(again)["told"] = 7
        said["whole"], said["class"] = again.flatten().tolist(), type(again) is nn.Parameter
        layer.reshard()
        said["back"] = layer.codes is part
        x = torch.ones(1, requires_grad=True)
        for _ in range(2):
            y = layer(x)
            assert layer.codes is part, "after the forward it is in parts again"
            y.backward()
        said["calls"], said["grad"] = gather.calls, layer.factor.grad.tolist()
        layer.fails = hasattr(layer, "reset_iter_state")  # without it a failed allocation ends a run
        try:
            layer(x)
        except MemoryError:
            layer.reset_iter_state()
        layer.fails = False
        layer(x).backward()
        layer.unshard()
        said["same"], said["kept"] = layer.codes is again, vars(layer.codes)["told"]
        layer.reshard()
        return said


@pytest.mark.skipif(bool(SHARDS.reason), reason=SHARDS.reason)
def test_each_layer_alone_in_bytes_with_what_is_kept_on_its_parameter() -> None:
    found = together.run(2, sharded)
    assert [each.pop("part") for each in found] == [[0, 1, 2], [3, 4, 5]]
    for each in found:
        assert each == {
            "ignored": True,
            "whole": [0, 1, 2, 3, 4, 5],
            "class": True,
            "back": True,
            "calls": 5,  # one, and each forward and backward
            "grad": [30.0],
            "same": True,
            "kept": 7,
        }
