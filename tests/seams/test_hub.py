"""What sources stands on in huggingface_hub, transformers' GGUF loader and the gguf package."""

from __future__ import annotations

import inspect

import pytest

from halfbyte.upstream.transformers import GGUF_RULES

needs_rules = pytest.mark.skipif(not GGUF_RULES.there, reason=GGUF_RULES.reason or "there")


def test_the_hub_has_the_names_that_its_failures_are_told_apart_by() -> None:
    from huggingface_hub import errors, get_cached_repo_tree, snapshot_download

    assert {"revision", "allow_patterns", "ignore_patterns"} <= inspect.signature(snapshot_download).parameters.keys()
    assert "revision" in inspect.signature(get_cached_repo_tree).parameters
    assert issubclass(errors.GatedRepoError, errors.RepositoryNotFoundError), "the gate must be asked for first"
    assert issubclass(errors.IncompleteSnapshotError, errors.LocalEntryNotFoundError)
    for name in ("RevisionNotFoundError", "HFValidationError", "CachedRepoTreeNotFoundError", "XetDownloadError"):
        assert issubclass(getattr(errors, name), Exception)


@needs_rules
def test_the_fast_tokenizer_is_made_of_a_gguf_whatever_its_architecture() -> None:
    from transformers import PreTrainedTokenizerFast

    source = inspect.getsource(PreTrainedTokenizerFast.__init__)
    assert "gguf_file" in source and "get_gguf_tokenizer" in source and "ARCHS" not in source


@needs_rules
def test_transformers_still_lacks_the_rules_that_are_listed_here() -> None:
    """When this fails, upstream cuts by them itself, and they can go from the table."""
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    from halfbyte.models.gguf.tokenizer import SPLITS

    assert not SPLITS.keys() & GGUF_PRE_TOKENIZER_SPLITS.keys()


def test_an_empty_model_tells_the_names_and_shapes_of_a_checkpoint() -> None:
    """`revert_weight_conversion`, which save_pretrained uses, on the meta device: a stack becomes its experts."""
    import torch
    from transformers import AutoModelForCausalLM, MixtralConfig
    from transformers.core_model_loading import revert_weight_conversion

    small = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "vocab_size": 16}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(MixtralConfig(**small, num_attention_heads=2, num_key_value_heads=2))
    shapes = {name: value.shape for name, value in revert_weight_conversion(model, model.state_dict()).items()}
    assert shapes["model.layers.0.block_sparse_moe.experts.7.w1.weight"] == (12, 8)


def test_the_gguf_package_maps_names_with_stacked_experts() -> None:
    from gguf import MODEL_ARCH, get_tensor_name_map

    names = get_tensor_name_map(MODEL_ARCH.LLAMA, 1)
    found = names.get_name("model.layers.0.block_sparse_moe.experts.w1.weight", try_suffixes=(".weight", ".bias"))
    assert found == "blk.0.ffn_gate_exps.weight"


def test_gguf_sizes_are_found_by_plain_numbers() -> None:
    from gguf.constants import GGML_QUANT_SIZES

    assert GGML_QUANT_SIZES[3] == (32, 20)  # Q4_1: two fp16 and 16 bytes of codes for 32 weights
    assert 10_000 not in GGML_QUANT_SIZES


def test_reading_a_part_of_a_file_goes_on_after_a_connection_ends() -> None:
    from huggingface_hub import get_hf_file_metadata
    from huggingface_hub.utils import _http

    assert "retry_on_errors" in inspect.signature(get_hf_file_metadata).parameters
    taken = inspect.signature(_http.http_stream_backoff).parameters
    assert {"max_retries", "base_wait_time", "retry_on_exceptions"} <= set(taken)
    assert any(e.__name__ == "RemoteProtocolError" for e in taken["retry_on_exceptions"].default)
