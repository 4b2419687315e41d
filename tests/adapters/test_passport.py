"""What an adapter belongs to is kept beside it, and an adapter of something else is refused with both sides named."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from halfbyte import finetune
from halfbyte.base.store.supply import Tell
from halfbyte.errors import AdapterError
from halfbyte.inference import target
from halfbyte.inference.load import open_run
from halfbyte.recipe.command import to_resume
from halfbyte.training.events import Listener
from tests import tiny_run


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps over an fp4 base, with a checkpoint at its third."""
    folder = tmp_path_factory.mktemp("world")
    finetune.train(
        tiny_run.recipe(folder, quant__type="fp4", train__save_strategy="steps", train__save_steps=3, train__seed=7)
    )
    return folder


@pytest.fixture
def copy(world: Path, tmp_path: Path) -> Path:
    """The same, to be changed; its recipe names the model in its own folder."""
    shutil.copytree(world, tmp_path / "world")
    for file in (tmp_path / "world/run/recipe.yaml", tmp_path / "world/run/adapter/adapter_config.json"):
        file.write_text(file.read_text().replace(str(world), str(tmp_path / "world")))
    return tmp_path / "world"


def of_seed(folder: Path, seed: int) -> None:
    """Other weights of the same shapes."""
    shutil.rmtree(folder / "model")
    tiny_run.checkpoint(folder / "model", seed=seed)


def weights_hash(file: Path) -> str:
    """Over every tensor by its name: dtype, shape and bytes, as docs/design.md has it; read here by hand."""
    raw = file.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    lines = []
    for name, entry in json.loads(raw[8:start]).items():
        if name != "__metadata__":
            begin, end = (start + offset for offset in entry["data_offsets"])
            described = f"{entry['dtype']}{entry['shape']}".encode()
            lines.append(f"{name}\0{hashlib.sha256(described + raw[begin:end]).hexdigest()}\n")
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


