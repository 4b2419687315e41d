"""The matrices of a GGUF file rounded anew, so that the file says what the run says, on the run's own rows.

Why: to the nearest level is the best rounding of a weight, and not of what a layer makes of its inputs. In 4 bits it
takes away much of what a short training has won.
What: layer after layer, from inputs that the file's own earlier layers make. The error of a column is made up for by
the columns that are not rounded yet; scales are by ggml's own search, weighted by what a column's error costs. Names,
types and sizes stay: llama.cpp reads a file like any other. (To correct for what earlier layers have lost as well, as
GPTAQ does, fits the few rows of a run too closely: docs/log.) Then the norms, which a file has in fp32, learn in a few
steps to give the logits of the run.
Source: GPTQ (arXiv:2210.17323); `ggml_quantize_chunk`.
Cost: the merged model in memory; three forwards of the rows; for a matrix (O, D) about O D^2 + 2 D^3 products; for the
norms forward and backward of `STEPS` x `ROWS` rows, one at a time.
"""

import ctypes
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf.quants import dequantize
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from halfbyte.base import load
from halfbyte.data.encoding.examples import IGNORED, Example
from halfbyte.errors import ExportError
from halfbyte.models import structure
from halfbyte.models.gguf.blocks import BLOCKS
from halfbyte.models.gguf.header import GgufTensor, read_header
from halfbyte.models.gguf.layouts import ParameterSource, parameter_sources
from halfbyte.models.gguf.reader import GgufReader
from halfbyte.system import device
from halfbyte.types import Model

TOKENS = 8192  # of all rows, at most
STEPS, ROWS = 9, 4  # for the norms
RATE = 2e-3  # it falls to zero
TOP = 256  # of the run's logits: so many tokens, and all others as one
DAMPING = 0.01  # of the mean square of an input, which is added to each
# The largest code of the types whose codes are written one by one; of others whole blocks are rounded.
LARGEST = {"Q4_0": 15, "Q4_1": 15, "Q5_0": 31, "Q5_1": 31, "Q8_0": 255, "Q4_K": 15, "Q5_K": 31}


@cache
def _ggml() -> ctypes.CDLL:
    """ggml's library, which comes with llama.cpp's."""
    spec = find_spec("llama_cpp_py_sync")
    assert spec is not None and spec.origin is not None
    path = next(p for p in sorted(Path(spec.origin).parent.rglob("*ggml-base*")) if p.is_file())
    library = ctypes.CDLL(str(path))
    wide, address = ctypes.c_int64, ctypes.c_void_p
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, address, address, wide, wide, wide, address]
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    return library


