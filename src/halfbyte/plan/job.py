"""A `Job`: what a plan follows from, as plain numbers. The model, its adapters, the rows and the recipe.

Cost: one walk over the tensors; no torch.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from halfbyte.data import pack
from halfbyte.data.mixture import Mixture
from halfbyte.data.prefixes import Tree
from halfbyte.errors import AdapterError
from halfbyte.models import tensors
from halfbyte.models.lora_sites import Site, leaf_of, saved_tensors, sites, trainable
from halfbyte.models.sources.checkpoint import Checkpoint, beside_bytes, tokenizer_bytes
from halfbyte.plan.layer import NO_SCORES, Layer, layer_of
from halfbyte.plan.result import ITEMSIZE
from halfbyte.plan.store_build import StoreBuild
from halfbyte.quant import policy
from halfbyte.recipe.schema import Recipe
from halfbyte.system import kernel_cache
from halfbyte.system.device import Device, compute_dtype, may_use_integers
from halfbyte.types import Model

Sizes = Sequence[int] | NDArray[np.int64]

# Without rows at hand: a common shape of instruction data, told as an assumption.
ASSUMED_ROWS = 1000
ATTENTION_NEEDS = {"bf16": "avx512_bf16", "fp32": "avx2"}  # layers/kernels/cpu: of `whole_attention`, by dtype
FILLED_TO = 16  # layers/packing.py: a micro-batch has a multiple of so many tokens


@dataclass(frozen=True, eq=False)
class Rows:
    """Of each row its tokens, and how many carry a label; of held-out rows their tokens. All become (rows,) int64."""

    lengths: Sizes
    labelled: Sizes = ()
    evaluated: Sizes = ()
    assumed: bool = False
    mixture: Mixture | None = None

    def __post_init__(self) -> None:
        for name in ("lengths", "labelled", "evaluated"):
            object.__setattr__(self, name, np.asarray(getattr(self, name), dtype=np.int64))

    @classmethod
    def assume(cls, length: int) -> Self:
        """Rows that all have `length` tokens, all of them labelled."""
        return cls((length,) * ASSUMED_ROWS, assumed=True)

    @cached_property
    def descending(self) -> NDArray[np.int64]:
        return np.sort(self.lengths)[::-1]

    @property
    def longest(self) -> int:
        return int(self.descending[0]) if len(self.lengths) else 1

    @cached_property
    def tokens(self) -> int:
        return int(np.sum(self.lengths))

    @property
    def mean(self) -> float:
        return self.tokens / max(1, len(self.lengths))

    @cached_property
    def mean_of_a_token(self) -> float:
        """The mean length of the row that a token lies in."""
        return float(np.square(self.lengths).sum()) / max(1, self.tokens)

    @cached_property
    def labelled_share(self) -> float:
        return int(np.sum(self.labelled)) / max(1, self.tokens) if len(self.labelled) else 1.0

    def in_groups(self, count: int, most: int) -> Self:
        """Answers to the rows' prompts, `count` to each, as long as the expected one; one of them has `most` tokens."""
        prompts, answers = (np.repeat(n, count) for n in (np.subtract(self.lengths, self.labelled), self.labelled))
        answers = np.where(np.arange(len(answers)) == prompts.argmax(), most, answers)
        return replace(self, lengths=prompts + answers, labelled=answers, mixture=None)

    def cut(self, length: int) -> Self:
        """The same rows, none longer than `length`."""
        lengths, labelled, evaluated = (np.minimum(n, length) for n in (self.lengths, self.labelled, self.evaluated))
        return replace(self, lengths=lengths, labelled=labelled, evaluated=evaluated)


@dataclass(frozen=True)
class ObjectiveCost:
    """What an objective (`objectives/`) takes beside a forward and a backward of its rows, and beside a loss that is
    made of its logits a chunk at a time (`layers/loss.py`)."""

    whole_logits: int = 0  # tensors of logits, (labelled tokens, vocabulary) in fp32, that exist at once in its loss
    forwards: float = 0.0  # more forwards without gradients for each micro-batch, such as 1 of a reference model


