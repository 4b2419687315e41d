"""What a stranger wrote takes a bounded time and memory, and what it costs to be sure is small."""

from __future__ import annotations

import mmap
import sys
import threading
import time
from pathlib import Path

import pytest

from halfbyte.system import limits
from halfbyte.system.limits import TooMuch, limited


def test_json_is_refused_by_its_length_and_its_depth(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"a": [1, "é"]}', encoding="utf-8")
    assert limits.read_json(path) == {"a": [1, "é"]}
    with pytest.raises(TooMuch, match="longer than 9 bytes"):
        limits.read_json(path, 9)
    path.write_text("[" * 100_000)
    with pytest.raises(TooMuch, match="nested too deeply"):
        limits.read_json(path)
    path.write_text("{")
    with pytest.raises(ValueError):
        limits.read_json(path)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ('{"num_hidden_layers": 1000000000}', "num_hidden_layers"),
        ('{"text_config": {"n_layer": 1e12}}', "n_layer"),
        ('{"num_labels": 1000000000}', "num_labels"),
        ('{"a": [{"decoder_layers": 5000, "num_layers": 5000}]}', "num_layers"),
        ('{"hidden_size": 1e300}', "hidden_size"),
        ('{"rope_theta": -Infinity}', "rope_theta"),
        ('{"model_type": ["llama"]}', "model_type"),
        ('{"text_config": {"model_type": {}}}', "model_type"),
    ],
)
def test_numbers_that_are_counted_up_to_have_a_limit(text: str, name: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(TooMuch, match=f"its {name} is"):
        limits.read_config(path)


def test_a_real_config_passes(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(
        '{"num_hidden_layers": 126, "vocab_size": 262144, "num_attention_heads": 128, "rope_theta": 1e7, '
        '"n_routed_experts": 384, "max_position_embeddings": 10485760, "layer_types": ["full_attention"]}'
    )
    assert isinstance(limits.read_config(path), dict)


def test_work_without_an_end_is_ended_and_the_next_is_not() -> None:
    def work() -> None:
        with limited("it", seconds=0.1):
            while True:
                try:
                    pass
                except Exception:
                    raise

    with pytest.raises(TooMuch, match="it takes longer than 0 s"):
        work()
    for _ in range(3):
        with limited("it", seconds=60.0):
            time.sleep(0.06)  # one look of the watch
    with pytest.raises(ZeroDivisionError), limited("it", seconds=60.0):
        _ = 1 / 0


def test_another_thread_is_ended_alone() -> None:
    seen: list[str] = []

    def work() -> None:
        try:
            with limited("it", seconds=0.1):
                while True:
                    pass
        except TooMuch:
            seen.append("ended")

    thread = threading.Thread(target=work)
    thread.start()
    with limited("this", seconds=60.0):
        thread.join()
    assert seen == ["ended"]


def test_a_machine_that_does_not_run_the_work_ends_nothing() -> None:
    """As when it is stopped, or other programs take its cores: time goes on, the work's own does not."""
    with limited("too long", seconds=0.2):
        time.sleep(1.0)


def test_memory_past_the_limit_is_refused_and_the_limit_is_taken_back() -> None:
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(TooMuch, match="it takes more than 0 GB of memory"), limited("it", more_bytes=200_000_000):
        _ = b"x" * 10**9
    assert resource.getrlimit(resource.RLIMIT_AS) == before
    with limited("it", more_bytes=10**9):
        _ = b"x" * 10**8


@pytest.mark.skipif(sys.platform != "linux", reason="the limit of memory is Linux's")
def test_what_was_mapped_a_moment_ago_is_not_counted_against_the_work() -> None:
    with limited("a"):
        pass
    with mmap.mmap(-1, 2 * limits.BYTES), limited("b"):  # a library is loaded, a base is mapped
        bytearray(200_000_000)