def test_it_says_what_was_trained_on_what(world: Path) -> None:
    written = json.loads((world / "run/adapter/halfbyte.json").read_text())
    weights = world / "run/adapter/adapter_model.safetensors"
    assert written["adapter_sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    belongs = written["belongs_to"]
    assert belongs["base"] == {
        "id": str(world / "model"),
        "revision": None,
        "content": weights_hash(world / "model/model.safetensors"),
    }
    assert (belongs["quant"]["type"], belongs["quant"]["double_quant"]) == ("fp4", True)
    assert "compute_dtype" not in belongs["quant"], "it is the machine's"
    assert belongs["chat_template"] == tiny_run.CHATML
    assert (written["recipe"]["train.seed"], written["rows"]["train"]["rows"]) == (7, 16)
    assert written["reached"] == {"steps": 4, "eval_loss": None}
    assert written["versions"]["halfbyte"]


def test_its_files_are_as_readable_as_each_other(world: Path) -> None:
    assert len({file.stat().st_mode for file in (world / "run/adapter").iterdir()}) == 1


def test_it_is_used_where_it_belongs_and_another_name_of_the_same_weights_is_the_same(world: Path, copy: Path) -> None:
    """The passport names the folder that it was trained on; the same weights in another one are taken unsaid."""
    assert passport_of(copy)["base"]["id"] == str(world / "model")
    notes: list[str] = []
    ids = torch.arange(12)[None]
    with torch.inference_mode():
        there = open_run(world / "run").model(input_ids=ids).logits
        here = open_run(copy / "run", Tell(note=lambda label, text: notes.append(text))).model(input_ids=ids).logits
    assert torch.equal(here, there)
    assert not [text for text in notes if "trained on" in text or "used all the same" in text]


def test_a_base_of_the_same_shapes_is_another_base(copy: Path) -> None:
    of_seed(copy, 1)
    with pytest.raises(AdapterError, match=r"does not belong to .*:\n  - base: trained on .* \(weights ") as e:
        open_run(copy / "run")
    before, after = (passport_of(copy)["base"]["content"], weights_hash(copy / "model/model.safetensors"))
    assert before[:12] in str(e.value) and after[:12] in str(e.value)
    said: list[str] = []
    open_run(copy / "run", Tell(note=lambda label, text: said.append(text)), force=True)
    assert any("used all the same: base: trained on" in text for text in said)


def passport_of(folder: Path) -> dict[str, dict[str, str]]:
    return dict(json.loads((folder / "run/adapter/halfbyte.json").read_text())["belongs_to"])


def test_a_base_without_a_store_is_told_by_pieces_of_it(tmp_path: Path) -> None:
    finetune.train(tiny_run.recipe(tmp_path, quant__type="none"))
    assert passport_of(tmp_path)["base"]["content"].startswith("samples:")
    open_run(tmp_path / "run")
    of_seed(tmp_path, 1)
    with pytest.raises(AdapterError, match="base: trained on"):
        open_run(tmp_path / "run")


def test_a_tokenizer_with_other_ids_and_another_template_are_refused(copy: Path) -> None:
    file = copy / "model/tokenizer.json"
    values = json.loads(file.read_text())
    vocab = values["model"]["vocab"]
    a, b = sorted(vocab, key=vocab.__getitem__)[40:42]
    vocab[a], vocab[b] = vocab[b], vocab[a]
    file.write_text(json.dumps(values))
    with pytest.raises(AdapterError, match=r"- tokenizer: trained with \w{12}, here is \w{12}"):
        open_run(copy / "run")
    vocab[a], vocab[b] = vocab[b], vocab[a]
    file.write_text(json.dumps(values))
    open_run(copy / "run")
    template = copy / "model/chat_template.jinja"
    template.write_text(template.read_text().replace("assistant", "helper"))
    with pytest.raises(AdapterError, match=r"- chat template: trained with one of \d+ characters, \w+, here is one of"):
        open_run(copy / "run")


def test_an_adapter_alone_is_put_on_the_base_it_was_trained_on(copy: Path) -> None:
    adapter = copy / "run/adapter"
    assert target.find(adapter).recipe.quant.type == "fp4", "of the passport; nf4 is the default"
    plain = ["quant.compute_dtype=fp32"]
    open_run(adapter, None, plain)
    with pytest.raises(AdapterError, match=r"quant\.type: trained with fp4, here is nf4"):
        open_run(adapter, None, [*plain, "quant.type=nf4"])
    (adapter / "halfbyte.json").unlink()  # as PEFT's own adapters have none
    open_run(adapter, None, [*plain, "quant.type=nf4"])


def test_weights_that_are_not_those_of_the_passport_are_refused(copy: Path) -> None:
    file = copy / "run/adapter/adapter_model.safetensors"
    tensors = load_file(file)
    name = next(iter(tensors))
    tensors[name] = tensors[name] + 1e-6
    save_file(tensors, file)
    with pytest.raises(AdapterError, match=r"not the file that halfbyte\.json beside it names"):
        open_run(copy / "run")


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 1}', '{"format": 1, "belongs_to": {"base": 3}}'])
def test_a_passport_that_cannot_be_read_is_one_clear_error(copy: Path, text: str) -> None:
    (copy / "run/adapter/halfbyte.json").write_text(text)
    with pytest.raises(AdapterError, match=r"halfbyte.json: it cannot be read .*\n  fix: remove it"):
        open_run(copy / "run")


def test_a_passport_of_a_later_version_says_so(copy: Path) -> None:
    file = copy / "run/adapter/halfbyte.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "format": 2}))
    with pytest.raises(AdapterError, match="it is of format 2, and this halfbyte reads format 1"):
        open_run(copy / "run")


def test_a_run_does_not_go_on_upon_another_base(copy: Path) -> None:
    of_seed(copy, 1)
    for later in ("adapter", "checkpoints/step-000004"):  # stopped after its third step
        shutil.rmtree(copy / "run" / later)
    (copy / "run/report.json").unlink()
    with pytest.raises(AdapterError, match=r"the checkpoint .*step-000003 does not belong to what is here:\n  - base"):
        finetune.train(to_resume(str(copy / "run")), resume=True)
    assert not (copy / "run/adapter").exists()
    finetune.train(to_resume(str(copy / "run")), resume=True, force=True)
    assert passport_of(copy)["base"]["content"] == weights_hash(copy / "model/model.safetensors")
    notices = json.loads((copy / "run/report.json").read_text())["notices"]
    assert any("used all the same: base" in notice for notice in notices)


def test_a_run_that_begins_with_an_adapter_of_another_base_says_so(copy: Path) -> None:
    of_seed(copy, 1)
    said: list[str] = []

    class Hears(Listener):
        def note(self, label: str, text: str) -> None:
            said.append(text)

    recipe = tiny_run.recipe(copy, quant__type="fp4", output=copy / "second", lora={"adapter": str(copy / "run")})
    finetune.train(recipe, listener=Hears())
    assert any("does not belong here, used all the same: base" in text for text in said)


def test_the_dtype_of_the_machine_changes_nothing(world: Path) -> None:
    run = open_run(world / "run/adapter", None, ["quant.compute_dtype=bf16"])
    assert run.model.dtype == torch.bfloat16
