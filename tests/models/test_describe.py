"""describe.py: a model's tensors without its weights, from a name, a folder, a GGUF and a hub; and nonsense refused."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from halfbyte.errors import SourceError
from halfbyte.models import describe
from halfbyte.models.describe import references, tensors_of
from halfbyte.models.tensors import read_checkpoint
from tests import tiny
from tests.hub_server import HubServer, Sparse

SHARDS = 3
NAME = "org/llama-7b"


def test_a_bundled_name_needs_nothing() -> None:
    found = describe.describe("Llama-2-7B")
    assert (found.parameters, found.origin, found.read_bytes) == (6_738_415_616, "bundled shape", 0)
    assert (found.facts.layers, found.facts.heads, found.facts.head_size) == (32, 32, 128)
    assert describe.describe("gemma3-270m").specs == describe.describe("gemma-3-270m").specs


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_a_folder_and_its_config_alone_agree(tmp_path: Path, name: str) -> None:
    tiny.save(tmp_path, name, torch.bfloat16)
    found = describe.describe(str(tmp_path))
    assert list(found.specs) == read_checkpoint(tmp_path)
    assert found.origin == "headers of 1 file"
    assert 0 < found.read_bytes < 20_000
    (tmp_path / "model.safetensors").unlink()
    alone = describe.describe(str(tmp_path))
    assert alone.origin == "config.json alone"
    assert sorted(alone.specs, key=str) == sorted(found.specs, key=str)


def test_an_unknown_architecture_without_weights_says_what_to_download(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "rwkv", "hidden_size": 8}))
    with pytest.raises(SourceError, match=r"has no \.safetensors file"):
        describe.describe(str(tmp_path))


@pytest.mark.parametrize("change", [{"num_hidden_layers": 0}, {"num_hidden_layers": None}, {"hidden_size": "many"}])
def test_a_config_without_layers_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    config = {**references()["llama-2-7b"]["config"], **change}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(SourceError, match=r"gives no (layers|hidden)"):
        describe.describe(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    with pytest.raises(SourceError, match=r"neither its config nor its tensors say"):
        describe.describe(str(tmp_path))


def test_a_cut_header_is_named(tmp_path: Path) -> None:
    tiny.save(tmp_path, "llama", torch.bfloat16)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(SourceError, match=r"model\.safetensors is cut short inside its header: 500 bytes of at least"):
        describe.describe(str(tmp_path))


def test_a_name_that_is_nothing_is_answered_with_near_ones() -> None:
    with pytest.raises(SourceError, match=r"there is no llama-2-7\b.*\n.*did you mean .*llama-2-7b"):
        describe.describe("llama-2-7")
    with pytest.raises(SourceError, match="bundled are"):
        describe.describe("./nowhere")


def test_a_quantised_folder_is_what_it_was_made_of(tmp_path: Path) -> None:
    config = {**references()["llama-2-7b"]["config"], "quantization_config": {"quant_method": "bitsandbytes"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert describe.describe(str(tmp_path)).parameters == 6_738_415_616


@pytest.mark.parametrize("name", ["llama", "qwen3", "minimax-m2"])
def test_a_gguf_by_its_header(tmp_path: Path, name: str) -> None:
    from gguf import GGUFWriter

    file = tmp_path / "m.gguf"
    writer = GGUFWriter(file, name)
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    writer.add_feed_forward_length(128)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_key_length(16)
    writer.add_context_length(256)
    writer.add_token_list(["a"] * 96)
    like = tiny.config("qwen3" if name == "qwen3" else "llama", vocab_size=96, changes={"tie_word_embeddings": True})
    wanted = tensors_of(json.loads(like.to_json_string(use_diff=False)))
    for number, spec in enumerate(wanted):
        gguf_name = "token_embd.weight" if spec.role == "embedding" else f"blk.{spec.layer or 0}.t{number}.weight"
        writer.add_tensor(gguf_name, np.zeros(spec.shape, np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = describe.describe(str(file))
    assert found.parameters == sum(s.numel for s in wanted)
    assert (found.facts.layers, found.facts.hidden, found.facts.vocab) == (2, 64, 96)
    assert found.read_bytes < file.stat().st_size


def test_a_gguf_that_no_run_could_read_is_no_plan(tmp_path: Path) -> None:
    from gguf import GGUFWriter

    writer = GGUFWriter(tmp_path / "m.gguf", "rwkv6")
    writer.add_token_list(["a"])
    writer.add_tensor("token_embd.weight", np.zeros((1, 64), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(SourceError, match=r"m\.gguf cannot be used: its architecture 'rwkv6' .* allowed: arcee"):
        describe.describe(str(tmp_path / "m.gguf"))


def test_a_mixture_in_a_gguf_is_no_dense_model(tmp_path: Path) -> None:
    """A Mixtral's file has the architecture llama; transformers makes a dense Llama of it."""
    from tests.models.gguf import test_architectures as gguf_files

    file, model = gguf_files.written(tmp_path, "mixtral")
    found = describe.describe(str(file))
    assert found.parameters == sum(p.numel() for p in model.parameters())
    roles = Counter(spec.role for spec in found.specs)
    assert (roles["expert"], roles["router"], roles["linear"]) == (2 * 3, 2, 2 * 4)
    assert (found.facts.experts, found.facts.experts_per_token) == (4, 2)


