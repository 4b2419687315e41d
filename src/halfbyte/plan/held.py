"""What is in memory whatever a micro-batch does: libraries, rows, base, adapters, what trains them; and on disk.

Source: QLoRA, arXiv:2305.14314 (4 bits and two levels of scales; `quant.four_bit`, bitsandbytes' own bytes);
AdamW keeps two fp32 numbers a parameter, its 8-bit form two bytes (arXiv:2110.02861). The process's own bytes are
measured: `LIBRARIES_*` is what remains of a tiny training (torch CPU build, transformers, peft, bitsandbytes, numba),
`docs/log.md` has the figures.
Cost: none; no torch.
"""

import numpy as np

from halfbyte.plan.job import Job
from halfbyte.plan.layer import expert_products
from halfbyte.plan.lines import Line, Placement, Recompute, Where, library_lines
from halfbyte.quant import formats
from halfbyte.system.device import Device
from halfbyte.system.threads import PRODUCTS_KEPT

LIBRARIES_PRIVATE_BYTES = 470_000_000
# Of each card, round figures that were not measured here: what the driver keeps for a process, code of kernels with it;
# and cuBLAS's workspace (torch: 32 MiB from compute capability 9.0 on, 8 before), once for each thread that multiplies.
CUDA_CONTEXT_BYTES, CUBLAS_BYTES = 530_000_000, 2 * 2**25
HOST_OF_CARD_BYTES = 2_500_000_000  # a CUDA build's libraries and pinned buffers in RAM; a round figure, not measured
# What the first micro-batches leave in the process beside tensors: compiled kernels, buffers of threads, the Trainer's
# own.
FIRST_MICRO_BATCH_BYTES = 50_000_000
# Of the compiler (numba, LLVM), where kernels are not in its cache yet; the process keeps them to its end. Measured: a
# cold run beside a warm one of the same recipe, private: 174 MB in fp32, 296 to 308 in bf16, whose kernels are more,
# and 379 where they multiply integers; 7 MB of code.
COMPILER_PRIVATE_BYTES, COMPILER_MORE_BYTES, COMPILER_INTEGER_BYTES = 180_000_000, 120_000_000, 75_000_000
# oneDNN's code of a matrix product of one shape and what it keeps beside it, and how many a size of micro-batches has:
# 54 MB in use more for 6 sizes, 90 for 10 (docs/log.md); `system/threads.py` bounds how many are kept. The first
# micro-batch's are in its own line.
PRODUCT_BYTES, PRODUCTS_OF_A_SIZE, PRODUCTS_OF_AN_EVALUATION = 500_000, 25, 8
COMPILER_FILE_BYTES = 7_000_000
# Of a tokenizer in memory, each byte of its tokenizer.json: 7.7 measured of 262,144 entries, 4 of 49,152. Where that
# is not at hand, for each entry of the vocabulary: 985 and 290.
TOKENIZER_SHARE, TOKENIZER_BYTES_PER_ENTRY = 8, 1000
ROW_BYTES = 60  # its length, labels, place in the order; its tokens lie in a file that is mapped
TOUCHED_BYTES_PER_TOKEN = 65536  # the kernel maps sixteen pages around each one that is touched
AHEAD = 2  # layers that are read ahead of a streamed one

# Bytes of optimiser state for each trained parameter; AdamW's 8 for a name that is not here.
OPTIMIZER_BYTES = {
    "sgd": 0, "rmsprop": 4, "adagrad": 4, "lion_32bit": 4, "paged_lion_32bit": 4, "adafactor": 1, "adamw_bnb_8bit": 2,
    "adamw_8bit": 2, "paged_adamw_8bit": 2, "lion_8bit": 1, "paged_lion_8bit": 1, "ademamix": 12, "ademamix_8bit": 3,
    "rmsprop_bnb": 4, "rmsprop_bnb_32bit": 4, "rmsprop_bnb_8bit": 1,
}  # fmt: skip


def _compiler_bytes(job: Job) -> int:
    integers = COMPILER_INTEGER_BYTES if job.recipe.quant.compute != "exact" else 0
    return COMPILER_PRIVATE_BYTES + (COMPILER_MORE_BYTES + integers if job.dtype == "bf16" else 0)