def nearest(weight: np.ndarray, kind: str, importance: np.ndarray) -> np.ndarray:
    """Blocks by ggml's own search: uint8 (rows, bytes of a row). `weight`: fp32 (rows, columns). `importance`: of an
    error in each column: (columns,)."""
    number, weights, nbytes = BLOCKS[kind]
    rows, columns = weight.shape
    weight, importance = (np.ascontiguousarray(each, np.float32) for each in (weight, importance))
    out = np.empty((rows, columns // weights * nbytes), np.uint8)
    _ggml().ggml_quantize_chunk(number, weight.ctypes.data, out.ctypes.data, 0, rows, columns, importance.ctypes.data)
    return out


def values_of(blocks: np.ndarray, kind: str) -> np.ndarray:
    return np.asarray(dequantize(blocks, gguf.GGMLQuantizationType[kind]), np.float32)


def put_codes(blocks: np.ndarray, kind: str, codes: np.ndarray) -> None:
    """Write the codes of blocks, one a row: uint8 (rows, bytes of a block), and (rows, weights of one)."""
    if kind == "Q8_0":
        blocks[:, 2:] = codes - np.uint8(128)
        return
    rows, low = len(blocks), codes & 15
    if kind in ("Q4_K", "Q5_K"):
        pairs = low.reshape(rows, 4, 2, 32)
        blocks[:, -128:] = (pairs[:, :, 0] | pairs[:, :, 1] << 4).reshape(rows, 128)
        if kind == "Q5_K":
            bits = (codes >> 4).reshape(rows, 8, 32) << np.arange(8, dtype=np.uint8)[:, None]
            blocks[:, 16:48] = np.bitwise_or.reduce(bits, axis=1)
        return
    blocks[:, -16:] = low[:, :16] | low[:, 16:] << 4
    if kind in ("Q5_0", "Q5_1"):
        blocks[:, -20:-16] = np.packbits(codes >> 4, axis=1, bitorder="little")


def _levels(blocks: np.ndarray, kind: str) -> tuple[Tensor, Tensor]:
    """What code 0 stands for in each column, and what one more adds: each (rows, weights of a block)."""
    ends = []
    for code in (0, 1):
        put_codes(blocks, kind, np.full((len(blocks), BLOCKS[kind][1]), code, np.uint8))
        ends.append(torch.from_numpy(values_of(blocks, kind)))
    return ends[0], ends[1] - ends[0]


def round_matrix(weight: Tensor, moments: Tensor, kind: str) -> tuple[np.ndarray, Tensor]:
    """Blocks, (rows, bytes of a row), and what they stand for, so that with inputs x of `moments` = sum x x^T the
    output is near that of `weight`: fp32 (rows, columns)."""
    size, end = BLOCKS[kind][1], weight.shape[1]
    damped = moments + DAMPING * moments.diagonal().mean().clamp(min=1e-12) * torch.eye(end)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    upper = torch.linalg.cholesky(inverse, upper=True)  # row c: how later columns make up for column c
    left, values = weight.clone(), torch.empty_like(weight)
    parts = list[np.ndarray]()
    for first in range(0, end, size):
        at, rest = slice(first, first + size), slice(first + size, end)
        mine = left[:, at]
        parts.append(nearest(mine.numpy(), kind, (upper.diagonal()[at] ** -2).numpy()))
        if kind in LARGEST:
            values[:, at], errors = _one_by_one(mine, upper[at, at], parts[-1], kind)
        else:
            values[:, at] = torch.from_numpy(values_of(parts[-1], kind))
            errors = torch.linalg.solve_triangular(upper[at, at], mine - values[:, at], upper=True, left=False)
        left[:, rest] -= errors @ upper[at, rest]
    return np.concatenate(parts, axis=1), values


def _one_by_one(weight: Tensor, upper: Tensor, blocks: np.ndarray, kind: str) -> tuple[Tensor, Tensor]:
    """A block of each row, a column after the other; the codes go into `blocks`. Returns its values, and the error of
    each column over `upper`'s diagonal."""
    low, step = _levels(blocks, kind)
    inverse = torch.where(step == 0, 0.0, 1 / step)
    codes, errors = torch.empty_like(weight), torch.empty_like(weight)
    for c in range(weight.shape[1]):
        codes[:, c] = ((weight[:, c] - low[:, c]) * inverse[:, c]).round().clamp(0, LARGEST[kind])
        errors[:, c] = (weight[:, c] - low[:, c] - step[:, c] * codes[:, c]) / upper[c, c]
        weight[:, c + 1 :] -= errors[:, c, None] * upper[c, c + 1 :]
    put_codes(blocks, kind, codes.to(torch.uint8).numpy())
    return torch.from_numpy(values_of(blocks, kind)), errors


def lost(weight: Tensor, values: Tensor, moments: Tensor) -> float:
    """The square of what the outputs differ by."""
    difference = weight - values
    return float(((difference @ moments) * difference).sum())


@dataclass
class _File:
    """A file and the matrices in it that can be rounded anew, by the model's names of their modules."""

    path: Path
    reader: GgufReader
    sources: dict[str, ParameterSource]
    matrices: dict[str, tuple[GgufTensor, ParameterSource]] = field(default_factory=dict)

    @classmethod
    def of(cls, path: Path, model: Model) -> "_File":
        header, shapes = read_header(path), {name: tuple(p.shape) for name, p in model.named_parameters()}
        config, prefix = model.config.get_text_config(), model.base_model_prefix
        sources = parameter_sources(header, config.model_type, shapes, prefix, config.num_hidden_layers)
        file = cls(path, GgufReader(header), sources)
        for name, module in model.named_modules():
            inside = type(module) is nn.Linear and module is not model.get_output_embeddings()
            source = sources.get(f"{name}.weight") if inside else None
            tensor = None if source is None else file.reader.tensors[source.name]
            if source is None or tensor is None or tensor.type not in BLOCKS or source.compose is not None:
                continue
            turn = source.transform
            if source.expert is None and turn.columns is None and turn.value is None and not turn.transposed:
                file.matrices[name] = tensor, source
        return file

    def put(self, name: str, values: Tensor) -> None:
        """Write a parameter that the file has in fp32."""
        source = self.sources[name]
        tensor = self.reader.tensors[source.name]
        turned = source.transform.inverse(values.detach().float().numpy(), self.reader, source.name)
        np.memmap(self.path, np.float32, "r+", tensor.start, turned.shape)[:] = turned

    def values(self, name: str, parameter: Tensor) -> Tensor:
        """A parameter as the file has it, fp32."""
        pieces = [piece.reshape(-1) for piece in self.sources[name].pieces(self.reader)]
        return torch.from_numpy(np.concatenate(pieces)).view(parameter.shape)

    def embed(self, model: Model) -> None:
        """Put the file's embedding into a model."""
        weight = model.get_input_embeddings().weight
        name = next(name for name, parameter in model.named_parameters() if parameter is weight)
        weight.data.copy_(self.values(name, weight))

    def round(self, name: str, module: nn.Linear, moments: Tensor) -> bool:
        """Round a matrix anew, in the file and in `module`; whether its output is nearer than before. `moments`: the
        sum of x x^T over its inputs."""
        tensor, source = self.matrices[name]
        order = source.transform.order
        turn = None if order is None else torch.from_numpy(order(self.reader, tensor.name, tensor.shape[0]))
        there = np.memmap(self.path, np.uint8, "r+", tensor.start, (tensor.shape[0], tensor.nbytes // tensor.shape[0]))
        before = torch.from_numpy(values_of(np.asarray(there), tensor.type))
        weight = module.weight.float()
        in_file = weight if turn is None else torch.empty_like(weight).index_copy_(0, turn, weight)
        blocks, after = round_matrix(in_file, moments, tensor.type)
        better = lost(in_file, after, moments) < lost(in_file, before, moments)
        if better:
            there[:] = blocks
        values = after if better else before
        module.weight.data.copy_(values if turn is None else values[turn])
        return better


Call = tuple[tuple[object, ...], dict[str, object]]
"""What a layer is given beside its hidden states."""


def repair(path: Path, merged: Path, rows: Sequence[Example]) -> str:
    """Round the matrices of a GGUF file anew, in place, and tune its norms; what was done, in words.

    Args:
        merged: the folder of the model that the file was written from. rows: of the run's own.
    Raises:
        ExportError: the model does not fit in memory.
    """
    nbytes = sum(path.stat().st_size for path in merged.glob("*.safetensors"))
    if nbytes > (free := device.ram_available()):
        raise ExportError(
            f"a repair holds the merged model in memory: {nbytes / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free.",
            fix="leave --repair out; the adapter beside its base keeps all: halfbyte export RUN --gguf-lora",
        )
    dtype = load.DTYPES[device.compute_dtype(device.detect())[0]]
    model = AutoModelForCausalLM.from_pretrained(merged, dtype=dtype if dtype != torch.float16 else torch.float32)
    model.eval()
    file = _File.of(path, model)
    wanted = [_Wanted.of(model, row) for row in rows[: STEPS * ROWS]]
    file.embed(model)
    count = _round_all(file, model, [row.input_ids for row in rows])
    norms = _tune(file, model, wanted)
    tokens = sum(len(row.input_ids) for row in rows)
    return (
        f"{count} of {len(file.matrices)} matrices were rounded anew and {norms} norms tuned, on {len(rows)} rows "
        f"({tokens:,} tokens)"
    )


@torch.no_grad()
def _round_all(file: _File, model: Model, rows: Sequence[Sequence[int]]) -> int:
    """Round layer after layer, in the file and in the model; how many matrices were rounded."""
    layers = structure.decoder_layers(model)
    names = {id(module): name for name, module in model.named_modules()}
    calls = [_calls(model, layers, ids) for ids in rows]
    now, count = [each[0][0] for each in calls], 0
    for number, layer in enumerate(layers):
        linears = {n: names[id(m)] for n, m in layer.named_modules() if names[id(m)] in file.matrices}
        moments: dict[str, Tensor] = {}
        for hidden, each in zip(now, calls, strict=True):
            seen = _read(layer, hidden, each[number][1], linears)[1]
            first = {n: next(m for m in seen if seen[m] is x) for n, x in seen.items()}  # some read one tensor
            for n in dict.fromkeys(first.values()):
                x = seen[n].reshape(-1, seen[n].shape[-1]).float()
                moments[n] = x.T @ x if n not in moments else moments[n].addmm_(x.T, x)
        for n in first:
            count += file.round(linears[n], layer.get_submodule(n), moments[first[n]])
        now = [_read(layer, hidden, each[number][1], ())[0] for hidden, each in zip(now, calls, strict=True)]
    return count


@dataclass(frozen=True)
class _Wanted:
    """What the run says after the tokens of a row that come before labelled ones: log-probabilities of its first `TOP`
    choices and of all others together (K, TOP + 1), and which those choices are (K, TOP)."""

    row: Example
    top: Tensor
    choices: Tensor

    @classmethod
    def of(cls, model: Model, row: Example) -> "_Wanted":
        with torch.no_grad():
            top, choices = _logs(model, row).topk(min(TOP, model.config.get_text_config().vocab_size - 1))
        return cls(row, _with_others(top), choices)

    def divergence(self, model: Model) -> Tensor:
        """Kullback-Leibler, from the run, summed over the tokens."""
        return nn.functional.kl_div(
            _with_others(_logs(model, self.row).gather(1, self.choices)), self.top, reduction="sum", log_target=True
        )


def _logs(model: Model, row: Example) -> Tensor:
    at = torch.tensor([i - 1 for i, label in enumerate(row.labels) if i and label != IGNORED])
    with torch.autocast("cpu", torch.bfloat16, enabled=model.dtype == torch.bfloat16):
        logits = model(input_ids=torch.tensor([row.input_ids]), logits_to_keep=at, use_cache=False).logits[0]
    return logits.float().log_softmax(-1)


def _with_others(logs: Tensor) -> Tensor:
    others = (1 - logs.exp().sum(1, keepdim=True)).clamp(min=1e-6).log()
    return torch.cat([logs, others], 1)


def _tune(file: _File, model: Model, rows: Sequence[_Wanted]) -> int:
    """Tune the norms towards the run's logits, `ROWS` rows a step, and write them; how many they are."""
    model.requires_grad_(False)
    names = [name for name, p in model.named_parameters() if p.dim() == 1 and name.endswith("weight")]
    names = [name for name in names if file.reader.tensors[file.sources[name].name].type == "F32"]
    norms = {}
    for name in names:
        home, _, leaf = name.rpartition(".")
        norms[name] = nn.Parameter(file.values(name, model.get_parameter(name)))
        setattr(model.get_submodule(home), leaf, norms[name])
    steps = -(-len(rows) // ROWS)
    optimizer = torch.optim.AdamW(norms.values(), RATE, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: min(1.0, (n + 1) / 3) * (1 - n / steps))
    for first in range(0, len(rows), ROWS):
        some = rows[first : first + ROWS]
        for row in some:
            (row.divergence(model) / sum(len(each.top) for each in some)).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    for name, norm in norms.items():
        file.put(name, norm)
    return len(norms)


class _Enough(Exception):
    """All that is asked of a forward is known."""


def _calls(model: Model, layers: Sequence[nn.Module], ids: Sequence[int]) -> list[tuple[Tensor, Call]]:
    """What each of the first layers is given for a row: its hidden states, of the first alone, and the rest."""
    seen = list[tuple[Tensor, Call]]()

    def hook(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        rest = dict(kwargs)
        hidden = args[0] if args else rest.pop("hidden_states")
        seen.append((hidden if not seen else hidden[:0], (args[1:], rest)))
        if len(seen) == len(layers):
            raise _Enough

    with ExitStack() as hooks, suppress(_Enough):
        for layer in layers:
            hooks.enter_context(_hooked(layer, hook))
        structure.body(model)(input_ids=torch.tensor([list(ids)]), use_cache=False)
    return seen


def _read(layer: nn.Module, hidden: Tensor, call: Call, linears: Iterable[str]) -> tuple[Tensor, dict[str, Tensor]]:
    """A layer's output, and what its matrices of these names are given."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda module, args, kwargs: seen.update({name: args[0]})

    with ExitStack() as hooks:
        for name in linears:
            hooks.enter_context(_hooked(layer.get_submodule(name), keep(name)))
        out = layer(hidden, *call[0], **call[1])
    return (out[0] if isinstance(out, tuple) else out), seen


@contextmanager
def _hooked(module: nn.Module, hook: Callable[..., None]) -> Iterator[None]:
    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