# --- the hub --------------------------------------------------------------------------------------------------------


def sharded_7b() -> dict[str, Any]:
    """A Llama-2-7B in three shards whose data is nowhere: only headers exist."""
    specs = tensors_of(references()["llama-2-7b"]["config"])
    files: dict[str, Any] = {"config.json": json.dumps(references()["llama-2-7b"]["config"]).encode()}
    weight_map = {}
    for number in range(SHARDS):
        name = f"model-{number + 1:05}-of-{SHARDS:05}.safetensors"
        header, at = {}, 0
        for spec in specs[number::SHARDS]:
            size = 2 * math.prod(spec.shape)
            header[spec.name] = {"dtype": "F16", "shape": list(spec.shape), "data_offsets": [at, at + size]}
            weight_map[spec.name] = name
            at += size
        raw = json.dumps(header).encode()
        start = len(raw).to_bytes(8, "little") + raw
        files[name] = Sparse(start, len(start) + at)
    files["model.safetensors.index.json"] = json.dumps({"weight_map": weight_map}).encode()
    return files


ASK = """
import json, sys
from halfbyte.errors import HalfbyteError
from halfbyte.models.describe import describe
try:
    found = describe(sys.argv[1])
    print(json.dumps([found.parameters, found.origin, found.read_bytes, "torch" in sys.modules]))
except HalfbyteError as error:
    print(error)
"""


