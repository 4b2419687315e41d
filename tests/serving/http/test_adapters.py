"""Adapters loaded and unloaded while the server runs, from allowed folders alone; answers are plain PEFT's."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from halfbyte.errors import AdapterError
from halfbyte.serving.engine import Engine
from halfbyte.serving.folders import AdapterFolders
from tests.serving import served
from tests.serving.http.test_app import Running, asked, until


@pytest.fixture(scope="module")
def where() -> Path:
    """`first` and `second` may be loaded; `outside` lies beside the folder that is allowed."""
    made = served.folder()
    (made / "allowed").mkdir()
    for name in ("first", "second"):
        shutil.move(made / name, made / "allowed" / name)
    shutil.copytree(made / "allowed" / "second", made / "outside")
    return made


@pytest.fixture
def running(where: Path) -> Iterator[Running]:
    """The base alone."""
    made = Running(Engine(served.opened(where, ())), folders=AdapterFolders.of([where / "allowed"], served.FP32))
    yield made
    made.end()


def load(server: Running, name: str, path: object, **more: bool) -> httpx2.Response:
    return server.post({"lora_name": name, "lora_path": str(path), **more}, "/v1/load_lora_adapter")


def unload(server: Running, name: str) -> httpx2.Response:
    return server.post({"lora_name": name}, "/v1/unload_lora_adapter")


def said(server: Running, name: str, question: str = "a large round box") -> str:
    made = server.client().chat.completions.create(model=name, messages=asked(question), temperature=0, max_tokens=12)
    return str(made.choices[0].message.content)


def right(where: Path, adapter: str | None, question: str = "a large round box") -> str:
    path = None if adapter is None else f"allowed/{adapter}"
    return served.words(served.greedy(served.plain(where, path), served.prompt(question), 12))


def test_adapters_come_and_go(running: Running, where: Path) -> None:
    made = load(running, "one", "first")
    assert (made.status_code, made.text) == (200, "Success: LoRA adapter 'one' added successfully.")
    assert load(running, "two", where / "allowed" / "second").status_code == 200
    assert [one.id for one in running.client().models.list()] == [served.BASE, "one", "two"]
    answers = {"one": right(where, "first"), "two": right(where, "second"), served.BASE: right(where, None)}
    assert len(set(answers.values())) == 3
    assert {name: said(running, name) for name in answers} == answers
    gone = unload(running, "one")
    assert (gone.status_code, gone.text) == (200, "Success: LoRA adapter 'one' removed successfully.")
    with pytest.raises(openai.NotFoundError, match="there is no model 'one'"):
        said(running, "one")
    assert {name: said(running, name) for name in ("two", served.BASE)} == {n: answers[n] for n in ("two", served.BASE)}
    assert load(running, "one", "second").status_code == 200 and said(running, "one") == answers["two"]
    assert unload(running, "two").status_code == 200 and said(running, "one") == answers["two"]


@pytest.mark.parametrize("settings", [("quant.compute_dtype=fp32",), ("quant.compute_dtype=bf16",)])
def test_one_that_is_loaded_answers_as_one_that_was_there(where: Path, settings: tuple[str, ...]) -> None:
    """In 4 bits, with fused layers, beside another that has other targets."""
    names = ("allowed/first", "allowed/second")
    answers = []
    for first, later in ((names, ()), (names[:1], ("second",)), ((), ("first", "second"))):
        server = Running(Engine(served.opened(where, first, settings)),
                         folders=AdapterFolders.of([where / "allowed"], settings))  # fmt: skip
        try:
            assert all(load(server, name, name).status_code == 200 for name in later)
            answers.append([said(server, name) for name in ("first", "second", served.BASE)])
        finally:
            server.end()
    assert answers[0] == answers[1] == answers[2] and len(set(answers[0])) == 3


def test_another_takes_its_place_and_no_client_is_refused(
    running: Running, where: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was begun is the first one's, what waits and what comes later is the second's, also read beside others."""
    assert load(running, "one", "first", load_inplace=True).status_code == 200
    step, answers = running.engine._step, dict[str, str]()
    monkeypatch.setattr(running.engine, "_step", lambda: (time.sleep(0.02), step()))

    def ask(when: str) -> threading.Thread:
        thread = threading.Thread(target=lambda: answers.update({when: said(running, "one")}))
        thread.start()
        return thread

    threads = [ask("before")]
    until(lambda: running.engine.running == 1)
    threads.append(threading.Thread(target=lambda: load(running, "one", "second", load_inplace=True)))
    threads[-1].start()
    until(lambda: len(running.engine.changes) == 1)
    threads.append(ask("meanwhile"))
    for thread in threads:
        thread.join()
    first, second = right(where, "first"), right(where, "second")
    assert first != second and answers == {"before": first, "meanwhile": second}
    assert said(running, "one") == second and said(running, served.BASE) == right(where, None)
    assert [one.id for one in running.client().models.list()] == [served.BASE, "one"]
    model = running.engine.models.opened.model
    assert [name for name in model.peft_config if name.startswith("adapter")] == [
        running.engine.models.by_name["one"].adapter
    ]


