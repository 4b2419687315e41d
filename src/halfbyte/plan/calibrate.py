"""What this machine does in a second: products, attention, passes over memory, dequantising, LoRA's dropout, a disk.

Why: time follows from these figures, and they differ tenfold between machines that look alike.
What: the best of several short tries, by `halfbyte doctor` or before the first training that takes minutes, kept in
halfbyte's cache. What is measured beside other load is used once and not kept; finished runs correct what is kept.
Source: Linux `proc(5)` (`schedstat`: how long our threads waited for a core) and `/proc/pressure/cpu`.
Cost: about three seconds once; reading the cache imports no torch.
"""

import contextlib
import hashlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING

from halfbyte.plan.result import Time
from halfbyte.plan.timing import Rates, pairs_of_a_token
from halfbyte.runs.folder import read_json
from halfbyte.system import files, usage
from halfbyte.system.device import Device, core_share
from halfbyte.system.libraries import version
from halfbyte.system.platforms import calls
from halfbyte.system.threads import asked_threads

if TYPE_CHECKING:
    import torch

SECONDS_EACH = 0.4
FILE_BYTES = 256_000_000
MEMORY_BYTES = 128_000_000  # more than any cache holds
FORMAT = 7
DROPPED = 1 << 20  # numbers of a layer's input
MIN_TRIES, CALLS_ON_CARD = 5, 8
LONG_S = 2.0  # a try that takes so long is not repeated, as products in bf16 where the processor has none
# Above these the machine was not ours alone. Threads of an idle machine wait for 1 to 2% of their time.
BUSY_SHARE, BUSY_PRESSURE = 0.08, 0.25
BUSY_SPREAD = 1.5
MAX_CORRECTION_OF_A_RUN = 2.0  # by one run, before the square root: a run is one model and one kind of rows
CORRECTION_LIMIT = 4.0


def cached(device: Device, dtype: str) -> Rates | None:
    """The rates of this machine, if they were measured under the same conditions."""
    path, names = path_of(device, dtype), {field.name for field in fields(Rates)}
    values = read_json(path)
    whole = files.is_sealed(values) and values.get("of", path.stem) == path.stem and names <= values.keys()
    return Rates(**{name: values[name] for name in names}) if whole else None


def path_of(device: Device, dtype: str) -> Path:
    """The file that holds the rates of this processor with so many threads."""
    cards = ", ".join(card.name for card in device.cards)
    share = core_share()  # a quota of 1.5 cores has two threads, which are slower than on two cores
    many = f"{threads(device)}{f' of {share:g}' if share < threads(device) else ''}"
    what = f"{FORMAT} {device.cpu} {' '.join(device.isa)} {many} {dtype} {version('torch')} {cards}"
    return files.cache_dir() / "calibration" / f"{hashlib.sha256(what.encode()).hexdigest()[:16]}.json"


def threads(device: Device) -> int:
    """Threads that torch will use, once `threads.configure` has been called."""
    asked = asked_threads()
    return asked[0] if asked else device.cores


def ensure(device: Device, dtype: str, *, say: Callable[[str], None] = lambda text: None, anew: bool = False) -> Rates:
    """The kept rates, or new ones (always with `anew`), kept unless the machine was busy."""
    if not anew and (rates := cached(device, dtype)) is not None:
        return rates
    say("calibrating this machine (a few seconds)")
    rates = measure(device, dtype)
    if rates.busy:
        say(f"the machine is busy ({rates.busy}), so times are a guess; this calibration is not kept")
    else:
        _save(device, dtype, rates)
    return rates