def ask(hub: HubServer | None, home: Path, name: str, **env: str) -> str:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    url = hub.url if hub is not None else "http://127.0.0.1:9"
    done = subprocess.run(
        [sys.executable, "-c", ASK, name],
        capture_output=True,
        text=True,
        env={**clean, "HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", **env},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_sharded_7b_on_a_hub_is_read_in_kilobytes(tmp_path: Path) -> None:
    with HubServer() as hub:
        hub.add(NAME, sharded_7b())
        parameters, origin, read, torch_there = json.loads(ask(hub, tmp_path, NAME))
        assert (parameters, origin, torch_there) == (6_738_415_616, "headers of 3 files on the hub", False)
        assert read < 500_000
        assert hub.sent_bytes < 2_000_000


def test_a_connection_that_ends_without_an_answer_is_opened_again(tmp_path: Path) -> None:
    with HubServer() as hub:
        hub.add(NAME, sharded_7b())
        hub.hang_up = 2
        assert json.loads(ask(hub, tmp_path, NAME))[0] == 6_738_415_616
        assert hub.hang_up == 0
        hub.hang_up = 99
        assert f"the download of {NAME} was cut: " in ask(hub, tmp_path, NAME)


def test_a_server_that_ignores_ranges_is_an_error_and_not_a_download(tmp_path: Path) -> None:
    with HubServer() as hub:
        hub.add(NAME, sharded_7b())
        hub.ignore_ranges = True
        said = ask(hub, tmp_path, NAME)
    assert "the server ignores ranges: it would send all 4.2" in said
    assert f"fix: download the model, and give its folder: hf download {NAME}" in said


def test_a_model_that_is_not_there_and_a_hub_that_is_not_there(tmp_path: Path) -> None:
    with HubServer() as hub:
        assert f"has no model {NAME}" in ask(hub, tmp_path, NAME)
        hub.add(NAME, {"README.md": b"hello"})
        assert f"{NAME} has no config.json, so it is not a model" in ask(hub, tmp_path, NAME)
    assert "cannot be reached" in ask(None, tmp_path, NAME)


@pytest.mark.parametrize("env", [{}, {"HF_HUB_OFFLINE": "1"}])
def test_a_hub_out_of_reach_leaves_the_bundled_shape(tmp_path: Path, env: dict[str, str]) -> None:
    parameters, origin, *_ = json.loads(ask(None, tmp_path, "meta-llama/Meta-Llama-3-8B-Instruct", **env))
    assert parameters == 8_030_261_248
    assert origin.startswith("bundled shape of llama-3-8b: ")
    assert ("HF_HUB_OFFLINE is set" if env else "http://127.0.0.1:9 cannot be reached") in origin


@pytest.mark.parametrize(
    ("repo", "bundled"),
    [
        ("Qwen/Qwen2.5-7B-Instruct", "qwen2.5-7b"),
        ("meta-llama/Llama-2-7b-chat-hf", "llama-2-7b"),
        ("mistralai/Mistral-7B-Instruct-v0.1", "mistral-7b"),
        ("microsoft/Phi-4-mini-instruct", "phi-4-mini"),
        ("microsoft/phi-4", "phi-4"),
        ("mistralai/Mixtral-8x7B-Instruct-v0.1", "mixtral-8x7b"),
        ("Qwen/Qwen3-30B-A3B-Instruct-2507", "qwen3-30b-a3b"),
        ("openai/gpt-oss-20b", "gpt-oss-20b"),
        ("deepseek-ai/DeepSeek-V3", "deepseek-v3"),
        ("deepseek-ai/DeepSeek-V3-0324", "deepseek-v3"),
        ("google/gemma-3-27b-it", "gemma-3-27b"),
        ("HuggingFaceTB/SmolLM3-3B", "smollm3-3b"),
        ("microsoft/Phi-4-multimodal-instruct", None),
        ("someone/llama-2-7b-with-more-layers", None),
    ],
)
def test_the_bundled_shape_of_a_hub_id(repo: str, bundled: str | None) -> None:
    assert describe.reference_of(repo) == bundled


def test_a_config_alone_on_the_hub(tmp_path: Path) -> None:
    with HubServer() as hub:
        hub.add(
            NAME, {"config.json": json.dumps(references()["opt-125m"]["config"]).encode(), "pytorch_model.bin": b"x"}
        )
        assert json.loads(ask(hub, tmp_path, NAME))[:2] == [
            sum(s.numel for s in tensors_of(references()["opt-125m"]["config"])), "config.json alone",
        ]  # fmt: skip
        hub.add("org/rwkv", {"config.json": b'{"model_type": "rwkv"}', "pytorch_model.bin": b"x"})
        assert "has no safetensors, and the tensors of a 'rwkv' are not known" in ask(hub, tmp_path, "org/rwkv")


def test_a_header_that_is_cut_on_the_hub(tmp_path: Path) -> None:
    files = {k: v for k, v in sharded_7b().items() if "index" not in k and "model" not in k}
    with HubServer() as hub:
        hub.add(NAME, {**files, "model.safetensors": (10**6).to_bytes(8, "little") + b"{}"})
        said = "model.safetensors is cut short inside its header: 10 bytes of at least 1,000,008"
        assert said in ask(hub, tmp_path, NAME)


def test_what_the_cache_has_needs_no_hub(tmp_path: Path) -> None:
    tiny.save(tmp_path / "m", "llama", torch.bfloat16)
    home = tmp_path / "home"
    with HubServer() as hub:
        hub.add("org/tiny", {p.name: p.read_bytes() for p in (tmp_path / "m").iterdir()})
        commit = hub.repos["org/tiny"].revisions["main"]
        online = json.loads(ask(hub, home, "org/tiny"))
    snapshot = home / "hub" / "models--org--tiny" / "snapshots" / commit
    shutil.copy(tmp_path / "m" / "model.safetensors", snapshot / "model.safetensors")
    offline = json.loads(ask(None, home, "org/tiny", HF_HUB_OFFLINE="1"))
    assert offline[0] == online[0]
    assert offline[1] == "headers of 1 file"