def process_lines(device: Device, job: Job) -> tuple[Line, ...]:
    """Libraries, tokenizer and rows: RAM of the process."""
    tokens = job.rows.tokens + int(np.sum(job.rows.evaluated))
    rows = len(job.rows.lengths) + len(job.rows.evaluated)
    data = 0 if job.rows.assumed else ROW_BYTES * rows
    by_file = None if job.tokenizer_json_bytes is None else TOKENIZER_SHARE * job.tokenizer_json_bytes
    held = (TOKENIZER_BYTES_PER_ENTRY * job.facts.vocab if by_file is None else by_file) + data
    words = "tokenizer" if job.rows.assumed else f"tokenizer of {job.facts.vocab} entries, {tokens} tokens as rows"
    if device.on_card:
        return (Line("libraries", HOST_OF_CARD_BYTES, "a CUDA build; a round figure"), Line("data", held, words))
    source, first = "measured on a tiny run", "kernels, threads' buffers and the Trainer, from then on"
    compiler, code = (_compiler_bytes(job), COMPILER_FILE_BYTES) if job.cold else (0, 0)
    products = PRODUCTS_OF_A_SIZE * job.sizes + PRODUCTS_OF_AN_EVALUATION * job.evaluated_sizes
    if job.expert_numel:
        adapted = any(site.reads == "experts" for site in job.sites)
        products += expert_products(job.facts, job.step_tokens, adapted=adapted)
    products = min(PRODUCTS_KEPT, products) - PRODUCTS_OF_A_SIZE
    return (
        *library_lines(LIBRARIES_PRIVATE_BYTES, "torch, transformers, peft, numba and their state"),
        Line("compiler's code", code, "kernels are compiled in the first run on a machine", source, "file"),
        Line("compiler", compiler, "kernels are compiled in the first run on a machine", source),
        Line("first micro-batch", FIRST_MICRO_BATCH_BYTES, first, source),
        Line("compiled products", PRODUCT_BYTES * products, "oneDNN's, of micro-batches of other sizes", source),
        Line("data", held, words),
    )


def card_lines() -> tuple[Line, ...]:
    """What is taken on each card whatever runs there."""
    return (
        Line("CUDA context", CUDA_CONTEXT_BYTES, "of the driver, for each card: a round figure", "", "device"),
        Line("cuBLAS workspace", CUBLAS_BYTES, "forward and backward have a thread each", "torch", "device"),
    )


