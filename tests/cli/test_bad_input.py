"""What a user can get wrong, and what a disk can do: one exact message, an exit code, nothing half-written.

Each case runs the command line in this process on a tiny model, in a folder of its own, and compares the folder before
and after. `TMP` stands for that folder; `<...>` for words of another library, which change with its version.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from halfbyte import finetune
from halfbyte.adapters import lora
from halfbyte.cli.options import one_each
from halfbyte.errors import HalfbyteError
from halfbyte.recipe.file import load_recipe
from halfbyte.runs import checkpoint, points
from halfbyte.runs.folder import DiskRetry, RunFolder
from halfbyte.system import files
from tests import tiny, tiny_run
from tests.forked import Forked
from tests.in_process import Cli, Ended, runner

AGAIN = "\n  fix: copy or download the files again"
ALLOWED = (
    "allowed: org/name[@revision] of the hub, a local folder, a .gguf file, "
    "or a packaged name (all-minilm-l6-v2, gemma3-270m, smollm2-135m)"
)
OTHER_OUTPUT = "\n  fix: give another output: (--output)"


@dataclass(frozen=True)
class Case:
    """`args` as typed; `prepare` damages the folder first; `err` is all of stderr."""

    name: str
    args: str | Sequence[str]
    err: str
    prepare: Callable[[], Any] | None = None
    code: int = 2


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A model, rows, a recipe, and a finished run with two checkpoints; all paths relative."""
    folder = tmp_path_factory.mktemp("world")
    before = Path.cwd()
    os.chdir(folder)
    try:
        tiny_run.checkpoint(folder / "model")
        tiny_run.recipe(
            Path("."),
            lora__r=8,
            lora__lora_alpha=16,
            lora__lora_dropout=0.05,
            train__max_steps=4,
            train__learning_rate=1e-3,
        )
        values = yaml.safe_load(Path("recipe.yaml").read_text())
        values["train"] |= {"save_strategy": "steps", "save_steps": 2}
        Path("recipe.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
        finetune.train(load_recipe(Path("recipe.yaml"), ["output=done"]))
        yield folder
    finally:
        os.chdir(before)


@pytest.fixture
def here(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "w"
    shutil.copytree(world, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path / "cache"))
    return folder


@pytest.fixture
def halfbyte(here: Path, capsys: pytest.CaptureFixture[str]) -> Cli:
    return runner(here, capsys)


def tree(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else "folder"
        for p in folder.rglob("*")
    }


def pattern(text: str) -> str:
    return ".*".join(re.escape(part) for part in text.split("<...>"))


# --- what the cases do to the folder ---------------------------------------------------------------------------------


def write(name: str, text: str) -> Callable[[], Any]:
    return lambda: Path(name).write_text(text)


def row(**columns: Any) -> str:
    return json.dumps(columns) + "\n"


def chat(*messages: tuple[str, str]) -> str:
    return row(messages=[{"role": role, "content": content} for role, content in messages])


def config(**changes: Any) -> Callable[[], Any]:
    """Change single values of the model's config.json."""

    def change() -> None:
        path = Path("model/config.json")
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def adapter_config(**changes: Any) -> Callable[[], Any]:
    def change() -> None:
        path = Path("done/adapter/adapter_config.json")
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def cut(name: str, by: int) -> Callable[[], Any]:
    return lambda: os.truncate(name, Path(name).stat().st_size - by)


def remove(*names: str) -> Callable[[], Any]:
    def gone() -> None:
        for path in map(Path, names):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return gone


def all_of(*steps: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> None:
        for step in steps:
            step()

    return run


def missing_shard() -> None:
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    Path("model/model.safetensors").rename(f"model/{first}")
    Path("model/model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": first, "b": second}}))


def pickled() -> None:
    weights = load_file("model/model.safetensors")
    Path("model/model.safetensors").unlink()
    torch.save(weights, "model/pytorch_model.bin")


def pickled_code() -> None:
    """A pickle that would make the folder `pwned`."""
    Path("model/model.safetensors").unlink()
    Path("model/pytorch_model.bin").write_bytes(b'cos\nmkdir\n(S"pwned"\ntR.')


def more_tokens() -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained("model")
    tokenizer.add_tokens([f"<extra {i}>" for i in range(50)])
    tokenizer.save_pretrained("model")


def nan_weight() -> None:
    path = "model/model.safetensors"
    weights = load_file(path)
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, path, metadata={"format": "pt"})


def other_base() -> None:
    """The run's adapter was trained on a Llama; now its recipe names a GPT-2."""
    tiny_run.checkpoint(Path("gpt2"), "gpt2")
    recipe = Path("done/recipe.yaml")
    recipe.write_text(recipe.read_text().replace("model: ../model", "model: ../gpt2"))


def no_passport() -> None:
    """As PEFT's own adapters have none."""
    Path("done/adapter/halfbyte.json").unlink()


def edited(name: str, old: str, new: str) -> None:
    text = Path(name).read_text()
    assert old in text
    Path(name).write_text(text.replace(old, new))


def damaged_checkpoints() -> None:
    for path in Path("done/checkpoints").glob("step-*/optimizer.safetensors"):
        os.truncate(path, path.stat().st_size - 1)


def mixture(folder: Path = Path("moe")) -> Path:
    """A tiny Qwen3-MoE: each layer's experts are two 3-D parameters."""
    sizes = {**tiny._LLAMA_LIKE, **tiny._TOKENS, "vocab_size": tiny_run.VOCAB, "head_dim": 16}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    torch.manual_seed(0)
    transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**sizes, **experts)).save_pretrained(folder)
    tiny_run.tokenizer().save_pretrained(folder)
    return folder


def llama4() -> None:
    """Its experts are two 3-D parameters that are multiplied with at once."""
    sizes = {**tiny._LLAMA_LIKE, **tiny._TOKENS, "vocab_size": tiny_run.VOCAB, "head_dim": 16}
    config = transformers.Llama4TextConfig(**sizes, num_local_experts=4, intermediate_size_mlp=64)
    transformers.Llama4ForCausalLM(config).save_pretrained("moe")
    tiny_run.tokenizer().save_pretrained("moe")


