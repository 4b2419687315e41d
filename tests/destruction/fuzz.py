"""Strangers' files, mutated: no crash, no hang, no large allocation, no file outside the folder, nothing run.

    python -m tests.destruction.fuzz --count 100000 --seed 0
    python -m tests.destruction.fuzz --count 1 --seed 4711    # the one input of that number
    python -m tests.destruction.fuzz --only "gguf blocks" --count 20000

Good files of every kind that a stranger may hand over are cut, spliced, repeated and given hostile bytes, numbers and
values, and read by the function that a command reads them with. Allowed are what it returns, and halfbyte's own errors.
Each input has `LIMIT_S` seconds and `LIMIT_BYTES` of address space above what the process had; whatever is opened
outside the folder, started or connected to is noted by an audit hook.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import signal
import sys
import sysconfig
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import yaml
from benchmarks import fuzz_reader
from safetensors.torch import save_file
from transformers import AutoConfig

from halfbyte.base import load
from halfbyte.base.config import open_tokenizer
from halfbyte.data.reading import files
from halfbyte.data.reading.read import Reader
from halfbyte.errors import HalfbyteError, SourceError
from halfbyte.inference.generate import chat_ids
from halfbyte.models import describe, tensors
from halfbyte.models.gguf import blocks, convert
from halfbyte.models.gguf import header as gguf_header
from halfbyte.models.gguf.architectures import config_of
from halfbyte.models.gguf.layouts import parameter_sources
from halfbyte.models.gguf.reader import GgufError
from halfbyte.models.sources import safetensors
from halfbyte.models.sources.checkpoint import Checkpoint
from halfbyte.quant import formats
from halfbyte.recipe import adapter, adapter_folder
from halfbyte.recipe.data import Data
from halfbyte.recipe.file import load_recipe
from halfbyte.recipe.schema import Quant
from tests import tiny_run
from tests.base import test_gguf_file

# Types and architectures: rows and columns in another order, transposes, fused tensors, experts.
IN_BLOCKS = (("Q4_0", "llama"), ("Q8_0", "gpt2"), ("Q5_1", "qwen35"), ("MXFP4", "gpt-oss"), ("Q4_1", "deepseek2-v3"))
LIMIT_S, LIMIT_BYTES = 5.0, 1_000_000_000
HOSTILE: tuple[Any, ...] = (
    None, True, -1, 0, 1, 2**31, 2**63, 2**64, 10**300, 1e308, -0.5, "", "x" * 10_000, "../../etc/passwd",
    "/etc/shadow",
    "\x00", "\ud800", "(a+)+$", [], {}, [[]], ["q"] * 1000, {"a": {"b": {}}}, "!!python/object/apply:os.system [x]",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{% for i in range(99999) %}{{ 'a' * 99999 }}{% endfor %}",
    "http://127.0.0.1:9/x", "os", "builtins.eval",
)  # fmt: skip
NUMBERS = (0, 1, 8, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
TEMPLATES = (
    tiny_run.CHATML,
    (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content | trim }} [/INST]{% else %}"
        "{{ raise_exception('no ' ~ m.role) if loop.index0 > 9 else m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    ),
    (
        "{% set ns = namespace(n=0, s='') %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
        "{% set ns.s = ns.s ~ m.content %}{% endfor %}{{ ns.s.split('a')[-1] | tojson(indent=2) }}{{ '%s' % ns.n }}"
        "{{ strftime_now('%Y') }}"
    ),
)


class Hang(BaseException):
    """An input took longer than it may."""


class Seeds:
    """Good files, and what reads each kind."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = tiny_run.checkpoint(folder / "model")
        self.tokenizer = tiny_run.tokenizer()
        self.tokenizer_json = (self.model / "tokenizer.json").read_bytes()
        self.config = json.loads((self.model / "config.json").read_text())
        self.rows = fuzz_reader.seeds()
        tiny_run.recipe(folder / "of", model=self.model)
        self.recipe = yaml.safe_load((folder / "of" / "recipe.yaml").read_text())
        (folder / "adapter").mkdir()
        save_file({"w.lora_A.weight": torch.zeros(4, 8)}, folder / "adapter" / "adapter_model.safetensors")
        self.adapter = {
            "peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "bias": "none",
            "rank_pattern": {"q_proj": 2}, "alpha_pattern": {}, "base_model_name_or_path": "m", "auto_mapping": None,
        }  # fmt: skip
        self.weights = (self.model / "model.safetensors").read_bytes()
        self.gguf = self._gguf(folder / "seed.gguf")
        self.blocks = [self._in_blocks(folder / kind, kind, name) for kind, name in IN_BLOCKS]

    @staticmethod
    def _in_blocks(folder: Path, kind: str, name: str) -> Blocks:
        """A file, and all but its weights as they lie in the cache; tokenizers have a seed of their own."""
        folder.mkdir()
        file, _ = test_gguf_file.written(folder, name, gguf.GGMLQuantizationType[kind])
        header = gguf_header.read_header(file)
        config = config_of(header)
        config.save_pretrained(folder)
        blocks.write(folder, header, blocks.describe(header, *described(header, config)))
        seed = Blocks(file, file.read_bytes(), header.header_bytes, (folder / blocks.MANIFEST).read_text())
        open_and_read(seed, config)  # compiles what it needs
        return seed

    @staticmethod
    def _gguf(path: Path) -> bytes:
        writer = gguf.GGUFWriter(str(path), "llama")
        writer.add_block_count(1)
        writer.add_token_list(["a", "b", "c"])
        writer.add_array("tokenizer.ggml.scores", [0.0, 1.0, 2.0])
        writer.add_tensor("token_embd.weight", np.zeros((3, 32), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path.read_bytes()


@dataclass(frozen=True)
class Blocks:
    """A good file whose own blocks are a base: its bytes, of which the first so many are its header; its manifest."""

    file: Path
    data: bytes
    header_bytes: int
    manifest: str


def described(header: Any, config: Any) -> tuple[Any, Any]:
    """Shapes and sources of every parameter, as the conversion finds them."""
    model = convert._empty(config)
    shapes, layers = convert.shapes_of(model), config.num_hidden_layers
    return shapes, parameter_sources(header, config.model_type, shapes, model.base_model_prefix, layers)


def open_and_read(seed: Blocks, config: Any) -> None:
    """What opening a base does before `from_pretrained`, and every number of its matrices."""
    checkpoint = Checkpoint(seed.file.parent, "m", None, "gguf", blocks=(seed.file,))
    opened = load.open_blocks(checkpoint, config, Quant(type="gguf"), torch.float32)
    shapes = {name: spec.shape for name, spec in ((s.name, s) for s in tensors.read_checkpoint(seed.file.parent))}
    in_blocks = formats.FORMATS["gguf"]
    for name in [name for name in opened.state if len(shapes.get(name, ())) == 2 and f"{name}.layout" in opened.state]:
        parts = {suffix: opened.state[f"{name}{suffix}"] for suffix in ("", ".layout", ".order", ".columns")
                 if f"{name}{suffix}" in opened.state}  # fmt: skip
        in_blocks.weight(in_blocks.layer(parts, shapes[name], Quant(type="gguf"), torch.float32), torch.float32)


def bytes_changed(data: bytes, draw: random.Random) -> bytes:
    for _ in range(draw.choice((0, 1, 1, 2, 3, 8))):
        at = draw.randrange(len(data) + 1)
        size = draw.choice((1, 1, 2, 5, 30, len(data)))
        what = draw.randrange(7)
        if what == 0:
            data = data[:at]
        elif what == 1:
            data = data[:at] + data[at + size :]
        elif what == 2:
            data = data[:at] + draw.choice(fuzz_reader.STRANGE) + data[at + size * draw.randrange(2) :]
        elif what == 3:
            data = data[:at] + bytes([draw.randrange(256)]) + data[at + 1 :]
        elif what == 4:
            data = data[:at] + data[at : at + size] * draw.choice((2, 50)) + data[at:]
        else:
            width = draw.choice((4, 8))
            number = draw.choice(NUMBERS) % 2 ** (8 * width)
            data = data[:at] + number.to_bytes(width, "little") + data[at + width :]
    return data


def value_changed(value: Any, draw: random.Random) -> Any:
    """A document with some of its values replaced."""
    value = json.loads(json.dumps(value))
    for _ in range(draw.choice((1, 1, 2, 4))):
        place = value
        while True:
            keys = [*place] if isinstance(place, dict) else [*range(len(place))]
            if not keys:
                break
            key = draw.choice(keys)
            if isinstance(place[key], dict | list) and place[key] and draw.random() < 0.8:
                place = place[key]
                continue
            place[key] = deepcopy(draw.choice(HOSTILE))  # a later change goes into it
            break
    return value


def document(value: Any, draw: random.Random) -> bytes:
    made = json.dumps(value_changed(value, draw) if draw.random() < 0.7 else value, ensure_ascii=draw.random() < 0.5)
    data = made.encode("utf-8", "surrogatepass")
    return data if draw.random() < 0.6 else bytes_changed(data, draw)


def header_of(seeds: Seeds, draw: random.Random) -> None:
    path = seeds.folder / "x.safetensors"
    data = seeds.weights
    if draw.random() < 0.5:
        length = int.from_bytes(data[:8], "little")
        text = document(json.loads(data[8 : 8 + length]), draw)
        data = len(text).to_bytes(8, "little") + text + data[8 + length :]
    path.write_bytes(bytes_changed(data, draw) if draw.random() < 0.7 else data)
    safetensors.read_header(path)


def index(seeds: Seeds, draw: random.Random) -> None:
    path = seeds.folder / safetensors.INDEX
    path.write_bytes(document({"metadata": {}, "weight_map": {"a": "x.safetensors", "b": "y.safetensors"}}, draw))
    safetensors.indexed_files(path)


def gguf_file(seeds: Seeds, draw: random.Random) -> None:
    path = seeds.folder / "x.gguf"
    path.write_bytes(bytes_changed(seeds.gguf, draw))
    gguf_header.read_header(path)


def gguf_blocks(seeds: Seeds, draw: random.Random) -> None:
    """A file that is opened in its own blocks: a new one; one that was edited after its manifest was written, with the
    same size and time; and a manifest that was edited."""
    seed, what = draw.choice(seeds.blocks), draw.randrange(4)
    manifest = seed.file.parent / blocks.MANIFEST
    text, head = seed.manifest, seed.header_bytes
    manifest.write_text(text)  # an input that ran over its time may have ended before it was put back
    seed.file.write_bytes(seed.data)
    try:
        if what == 3:
            manifest.write_bytes(document(json.loads(text), draw))
            tensors.read_checkpoint(seed.file.parent)
            return
        in_header = draw.random() < 0.8
        changed = (
            bytes_changed(seed.data[:head], draw) + seed.data[head:] if in_header else bytes_changed(seed.data, draw)
        )
        seed.file.write_bytes(changed)
        if what == 2:
            open_and_read(seed, AutoConfig.from_pretrained(seed.file.parent))
            return
        try:
            header = gguf_header.read_header(seed.file)
            blocks.describe(header, *described(header, config_of(header)))
        except GgufError as error:  # the child that converts says it in one line
            raise SourceError(str(error)) from error
        open_and_read(seed, config_of(header))
    finally:
        seed.file.write_bytes(seed.data)
        manifest.write_text(text)


def config(seeds: Seeds, draw: random.Random) -> None:
    path = seeds.model / "config.json"
    path.write_bytes(document(seeds.config, draw))
    try:
        describe.describe(str(seeds.model))
    finally:
        path.write_text(json.dumps(seeds.config))


def adapter_config(seeds: Seeds, draw: random.Random) -> None:
    path = seeds.folder / "adapter" / "adapter_config.json"
    path.write_bytes(document(seeds.adapter, draw))
    adapter.lora_settings(seeds.folder / "adapter")


def passport(seeds: Seeds, draw: random.Random) -> None:
    belongs = {"base": {"id": "m", "revision": None, "content": "ab"}, "quant": {"type": "nf4"}, "tokenizer": "x"}
    path = seeds.folder / "adapter" / adapter_folder.PASSPORT
    path.write_bytes(document({"format": 1, "belongs_to": belongs}, draw))
    adapter_folder.read_passport(seeds.folder / "adapter")


def recipe(seeds: Seeds, draw: random.Random) -> None:
    path = seeds.folder / "x.yaml"
    if draw.random() < 0.5:
        path.write_bytes(document(seeds.recipe, draw))
    else:
        path.write_bytes(bytes_changed(yaml.safe_dump(seeds.recipe).encode(), draw))
    load_recipe(path)


def tokenizer(seeds: Seeds, draw: random.Random) -> None:
    path = seeds.model / "tokenizer.json"
    path.write_bytes(
        bytes_changed(seeds.tokenizer_json, draw)
        if draw.random() < 0.5
        else document(json.loads(seeds.tokenizer_json), draw)
    )
    try:
        open_tokenizer(Checkpoint(seeds.model, "m", None, "folder"))
    finally:
        path.write_bytes(seeds.tokenizer_json)


def template(seeds: Seeds, draw: random.Random) -> None:
    text = bytes_changed(draw.choice(TEMPLATES).encode(), draw)
    if draw.random() < 0.2:
        text += draw.choice([v for v in HOSTILE if isinstance(v, str)]).encode("utf-8", "replace")
    seeds.tokenizer.chat_template = text.decode("utf-8", "replace")
    chat_ids(seeds.tokenizer, [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])


def rows(seeds: Seeds, draw: random.Random) -> None:
    data, ending = fuzz_reader.mutated(seeds.rows, draw)
    path = seeds.folder / f"rows{ending}"
    path.write_bytes(data)
    try:
        for _ in Reader(files.find(str(path)), Data(train=str(path))):
            pass
    finally:
        path.unlink()


READERS: dict[str, tuple[Callable[[Seeds, random.Random], None], int]] = {
    "safetensors": (header_of, 20), "index": (index, 8), "gguf": (gguf_file, 20),
    "gguf blocks": (gguf_blocks, 10), "config.json": (config, 10),
    "adapter_config.json": (adapter_config, 10), "passport": (passport, 4), "recipe": (recipe, 4),
    "tokenizer": (tokenizer, 4), "template": (template, 10), "rows": (rows, 10),
}  # fmt: skip


class Watched:
    """What was done outside the folder while it is on."""

    STARTS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "socket.connect", "pty.spawn",
              "socket.getaddrinfo", "ctypes.dlopen", "os.startfile")  # fmt: skip

    def __init__(self, folder: Path) -> None:
        own = sysconfig.get_paths()
        self.inside = (str(folder), sys.prefix, sys.base_prefix, own["stdlib"], "/proc/", "/sys/", "/dev/",
                       str(Path(__file__).parents[2]), "/usr/share/zoneinfo", "/etc/localtime", "/usr/lib")  # fmt: skip
        self.on, self.seen = False, list[str]()
        sys.addaudithook(self.hook)

    def hook(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event in self.STARTS:
            self.seen.append(f"{event} {str(args)[:200]}")
        elif event == "open" and isinstance(args[0], str | os.PathLike):
            path = os.path.abspath(args[0])
            if not path.startswith(self.inside):
                self.seen.append(f"open {path}")


@contextmanager
def in_bounds(watched: Watched) -> Any:
    began, waits = time.process_time(), [True]

    def late(*_: object) -> None:
        if waits[0] and time.process_time() - began < LIMIT_S:  # once more: others may have stopped this process
            waits[0] = False
            signal.setitimer(signal.ITIMER_REAL, LIMIT_S)
            return
        raise Hang(f"over {LIMIT_S} s")

    with open("/proc/self/statm", encoding="ascii") as file:
        mapped = int(file.read().split()[0]) * resource.getpagesize()
    limits, before = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGALRM, late)
    resource.setrlimit(resource.RLIMIT_AS, (mapped + LIMIT_BYTES, limits[1]))
    signal.setitimer(signal.ITIMER_REAL, LIMIT_S + 1.0)  # a template's own limit is that long
    watched.on, watched.seen = True, []
    try:
        yield
    finally:
        watched.on = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, limits)