def base_lines(job: Job, placement: Placement, cards: int, where: Where, room_bytes: float) -> tuple[Line, ...]:
    """The frozen base, where it computes.

    Args:
        room_bytes: for pages of a mapped base; what does not stay is read from disk again.
    """
    quant = job.recipe.quant
    kind = f"{len(job.specs)} tensors, {job.parameters / 1e6:.1f} M weights, quant.type {quant.type}"
    source = formats.of(quant).source
    if placement == "streamed":
        how = f"streamed: {1 + AHEAD} layers of {job.facts.layers}, or one and the head"
        return (Line("base", busy_file_bytes(job), how, source, "file"),)
    if placement == "split":
        share = -(-(job.base_bytes - job.outer_bytes) // cards) + job.outer_bytes
        return (Line("base", share, f"a card's share of {cards}: {kind}", source, where),)
    if placement == "sharded":
        inner = job.base_bytes - job.outer_bytes
        scales = inner // 32 if quant.quantises else 0
        share = job.outer_bytes + scales + -(-(inner - scales) // job.ranks) + 2 * job.layer_bytes
        return (Line("base", share, f"a share of {job.ranks} of the layers, and one whole: {kind}", source, where),)
    if placement == "mapped":
        whole = job.base_bytes - job.outer_bytes + _touched_outer(job)
        held = min(whole, max(busy_file_bytes(job), int(room_bytes)))
        part = "" if held == whole else f"{held / whole:.0%} of "
        return (Line("base", held, f"mapped: {part}{kind}", source, "file"),)
    return (Line("base", job.base_bytes, kind, source, where),)


def busy_file_bytes(job: Job) -> int:
    """Pages of a mapped or streamed base that are in use at once.

    The layer that computes, with all its experts, and those that are read ahead; or the head beside the last layer.
    """
    return min(job.base_bytes, job.layer_bytes + max(AHEAD * job.ahead_bytes, _touched_outer(job)))


def _touched_outer(job: Job) -> int:
    """Of an embedding that is not the head too, only the rows of the data's tokens are read."""
    if job.facts.tied_head:
        return job.outer_bytes
    embedding = job.itemsize * job.embedding_numel
    distinct = min(job.facts.vocab, max(1, round(0.2 * job.rows.tokens)))
    return job.outer_bytes - embedding + min(embedding, distinct * TOUCHED_BYTES_PER_TOKEN)


def training_lines(job: Job, where: Where, recompute: Recompute) -> tuple[Line, ...]:
    """What trains: fp32 masters, their copies in the compute dtype, and the optimiser's state. The base has its own
    copy of a module that trains whole."""
    count, optimizer = job.trainable, str(job.recipe.train.optim)
    state = OPTIMIZER_BYTES.get(optimizer, 8)
    copies = job.lora_parameters
    if recompute == "full":  # they are made again with each layer
        copies //= max(1, job.facts.layers)
    # of what trains whole its gradient too, before it is widened
    copies = (copies + 2 * job.trained_whole) * (job.itemsize if job.dtype != "fp32" else 0)
    source = "LoRA, arXiv:2106.09685: r (in + out)"
    return (
        Line("adapters", 4 * count, f"{count} trained parameters in fp32", source, where),
        Line("adapters' copies", copies, f"in {job.dtype} while a micro-batch lasts", "layers/lora_linear.py", where),
        Line("optimiser", state * count, f"{optimizer}: {state} bytes a parameter", "AdamW: two numbers", where),
    )


def gradient_lines(job: Job, where: Where, *, micro_batches: int, micro_batch_bytes: int) -> tuple[Line, ...]:
    """Gradients at a step's peak. With several micro-batches all of them are there when the last one is at its peak;
    with one they come as its activations go, so a layer's are there, or all of them when `micro_batch_bytes` are
    gone. Those of modules that train whole are made at once, and then added. On a card a copy of those before a
    micro-batch is held, to be put back if it does not fit."""
    whole, made = 4 * job.trainable, 4 * job.trained_whole
    if micro_batches > 1:
        line = Line("gradients", whole + made, f"fp32, over {micro_batches} micro-batches", "", where)
        copied = whole if where == "device" else 0
        return line, Line("gradients' copy", copied, "as they were before a micro-batch", "training/pace.py", where)
    held = max(whole // max(1, job.facts.layers), whole - micro_batch_bytes, made)
    return (Line("gradients", held, f"fp32, {whole / 1e6:.1f} MB at the end of the only micro-batch", "", where),)


def loading_bytes(job: Job, placement: Placement, lines: tuple[Line, ...]) -> int:
    """The peak while the base is opened: what is held then, and one tensor more on its way."""
    held = sum(line.bytes for line in lines if line.name.startswith(("libraries", "CUDA", "cuBLAS")))
    if job.mappable and placement in ("mapped", "streamed"):
        return held + job.outer_bytes
    base = sum(line.bytes for line in lines if line.name == "base")
    return held + base + job.biggest_numel * (job.itemsize if job.mappable or job.stored else job.itemsize + 4)


def disk_lines(job: Job) -> tuple[Line, ...]:
    """What a run leaves on disk: the base's store, checkpoints, the adapter."""
    train, lora = job.recipe.train, job.recipe.lora
    state = OPTIMIZER_BYTES.get(str(train.optim), 8)
    one = (4 + state) * job.trainable
    keep = 0 if train.save_strategy == "no" and train.save_minutes is None else (train.save_total_limit or 1) + 1
    final = (4 if lora.save_dtype == "fp32" else 2) * job.trainable + job.tokenizer_bytes
    best = 4 * job.trainable if len(job.rows.evaluated) else 0
    base = job.building.disk_bytes if job.stored else 0
    lines = (
        Line("base store", base, f"quantised once: {job.recipe.quant.type}", "", "disk"),
        Line("checkpoints", keep * one, f"{keep} of {one / 1e6:.1f} MB, one of them being written", "", "disk"),
        Line("adapter", final, "the last, or the best where evaluations choose", "", "disk"),
        Line("best adapter", best, "so far, in fp32", "", "disk"),
    )
    return tuple(line for line in lines if line.bytes or line.name in ("checkpoints", "adapter"))
