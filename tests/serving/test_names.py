"""What may be served together, under which names, and where: refused before a model is opened."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from halfbyte.errors import AdapterError, RecipeError, RunError
from halfbyte.serving import names
from halfbyte.serving.settings import KEY, Settings, bind, key_of


def adapter(folder: Path, base: str, **settings: object) -> Path:
    """An adapter as far as its config says; and its base's folder."""
    folder.mkdir(parents=True)
    model = folder.parent / base
    model.mkdir(exist_ok=True)
    (model / "config.json").write_text("{}")
    config = {"peft_type": "LORA", "base_model_name_or_path": str(model), "r": 4, "bias": "none", **settings}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "adapter_model.safetensors").touch()
    return folder


def test_names_are_those_of_folders_unless_others_are_given(tmp_path: Path) -> None:
    one, two = adapter(tmp_path / "one", "base"), adapter(tmp_path / "run" / "adapter", "../base")
    found = names.find([str(one), f"short={one}", str(two), str(tmp_path / "base")])
    assert list(found.adapters) == ["one", "short", "run"] and found.base == "base"
    assert found.first is found.adapters["one"] and found.adapters["short"].adapter == one
    alone = names.find([str(tmp_path / "base")])
    assert alone.base == "base" and not alone.adapters and alone.first.adapter is None


def test_what_cannot_be_served_together_is_refused(tmp_path: Path) -> None:
    one, other = adapter(tmp_path / "one", "base"), adapter(tmp_path / "two", "other")
    with pytest.raises(AdapterError, match=r"cannot share a base: model is .*other there and .*base here"):
        names.find([str(one), str(other)])
    with pytest.raises(RecipeError, match="two adapters would be served as one") as error:
        names.find([str(one), str(one)])
    assert error.value.fix == f"name one of them: halfbyte serve OTHER={one}"
    with pytest.raises(RecipeError, match="two adapters would be served as a") as error:
        names.find([f"a={one}", f"a={one}"])
    assert error.value.fix == f"name one of them: halfbyte serve OTHER={one}"
    with pytest.raises(RecipeError, match=rf"both be served as base\.\n  fix: halfbyte serve NAME={one}$"):
        names.find([f"base={one}"])
    biased = adapter(tmp_path / "biased", "base", bias="all")
    assert list(names.find([str(biased)]).adapters) == ["biased"]
    with pytest.raises(AdapterError, match="biased has trained the base's biases"):
        names.find([str(one), str(biased)])
    with pytest.raises(RunError):
        names.find([str(tmp_path / "nothing")])


def test_other_machines_need_a_key_and_a_port_its_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY, raising=False)
    with pytest.raises(RecipeError, match="there is no API key"):
        bind(Settings(host="0.0.0.0", port=0, key=key_of(None)))
    monkeypatch.setenv(KEY, "short")
    with pytest.raises(RecipeError, match="16 printable characters"):
        key_of(None)
    (tmp_path / "key").write_text("a-long-enough-secret\n")
    key = key_of(tmp_path / "key")
    assert key == "a-long-enough-secret" and key not in repr(Settings(key=key))
    with pytest.raises(RecipeError, match="cannot be read"):
        key_of(tmp_path / "none")
    bind(Settings(host="0.0.0.0", port=0, key=key)).close()
    with bind(Settings(port=0)) as taken:
        taken.listen()
        with pytest.raises(RecipeError, match="cannot be used: Address already in use"):
            bind(Settings(port=taken.getsockname()[1]))
    with pytest.raises(RecipeError, match=r"nowhere\.invalid:8000 cannot be used"):
        bind(Settings(host="nowhere.invalid", key=key))