def correct(device: Device, dtype: str, time_planned: Time, step_s: float, waited_share: float | None) -> Rates | None:
    """Correct the kept rates by a finished run: half of the way from planned to measured seconds a step.

    Args:
        time_planned: of the run's plan. step_s: of a usual step. waited_share: of the time that the run's threads
            wanted a core, the share in which they waited for one; None if it is not known.

    Returns:
        The new rates; None where the run tells nothing: another load beside it, a plan from other rates, or a base that
        is read from disk.
    """
    before = cached(device, dtype)
    if before is None or before.source != time_planned.source or time_planned.reading_s:
        return None
    if waited_share is None or waited_share > BUSY_SHARE or not min(step_s, time_planned.step_s) > 0:
        return None
    ratio = min(max(step_s / time_planned.step_s, 1 / MAX_CORRECTION_OF_A_RUN), MAX_CORRECTION_OF_A_RUN)
    correction = min(max(before.correction * ratio**0.5, 1 / CORRECTION_LIMIT), CORRECTION_LIMIT)
    first = before.source.partition("; corrected")[0]
    source = f"{first}; corrected {date.today()} by finished runs: times {correction:.2f}"
    rates = replace(before, correction=correction, source=source)
    _save(device, dtype, rates)
    return rates


def _save(device: Device, dtype: str, rates: Rates) -> None:
    path = path_of(device, dtype)
    with contextlib.suppress(OSError):  # a cache that cannot be written costs the same seconds again
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write(path, files.as_json(files.seal({**asdict(rates), "of": path.stem})))


def measure(device: Device, dtype: str) -> Rates:
    """Measure, on torch's own threads: the best of some tries each."""
    import torch

    kind = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    before, tries = usage.cpu_time(), Tries(device.main)
    with torch.no_grad():
        main = _main_rates(tries, kind)
        dropped = _dropout_rate(tries, kind) if device.kind == "cpu" else 0.0
        integers = _integer_rate(tries) if device.kind == "cpu" else 0.0
    after = usage.cpu_time()
    waited = after.since(before).waited_share if before and after else None
    busy = load_seen(waited, tries.spread, usage.pressure() if waited is None else None)
    source = f"calibrated {date.today()}: {threads(device)} threads, {dtype}{', beside other load' if busy else ''}"
    return Rates(*main, source=source, busy=busy, dropped=dropped, integer_ops=integers)


def load_seen(waited_share: float | None, spread: float, pressure: float | None = None) -> str:
    """What shows that others used the cores while this machine was measured; empty where nothing does.

    Args:
        waited_share: of our threads' time. spread: the median try over the best. pressure: of the whole machine, for
            where our own waiting is not known.
    """
    if (waited_share or 0.0) > BUSY_SHARE:
        return f"its threads waited for a core {waited_share:.0%} of the time"
    if waited_share is None and (pressure or 0.0) > BUSY_PRESSURE:
        return f"some process waited for a core {pressure:.0%} of the time"
    if spread > BUSY_SPREAD:
        return f"the usual try took {spread:.1f} times as long as the best"
    return ""


class Tries:
    """Runs something on `where` for a moment, several times; `spread` is the largest median over best of all of it."""

    def __init__(self, where: str) -> None:
        self.where, self.spread = where, 1.0

    def best(self, call: Callable[[], object]) -> float:
        """Seconds of the fastest call: what slows another one down is not this machine."""
        self._once(call)
        taken, ends = [self._once(call)], time.perf_counter() + SECONDS_EACH
        while taken[0] < LONG_S and (len(taken) < MIN_TRIES or time.perf_counter() < ends):
            taken.append(self._once(call))
        self.spread = max(self.spread, statistics.median(taken) / min(taken))
        return min(taken)

    def _once(self, call: Callable[[], object]) -> float:
        """On a card the mean of several, as one may be over before the host has seen it begin."""
        times = 1 if self.where == "cpu" else CALLS_ON_CARD
        self._wait()
        began = time.perf_counter()
        for _ in range(times):
            call()
        self._wait()
        return (time.perf_counter() - began) / times

    def _wait(self) -> None:
        if self.where != "cpu":
            import torch

            torch.get_device_module(self.where.partition(":")[0]).synchronize()