def cut_gguf() -> None:
    writer = gguf.GGUFWriter("cut.gguf", "llama")
    writer.add_token_list(["a", "b"])
    writer.add_tensor("token_embd.weight", np.zeros((64, 64), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    cut("cut.gguf", 1000)()


# --- mistakes: exit code 2 -------------------------------------------------------------------------------------------


def train(*values: str) -> list[str]:
    """`halfbyte train recipe.yaml` with one `--set` for each value."""
    return ["train", "recipe.yaml", "--quiet", *(part for value in values for part in ("--set", value))]


DATA = "data.train=bad.jsonl"
CASES = [
    # the command line and the recipe
    Case(
        "no recipe",
        "train nope.yml",
        "error: there is no recipe nope.yml.\n  fix: `halfbyte init nope.yml` writes one",
        lambda: Path("recipe.yaml").rename("recipe.txt"),
    ),
    Case(
        "near recipe",
        "train recip.yaml",
        "error: there is no recipe recip.yaml; did you mean recipe.yaml?\n  fix: `halfbyte init recip.yaml` writes one",
    ),
    Case(
        "recipe is a list",
        "train bad.yaml",
        "error: bad.yaml holds a list; a recipe is a mapping with the keys model, revision, task, labels, "
        "class_weight, vectors, quant, lora, data, train, eval, output, allow_pickle, trust_remote_code.\n"
        "  fix: `halfbyte init NAME.yaml` writes a recipe to start from",
        write("bad.yaml", "- model: model\n"),
    ),
    Case(
        "recipe is a folder",
        "train bad.yaml",
        "error: bad.yaml cannot be read: Is a directory.",
        lambda: Path("bad.yaml").mkdir(),
    ),
    Case("r is 0", train("lora.r=0"), "error: recipe.yaml: --set lora.r must be >= 1, got 0"),
    Case(
        "negative learning rate",
        train("train.learning_rate=-1"),
        "error: recipe.yaml: --set train.learning_rate must be > 0, got -1",
    ),
    Case(
        "all problems at once",
        train("lora.r=0", "train.learning_rate=-1"),
        "error: recipe.yaml: 2 problems\n  - --set lora.r must be >= 1, got 0\n"
        "  - --set train.learning_rate must be > 0, got -1",
    ),
    Case(
        "several values after one --set",
        "train recipe.yaml --quiet --set lora.r=0 train.learning_rate=-1 lora.rr=3",
        "error: recipe.yaml: 3 problems\n  - --set lora.r must be >= 1, got 0\n"
        "  - --set lora.rr is not a field; did you mean lora.r?\n  - --set train.learning_rate must be > 0, got -1",
    ),
    Case("unknown field", train("lora.rr=3"), "error: recipe.yaml: --set lora.rr is not a field; did you mean lora.r?"),
    Case(
        "set without a value",
        train("lora.r"),
        "error: recipe.yaml: --set lora.r: must be FIELD=VALUE, such as lora.r=32",
    ),
    Case(
        "pissa",
        train("lora.init_lora_weights=pissa"),
        "error: recipe.yaml: --set lora.init_lora_weights cannot be 'pissa': it starts from a decomposition of the "
        "base's weights and changes them; the frozen base stays as it is",
    ),
    Case(
        "optimiser arguments",
        train("train.optim=rmsprop", "train.optim_args=momentum=x"),
        "error: train: optimiser rmsprop and schedule linear cannot be made as asked: could not convert string to "
        "float: 'x'.\n  fix: look at train.optim_args and train.lr_scheduler_kwargs",
    ),
    Case(
        "more steps than can be planned",
        train("train.max_steps=1000000000"),
        "error: train: 1,000,000,000 steps are more than the 1,000,000 that one run can have.\n"
        "  fix: lower train.max_steps or train.num_train_epochs",
    ),
    Case(
        "data beside a recipe",
        "train recipe.yaml train.jsonl",
        "error: recipe.yaml is a recipe and names its own data; train.jsonl is one argument too many.",
    ),
    Case(
        "a model without data",
        "train model",
        "error: model is not a recipe (.yaml), and no data is given to train a model on.\n"
        "  fix: halfbyte train model DATA.jsonl, or write a recipe with `halfbyte init`",
    ),
    Case(
        "init over a file",
        "init recipe.yaml",
        "error: recipe.yaml exists and is not overwritten.\n  fix: name another file: halfbyte init NAME.yaml",
    ),
    Case(
        "init into nothing",
        "init nowhere/recipe.yaml",
        "error: nowhere/recipe.yaml cannot be written: No such file or directory.",
    ),
    # the data
    Case(
        "no data file",
        train("data.train=trian.jsonl"),
        "error: trian.jsonl: no such file.\n  fix: did you mean train.jsonl?",
    ),
    Case(
        "data is a folder",
        train("data.train=model"),
        "error: model is a folder; it holds <...> .json, <...>.\n  fix: name its files: model/*.json",
    ),
    Case(
        "empty data",
        train(DATA),
        'error: bad.jsonl has no rows.\n  fix: write one JSON object a line: {"prompt": "...", "completion": "..."}',
        write("bad.jsonl", ""),
    ),
    Case(
        "a row is not JSON",
        train(DATA),
        'error: 1 of 2 rows cannot be used\n  - bad.jsonl:2: not JSON (Expecting value at character 12): {"prompt": a}',
        write("bad.jsonl", row(prompt="a", completion="b") + '{"prompt": a}\n'),
    ),
    Case(
        "wrong fields",
        train(DATA),
        "error: bad.jsonl:1: cannot tell the format. Needed: the key 'messages' or 'conversations', or both 'prompt' "
        "and 'completion', or 'instruction' and 'output', or 'text'; got 'prompt', 'complettion'.\n"
        "  fix: name the columns, as in --set data.fields.prompt=question --set data.fields.completion=answer",
        write("bad.jsonl", row(prompt="a", complettion="b")),
    ),
    Case(
        "fields that no row has",
        train(DATA, "data.fields={prompt: instrucion, completion: output}"),
        "error: data.fields.prompt: the rows have no column 'instrucion', but 'instruction', 'output'; did you mean "
        "'instruction'?",
        write("bad.jsonl", row(instruction="a", output="b")),
    ),
    Case(
        "a near field",
        train(DATA, "data.format=prompt_completion"),
        "error: 1 of 1 rows cannot be used\n  - bad.jsonl:1: completion: missing; the row has 'prompt', "
        "'complettion'; did you mean 'complettion'?",
        write("bad.jsonl", row(prompt="a", complettion="b")),
    ),
    Case(
        "nothing to learn from",
        train(DATA),
        "error: 1 of 1 rows cannot be used\n"
        "  - bad.jsonl:1: messages: no message has the role assistant, so there is nothing to learn from",
        write("bad.jsonl", chat(("user", "a"))),
    ),
    Case(
        "unknown role",
        train(DATA),
        "error: 1 of 2 rows cannot be used\n  - bad.jsonl:2: messages[1].role: one of system, developer, user, "
        "assistant, tool is needed, got 'asistant'; did you mean 'assistant'?",
        write("bad.jsonl", chat(("user", "a"), ("assistant", "b")) + chat(("user", "a"), ("asistant", "b"))),
    ),
    Case(
        "rows too long",
        train("data.max_length=23"),
        "error: 1 of 16 rows are longer than data.max_length 23; the longest has 24 tokens\n"
        "  - train.jsonl:1: 24 tokens\n"
        "  fix: data.max_length: 24, or data.overlong: truncate (cut the end off) or skip",
    ),
    Case(
        "no chat template for held-out rows",
        train("data.eval=bad.jsonl"),
        "error: the rows are messages, and this tokenizer has no chat template.\n"
        "  fix: data.chat_template: a file with one, or rows of prompt and completion",
        all_of(remove("model/chat_template.jinja"), write("bad.jsonl", chat(("user", "a"), ("assistant", "b")))),
    ),
    Case(
        "a chat template that is no Jinja",
        train(),
        "error: the chat template cannot be read: unexpected 'end of template' (line 1).\n"
        "  fix: data.chat_template: a file with a template that can",
        write("model/chat_template.jinja", "{% for"),
    ),
    Case(
        "no held-out file",
        train("data.eval=nowhere/nope.jsonl"),
        "error: nowhere/nope.jsonl: no such file.\n  fix: check the path; it is read relative to where halfbyte runs",
    ),
    # the model
    Case("unknown model", train("model=xyz"), f"error: unknown model 'xyz'; {ALLOWED}"),
    Case(
        "near model",
        train("model=smollm2"),
        f"error: unknown model 'smollm2'; {ALLOWED}\n  fix: did you mean smollm2-135m?",
    ),
    Case(
        "no tokenizer",
        train(),
        "error: no tokenizer could be read from TMP/model: it has no tokenizer.json\n"
        "  fix: put the model's tokenizer.json and tokenizer_config.json beside its config.json",
        remove("model/tokenizer.json", "model/tokenizer_config.json"),
    ),
    Case(
        "config is not JSON",
        train(),
        "error: model is not a whole checkpoint:\n  - config.json is not JSON that can be used: "
        f"Unterminated string starting at: line 1 column 2 (char 1){AGAIN}",
        write("model/config.json", '{"model'),
    ),
    Case(
        "config with nonsense",
        train(),
        "error: TMP/model/config.json is not a config that transformers knows: <...>hidden_size<...>",
        config(hidden_size="x"),
    ),
    Case(
        "weights cut short",
        train(),
        f"error: model is not a whole checkpoint:\n  - model.safetensors is cut short: 462,076 bytes of 462,176{AGAIN}",
        cut("model/model.safetensors", 100),
    ),
    Case(
        "a shard is missing",
        train(),
        f"error: model is not a whole checkpoint:\n  - model-00002-of-00002.safetensors is missing{AGAIN}",
        missing_shard,
    ),
    Case(
        "weights of another shape",
        train(),
        "error: TMP/model has not the shape of 2 of the weights that LlamaForCausalLM needs: lm_head.weight is "
        "(320, 64), not (330, 64), model.embed_tokens.weight is (320, 64), not (330, 64). They would be random "
        "numbers.\n  fix: download the checkpoint again, or check that config.json belongs to it",
        config(vocab_size=330),
    ),
    Case(
        "weights missing",
        train(),
        "error: TMP/model lacks 9 of the weights that LlamaForCausalLM needs: model.layers.2.input_layernorm.weight, "
        "model.layers.2.mlp.down_proj.weight, model.layers.2.mlp.gate_proj.weight, model.layers.2.mlp.up_proj.weight, "
        "model.layers.2.post_attention_layernorm.weight, .... They would be random numbers.\n"
        "  fix: download the checkpoint again, or check that config.json belongs to it",
        config(num_hidden_layers=3),
    ),
    Case(
        "pickled weights",
        train(),
        "error: model has only pickled weights (pytorch_model.bin), and a pickle can run code when it is read; "
        "allowed: safetensors\n"
        "  fix: use a revision or a copy with safetensors, or, if you trust it, set allow_pickle: true",
        pickled,
    ),
    Case(
        "pickled code",
        train("allow_pickle=true"),
        "error: TMP/model: its pickled weights hold more than tensors, so they were not read: <...>os.mkdir<...>.\n"
        "  fix: use a copy of the model with safetensors",
        pickled_code,
    ),
    Case(
        "code in the checkpoint",
        train(),
        "error: TMP/model brings Python code of its own (`auto_map` in config.json), which is not run unasked.\n"
        "  fix: read that code; if you trust it, set `trust_remote_code: true` in the recipe",
        config(model_type="mine", auto_map={"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}),
    ),
    Case(
        "unknown architecture",
        train(),
        "error: TMP/model/config.json is not a config that transformers knows: <...>`lama`<...>",
        config(model_type="lama"),
    ),
    Case(
        "not a causal model",
        train(),
        "error: TMP/model: model type 't5' is not a causal language model, and has none that is opened alone.\n"
        "  fix: choose a model with a causal-LM head, such as a Llama, Qwen, Gemma, Mistral, GPT-2 or BLOOM",
        config(model_type="t5"),
    ),
    Case(
        "a GPTQ checkpoint",
        train(),
        "error: TMP/model is already quantised with 'gptq'; LoRA here is trained on a base that bitsandbytes holds.\n"
        "  fix: use the unquantised checkpoint of the same model",
        config(quantization_config={"quant_method": "gptq", "bits": 4}),
    ),
    Case(
        "an 8-bit checkpoint without scales",
        train(),
        "error: TMP/model: config.json says that the weights are quantised, but 14 matrices have no scales: "
        "model.layers.0.self_attn.q_proj, model.layers.0.self_attn.k_proj, model.layers.0.self_attn.v_proj, ....\n"
        "  fix: remove `quantization_config` from config.json if the weights are in 16 bits, or download them again",
        config(quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True}),
    ),
    Case(
        "more tokens than rows",
        train(),
        "error: TMP/model: the tokenizer knows 370 tokens, the embedding has 320 rows.\n"
        "  fix: use the tokenizer that belongs to this checkpoint",
        more_tokens,
    ),
    Case(
        "experts outside transformers' interface",
        train("model=moe"),
        "error: transformers' code of a llama4_text computes with all its experts at once, so quant.type nf4 cannot "
        "hold them: 4 tensors such as model.layers.0.feed_forward.experts.down_proj (4, 128, 64), 0.000 billion "
        "weights.\n  fix: leave them in 16 bits (0.0 GB): --set 'quant.skip_modules=[experts]'",
        llama4,
    ),
    Case(
        "experts outside transformers' interface, planned",
        ["plan", "moe", "--set", "quant.type=nf4"],
        "error: transformers' code of a llama4_text computes with all its experts at once, so quant.type nf4 cannot "
        "hold them: 4 tensors such as model.layers.0.feed_forward.experts.down_proj (4, 128, 64), 0.000 billion "
        "weights.\n  fix: leave them in 16 bits (0.0 GB): --set 'quant.skip_modules=[experts]'",
        llama4,
    ),
    Case(
        "a GGUF cut short",
        train("model=cut.gguf"),
        "error: TMP/cut.gguf is cut short: 15,576 bytes of 16,576\n  fix: download or copy the file again",
        cut_gguf,
    ),
    # the adapters
    Case(
        "no such target",
        train("lora.target_modules=[q_pro]"),
        "error: lora.target_modules: no module of llama matches 'q_pro' (near: q_proj, v_proj, o_proj). "
        "Its linear layers: q_proj x2, k_proj x2, v_proj x2, o_proj x2, gate_proj x2, up_proj x2, down_proj x2, "
        "lm_head x1\n  fix: lora.target_modules: auto",
    ),
    Case(
        "a target that is no matrix",
        train("lora.target_modules=[norm]"),
        "error: lora.target_modules: 'norm' is a LlamaRMSNorm, which cannot carry an adapter\n"
        "  fix: lora.target_modules: auto, or leave them out",
    ),
    Case(
        "nothing to save",
        train("lora.modules_to_save=[lm_haed]"),
        "error: lora.modules_to_save names lm_haed, which the model does not have.\n  fix: did you mean lm_head?",
    ),
    Case(
        "nothing to save, in the dry run",
        [*train("lora.modules_to_save=[lm_haed]"), "--dry-run"],
        "error: lora.modules_to_save names lm_haed, which the model does not have.\n  fix: did you mean lm_head?",
    ),
    Case(
        "another rank for a trained adapter",
        "eval done --data train.jsonl --set lora.r=4",
        "error: --set lora.r=4: an adapter is used with the values that it was trained with; allowed here: "
        "model, quant.placement, data.*, eval.*, train.per_device_eval_batch_size.",
    ),
    Case(
        "saved whole, but in 4 bits",
        train("lora.modules_to_save=[down_proj]"),
        "error: lora.modules_to_save takes in down_proj, held in nf4: numbers of so few bits cannot train.\n"
        "  fix: keep them in 16 bits: --set 'quant.skip_modules=[down_proj]'",
    ),
    Case(
        "nothing to skip",
        train("quant.skip_modules=[foo]"),
        "error: quant.skip_modules ['foo'] name no module of LlamaForCausalLM.\n"
        "  fix: use module names as in `model.named_modules()`, such as `lm_head` or `mlp.down_proj`",
    ),
    # run folders
    Case(
        "the run exists",
        train("output=done"),
        f"error: the run folder done exists already, and a run is never overwritten.\n"
        f"  fix: continue it with halfbyte train done --resume, or {OTHER_OUTPUT.partition('fix: ')[2]}",
    ),
    Case(
        "a file as the run",
        "train model train.jsonl -q -o train.jsonl",
        f"error: train.jsonl is a file, and a run needs a new folder.{OTHER_OUTPUT}",
    ),
    Case(
        "a folder as output that is no run",
        train("output=model"),
        f"error: model is a folder that is no run, and a run needs a new folder.{OTHER_OUTPUT}",
    ),
    Case(
        "an output of nothing",
        ["train", "recipe.yaml", "--output="],
        "error: --output is given nothing.\n  fix: give it a value, or leave --output out",
    ),
    Case(
        "a time of nothing",
        ["train", "recipe.yaml", "--within", ""],
        "error: --within is given nothing.\n  fix: give it a value, or leave --within out",
    ),
    Case(
        "a time that is none",
        ["train", "recipe.yaml", "--within", "90x"],
        "error: --within must be a time such as 30m, 1h30m or 90s, got '90x'.",
    ),
    Case(
        "a search in no time",
        ["tune", "recipe.yaml", "--within", "0s"],
        "error: --within must be a time such as 30m, 1h30m or 90s, got '0s'.",
    ),
    Case(
        "a file in the way",
        train("output=train.jsonl/run"),
        f"error: the run folder train.jsonl/run cannot be made: TMP/train.jsonl is a file.{OTHER_OUTPUT}",
    ),
    Case(
        "another learning rate of a run that was stopped",
        "train done --resume --set train.learning_rate=0.002",
        "error: the run done was trained until step 4 with other values:\n"
        "  - train.learning_rate: 0.001 in the run, 0.002 asked\n<...>\n<...>halfbyte train done/recipe.yaml --output "
        "runs/NAME; from its weights, add --set lora.adapter=done/checkpoints/step-000004 "
        "--set train.learning_rate=0.002",
        remove("done/adapter"),
    ),
    Case("training a run", "train done", "error: done is a run folder.\n  fix: halfbyte train done --resume"),
    Case(
        "resuming nothing",
        "train nowhere --resume",
        "error: nowhere is not a run folder: it has no recipe.yaml.\n"
        "  fix: halfbyte train RUN --resume, with the folder that train made",
    ),
    Case(
        "resuming elsewhere",
        "train done --resume --output other",
        "error: --resume continues a run in its own folder on its own rows; --output and DATA cannot be "
        "given with it.\n"
        "  fix: halfbyte train done --resume",
    ),
    Case(
        "resuming with a change",
        "train done --resume --set lora.r=16 --set train.seed=7",
        "error: the run done was trained until step 4 with other values:\n"
        "  - lora.r: 8 in the run, 16 asked\n  - train.seed: 42 in the run, 7 asked\n"
        "  What may change: <...>quant.placement<...>save_total_limit<...>\n"
        "  fix: put back what the run had; or start a new run: halfbyte train done/recipe.yaml --output runs/NAME",
    ),
    Case(
        "resuming with a recipe that was edited",
        "train done --resume",
        "error: the run done was trained until step 4 with other values:\n"
        "  - train.learning_rate: 0.001 in the run, 0.002 asked\n<...>\n<...>halfbyte train done/recipe.yaml --output "
        "runs/NAME; from its weights, add --set lora.adapter=done --set train.learning_rate=0.002",
        lambda: edited("done/recipe.yaml", "learning_rate: 0.001", "learning_rate: 0.002"),
    ),
    Case(
        "resuming on fewer rows",
        "train done --resume --set train.max_steps=6",
        "error: data.train (train.jsonl) has changed since step 4 of the run done: it was 16 rows, now 12 rows.\n"
        "  fix: put back what the run had; or start a new run: halfbyte train done/recipe.yaml --output runs/NAME",
        lambda: tiny_run.rows(Path("train.jsonl"), 12),
    ),
    Case(
        "resuming on other rows",
        "train done --resume --set train.max_steps=6",
        "error: data.train (train.jsonl) has changed since step 4 of the run done: it was 16 other rows.\n<...>",
        lambda: tiny_run.rows(Path("train.jsonl"), 16, seed=3),
    ),
    Case(
        "resuming for fewer steps",
        "train done --resume --set train.max_steps=3",
        "error: the run done is at step 4, and the recipe asks for 3.\n"
        "  fix: more: halfbyte train done --resume --set train.max_steps=8",
    ),
    Case(
        "resuming from damage",
        "train done --resume",
        "error: no whole checkpoint to resume from in done/checkpoints; found only damaged ones: step-000002 "
        "(optimizer.safetensors has another size), step-000004 (optimizer.safetensors has another size).\n"
        "  fix: start again with another `output:` (`--set output=runs/NAME`)",
        all_of(damaged_checkpoints, remove("done/report.json")),
    ),
    Case(
        "no adapter yet",
        "eval done",
        "error: the run done has no adapter yet: it got to step 4, with a checkpoint at step 4.\n"
        "  fix: halfbyte train done --resume; or give its checkpoint in the place of the run: "
        "done/checkpoints/step-000004",
        remove("done/adapter"),
    ),
    Case(
        "no adapter yet to verify",
        "verify done",
        "error: the run done has no adapter yet: it got to step 4, with a checkpoint at step 4.\n"
        "  fix: halfbyte train done --resume; or give its checkpoint<...>done/checkpoints/step-000004<...>",
        remove("done/adapter"),
    ),
    Case(
        "neither adapter nor checkpoint yet",
        "eval done",
        "error: the run done has no adapter yet: it got to step 4, without a checkpoint.\n"
        "  fix: halfbyte train done --resume",
        all_of(remove("done/adapter"), remove("done/checkpoints/step-000002"), remove("done/checkpoints/step-000004")),
    ),
    Case(
        "no held-out rows",
        "eval done",
        "error: the run has no held-out rows (data.eval).\n  fix: halfbyte eval done --data ROWS.jsonl",
    ),
    Case(
        "a folder of rows to score",
        ["eval", "done", "--data", "my rows"],
        "error: my rows is a folder; it holds 1 .jsonl.\n  fix: halfbyte eval done --data 'my rows/a.jsonl'",
        all_of(lambda: Path("my rows").mkdir(), write("my rows/a.jsonl", row(prompt="a", completion="b"))),
    ),
    Case(
        "a key that is not there",
        ["serve", "done", "--api-key-file", "my key"],
        "error: --api-key-file my key cannot be read: No such file or directory.\n"
        "  fix: openssl rand -hex 24 > 'my key'",
    ),
    Case(
        "a store where a file is",
        "quantize model --set quant.type=nf4 --out rows.txt",
        "error: rows.txt is not a store: it has no halfbyte-store.json, which is written last.\n"
        "  fix: name another folder: --out DIR",
        write("rows.txt", "kept\n"),
    ),
    Case(
        "a store where a folder is, and a model that would have to be fetched",
        "quantize org/name --set quant.type=nf4 --out model",
        "error: model is not a store: it has no halfbyte-store.json, which is written last.\n"
        "  fix: name another folder: --out DIR",
    ),
    Case(
        "a folder that is no run",
        "generate done/checkpoints --prompt x",
        "error: done/checkpoints is not a run folder: it has no recipe.yaml and no checkpoints/.",
    ),
    *(
        Case(
            f"the folder of a GGUF file: {words}",
            [*words.split(), "my export"],
            "error: my export has no config.json, but it has GGUF files: m.gguf\n"
            "  fix: give one file as the model: 'my export/m.gguf'",
            all_of(lambda: Path("my export").mkdir(), write("my export/m.gguf", "GGUF")),
        )
        for words in ("plan", "generate --prompt x")
    ),
    Case(
        "a base has no rows of its own",
        "eval model",
        "error: the run has no held-out rows (data.eval).\n  fix: halfbyte eval model --data ROWS.jsonl",
    ),
    Case(
        "pairs for a run that has learned from answers",
        "eval done --data pairs.jsonl",
        "error: pairs.jsonl:1: <...> say which answer is better, and train.method sft does not read that.\n"
        "  fix: rows of the kind that was trained on: halfbyte eval done --data ROWS.jsonl",
        write("pairs.jsonl", row(prompt="a", chosen="b", rejected="c")),
    ),
    Case(
        "a prompt in another encoding",
        ["generate", "done", "--prompt", "a", "--prompt", "caf\udce9"],
        'error: --prompt 2 is not UTF-8.\n  fix: "$(iconv -f ISO-8859-1 -t UTF-8 FILE)" in its place',
    ),
    Case(
        "a base alone has nothing to merge",
        "merge model",
        "error: model is a base without an adapter: there is nothing to ship.\n  fix: halfbyte train model ROWS.jsonl",
    ),
    Case(
        "two exports at once",
        "export done --gguf F16 --gguf-lora",
        "error: --gguf and --gguf-lora exclude each other.\n  fix: leave out all but one: --gguf",
    ),
    Case(
        "an adapter's folder in a GGUF format",
        "export done --peft --gguf F16",
        "error: --gguf and --peft exclude each other.\n  fix: leave out all but one: --gguf",
    ),
    Case(
        "a repair of nothing",
        "export done --repair",
        "error: --repair is of a GGUF file, and none is asked for.\n  fix: --gguf Q4_0 --repair",
    ),
    Case(
        "weights to merge an adapter into that is exported alone",
        "export done --peft --base 4bit",
        "error: --base is of a file that is merged: an adapter is exported alone.\n  fix: leave --base out",
    ),
    Case(
        "rows for what is not compared",
        "export done --peft --data train.jsonl",
        "error: --data names rows to compare on, and --peft compares nothing.\n  fix: leave --data out",
    ),
    Case(
        "rows to compare on that are not there",
        "merge done --data nowhere.jsonl",
        "error: nowhere.jsonl: no such file.\n  fix: check the path; it is read relative to where halfbyte runs",
    ),
    Case(
        "rows to compare on that are none",
        "export done --gguf F16 --data cut.jsonl",
        "error: 1 of 1 rows cannot be used\n  - cut.jsonl:1: not JSON <...>",
        write("cut.jsonl", "{\n"),
    ),
    Case(
        "a program without its adapter",
        "export done --for vllm",
        "error: --for names the program that reads an adapter.\n  fix: --peft --for vllm",
    ),
    Case(
        "another rank for an adapter",
        "generate done/adapter --prompt x --set lora.r=3",
        "error: --set lora.r=3: an adapter is used with the values that it was trained with; allowed here: model<...>",
    ),
    Case(
        "another rank for a run that is verified",
        "verify done --set lora.r=3",
        "error: --set lora.r=3: an adapter is used with the values that it was trained with; allowed here: model, "
        "quant.<...>",
    ),
    Case("a file is no run", "chat recipe.yaml", "error: recipe.yaml is a file, not a run folder."),
    Case(
        "no run",
        "generate nowhere --prompt x",
        "error: there is no run folder nowhere.\n  fix: give the `output:` of a run, such as runs/quickstart",
    ),
    Case(
        "an adapter of another base by its passport",
        "generate done --prompt x --max-new-tokens 2",
        "error: the adapter done/adapter does not belong to what is here:\n  - base: trained on <...> (weights <...>), "
        "here is TMP/gpt2 (weights <...>)\n  fix: open it with what it was trained with; --force goes on all the same",
        other_base,
    ),
    Case(
        "an adapter of another base",
        "generate done --prompt x --max-new-tokens 2",
        "error: the adapter in done/adapter does not fit this base: Target modules <...> not found in the base model. "
        "<...>\n  fix: it was trained on 'TMP/model'; open it on that model",
        all_of(other_base, adapter_config(base_model_name_or_path="TMP/model"), no_passport),
    ),
    Case(
        "an adapter of another base, to be merged unproven",
        "merge done --no-proof -q",
        "error: the adapter done/adapter does not belong to what is here:\n  - base: trained on <...> (weights <...>), "
        "here is TMP/gpt2 (weights <...>)\n  fix: open it with what it was trained with; --force goes on all the same",
        other_base,
    ),
    Case(
        "an adapter of another base, for vLLM, without a passport",
        "export done --peft -q",
        "error: the adapter in done/adapter does not fit this model: Target modules <...> not found in the base model. "
        "<...>\n  fix: it was trained on 'TMP/model'",
        all_of(other_base, adapter_config(base_model_name_or_path="TMP/model"), no_passport),
    ),
    Case(
        "an adapter of another size",
        "generate done --prompt x --max-new-tokens 2",
        "error: done/adapter/adapter_config.json is not the file that halfbyte.json beside it names; --force uses it "
        "all the same.\n  fix: copy it again; a run's checkpoints/ hold earlier states of its adapter",
        adapter_config(r=4, base_model_name_or_path="org/name"),
    ),
    Case(
        "an adapter cut short",
        "generate done --prompt x --max-new-tokens 2",
        "error: done/adapter/adapter_model.safetensors is cut short or damaged: <...>.\n"
        "  fix: copy it again; a run's checkpoints/ hold earlier states of its adapter",
        cut("done/adapter/adapter_model.safetensors", 10),
    ),
    Case(
        "an adapter of another kind",
        "generate done --prompt x --max-new-tokens 2",
        "error: done/adapter/adapter_config.json is not the config of a LoRA adapter: its peft_type is 'IA3'.",
        adapter_config(peft_type="IA3"),
    ),
    Case(
        "the base is gone",
        "generate done --prompt x --max-new-tokens 2",
        f"error: there is no ./model; {ALLOWED}\n  fix: did you mean moved_model?",
        lambda: Path("model").rename("moved_model"),
    ),
]


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (
            "train r.yaml --set a=1 lora.r=2 train.seed=3 -q",
            "train r.yaml --set a=1 --set lora.r=2 --set train.seed=3 -q",
        ),
        ("train model --set lora.r=2 rows.jsonl", "train model --set lora.r=2 rows.jsonl"),
        ("train model rows.jsonl lora.r=2 --set lora.r=3", "train model rows.jsonl lora.r=2 --set lora.r=3"),
        ("generate run --set data.eval=none -p model=x", "generate run --set data.eval=none -p model=x"),
        ("train r.yaml --set lora.r=2 x.y=3", "train r.yaml --set lora.r=2 x.y=3"),
    ],
)
def test_values_after_one_set_are_one_each(words: str, meant: str) -> None:
    assert one_each(words.split()) == meant.split()


def test_what_is_told_to_begin_with_a_runs_weights_does(halfbyte: Cli) -> None:
    said = halfbyte("train", "done", "--resume", "--set", "train.learning_rate=0.002").err
    command, added = re.search(r"a new run: halfbyte (.*); from its weights, add (.*)", said).groups()
    begun = halfbyte(*command.split(), *added.split(), "--dry-run")
    assert begun.code == 0 and "of the adapter done" in begun.out, begun


def test_the_checkpoint_that_is_named_can_be_used(halfbyte: Cli) -> None:
    remove("done/adapter")()
    (named,) = halfbyte("eval", "done").err.rpartition("in the place of the run: ")[2].split()
    scored = halfbyte("eval", named, "--data", "train.jsonl", "--limit", "2", "--metric", "exact_match", "--json")
    assert scored.code == 0 and json.loads(scored.out)["rows"] == 2, scored


def test_a_run_that_is_being_written_is_told_before_the_work(halfbyte: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finetune, "train", None)
    with RunFolder(Path("done")).lock():
        ended = halfbyte("train", "done", "--resume", "--set", "train.max_steps=8")
    said = (
        f"error: the run done is being written by process {os.getpid()}.\n  fix: wait for it, stop it, or give another"
    )
    assert (ended.code, ended.out) == (2, "") and ended.err.startswith(said), ended


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_mistake_is_one_message(case: Case, here: Path, halfbyte: Cli) -> None:
    if case.prepare is not None:
        case.prepare()
    before = tree(here)
    ended = halfbyte(*(case.args.split() if isinstance(case.args, str) else case.args))
    assert re.fullmatch(pattern(case.err) + "\n", ended.err), ended.err
    assert ended.code == case.code
    assert "Traceback" not in ended.err + ended.out
    assert tree(here) == before


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("train recipe.yaml --set data.train=nope.jsonl", "nope.jsonl: no such file"),
        ("train recipe.yaml --set data.eval=nope.jsonl", "nope.jsonl: no such file"),
        ("train recipe.yaml --set output=done", "the run folder done exists already"),
        ("train recipe.yaml --set data.fields.prompt=question", "question"),
        ("train recipe.yaml --dry-run --set data.train=nope.jsonl", "nope.jsonl: no such file"),
        ("train recipe.yaml", "unknown model 'model'"),
        ("train recipe.yaml --set model=org/nope", "org/nope (revision main) is not in the cache"),
        ("train nope --resume", "nope is not a run folder"),
        ("data check nope.jsonl --model model", "nope.jsonl: no such file"),
        ("eval nope", "there is no run folder nope"),
        ("eval done --data nope.jsonl", "nope.jsonl: no such file"),
        ("generate nope --prompt x", "there is no run folder nope"),
        ("chat nope", "there is no run folder nope"),
        ("generate nope.gguf --prompt x", "there is no nope.gguf; allowed: "),
        ("export done --gguf Q9", "--gguf Q9: no such format."),
        ("export done --gguf Q8_0 --out done", "done exists already, and nothing is overwritten."),
        ("merge done --out done/adapter", "done/adapter exists already, and nothing is overwritten."),
        ("merge done --out /proc/x", "/proc/x cannot be written: "),
        ("merge nope", "there is no run folder nope"),
        ("serve done --allow-adapters nope", "--allow-adapters nope is no folder."),
        ("doctor nope", "unknown model 'nope'"),
        ("quantize nope", "unknown model 'nope'"),
        ("train recipe.yaml --set train.method=rloo lora.lora_dropout=0 train.rewards=none.py:f", "there is no file "),
    ],
)
def test_told_before_a_library_is_loaded_or_a_model_looked_for(command: str, said: str, here: Path) -> None:
    """The model is gone too, and what would be found first if anything slow came first is that it is not there."""
    shutil.rmtree("model")
    code = (
        "import sys\nfrom halfbyte.cli import main\n"
        "code = main._guard(lambda: main.app(sys.argv[1:], standalone_mode=False))\n"
        "print(code, sorted({'torch', 'transformers', 'peft', 'datasets', 'numba'} & set(sys.modules)))"
    )
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code, *command.split()], capture_output=True, text=True, env=env)
    assert done.stderr.startswith("error: ") and said in done.stderr, done.stderr
    assert done.stdout == "2 []\n"


