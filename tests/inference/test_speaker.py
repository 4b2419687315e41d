"""A remembered proof: the same answers without a model, and whatever changes is proven again."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from halfbyte.inference import load, speaker, target
from halfbyte.inference.speaker import Speaker
from halfbyte.layers.decoding import image
from halfbyte.layers.decoding.tape import isa
from halfbyte.system import files, libraries, pages
from halfbyte.writing.sampling import SamplingParams
from halfbyte.writing.text import Session
from tests import tiny_run

pytestmark = pytest.mark.skipif(isa(torch.float32) is None, reason="no kernels for this processor")

PLAIN = ["quant.type=none", "quant.compute_dtype=fp32"]
GREEDY, DRAWN = SamplingParams(9), SamplingParams(9, temperature=0.8, seed=3)


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path / "cache"))
    return tiny_run.checkpoint(tmp_path / "model", "llama")


def opened_by(subject: target.Target, opens: list[str], **how: Any) -> Speaker:
    """What notes each time that it is opened."""
    return Speaker(subject, lambda: opens.append("") or load.open_target(subject, alone=True), **how)


def said(who: Speaker, text: str, params: SamplingParams = GREEDY, *, base: bool = False) -> str:
    session = Session(exact=True)
    ids = who.ids([{"role": "user", "content": text}])
    answer = who.answer(ids, params, session, base=base)
    assert who.remember(ids, session, base=base) is None
    return answer


def adapter_on(model: Path, folder: Path, seed: int) -> Path:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(model), config).save_pretrained(folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": str(model)}))
    return folder


@pytest.mark.parametrize("settings", [PLAIN, ["quant.type=nf4"]], ids=["16 bits", "4 bits"])
def test_a_second_start_says_the_same_without_a_model(model: Path, settings: list[str]) -> None:
    opens, subject = list[str](), target.find(model, settings)
    asked = [("red", GREEDY), ("a large round box", GREEDY), ("red", DRAWN)]
    first, second = opened_by(subject, opens), opened_by(subject, opens)
    wanted = [said(first, *each) for each in asked]
    assert [said(second, *each) for each in asked] == wanted
    assert len(opens) == 1 and second.changed == []
    assert second.context == first.context


def test_it_needs_neither_torch_nor_transformers(model: Path) -> None:
    said(opened_by(target.find(model, PLAIN), []), "red")
    code = f"""
