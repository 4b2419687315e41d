"""Losses and gradients of every task on decoders and encoders, packed, beside those of transformers and PEFT (fp32)."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel, AutoModelForSequenceClassification, AutoModelForTokenClassification

import halfbyte
from halfbyte.adapters import unpad
from halfbyte.adapters.assembly import AdaptedBase, assemble
from halfbyte.base import load
from halfbyte.data.encoding.examples import Example
from halfbyte.errors import BaseModelError
from halfbyte.layers import fuse, heads, packed_attention, sight
from halfbyte.layers.kernels import ALL_TOKENS
from halfbyte.models.sources.lookup import resolve
from halfbyte.objectives.labels import Labels, Tags
from halfbyte.proofs.packing import prove_packing
from halfbyte.recipe.schema import Lora, Quant, Recipe
from halfbyte.system import device
from tests import encoders, tiny_run

CLOSE = 1e-5
LENGTHS = (5, 17, 2, 30, 9)  # longer than a window of 8 among them
CAUSAL = ("llama", "qwen3", "gemma3", "gpt2")
ENCODERS = ("bert", "roberta", "xlm-roberta", "modernbert", "deberta-v2")
EVERY = (*CAUSAL, *encoders.NAMES)
KINDS = {"classify": Labels(("a", "b", "c")), "regress": Labels(), "tag": Tags(("B-x", "I-x", "O"))}
FAST = {
    ("bert", "classify"), ("roberta", "classify"), ("modernbert", "classify"), ("deberta", "classify"),
    ("embeddinggemma", "embed"), ("bert", "tag"), ("llama", "tag"), ("bert", "embed"), ("xlm_roberta", "regress"),
    ("modernbert", "tag"),
}  # fmt: skip
CASES = [
    pytest.param(name, task, marks=() if (name, task) in FAST else pytest.mark.slow, id=f"{name}-{task}")
    for name in EVERY
    for task in (*KINDS, "embed")
    if task != "tag" or "gemma" not in name  # transformers has no class for it
]


def folder(where: Path, name: str) -> Path:
    save = encoders.checkpoint if name in encoders.NAMES else tiny_run.checkpoint
    path = save(where / name, name)
    config = json.loads((path / "config.json").read_text())
    config.setdefault("classifier_dropout", 0.0)  # transformers' heads of tags take 0.1 where none is said
    (path / "config.json").write_text(json.dumps(config))
    return path


def opened(path: Path, task: str, quant: str = "none") -> AdaptedBase:
    """A base of this checkpoint in fp32, with a head and LoRA whose B is not 0."""
    settings: dict[str, Any] = {"type": quant, "compute_dtype": "fp32"}
    base = load.open_base(resolve(str(path)), Quant(**settings), device.detect())
    names = [spec.name for spec in base.specs]
    drawn = heads.attach(base.model, *heads.wanted(KINDS.get(task)), seed=0, names=names)
    lora = Lora(r=4, lora_alpha=8, lora_dropout=0.0, modules_to_save=drawn or None)
    recipe = Recipe(model=str(path), data={"train": "x.jsonl", "max_length": 64}, lora=lora)
    model = assemble(base, recipe)
    generator = torch.Generator().manual_seed(3)
    for n, p in model.model.named_parameters():
        if "lora_B" in n:
            p.data.normal_(0, 0.1, generator=generator)
    model.model.train()
    return model


def rows(task: str, vocabulary: int = tiny_run.VOCAB) -> list[Example]:
    """Ragged texts; their tags on all tokens but the first and the last."""
    draw, made = random.Random(0), list[Example]()
    for length in LENGTHS:
        ids = tuple(draw.randrange(5, vocabulary) for _ in range(length))
        marked = range(1, length - 1) if task == "tag" and length > 2 else (length - 1,)
        value: Any = [draw.choice(KINDS["tag"].names) for _ in marked] if task == "tag" else draw.choice("abc")
        value = draw.random() if task == "regress" else value
        labels = tuple(token if i in marked else -100 for i, token in enumerate(ids))
        made.append(Example(ids, labels, "", (), json.dumps(value)))
    return made


def plain(path: Path, task: str, ours: Any) -> Any:
    """transformers' class for the task with PEFT, and our numbers in all that trains."""
    lm = ours.get_base_model()
    auto = {"tag": AutoModelForTokenClassification, "embed": AutoModel}.get(task, AutoModelForSequenceClassification)
    width = {} if task == "embed" else {"num_labels": KINDS[task].width}
    base = auto.from_pretrained(path, dtype=torch.float32, **width)
    config = ours.peft_config["default"]
    saved = sorted(config.modules_to_save or ())
    inner = f"{lm.base_model_prefix}." if task == "embed" else ""
    targets = config.target_modules if isinstance(config.target_modules, str) else sorted(config.target_modules)
    kind = {"tag": "TOKEN_CLS", "embed": "FEATURE_EXTRACTION"}.get(task, "SEQ_CLS")
    model = get_peft_model(
        base,
        LoraConfig(
            r=4, lora_alpha=8, lora_dropout=0.0, target_modules=targets, modules_to_save=saved or None, task_type=kind
        ),
    )
    state = {n.replace(f"base_model.model.{inner}", "base_model.model.", 1): p for n, p in ours.named_parameters()}
    for name, p in model.named_parameters():
        if p.requires_grad:
            p.data.copy_(state[name])
    return model.train()