def test_enough_cases() -> None:
    assert len(CASES) >= 36 and len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize("command", ["train", "eval nope --limit 0", "generate done", "frobnicate", "train --foo"])
def test_a_command_line_that_cannot_be_read(command: str, here: Path, halfbyte: Cli) -> None:
    before = tree(here)
    ended = halfbyte(*command.split())
    assert ended.code == 2 and "Error" in ended.err and "Traceback" not in ended.err
    assert tree(here) == before


def test_a_folder_that_may_not_be_read(here: Path, halfbyte: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """Permissions do not stop a superuser, so the system's refusal is put in its place."""
    scandir = os.scandir

    def refuse(path: Any = ".") -> Any:
        if Path(path).name == "model":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    ended = halfbyte(*train())
    assert (ended.code, ended.err) == (2, "error: the folder model cannot be read: Permission denied\n")
    assert not Path("run").exists()


def test_a_data_file_that_may_not_be_read(here: Path, halfbyte: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.open

    def refuse(self: Path, *args: Any, **kwargs: Any) -> Any:
        if self.name == "train.jsonl":
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refuse)
    ended = halfbyte(*train())
    assert (ended.code, ended.err) == (2, "error: train.jsonl cannot be read: Permission denied.\n")
    assert not Path("run").exists()


def test_what_the_system_refuses_anywhere_is_one_line(halfbyte: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.EIO, "Input/output error", "/somewhere")

    monkeypatch.setattr(finetune, "train", refuse)
    ended = halfbyte(*train())
    assert (ended.code, ended.err) == (1, "error: /somewhere: Input/output error\n")


def test_a_mixture_trains(here: Path, halfbyte: Cli) -> None:
    mixture()
    ended = halfbyte(*train("model=moe", "train.max_steps=1"))
    assert (ended.code, ended.err) == (0, "")
    assert Path("run/adapter/adapter_model.safetensors").is_file()


def test_fused_experts_can_be_accepted(here: Path, halfbyte: Cli) -> None:
    mixture()
    ended = halfbyte(*train("model=moe", "quant.skip_modules=[experts]", "train.max_steps=1"))
    assert (ended.code, ended.err) == (0, "")
    assert Path("run/adapter/adapter_model.safetensors").is_file()


def test_a_pickle_can_be_accepted(here: Path, halfbyte: Cli) -> None:
    pickled()
    ended = halfbyte(*train("allow_pickle=true", "train.max_steps=1"))
    assert (ended.code, ended.err) == (0, "")


# --- runs that start and fail: exit code 1, and all that was written can be used ------------------------------------


def whole(run: RunFolder) -> list[int]:
    """The steps of a run's checkpoints; nothing half-written may lie beside them."""
    left = [str(p.relative_to(run.path)) for p in run.path.rglob("*") if p.name.startswith(".")]
    assert not left, left
    saved = points.checkpoints(run.checkpoints)
    assert all(points.is_whole(path, hashes=True) for path in saved)
    assert len(list(run.checkpoints.iterdir())) == len(saved)
    return [points.step_of(path) for path in saved]


FREE = "  fix: free some space, then go on from the newest whole checkpoint: halfbyte train run --resume\n"
FULL = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.fixture(autouse=True)
def _waits_for_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finetune, "DiskRetry", partial(DiskRetry, wait_s=0.0))


