"""Files of strangers: bounded before anything is allocated, nothing run, no path followed, one clear error each."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from halfbyte.base.config import open_config, open_tokenizer
from halfbyte.data.reading import files
from halfbyte.data.reading.read import Reader
from halfbyte.errors import AdapterError, BaseModelError, DataError, HalfbyteError, RecipeError, SourceError
from halfbyte.inference.generate import chat_ids
from halfbyte.models import describe
from halfbyte.models.sources import safetensors
from halfbyte.models.sources.checkpoint import Checkpoint
from halfbyte.recipe import adapter
from halfbyte.recipe.data import Data
from halfbyte.recipe.file import load_recipe
from tests import tiny_run


def header(path: Path, text: bytes) -> Path:
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    return path


@pytest.mark.parametrize(
    "text",
    [
        b"[" * 100_000,
        b"{" + b'"a":[' * 50_000,
        b'{"w":{"dtype":"F32","shape":[' + b"9223372036854775807," * 5_000 + b'1],"data_offsets":[0,4]}}',
        b'{"w":{"dtype":"F32","shape":[' + b"9" * 4_000 + b'],"data_offsets":[0,4]}}',
        b'{"w":{"dtype":"F32","shape":[-1,-1],"data_offsets":[0,4]}}',
    ],
)
def test_headers_of_safetensors(text: bytes, tmp_path: Path) -> None:
    with pytest.raises(SourceError):
        safetensors.read_header(header(tmp_path / "model.safetensors", text))
    (tmp_path / "long.safetensors").write_bytes((31_000_000).to_bytes(8, "little") + b"[]," * 10)
    with pytest.raises(SourceError, match="is not a safetensors file"):
        safetensors.read_header(tmp_path / "long.safetensors")


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors"])
def test_an_index_names_no_path(name: str, tmp_path: Path) -> None:
    index = tmp_path / safetensors.INDEX
    index.write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(SourceError, match="names a path, not a file"):
        safetensors.indexed_files(index)


@pytest.mark.parametrize(
    "change", [{"num_hidden_layers": 10**9}, {"num_labels": 10**9}, {"auto_map": {"AutoConfig": "evil.Config"},
                                                                     "model_type": "evil"}]
)  # fmt: skip
def test_configs(change: dict[str, Any], tmp_path: Path) -> None:
    folder = tiny_run.checkpoint(tmp_path / "model")
    (folder / "evil.py").write_text("import pathlib\npathlib.Path('was_run').touch()\n")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(BaseModelError):
        open_config(folder)
    with pytest.raises(HalfbyteError):
        describe.describe(str(folder)) if "auto_map" not in change else open_config(folder)
    assert not Path("was_run").exists()


ADAPTER = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"r": 10**9}, "a rank is a whole number of at most 16,384"),
        ({"r": "4"}, "a rank is"),
        ({"rank_pattern": {"q_proj": 10**7}}, "a rank is"),
        ({"rank_pattern": [1]}, "are mappings"),
        ({"target_modules": "(a+)+$"}, "repeats inside repeats"),
        ({"target_modules": "([a-z.]*)*q"}, "repeats inside repeats"),
        ({"exclude_modules": ".*.*.*.*.*x"}, "more than 4"),
        ({"rank_pattern": {"(.|..)+(.+)+": 4}}, "repeats inside repeats"),
        ({"target_modules": "a" * 20_000}, "the pattern"),
    ],
)
def test_configs_of_adapters(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    save_file({"w": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(ADAPTER | change))
    with pytest.raises(AdapterError, match=said):
        adapter.read_config(tmp_path)


@pytest.mark.parametrize(
    "pattern", [r".*\.(q|v)_proj", r"(?!.*visual).*layers\.\d+\..*(q_proj|v_proj)", "model.*", "q"]
)
def test_patterns_of_honest_adapters_pass(pattern: str, tmp_path: Path) -> None:
    assert not adapter.is_explosive(pattern)


def test_recipes_that_grow(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    bomb = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{x: *a{i - 1}, y: *a{i - 1}}}\n" for i in range(1, 60))
    lists = "b0: &b0 [1]\n" + "".join(f"b{i}: &b{i} [{', '.join([f'*b{i - 1}'] * 9)}]\n" for i in range(1, 30))
    for text, said in ((bomb, "more than 20,000 values"), (lists, "more than 20,000 values"),
                       ("model: " + "[" * 30_000, "nested too deeply"), ("# " + "x" * 200_000, "longer than"),
                       ("model: !!python/object/apply:os.system [touch was_run]", "not YAML")):  # fmt: skip
        path.write_text(text)
        with pytest.raises(RecipeError, match=said):
            load_recipe(path)
    assert not Path("was_run").exists()


def rows(path: Path) -> Reader:
    reader = Reader(files.find(str(path)), Data(train=str(path)))
    for _ in reader:
        pass
    return reader


def test_gzip_bombs(tmp_path: Path) -> None:
    for name, content in (("lines.jsonl.gz", b"\n"), ("line.jsonl.gz", b" "), ("list.json.gz", b'{"text": "a"},')):
        path = tmp_path / name
        with gzip.open(path, "wb", 9) as file:
            file.write(b"[" * (name == "list.json.gz"))
            for _ in range(20):
                file.write(content * (1_000_000 // len(content)))
        assert path.stat().st_size < 200_000
        with pytest.raises(DataError, match="bytes become more than"):
            rows(path)
    honest = tmp_path / "rows.jsonl.gz"
    with gzip.open(honest, "wt") as file:
        file.writelines(json.dumps({"prompt": f"{i} " * 20, "completion": "b"}) + "\n" for i in range(2_000))
    assert rows(honest).rows == 2_000


def test_parquet_bombs(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "rows.parquet"
    text = pa.DictionaryArray.from_arrays(pa.array([0] * 20_000, pa.int32()), pa.array(["x" * 8_000_000]))
    pq.write_table(pa.table({"text": text}), path, compression="zstd")
    assert path.stat().st_size < 1_000_000, "160 GB in less than a megabyte"
    with pytest.raises(DataError, match="takes more than 1 GB of memory"):
        rows(path)


TEMPLATES = {
    "without an end": "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}",
    "doubling": "{% set n = namespace(s='ab') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}",
    "product": "{{ 'a' * 10000000000 }}",
    "power": "{{ 9 ** 999999999 }}",
    "format": "{{ '%9999999999d' % 1 }}",
    "just": "{{ 'a'.ljust(9999999999) }}",
}


@pytest.mark.parametrize("kind", TEMPLATES)
def test_templates_end(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tiny_run.tokenizer(chat_template=TEMPLATES[kind])
    with pytest.raises(DataError, match=r"the chat template (takes|calculates powers)"):
        chat_ids(tokenizer, [{"role": "user", "content": "x"}])


@pytest.mark.parametrize(
    "text", ["{{ ''.__class__.__mro__ }}", "{{ cycler.__init__.__globals__.os.system('touch x') }}"]
)
def test_templates_run_nothing(text: str) -> None:
    with pytest.raises(DataError, match="the chat template refuses the conversation"):
        chat_ids(tiny_run.tokenizer(chat_template=text + "{{ x.y.z }}"), [{"role": "user", "content": "x"}])


DAMAGES: dict[str, Callable[[Path], None]] = {
    "nothing": lambda path: path.write_text(""),
    "deep": lambda path: path.write_text("[" * 200_000),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "another kind": lambda path: path.write_text('{"model": {"type": "Unigram", "vocab": [["a", null]]}}'),
    "long": lambda path: path.open("ab").truncate(200_000_000) and None,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_tokenizers(damage: str, tmp_path: Path) -> None:
    folder = tiny_run.checkpoint(tmp_path / "model")
    DAMAGES[damage](folder / "tokenizer.json")
    with pytest.raises(BaseModelError):
        open_tokenizer(Checkpoint(folder, "model", None, "folder"))