def plain_loss(model: Any, row: Example, task: str, pooling: str, weights: Tensor) -> Tensor:
    """Of one text, summed."""
    ids = torch.tensor([row.input_ids])
    if task == "embed":
        hidden = model(input_ids=ids)[0][0]
        return ((hidden.mean(0) if pooling == "mean" else hidden[-1]) * weights).sum()
    value = json.loads(row.completion)
    if task == "tag":
        marks = [i for i, label in enumerate(row.labels) if label >= 0]
        target = torch.full((1, len(row.input_ids)), -100)
        target[0, marks] = torch.tensor([KINDS["tag"].names.index(tag) for tag in value])
        return model(input_ids=ids, labels=target).loss * len(marks)
    target = torch.tensor([value if task == "regress" else "abc".index(value)])
    return model(input_ids=ids, labels=target).loss


@pytest.mark.parametrize(("name", "task"), CASES)
def test_loss_and_gradients_are_those_of_transformers_and_peft(name: str, task: str, tmp_path: Path) -> None:
    path = folder(tmp_path, name)
    assembled = opened(path, task)
    assert assembled.packed.ok and assembled.packed.layout == ("rows" if name == "deberta" else "cu_seq_lens")
    assert assembled.fused.ok, assembled.fused.reason
    ours, examples = assembled.model, rows(task)
    weights = torch.randn(64, generator=torch.Generator().manual_seed(5))
    config = ours.get_base_model().config
    if task == "embed":
        batch = Labels(("a", "b", "c")).collate(examples)
        loss = (heads.vectors(ours, batch, "auto") * weights).sum()
    else:
        loss = KINDS[task].loss(ours, KINDS[task].collate(examples))
    loss.backward()
    other = plain(path, task, ours)
    pooling = "mean" if config.model_type in ENCODERS else "lasttoken"
    wanted = torch.stack([plain_loss(other, row, task, pooling, weights) for row in examples])
    wanted.sum().backward()
    assert float(loss.detach()) == pytest.approx(float(wanted.detach().sum()), rel=CLOSE)
    inner = f"{ours.get_base_model().base_model_prefix}." if task == "embed" else ""
    got = {n.replace(f"base_model.model.{inner}", "base_model.model.", 1): p.grad for n, p in ours.named_parameters()}
    for n, p in other.named_parameters():
        if p.requires_grad:
            assert p.grad is not None and got[n] is not None, n
            assert float((got[n] - p.grad).norm()) <= CLOSE * max(float(p.grad.norm()), 1e-3), n


def test_a_causal_mask_in_an_encoder_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, right = folder(tmp_path, "bert"), packed_attention._packed

    def causal(module: Any, q: Tensor, k: Tensor, v: Tensor, pack: Any, asked: Any) -> Tensor:
        return right(module, q, k, v, pack, type(asked)(asked.scaling, asked.dropout, None, None, None))

    monkeypatch.setattr(packed_attention, "_packed", causal)
    assembled = opened(path, "classify")
    assert assembled.packed.layout == "rows"
    assert "cu_seq_lens: logits differ" in assembled.packed.reason