@dataclass(frozen=True)
class Job:
    """One training to be planned. `mappable`: the base can lie in a mapped file as it is computed with (a store, or a
    checkpoint in that dtype)."""

    recipe: Recipe
    specs: tuple[tensors.TensorSpec, ...]
    facts: tensors.Facts
    sites: tuple[Site, ...]
    rows: Rows
    dtype: str
    mappable: bool = False
    stored: bool = False  # the base is quantised here, once, into a store; also where it computes on a card
    kernels: bool = True  # the engine's kernels run here; else torch's own operations
    integers: bool = False  # frozen products may be of 8-bit integers here (`quant.compute`)
    whole_attention: bool = True  # attention is one kernel here, whose scores stay in cache (`kernels/cpu/attention/`)
    packed: bool = True  # examples share a micro-batch; False where that is not proven for the model
    beside_bytes: int | None = None  # of the tokenizer and what else a store copies; None where they are not at hand
    uncompiled: tuple[str, ...] = ()  # kernels that this machine has yet to compile (`system.kernel_cache`)
    tokenizer_bytes: int = 0  # of a tokenizer that is written beside the adapter, as it is not the base's own
    tokenizer_json_bytes: int | None = None  # of the tokenizer's file; None where it is not at hand
    ranks: int = 1  # processes that share the rows of a step; this is the plan of one of them
    objective: ObjectiveCost = ObjectiveCost()  # what the loss takes beside a forward and a backward
    evaluations: int = 0  # of the held-out rows in this process's part of the run
    done: int = 0  # steps that others have made
    trees: tuple[Tree, ...] = ()  # what the rows of some steps have in common, where it is computed once

    @classmethod
    def of(
        cls, recipe: Recipe, specs: Sequence[tensors.TensorSpec], facts: tensors.Facts, rows: Rows, device: Device, *,
        targets: Sequence[str] | str | None = None, mappable: bool | None = None,
    ) -> Self:  # fmt: skip
        """From what is known of a run. `targets`: modules that were chosen already; None: chosen here, by name.
        `mappable`: whether the base can lie in a mapped file; None: decided here."""
        policy.check_experts(facts.model_type, specs, recipe.quant)
        dtype, _ = compute_dtype(device, recipe.quant.compute_dtype)
        on_cpu = device.kind == "cpu"
        if mappable is None:
            mappable = not recipe.quant.quantises and all(ITEMSIZE[dtype] == s.nbytes / s.numel for s in specs)
        adapted = sites(specs, recipe.lora, targets) if specs else ()
        saved = [s for s in saved_tensors(specs, recipe.lora) if policy.encoding(s, recipe.quant) == "quantised"]
        if saved:
            leaves = ", ".join(sorted({leaf_of(s.name.removesuffix(".weight")) for s in saved}))
            raise AdapterError(
                f"lora.modules_to_save takes in {leaves}, held in {recipe.quant.type}: numbers of so few bits cannot "
                "train.",
                fix=f"keep them in 16 bits: --set 'quant.skip_modules=[{leaves}]'",
            )
        kernels = on_cpu and dtype in ("bf16", "fp32")
        stored = bool(mappable) and recipe.quant.quantises and not recipe.quant.in_file
        mappable = mappable and on_cpu
        job = cls(recipe, tuple(specs), facts, adapted, rows, dtype, mappable=mappable, stored=stored, kernels=kernels)
        integers = kernels and may_use_integers(device, dtype, recipe.quant.compute)
        return replace(job, integers=integers, whole_attention=ATTENTION_NEEDS.get(dtype) in device.isa)

    @classmethod
    def of_checkpoint(
        cls, recipe: Recipe, checkpoint: Checkpoint, model: "Model | None", rows: Rows, device: Device,
        targets: Sequence[str] | str | None = None,
    ) -> Self:  # fmt: skip
        """From the headers of a checkpoint; from `model` where it has none (pickled weights, or quantised ones)."""
        config = tensors.read_config(checkpoint.path)
        if model is not None and (checkpoint.pickle or tensors.is_quantised(config)):
            from halfbyte.quant.bnb import shape_of

            specs = [tensors.spec_of(name, shape_of(p), "BF16", config) for name, p in model.named_parameters()]
        else:
            specs = tensors.read_checkpoint(checkpoint.path)
        facts = tensors.facts_of(config, specs)
        # a base that is quantised here is on disk, in its store, in the form that it is computed in
        job = cls.of(recipe, specs, facts, rows, device, targets=targets, mappable=recipe.quant.quantises or None)
        return job.in_folder(checkpoint.path)

    def in_folder(self, folder: Path | None, *, here: bool = True) -> Self:
        """The same of a model whose files are in `folder`; None where they are not at hand. `here`: on this machine."""
        beside = beside_bytes(folder) if folder is not None and folder.is_dir() else None
        tokenizer = tokenizer_bytes(folder) if folder is not None else None
        uncompiled = self.kernels_to_compile(writes=self.recipe.train.draws) if here else ()
        return replace(self, beside_bytes=beside, uncompiled=uncompiled, tokenizer_json_bytes=tokenizer)

    def kernels_to_compile(self, *, writes: bool) -> tuple[str, ...]:
        """Of what it computes with, and where it `writes` answers of the interpreter: what numba's cache lacks."""
        if not self.kernels:
            return ()
        attention = self.whole_attention and self.layer.pairs in NO_SCORES
        kinds = {"state_space" if r.scan else "delta_rule" if r.heads else "conv" for r in self.facts.recurrences}
        interpreter = kernel_cache.decoding(blocks=self.recipe.quant.in_file, states=bool(kinds))
        return kernel_cache.uncompiled(
            self.dtype, attention=attention, integers=self.integers, recurrent=sorted(kinds),
            interpreter=interpreter if writes and self.whole_attention else "",
        )  # fmt: skip

    @property
    def itemsize(self) -> int:
        return ITEMSIZE[self.dtype]

    @property
    def rows_per_step(self) -> int:
        return self.recipe.train.rows_per_step * (self.recipe.train.num_generations or 1)

    @cached_property
    def mean_rows_per_step(self) -> float:
        """Fewer than are asked for where there are fewer, and at the end of an epoch; this process's share."""
        count, asked = len(self.rows.lengths), self.rows_per_step
        return (asked if self.rows.assumed else count / max(1, math.ceil(count / asked))) / self.ranks

    @cached_property
    def parameters(self) -> int:
        return sum(s.numel for s in self.specs)

    @cached_property
    def trainable(self) -> int:
        return trainable(self.sites, self.specs, self.recipe.lora)

    @cached_property
    def saved_parameters(self) -> int:
        """How many of the trained numbers are in modules of `modules_to_save`."""
        return sum(s.numel for s in saved_tensors(self.specs, self.recipe.lora))

    @property
    def _expert_share(self) -> float:
        """The share of all experts that one token is sent to."""
        return self.facts.experts_per_token / self.facts.experts if self.facts.experts else 1.0

    @cached_property
    def linear_numel(self) -> int:
        """Weights that every token is multiplied with, without the head; of experts those that a token meets."""
        linears = [s for s in self.specs if s.role in ("linear", "expert")]
        return sum(s.numel for s in linears) - self.expert_numel + round(self.expert_numel * self._expert_share)

    @cached_property
    def expert_numel(self) -> int:
        return sum(s.numel for s in self.specs if s.role == "expert")

    @cached_property
    def linear_widths(self) -> int:
        """Numbers that a token brings into all linear layers and takes out of them; without experts."""
        return sum(sum(s.shape) for s in self.specs if s.role == "linear")

    def _bytes_by_layer(self, *, experts: bool) -> Counter[int | None]:
        """Bytes of each decoder layer of the base, and of what is around them (None); without `table_bytes`."""
        sizes = Counter[int | None]()
        for s in self.specs:
            if (experts or s.role != "expert") and not (s.per_layer and self.mappable):
                sizes[s.layer] += policy.encoded_bytes(s, self.recipe.quant, self.itemsize)
        return sizes

    @cached_property
    def _layers_bytes(self) -> Counter[int | None]:
        return self._bytes_by_layer(experts=True)

    @property
    def base_bytes(self) -> int:
        return self._layers_bytes.total()

    @cached_property
    def table_bytes(self) -> int:
        """Of a base that can be mapped, the table of per-layer embeddings, which stays in its file wherever the rest
        lies."""
        return sum(self.itemsize * s.numel for s in self.specs if s.per_layer and self.mappable)

    @cached_property
    def values_bytes(self) -> int:
        """Of a base in a file's own blocks, what is made of its values when it is opened, in private memory."""
        quant = self.recipe.quant
        made_of = (s for s in self.specs if policy.encoding(s, quant) != "quantised") if quant.in_file else ()
        return sum(policy.encoded_bytes(s, quant, self.itemsize) for s in made_of)

    @property
    def layer_bytes(self) -> int:
        """Bytes of the largest decoder layer of the base."""
        return max((size for layer, size in self._layers_bytes.items() if layer is not None), default=0)

    @cached_property
    def dense_layer_bytes(self) -> int:
        """Bytes of the largest decoder layer without experts, which are read when tokens are sent to them."""
        sizes = self._bytes_by_layer(experts=False).items()
        return max((size for layer, size in sizes if layer is not None), default=0)

    @property
    def outer_bytes(self) -> int:
        """Bytes of the base around its layers: embeddings, head, last norm."""
        return self._layers_bytes[None]

    @cached_property
    def largest_linear(self) -> int:
        """Numbers in the largest matrix that is dequantised to be multiplied with."""
        linears = (s for s in self.specs if policy.encoding(s, self.recipe.quant) == "quantised")
        return max((s.numel // (s.shape[0] if s.role == "expert" else 1) for s in linears), default=0)

    @cached_property
    def store_build(self) -> StoreBuild:
        return StoreBuild(self.specs, self.recipe.quant, self.itemsize, self.facts.vocab, self.beside_bytes)

    @property
    def recurrent(self) -> bool:
        """Whether layers carry a state from token to token, more than a convolution's."""
        return any(r.heads for r in self.facts.recurrences)

    @cached_property
    def layer(self) -> Layer:
        lora = self.recipe.lora
        fused, dropout = not (lora.use_dora or lora.lora_bias), lora.lora_dropout > 0
        how = {"kernels": self.kernels, "dropout": dropout, "fused": fused}
        windows = self.kernels and self.whole_attention and not self.trees  # a kernel has them
        longest = 0 if windows else self.rows.longest
        return layer_of(self.facts, self.sites, self.itemsize, longest=longest, **how)

    @cached_property
    def lora_parameters(self) -> int:
        return sum(site.parameters for site in self.sites)

    @cached_property
    def lora_parameters_per_token(self) -> int:
        """LoRA parameters that one token is multiplied with: all, but of experts only those of its own."""
        return round(sum(s.parameters * (self._expert_share if s.reads == "experts" else 1.0) for s in self.sites))

    @cached_property
    def lora_widths(self) -> int:
        """Numbers that a token brings into all adapters and takes out of them."""
        times = self.facts.experts_per_token
        return sum((s.inputs + s.outputs) * (times if s.reads == "experts" else 1) for s in self.sites)

    def dequantised_weights(self, tokens: float) -> float:
        """Weights of the linear layers that a micro-batch of `tokens` is multiplied with. Of experts those that any of
        its tokens chose, if each is as likely."""
        linears = [s for s in self.specs if s.role in ("linear", "expert")]
        experts = sum(s.numel for s in linears if s.role == "expert" or ".experts." in s.name)
        return sum(s.numel for s in linears) - experts * (1.0 - self.met_share(tokens))

    def met_share(self, tokens: float) -> float:
        """The share of all experts that any of so many tokens chose, if each is as likely."""
        return 1.0 - (1.0 - min(1.0, self._expert_share)) ** tokens

    @cached_property
    def largest_tensor_numel(self) -> int:
        """Numbers of the largest tensor; of a stack of experts those of one."""
        return max((s.numel // (s.shape[0] if s.role == "expert" else 1) for s in self.specs), default=0)

    @cached_property
    def embedding_numel(self) -> int:
        """Numbers of the largest embedding."""
        return max((s.numel for s in self.specs if s.role == "embedding" and not s.per_layer), default=0)

    @cached_property
    def steps(self) -> int:
        """Of the whole run; 1 where rows are assumed."""
        train, epochs = self.recipe.train, self.recipe.train.num_train_epochs
        count = self.rows.mixture.epoch_rows if self.rows.mixture else len(self.rows.lengths)
        max_steps = 1 if self.rows.assumed else train.max_steps
        return pack.count_steps(count, rows_per_step=self.rows_per_step, epochs=epochs, max_steps=max_steps)

    @cached_property
    def step_tokens(self) -> int:
        """Tokens of the largest step, by the order that the run will take its rows in; of several processes the most
        that one of them gets."""
        if self.order is None:
            return 1
        # a step that shares less than those that were looked at is split
        step = max((tree.tokens for tree in self.trees), default=0) or max(1, self.order.most_tokens())
        return step if self.ranks == 1 else min(step, -(-step // self.ranks) + self.rows.longest)

    def computed_share(self, tokens: int) -> float:
        """The share of the rows' tokens that is computed, in micro-batches of at most so many."""
        parts = [size for tree in self.trees for size in self._sizes(tree, tokens)]
        return sum(parts) / sum(sum(tree.lengths) for tree in self.trees) if self.trees else 1.0

    def labelled_share(self, tokens: int) -> float:
        """The share of the computed tokens that is labelled, in micro-batches of at most so many."""
        return min(1.0, self.rows.labelled_share / self.computed_share(tokens))

    def _sizes(self, tree: Tree, tokens: int) -> list[int]:
        """Computed tokens of the families of a step, in parts that go into a micro-batch of one process."""
        limit = min(tokens, -(-tree.tokens // self.ranks) + self.rows.longest) if self.ranks > 1 else tokens
        return [size for _, size in tree.groups(limit, len(tree.order))]

    def shared_micro_batches(self, tokens: int) -> float:
        """How many micro-batches of at most `tokens` a step of one process has, where rows share their beginnings."""
        counts = [math.ceil(sum(self._sizes(tree, tokens)) / self.ranks / tokens) for tree in self.trees]
        return sum(counts) / len(counts)

    @cached_property
    def mean_of_a_token(self) -> float:
        """The mean length of the row that a computed token lies in, as attention counts it."""
        pairs = [(n, s) for tree in self.trees for n, s in zip(tree.lengths, tree.shared, strict=True)]
        return (
            sum(n * n - s * s for n, s in pairs) / sum(n - s for n, s in pairs)
            if pairs
            else (self.rows.mean_of_a_token)
        )

    @cached_property
    def micro_batch_sizes(self) -> int:
        """How many sizes of micro-batches a run meets: oneDNN compiles for each. Counted by the steps of an epoch, as
        the parts of a split step are no more diverse; each is filled up to a multiple of `FILLED_TO` tokens."""
        if self.order is None:
            return 1
        return max(1, len(np.unique(-(-self.order.sums(0) // FILLED_TO))))

    @cached_property
    def evaluation_sizes(self) -> int:
        """The same of evaluations, whose micro-batches are about as large: at most as many as there are; of the run's
        verdict, two; and of the three rows whose logits are kept, one at a time."""
        kinds = len(np.unique(-(-np.asarray(self.rows.lengths) // FILLED_TO)))
        return math.ceil(int(np.sum(self.rows.evaluated)) / max(1, self.step_tokens)) + min(2, kinds) + min(3, kinds)

    @cached_property
    def order(self) -> pack.Steps | None:
        """The run's steps; None where there are none."""
        rows, train = np.asarray(self.rows.lengths), self.recipe.train
        if not self.steps or not len(rows):
            return None
        seed, mixture = train.order_seed, self.rows.mixture
        return pack.Steps(rows, rows, self.rows_per_step, self.steps, seed, 1, 1, mixture=mixture)