def at_call(number: int, real: Callable[..., Any], error: Exception) -> Callable[..., Any]:
    """`real` until its call `number`, which leaves a part of the file and raises."""
    calls = []

    def write(tensors: Any, path: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(path)
        if len(calls) < number:
            return real(tensors, path, *args, **kwargs)
        Path(path).write_bytes(b"half")
        raise error

    return write


def test_no_space_for_the_second_checkpoint(halfbyte: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    # a checkpoint has two files of tensors of its own: the third call is the second checkpoint's first
    monkeypatch.setattr(checkpoint, "save_file", at_call(3, save_file, FULL))
    ended = halfbyte(*train())
    assert ended.code == 0
    assert "the disk of run/checkpoints is full" in ended.err
    assert "the run goes on, and its earlier checkpoints stay" in ended.err
    assert whole(RunFolder(Path("run"))) == [2]
    assert Path("run/adapter/adapter_model.safetensors").read_bytes() == (
        Path("done/adapter/adapter_model.safetensors").read_bytes()
    )


def test_no_space_for_the_adapter(halfbyte: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    # the adapter is written into each of the two checkpoints first
    monkeypatch.setattr(lora, "save_file", at_call(3, save_file, FULL))
    ended = halfbyte(*train())
    assert ended.code == 1
    said = r"the adapter run/adapter could not be written: the disk of run/adapter is full \(.* MB free\)"
    assert re.fullmatch(rf"error: {said}\.\n{FREE}", ended.err)
    assert not Path("run/adapter").exists()
    assert whole(RunFolder(Path("run"))) == [2, 4]


def test_no_space_for_the_best_adapter(halfbyte: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora, "save_file", at_call(1, save_file, FULL))
    ended = halfbyte(*train("data.eval=train.jsonl", "train.eval_strategy=steps", "train.eval_steps=1"))
    assert ended.code == 1
    said = r"the best adapter run/checkpoints/best could not be written: the disk of \S+ is full \(.* MB free\)"
    assert re.fullmatch(rf"(warning: {said}; the run goes on, .*\n)+error: {said}\.\n{FREE}", ended.err)
    assert whole(RunFolder(Path("run"))) == []


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="needs /dev/full, a device without space")
def test_no_space_for_the_metrics(halfbyte: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = RunFolder.__post_init__

    def full(self: RunFolder) -> None:
        paths(self)
        self.metrics = Path("/dev/full")

    monkeypatch.setattr(RunFolder, "__post_init__", full)
    ended = halfbyte(*train())
    assert ended.code == 1
    assert "metrics wait in memory" in ended.err
    assert "error: 4 rows of /dev/full could not be written: its disk is full." in ended.err
    assert Path("run/adapter/adapter_model.safetensors").is_file()


def test_no_space_for_the_run_folder(here: Path, halfbyte: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "write", full)
    before = tree(here)
    ended = halfbyte(*train())
    assert ended.code == 2
    assert re.fullmatch(
        r"error: no space left: writing run needs \d+ bytes, and \. has \d+ bytes free\.\n"
        r"  fix: free some space, or give another output: \(--output\)\n",
        ended.err,
    )
    assert tree(here) == before


def test_a_loss_that_is_not_finite(halfbyte: Cli) -> None:
    ended = halfbyte(*train("train.learning_rate=1e30"))
    assert ended.code == 1
    assert re.fullmatch(
        r"warning: train\.learning_rate 1e\+30 is outside the usual 1e-05 to 0\.003\n"
        r"error: the loss is nan at step 2 \(rows (train\.jsonl:\d+(, )?){4}\)\. "
        r"The batch is in [^;]+; nothing of this step was saved\.\n"
        r"  fix: lower train\.learning_rate, set train\.max_grad_norm, or look at those rows\n",
        ended.err,
    )
    run = RunFolder(Path("run"))
    assert [row["step"] for row in run.read_metrics()] == [1]
    assert whole(run) == [] and not run.adapter.exists()


def test_a_base_that_is_not_finite(halfbyte: Cli) -> None:
    nan_weight()
    ended = halfbyte(*train())
    assert ended.code == 1
    assert re.fullmatch(
        r"error: the loss is nan at step 1 \(rows (train\.jsonl:\d+(, )?){4}\)\. "
        r"The batch is in [^;]+; nothing of this step was saved\.\n"
        r"  fix: nothing has been trained yet: look at the base's weights and at those rows\n",
        ended.err,
    )


# --- the same in processes of their own -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "code", "err"),
    [
        ("train nope.yaml", 2, "error: there is no recipe nope.yaml.\n"),
        ("train recipe.yaml --set lora.r=0", 2, "error: recipe.yaml: --set lora.r must be >= 1, got 0\n"),
        ("train recipe.yaml -q --set data.train=empty", 2, "error: empty has no rows.\n"),
        ("train recipe.yaml -q --set train.optim=sgd --set train.learning_rate=1e30", 1, "error: the loss is "),
    ],
)
def test_as_a_process(command: str, code: int, err: str, here: Path) -> None:
    Path("empty").write_text("")
    before = tree(here)
    if code == 1:  # it loads all there is
        ended = Forked("halfbyte", *command.split()).end()
    else:
        done = subprocess.run([sys.executable, "-m", "halfbyte", *command.split()], capture_output=True, text=True)
        ended = Ended(done.returncode, done.stdout, done.stderr)
    assert ended.code == code
    assert ended.err.startswith(err)
    assert ended.err.count("\n") <= 2 and "Traceback" not in ended.err
    if code == 2:
        assert tree(here) == before


def test_every_error_is_of_the_family() -> None:
    """What `_guard` turns into a message: each kind has its own exit code."""
    kinds = {kind.__name__: kind.exit_code for kind in HalfbyteError.__subclasses__()}
    assert kinds.pop("TrainError") == kinds.pop("Unforeseen") == kinds.pop("ExportError") == 1
    assert set(kinds.values()) == {2}