@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_the_pooler_of_a_body_alone_is_brought(quant: str, tmp_path: Path) -> None:
    """A checkpoint of BertModel has bare names; its pooler stays as it is, and the classifier alone is drawn."""
    whole, bare = encoders.model("bert"), tmp_path / "bare"
    whole.bert.save_pretrained(bare)
    encoders.tokenizer().save_pretrained(bare)
    assert {"pooler.dense.weight"} <= load_file(bare / "model.safetensors").keys()
    model = opened(bare, "classify", quant).model
    assert set(model.peft_config["default"].modules_to_save) == {"classifier"}
    (weight,) = (p for n, p in model.named_parameters() if n.endswith("bert.pooler.dense.weight"))
    assert torch.equal(weight, whole.bert.pooler.dense.weight) and not weight.requires_grad


def test_a_fused_projection_whose_parts_are_exchanged_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ModernBERT's queries, keys and values are one product: LoRA's part of each on the next one."""
    path, right = folder(tmp_path, "modernbert"), fuse.lora_linear
    assert opened(path, "classify").fused.ok

    def faulty(x: Any, layer: Any, a: Any, b: Tensor, scale: float, p: float) -> Any:
        return right(x, layer, a, b.roll(64, 0) if len(b) == 3 * 64 else b, scale, p)

    monkeypatch.setattr(fuse, "lora_linear", faulty)
    fused = opened(path, "classify").fused
    assert not fused.ok and "gradients differ" in fused.reason


@pytest.mark.parametrize("window", [8, 24])  # to both sides together: the second one is longer than the short rows
@pytest.mark.parametrize("fused", [False, True])
def test_a_window_off_by_one_is_seen(window: int, fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    right, of_layer = packed_attention.reach_of, sight.Sight.reach
    for more in (0, 1, -1):
        model = encoders.classifier("modernbert", local_attention=window)
        if fused:
            fuse.install(model)

        def faulty(reach: tuple[int, int], more: int = more) -> tuple[int, int]:
            before, after = (n if n == ALL_TOKENS else n + more for n in reach)
            return before, after

        monkeypatch.setattr(packed_attention, "reach_of", lambda n, *, causal, off=faulty: off(right(n, causal=causal)))
        monkeypatch.setattr(sight.Sight, "reach", lambda self, n, off=faulty: off(of_layer(self, n)))
        proof = prove_packing(model, 60)
        assert (proof.layout == "cu_seq_lens") is (more == 0), (more, proof.reason)


def test_a_pooled_neighbour_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = heads.loss.labelled_hidden
    monkeypatch.setattr(heads.loss, "labelled_hidden", lambda m, b: right(m, {**b, "keep": (b["keep"] + 1) % 15}))
    with pytest.raises(BaseModelError, match="off by"):
        opened(folder(tmp_path, "bert"), "classify")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("bert", "SEQ_CLS"),
        pytest.param("bert", "TOKEN_CLS", marks=pytest.mark.slow),
        pytest.param("modernbert", "SEQ_CLS", marks=pytest.mark.slow),
        pytest.param("llama", "SEQ_CLS", marks=pytest.mark.slow),
    ],
)
def test_a_script_with_padded_rows(name: str, kind: str, tmp_path: Path) -> None:
    """The drop-in's loss and gradients are PEFT's, and it runs without padding."""
    path, grads = folder(tmp_path, name), []
    auto = AutoModelForTokenClassification if kind == "TOKEN_CLS" else AutoModelForSequenceClassification
    lengths = torch.tensor([9, 4, 30])
    mask = (torch.arange(30) < lengths[:, None]).long()
    ids = torch.randint(5, 300, (3, 30), generator=torch.Generator().manual_seed(0)) * mask
    labels = ids % 3 * mask - 100 * (1 - mask) if kind == "TOKEN_CLS" else torch.tensor([0, 2, 1])
    for make in (halfbyte.get_peft_model, get_peft_model):
        torch.manual_seed(0)
        model = make(
            auto.from_pretrained(path, num_labels=3, pad_token_id=0),
            LoraConfig(
                r=4,
                target_modules=["query", "value", "q_proj", "v_proj", "Wqkv"],
                task_type=kind,
                init_lora_weights=False,
            ),
        ).train()
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None} | {"": loss.detach()})
        if make is halfbyte.get_peft_model:
            assert unpad.why_padded(model) == ""
    assert grads[0].keys() == grads[1].keys()
    for n, wanted in grads[1].items():
        assert float((grads[0][n] - wanted).norm()) <= CLOSE * max(float(wanted.norm()), 1e-3), n
