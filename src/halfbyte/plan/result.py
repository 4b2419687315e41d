"""What a plan is made of: lines with a name, bytes and a formula in words; the plan itself; both printable as JSON.

Cost: none; no torch.
"""

from dataclasses import asdict, dataclass, field
from typing import Literal

from halfbyte.system.cards import torch_build
from halfbyte.system.words import duration
from halfbyte.types import Document

GB = 1e9
# Code of the libraries, mapped: all that starting touches, and what a step runs of it, which is all that stays where
# pages can be let go (`system/pages.py`). Measured with a build of torch for CPUs alone: 270 to 327 MB, and 95 to 104.
LIBRARIES_FILE_BYTES, STEP_CODE_BYTES = 330_000_000, 105_000_000
# More where torch is a build for cards, which is what PyPI has for Linux, card or not. Measured: all libraries in,
# torch 2.15.0+cu132 (Python 3.13) beside 2.13.0+cpu, 165 MB private and 517 of files; 2.13.0+cu130 144 and 489.
CARD_BUILD_PRIVATE_BYTES, CARD_BUILD_FILE_BYTES = 165_000_000, 517_000_000
# Lines between what is expected and the upper figure: of the process, and of a micro-batch.
RESERVE, POOL_RESERVE = "heap's reserve", "pool's reserve"
CODE = "libraries, mapped"
NOT_TENSORS = ("CUDA context", "allocator")
ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4}

# private: memory of the process itself; file: pages of a mapped file, which the system can drop and read again;
# device: a card's; disk: what stays on disk.
Where = Literal["private", "file", "device", "disk"]
Recompute = Literal["none", "selective", "full"]
Placement = Literal["resident", "mapped", "streamed", "split", "sharded"]


@dataclass(frozen=True)
class Line:
    """One thing that takes memory, how its bytes were counted, and where that formula is from."""

    name: str
    bytes: int
    how: str
    source: str = ""
    where: Where = "private"


@dataclass(frozen=True)
class Time:
    """Seconds of a step and of the run, each as a range; `source` says what they rest on.

    `reading_s` of a step are spent reading the base from disk; of a streamed base while it computes.
    """

    step_low_s: float
    step_s: float
    step_high_s: float
    steps: int
    source: str
    measured: bool = False
    parts: dict[str, float] = field(default_factory=dict)
    reading_s: float = 0.0
    around: dict[str, float] = field(default_factory=dict)
    """Seconds of the run beside its steps, by what they are spent on."""
    done: int = 0  # steps that an earlier process has made
    forward_s: float = 0.0  # of a token in an evaluation

    @property
    def run_s(self) -> float:
        """Of all steps, whoever makes them."""
        return self.step_s * self.steps

    @property
    def seconds(self) -> float:
        """From the plan to the report: the steps that are left, and what is around them."""
        return self.step_s * (self.steps - self.done) + sum(self.around.values())

    @property
    def line(self) -> str:
        """The seconds and what they go to, as every command says it."""
        parts = {"steps": self.step_s * (self.steps - self.done), **self.around}
        shown = ", ".join(f"{name} {duration(seconds)}" for name, seconds in parts.items())
        return f"about {duration(self.seconds)}: {shown} ({self.source})"


@dataclass(frozen=True)
class Fix:
    """A change that makes a plan fit (`short_bytes` 0) or comes near, and what it costs in time: 1.3 is 30% longer."""

    change: str
    setting: str
    peak_bytes: int
    short_bytes: int
    slower: float