def fuzz(
    count: int, seed: int, folder: Path, only: str | None = None
) -> tuple[Counter[str], list[tuple[int, str]], dict[str, float]]:
    """What became of `count` inputs (of one kind only); those that failed, with their number; a kind's longest time."""
    seeds, watched = Seeds(folder), Watched(folder)
    names, weights = [*READERS], [share for _, share in READERS.values()]
    outcomes: Counter[str] = Counter()
    failed: list[tuple[int, str]] = []
    longest: dict[str, float] = {}
    for number in range(seed, seed + count):
        draw = random.Random(number)
        name = draw.choices(names, weights)[0] if only is None else only
        began = time.perf_counter()
        try:
            with in_bounds(watched):
                READERS[name][0](seeds, draw)
            outcomes["read"] += 1
        except HalfbyteError as error:
            outcomes["refused"] += 1
            if not str(error).strip() or "Traceback" in str(error):
                failed.append((number, f"{name}: an error that says nothing: {error}"))
        except (Hang, Exception):
            failed.append((number, f"{name}: {traceback.format_exc(limit=-8)[:3000]}"))
        if watched.seen:
            failed.append((number, f"{name}: {watched.seen[:5]}"))
        took = time.perf_counter() - began
        longest[name] = max(longest.get(name, 0.0), took)
        outcomes[f"of {name}"] += 1
    return outcomes, failed, longest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=READERS)
    given = parser.parse_args()
    began = time.perf_counter()
    out = os.fdopen(os.dup(1), "w")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)  # what Rust says when it panics
    with tempfile.TemporaryDirectory() as folder:
        outcomes, failed, longest = fuzz(given.count, given.seed, Path(folder), given.only)
    kinds = Counter(text.splitlines()[-1][:160] for _, text in failed)
    for number, text in failed[:6]:
        print(f"--- input {number}\n{text}", file=out)
    for text, times in kinds.most_common(12):
        print(f"{times} x {text}", file=out)
    told = ", ".join(f"{n:,} {name}" for name, n in sorted(outcomes.items()))
    slow = ", ".join(f"{name} {s:.2f}" for name, s in longest.items())
    took = time.perf_counter() - began
    print(
        f"{given.count:,} inputs from {given.seed} in {took:.0f} s: {told}; {len(failed)} failed; longest s: {slow}",
        file=out,
    )
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