def _main_rates(tries: Tries, kind: "torch.dtype") -> tuple[float, float, float, float, float]:
    """What is done in a second, in the order of `Rates`; products are the engine's, not always torch's."""
    import torch

    from halfbyte.layers.kernels.cpu.matmul import into
    from halfbyte.quant import bnb
    from halfbyte.quant.dequantise import dequantised

    size = 2048 if tries.where == "cpu" else 8192
    a, b, out = (torch.ones(size, size, dtype=kind, device=tries.where) for _ in range(3))
    long = torch.ones(MEMORY_BYTES // kind.itemsize, dtype=kind, device=tries.where)
    layer = bnb.quantised_linear(torch.ones(size, size, dtype=kind), tries.where)
    return (
        2 * size**3 / tries.best(lambda: into(out, a, b)),
        2 * long.nbytes / tries.best(lambda: long.mul_(1)),
        size * size / tries.best(lambda: dequantised(layer)),
        _attention_rate(tries, kind),
        _disk_rate(),
    )


def _integer_rate(tries: Tries) -> float:
    """Operations a second of int8 products; 0 where the engine takes none."""
    import torch

    from halfbyte.layers.kernels.cpu.integer import products as integer

    if integer.why_not():
        return 0.0
    size = 2048
    a, out = torch.ones(size, size, dtype=torch.int8), torch.empty(size, size, dtype=torch.int32)
    return 2 * size**3 / tries.best(lambda: torch._int_mm(a, a, out=out))


def _dropout_rate(tries: Tries, kind: "torch.dtype") -> float:
    """Numbers a second that LoRA's dropout passes over, by the engine's own function; 0 where it is another one's."""
    import torch

    from halfbyte.layers.kernels.cpu import available
    from halfbyte.layers.lora_linear import drop

    x = torch.ones(DROPPED, dtype=kind)
    return DROPPED / tries.best(lambda: drop(x, 0.05, 1)) if available(x) else 0.0


def _attention_rate(tries: Tries, kind: "torch.dtype") -> float:
    """Forward and backward of 8 heads of 64 over 4 examples of 256 tokens, by the engine's own function; on a card of
    32 heads of 128 over 8 examples of 1024."""
    import torch

    from halfbyte.layers import attention
    from halfbyte.layers.kernels import card

    lengths, heads, d = ((256,) * 4, 8, 64) if tries.where == "cpu" else ((1024,) * 8, 32, 128)
    total = sum(lengths)
    flop = 14 * sum(n * pairs_of_a_token(n) for n in lengths) * heads * d
    with torch.enable_grad():
        q, k, v = (torch.randn(total, heads, d, device=tries.where).to(kind).requires_grad_() for _ in range(3))
        scale = d**-0.5
        if attention.takes(q, k, v):
            return flop / tries.best(lambda: attention.attention(q, k, v, lengths, scale, None, None).sum().backward())
        if card.takes(q, k, v, card.kernel_name()):
            pack = card.PackLengths(lengths, card.kernel_name())
            return flop / tries.best(lambda: card.attention(q, k, v, pack, scale, None).sum().backward())
        shaped = [
            x.detach().view(len(lengths), lengths[0], heads, d).transpose(1, 2).requires_grad_() for x in (q, k, v)
        ]
        attend = torch.nn.functional.scaled_dot_product_attention
        return flop / tries.best(lambda: attend(*shaped, is_causal=True).sum().backward())


def _disk_rate() -> float:
    """Bytes a second of reading a new file, past the page cache where the system lets go of it."""
    folder = files.cache_dir() if os.access(files.cache_dir(), os.W_OK) else Path(tempfile.gettempdir())
    path = folder / f".calibration.{os.getpid()}"
    block = os.urandom(1 << 20) * 16
    try:
        with path.open("wb") as file:
            file.writelines([block] * (FILE_BYTES // len(block)))
            file.flush()
            os.fsync(file.fileno())
        with path.open("rb", buffering=0) as file:
            calls.advise(file.fileno(), "DONTNEED")
            began = time.perf_counter()
            while file.read(len(block)):
                pass
            return FILE_BYTES / (time.perf_counter() - began)
    except OSError:
        return 500e6  # a disk that cannot be written to is not measured: a slow one is assumed
    finally:
        path.unlink(missing_ok=True)