import sys
from pathlib import Path
from halfbyte.inference import speaker, target
from halfbyte.writing.sampling import SamplingParams
from halfbyte.writing.text import Session
who = speaker.Speaker(target.find(Path({str(model)!r}), {PLAIN}), lambda: sys.exit("opened"))
who.answer(who.ids([{{"role": "user", "content": "red"}}]), SamplingParams(5), Session())
print(sorted({{"torch", "transformers", "peft", "bitsandbytes"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_whatever_changes_is_proven_again(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opens, subject = list[str](), target.find(model, PLAIN)
    wanted = said(opened_by(subject, opens), "red")

    def again(**how: Any) -> list[str]:
        opens.clear()
        who = opened_by(subject, opens, keeps=False, **how)
        assert said(who, "red") == wanted
        assert len(opens) == 1
        return who.changed

    with monkeypatch.context() as patch:
        own = libraries.version
        patch.setattr(libraries, "version", lambda name: "9.9" if name == "peft" else own(name))
        assert again() == ["peft"]
    with monkeypatch.context() as patch:
        (tmp_path / "proc").mkdir()
        flags = Path("/proc/cpuinfo").read_text().replace("flags\t\t:", "flags\t\t: another")
        (tmp_path / "proc/cpuinfo").write_text(flags)
        own_around = libraries.surroundings
        patch.setattr(libraries, "surroundings", lambda threads: own_around(threads, tmp_path))
        assert again() == ["processor"]
    with monkeypatch.context() as patch:
        patch.setattr(speaker.threads, "asked_threads", lambda *env: None)
        patch.setattr(speaker.device, "cores", lambda *root: 3)
        assert again() == ["threads"]
    assert again(prove=True) == []
    (numbers,) = (tmp_path / "cache/tapes").glob("*/numbers.bin")
    whole = numbers.read_bytes()
    numbers.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    assert again() == ["the base's files"]
    numbers.write_bytes(whole)
    index = numbers.with_name("tape.json")
    document = json.loads(index.read_bytes())
    index.write_bytes(files.as_json(files.seal({n: v for n, v in document.items() if n not in ("chat", "seal")})))
    assert again() == ["'chat'"], "of another version"
    index.write_bytes(files.as_json(document))
    (model / "generation_config.json").write_text('{"eos_token_id": 1}')
    assert again() == ["base"]


def test_another_adapter_in_its_place_is_seen(model: Path, tmp_path: Path) -> None:
    opens, folder = list[str](), adapter_on(model, tmp_path / "adapter", 0)
    subject = target.find(folder, PLAIN)
    first = opened_by(subject, opens)
    before, base = said(first, "red"), said(first, "red", base=True)
    second = opened_by(subject, opens)
    assert (said(second, "red"), said(second, "red", base=True)) == (before, base) and len(opens) == 1
    adapter_on(model, folder, 1)
    third = opened_by(subject, opens)
    now = said(third, "red")
    assert third.changed == ["adapter"] and len(opens) == 2
    assert now == said(opened_by(subject, [], prove=True), "red") != before


def test_a_longer_prompt_than_was_proven_goes_to_the_model(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from halfbyte.writing import image_writer

    monkeypatch.setattr(image_writer, "_PROOF_PRODUCTS", 0.0)
    opens, subject = list[str](), target.find(model, PLAIN)
    said(opened_by(subject, opens), "red")
    who = opened_by(subject, opens)
    said(who, "red")
    assert len(opens) == 1
    said(who, "a large round box of red and blue and green")
    assert len(opens) == 2


def test_a_base_that_is_in_no_file_is_not_written_to_one(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image, "MOST_BYTES", 1000)
    who, session = opened_by(target.find(model, PLAIN), []), Session(exact=True)
    ids = who.ids([{"role": "user", "content": "red"}])
    who.answer(ids, GREEDY, session)
    assert "of the disk" in str(who.remember(ids, session))


def test_an_address_that_is_none_of_the_tapes_is_seen_wherever_the_heap_begins(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, least = image._Addresses.__init__, image._LEAST

    def forgets(self: Any, decoders: Any) -> None:
        own(self, decoders)
        heap = pages.heap()
        mine = [start for start in self.spans if any(s.start <= start < s.end for s in heap)]
        self.spans = {start: place for start, place in self.spans.items() if start != mine[-1]}

    monkeypatch.setattr(image._Addresses, "__init__", forgets)
    for limit in (least, image._MOST):  # as addresses are here, and as where they are lower than any limit
        monkeypatch.setattr(image, "_LEAST", limit)
        who, session = opened_by(target.find(model, PLAIN), []), Session(exact=True)
        ids = who.ids([{"role": "user", "content": "red"}])
        who.answer(ids, GREEDY, session)
        assert "an address none of the tape's" in (who.remember(ids, session) or "")


def test_an_image_that_says_something_else_is_not_kept(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = image.TapeImage.embedded
    monkeypatch.setattr(image.TapeImage, "embedded", lambda self, tokens, factor: 1.5 * own(self, tokens, factor))
    who, session = opened_by(target.find(model, PLAIN), []), Session(exact=True)
    ids = who.ids([{"role": "user", "content": "red"}])
    who.answer(ids, GREEDY, session)
    assert who.remember(ids, session) == "the image gives other logits than the tape"
    assert speaker.Speaker(who.subject, pytest.fail)._image(base=False) is None