def test_it_waits_for_what_is_being_written_and_what_waits_goes_on(
    running: Running, where: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load(running, "one", "first").status_code == 200
    step, found = running.engine._step, dict[str, Any]()
    monkeypatch.setattr(running.engine, "_step", lambda: (time.sleep(0.02), step()))

    def aside(name: str, work: Any) -> threading.Thread:
        thread = threading.Thread(target=lambda: found.update({name: work()}))
        thread.start()
        return thread

    def failing() -> str:
        with pytest.raises(openai.NotFoundError, match="there is no model 'one' any more") as error:
            said(running, "one")
        return str(error.value)

    threads = [aside("before", lambda: said(running, "one"))]
    until(lambda: running.engine.running == 1)
    threads.append(aside("gone", lambda: unload(running, "one").status_code))
    until(lambda: len(running.engine.changes) == 1)
    threads += [aside("waits", failing), aside("base", lambda: said(running, served.BASE))]
    for thread in threads:
        thread.join()
    assert found["before"] == right(where, "first") and found["gone"] == 200
    assert found["base"] == right(where, None) and "any more" in found["waits"]


def test_only_what_was_allowed_is_read(running: Running, where: Path) -> None:
    allowed = where / "allowed"
    (allowed / "link").symlink_to(where / "outside")
    (allowed / "inside").symlink_to(allowed / "first")
    shutil.copytree(allowed / "first", allowed / "weights")
    (allowed / "weights" / "adapter_model.safetensors").unlink()
    (allowed / "weights" / "adapter_model.safetensors").symlink_to(where / "outside" / "adapter_model.safetensors")
    (allowed / "above").mkdir()
    (allowed / "above" / "adapter").symlink_to(where / "outside")
    (allowed / "looping").symlink_to(allowed / "looping")
    answers = {
        str(path): load(running, "x", path)
        for path in (
            "../outside", where / "outside", f"{allowed}/../outside", "first/../../outside", "link", "weights", "above",
            "/etc", "/etc/passwd", "nothing", "", ".." , "a\0b", "x" * 5000, "looping", f"{allowed}x",
        )
    }  # fmt: skip
    codes = {path: answer.status_code for path, answer in answers.items()}
    assert codes == {path: 400 if not path else 404 for path in codes}
    told = {answer.json()["error"]["message"] for path, answer in answers.items() if path}
    assert len(told) == 1  # what is there cannot be told from what is not
    assert load(running, "x", "inside").status_code == 200
    for path in ("link", "inside", "looping"):
        (allowed / path).unlink()
    for path in ("weights", "above"):
        shutil.rmtree(allowed / path)


def test_errors_are_those_of_vllm_and_change_nothing(running: Running, where: Path) -> None:
    other = served.folder("gpt2", {"other": {"target_modules": ["c_attn"]}})
    shutil.copytree(other / "other", where / "allowed" / "other")
    shutil.copytree(where / "allowed" / "first", where / "allowed" / "broken")
    (where / "allowed" / "broken" / "adapter_model.safetensors").write_bytes(b"x" * 100)
    assert load(running, "one", "first").status_code == 200
    for made, status, kind, words in (
        (load(running, "", "first"), 400, "InvalidUserInput", "Both 'lora_name' and 'lora_path' must be provided."),
        (load(running, "one", "second"), 400, "InvalidUserInput", "The lora adapter 'one' has already been loaded."),
        (load(running, "one", "second", load_inplace=False), 400, "InvalidUserInput", "set 'load_inplace' to True"),
        (load(running, served.BASE, "second"), 400, "InvalidUserInput", "already been loaded"),
        (load(running, served.BASE, "second", load_inplace=True), 400, "InvalidUserInput", "already been loaded"),
        (load(running, "one", "broken", load_inplace=True), 400, "InvalidUserInput", "damaged"),
        (load(running, "a b", "second"), 400, "InvalidUserInput", "is no name"),
        (load(running, "x", "nowhere"), 404, "NotFoundError", "there is no adapter of this name"),
        (load(running, "x", "other"), 400, "InvalidUserInput", "cannot share a base"),
        (load(running, "x", "broken"), 400, "InvalidUserInput", "damaged"),
        (unload(running, ""), 400, "InvalidUserInput", "needs to be provided"),
        (unload(running, "x"), 404, "NotFoundError", "The lora adapter 'x' cannot be found."),
        (unload(running, served.BASE), 404, "NotFoundError", "cannot be found"),
    ):
        assert (made.status_code, made.json()["error"]["type"]) == (status, kind) and words in made.text
    assert said(running, "one") == right(where, "first") and said(running, served.BASE) == right(where, None)


def test_without_the_flag_there_is_no_such_route(where: Path) -> None:
    made = Running(Engine(served.two()))
    try:
        assert load(made, "one", where / "allowed" / "first").status_code == 404
    finally:
        made.end()
    with pytest.raises(AdapterError, match="is no folder"):
        AdapterFolders.of([where / "nowhere"])