@dataclass(frozen=True)
class Plan:
    """What a run is expected to take, and the choices that follow from it.

    `lines` add up to the peak of a training step, where it computes: in RAM, or on one card (the fullest). `host_lines`
    are RAM beside the cards. `loading`, `evaluating` and `generating` are peaks of their own, in the same place.
    `reasons` has one for each choice, under its name. `tokens_in_micro_batch`: what activations were counted for. It is
    `max_tokens_per_micro_batch`, or less when a whole step is shorter, or more when one example is longer.
    `evaluation_tokens`: of an evaluation's micro-batch, which keeps nothing.
    `busy_file_bytes`: pages of a mapped or streamed base that must be there at once; others stay while there is room.
    `read_bytes`: of the base, read again in a step. `building`: RAM while the base's store is built, once.
    """

    compute_dtype: str
    placement: Placement
    recompute: Recompute
    max_tokens_per_micro_batch: int
    tokens_in_micro_batch: int
    evaluation_tokens: int
    lines: tuple[Line, ...]
    host_lines: tuple[Line, ...]
    disk: tuple[Line, ...]
    loading_bytes: int
    evaluating_bytes: int
    generating_bytes: int
    available_bytes: int
    host_available_bytes: int
    trainable: int
    parameters: int
    time: Time
    reasons: dict[str, str]
    warnings: tuple[str, ...]
    busy_file_bytes: int = 0
    read_bytes: int = 0
    building: tuple[Line, ...] = ()
    fixes: tuple[Fix, ...] = ()

    @property
    def gradient_checkpointing(self) -> bool:
        return self.recompute != "none"

    @property
    def step_bytes(self) -> int:
        return sum(line.bytes for line in self.lines)

    @property
    def peak_bytes(self) -> int:
        """The upper figure: the most at any time, of a step, of loading, of an evaluation, of building the store."""
        building = 0 if self.host_lines else self.building_bytes  # in RAM
        return max(self.step_bytes, self.loading_bytes, self.evaluating_bytes, building)

    @property
    def expected_bytes(self) -> int:
        """The same without reserves."""
        return max(
            self.step_bytes - self.line(POOL_RESERVE), self.peak_bytes if self.peak_bytes > self.step_bytes else 0
        ) - self.line(RESERVE)

    @property
    def building_bytes(self) -> int:
        return sum(line.bytes for line in self.building)

    @property
    def micro_batch_bytes(self) -> int:
        """What is there only while a micro-batch runs."""
        passing = ("activations", "backward of a layer", "logits", "dequantised weight", "allocator", POOL_RESERVE)
        return sum(map(self.line, passing))

    @property
    def private_bytes(self) -> int:
        """What cannot be dropped: a step's lines without pages of files."""
        return sum(line.bytes for line in self.lines if line.where != "file")

    @property
    def allocated_bytes(self) -> int:
        """Of a step on a card, what torch counts as allocated: no driver, and nothing of what its allocator keeps."""
        return sum(line.bytes for line in self.lines if line.where == "device" and line.name not in NOT_TENSORS)

    @property
    def file_bytes(self) -> int:
        return self.step_bytes - self.private_bytes

    @property
    def short_bytes(self) -> int:
        """How much is missing; 0 where the plan fits. Pages of files count as far as they must be there at once."""
        host = sum(line.bytes for line in self.host_lines)
        return max(0, self.needed_bytes - self.available_bytes, host - self.host_available_bytes)

    @property
    def step_needed_bytes(self) -> int:
        """What a step must have in memory: all but the pages that the kernel may drop and read again."""
        return self.private_bytes + self.busy_file_bytes

    @property
    def needed_bytes(self) -> int:
        """What must be in memory at the worst time, which is the peak without the pages that the kernel may drop."""
        code = self.line(CODE)
        loading = self.loading_bytes - (max(code, LIBRARIES_FILE_BYTES) if code else 0)
        evaluating = self.evaluating_bytes - self.file_bytes + self.busy_file_bytes
        building = 0 if self.host_lines else sum(line.bytes for line in self.building if line.where != "file")
        return max(self.step_needed_bytes, loading, evaluating, building)

    @property
    def memory_line(self) -> str:
        """The upper figure and what is expected, as every command says it."""
        droppable = self.file_bytes - self.busy_file_bytes
        parts = [f"{self.expected_bytes / GB:.2f} expected"] if self.line(RESERVE) else []
        parts += [f"{droppable / GB:.2f} of it pages of files, which the system may drop"] if droppable > 0 else []
        return f"at most {self.peak_bytes / GB:.2f} GB of {self.available_bytes / GB:.1f} GB free" + (
            f" ({'; '.join(parts)})" if parts else ""
        )

    def line(self, name: str) -> int:
        return sum(line.bytes for line in self.lines if line.name == name)

    def to_json(self) -> Document:
        sums = (name for name, value in vars(Plan).items() if isinstance(value, property))
        return {**{name: getattr(self, name) for name in sums}, **asdict(self)}


def library_lines(private_bytes: int, names: str, file_bytes: int = LIBRARIES_FILE_BYTES) -> tuple[Line, ...]:
    """RAM of the libraries: `private_bytes` with a build of torch for CPUs, more with one for cards; and their code."""
    if torch_build() in ("cuda", "rocm"):
        private_bytes, file_bytes = private_bytes + CARD_BUILD_PRIVATE_BYTES, file_bytes + CARD_BUILD_FILE_BYTES
        names = f"{names}; torch is a build for cards"
    return (
        Line("libraries", private_bytes, names, "measured on a tiny run"),
        Line(CODE, file_bytes, "their code", "measured on a tiny run", "file"),
    )
