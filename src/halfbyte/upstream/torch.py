"""What differs between the versions of torch."""

import inspect

from halfbyte.upstream.seam import Seam


def _kernels_can_be_put_before() -> bool:
    import torch

    return callable(torch.library.get_kernel)


def _shards_codes() -> bool:
    from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam

    # Older ones make each part a parameter that trains, which codes cannot be.
    return "requires_grad=param.requires_grad" in inspect.getsource(FSDPParam._init_sharded_param)


KERNELS = Seam(
    "torch", "kernels that another can hand on to", "other scripts quantise by bitsandbytes' own code, more slowly",
    _kernels_can_be_put_before,
)  # fmt: skip
SHARDS = Seam(
    "torch", "FSDP2 that takes codes (2.12 has it)", "quant.placement sharded is refused", _shards_codes,
)  # fmt: skip
SEAMS = (KERNELS, SHARDS)
