"""What sources stands on in huggingface_hub, transformers' GGUF loader and the gguf package."""

from __future__ import annotations

import inspect

import pytest


def test_the_hub_has_the_names_that_its_failures_are_told_apart_by() -> None:
    from huggingface_hub import errors, get_cached_repo_tree, snapshot_download

    assert {"revision", "allow_patterns", "ignore_patterns"} <= inspect.signature(snapshot_download).parameters.keys()
    assert "revision" in inspect.signature(get_cached_repo_tree).parameters
    assert issubclass(errors.GatedRepoError, errors.RepositoryNotFoundError), "the gate must be asked for first"
    assert issubclass(errors.IncompleteSnapshotError, errors.LocalEntryNotFoundError)
    for name in ("RevisionNotFoundError", "HFValidationError", "CachedRepoTreeNotFoundError", "XetDownloadError"):
        assert issubclass(getattr(errors, name), Exception)


def test_the_loader_takes_a_config_with_a_gguf_and_reports_what_was_missing() -> None:
    from transformers import GgufConfig, PreTrainedModel

    assert GgufConfig(dequantize=True).dequantize
    source = inspect.getsource(PreTrainedModel.from_pretrained)
    assert "gguf_file" in source and "output_loading_info" in source


def test_transformers_still_needs_our_digit_split() -> None:
    """When this fails, upstream splits digits itself, and the table in convert.py can go."""
    mapping = pytest.importorskip("transformers.integrations.gguf.gguf_tokenizer_mapping")
    from halfbyte.models.sources.gguf_convert import DIGIT_SPLIT

    assert not DIGIT_SPLIT & mapping.GGUF_PRE_TOKENIZER_SPLITS.keys()


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
