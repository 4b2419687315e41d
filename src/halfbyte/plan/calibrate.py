"""What this machine does in a second: matrix products, attention, passes over memory, dequantising, reading a file.

Why: time follows from these five figures, and they differ tenfold between machines that look alike.
What: measured once, by `halfbyte doctor` or before the first training, and kept in halfbyte's cache under the
processor, the number of threads and torch's version; without them a plan says "time assumed".
Cost: about three seconds once; reading the cache imports no torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from halfbyte.plan.timing import Rates
from halfbyte.system import files
from halfbyte.system.device import Device
from halfbyte.system.files import cache_dir
from halfbyte.system.threads import asked_threads
from halfbyte.system.versions import version

SECONDS_EACH = 0.4
FILE_BYTES = 256_000_000
MEMORY_BYTES = 128_000_000  # more than any cache holds
FORMAT = 2


def cached(device: Device, dtype: str) -> Rates | None:
    """The rates of this machine, if they were measured under the same conditions."""
    try:
        values = json.loads(path_of(device, dtype).read_text(encoding="utf-8"))
        return Rates(**{field.name: values[field.name] for field in fields(Rates)})
    except (OSError, ValueError, KeyError, TypeError):
        return None


def path_of(device: Device, dtype: str) -> Path:
    """The file that holds the rates of this processor with so many threads."""
    import hashlib

    what = f"{FORMAT} {device.cpu} {' '.join(device.isa)} {threads(device)} {dtype} {version('torch')} {_cards(device)}"
    return cache_dir() / "calibration" / f"{hashlib.sha256(what.encode()).hexdigest()[:16]}.json"


def threads(device: Device) -> int:
    """Threads that torch will use, once `process.settle` has been called."""
    asked = asked_threads()
    return asked[0] if asked else device.cores


def ensure(device: Device, dtype: str, *, say: Callable[[str], None] = lambda text: None, anew: bool = False) -> Rates:
    """The cached rates, or new ones (always with `anew`), kept if the cache can be written."""
    found = None if anew else cached(device, dtype)
    if found is not None:
        return found
    say("calibrating this machine once (a few seconds)")
    rates = measure(device, dtype)
    path = path_of(device, dtype)
    with contextlib.suppress(OSError):  # a cache that cannot be written costs the same seconds again
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write(path, files.as_json(rates.to_json()))
    return rates


def measure(device: Device, dtype: str) -> Rates:
    """Measure, on torch's own threads: the median of some tries each."""
    import torch

    where = "cuda" if device.kind == "cuda" else "cpu"
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    started = time.strftime("%Y-%m-%d")
    with torch.no_grad():
        return Rates(
            matmul_flops=_matmul(torch, where, kind),
            memory_bytes=_memory(torch, where, kind),
            dequant_elements=_dequantise(torch, where, kind),
            attention_flops=_attention(torch, where, kind),
            disk_bytes=_disk(),
            source=f"calibrated {started}: {threads(device)} threads, {dtype}",
        )


def _usual(call: Callable[[], Any], where: str) -> float:
    """Seconds of the median call: a training runs at what lasts, not at the best moment of a clock that moves."""
    import torch

    def once() -> float:
        began = time.perf_counter()
        call()
        if where == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    once()
    taken, ends = [once()], time.perf_counter() + SECONDS_EACH
    while time.perf_counter() < ends:
        taken.append(once())
    return statistics.median(taken)


def _matmul(torch: Any, where: str, kind: Any) -> float:
    size = 2048 if where == "cpu" else 8192
    a, b = torch.ones(size, size, dtype=kind, device=where), torch.ones(size, size, dtype=kind, device=where)
    out = torch.empty_like(a)
    return 2 * size**3 / _usual(lambda: torch.mm(a, b, out=out), where)


def _memory(torch: Any, where: str, kind: Any) -> float:
    a = torch.ones(MEMORY_BYTES // torch.empty(0, dtype=kind).element_size(), dtype=kind, device=where)
    out = torch.empty_like(a)
    return 3 * a.numel() * a.element_size() / _usual(lambda: torch.add(a, a, out=out), where)


def _dequantise(torch: Any, where: str, kind: Any) -> float:
    from halfbyte.quant import bnb
    from halfbyte.quant.dequantise import dequantised

    layer = bnb.quantised_linear(torch.ones(2048, 2048, dtype=kind), where)
    return 2048 * 2048 / _usual(lambda: dequantised(layer, reuse=True), where)


def _attention(torch: Any, where: str, kind: Any) -> float:
    """Forward and backward of 8 heads of 64 over 4 examples of 256 tokens, by the engine's own function."""
    from halfbyte.layers import attention

    lengths, heads, d = (256,) * 4, 8, 64
    total = sum(lengths)
    flop = 14 * sum(n * n for n in lengths) * heads * d / 2
    with torch.enable_grad():
        q, k, v = (torch.randn(total, heads, d, device=where).to(kind).requires_grad_() for _ in range(3))
        scale = d**-0.5
        if attention.takes(q, k, v):
            return flop / _usual(
                lambda: attention.attention(q, k, v, lengths, scale, None, None).sum().backward(), where
            )
        shaped = [x.detach().view(4, 256, heads, d).transpose(1, 2).requires_grad_() for x in (q, k, v)]
        attend = torch.nn.functional.scaled_dot_product_attention
        return flop / _usual(lambda: attend(*shaped, is_causal=True).sum().backward(), where)


def _disk() -> float:
    """Bytes a second of reading a new file, past the page cache where the system lets go of it."""
    folder = cache_dir() if os.access(cache_dir(), os.W_OK) else Path("/tmp")
    path = folder / f".calibration.{os.getpid()}"
    block = os.urandom(1 << 20) * 16
    try:
        with path.open("wb") as file:
            for _ in range(FILE_BYTES // len(block)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        with path.open("rb", buffering=0) as file:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            began = time.perf_counter()
            while file.read(len(block)):
                pass
            return FILE_BYTES / (time.perf_counter() - began)
    except OSError:
        return 500e6  # a disk that cannot be written to is not measured: a slow one is assumed
    finally:
        path.unlink(missing_ok=True)


def _cards(device: Device) -> str:
    return ", ".join(card.name for card in device.cards)
