"""The studio in headless Chromium: from a dropped file to an adapter, a compared answer and an exported file, without a
terminal; a reload and a killed server meanwhile; what axe-core finds. Needs playwright (PyPI) and a browser; axe-core
comes from npm."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import tiny_run
from tests.report import made
from tests.serving.http.test_page import CHROMIUM
from tests.studio.driven import MINUTE, MOVE, Server, look, of_a_kill, rows

pytest.importorskip("playwright.sync_api")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not CHROMIUM, reason="no Chromium here")]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("studio")
    tiny_run.checkpoint(folder / "tiny")
    server = Server(folder)
    yield server
    server.end()


def test_from_a_dropped_file_to_an_answer_and_an_export(server: Server, page: Any, axe: str, tmp_path: Path) -> None:
    page.fill("#base", "tiny")
    page.set_input_files("#file", rows(tmp_path / "asked.csv", 240))
    page.wait_for_selector("#plan dd[data-of=memory]", timeout=MINUTE)
    page.wait_for_selector("#examples .piece.on", timeout=MINUTE)
    assert page.url.endswith("#new/asked.yaml")
    assert "box" in "".join(page.locator("#examples .piece.on").all_text_contents())
    look(page, axe, "new")

    before = page.inner_text("#plan dd[data-of=memory]"), page.inner_text("#plan dd[data-of=steps]")
    for field, value in (("lora.r", 3), ("train.per_device_train_batch_size", 1)):
        page.locator(f"input[name='{field}']").evaluate(MOVE, value)
        page.wait_for_selector("#pending", state="visible")
        page.wait_for_selector("#pending", state="hidden", timeout=MINUTE)
    assert page.inner_text("#plan dd[data-of=steps]") != before[1]
    text = (server.folder / "recipes" / "asked.yaml").read_text()
    assert re.search(r"^  r: 8$", text, re.M) and re.search(r"^  lora_alpha: 16$", text, re.M)
    page.reload()
    page.wait_for_selector("#examples .piece.on", timeout=MINUTE)
    assert page.inner_text("#out-lora\\.r") == "8"

    page.click("#start")
    page.wait_for_selector("#charts svg", timeout=4 * MINUTE)
    server.kill()  # while it trains
    page.wait_for_selector("#state.bad")
    server.start()
    page.wait_for_selector("#state.ready", timeout=MINUTE)
    page.click("#actions >> text=Stop")
    page.click("#actions >> text=Go on", timeout=2 * MINUTE)
    page.wait_for_selector("#job pre:has-text('halfbyte train runs/asked --resume')", timeout=MINUTE)
    page.wait_for_selector("#run-name .finished, #run-name .worse, #run-name .diverged", timeout=6 * MINUTE)
    look(page, axe, "run")
    assert (server.folder / "runs" / "asked" / "adapter" / "adapter_model.safetensors").is_file()

    page.select_option("#actions select", "F16")
    for button, said in (
        ("Score", "eval"),
        ("Verify", "verify"),
        ("Merge", "merge"),
        ("Export GGUF", "export"),
        ("Export adapter", "export"),
    ):
        page.click(f"#actions >> text={button}")
        page.wait_for_selector("#job .note:has-text('running')", timeout=MINUTE)
        page.wait_for_selector(f"#result:has-text('{said} done')", timeout=4 * MINUTE)
    run = server.folder / "runs" / "asked"
    assert (run / "eval" / "scores.json").is_file() and list(run.glob("*/*.gguf"))
    assert {"merged"} < {path.parent.name for path in run.glob("*/export.json")}
    page.click("#actions >> text=Report")
    page.wait_for_selector("#report svg.chart", timeout=MINUTE)
    look(page, axe, "report")
    page.go_back()
    page.click("#actions >> text=Ask")
    page.click("text=Ask base and adapter", timeout=2 * MINUTE)
    page.wait_for_selector("#state.ready", timeout=MINUTE)
    page.fill("#most", "8")
    page.fill("#ask", "red cup 3 old box")
    page.click("#send")
    page.locator(".answer .tools").nth(1).wait_for(timeout=MINUTE)
    look(page, axe, "ask")
    page.click("#back")
    page.click("nav >> text=Commands")
    page.locator("#jobs >> text=Stop").first.click()
    page.wait_for_selector("#jobs:not(:has(.running))", timeout=MINUTE)
    look(page, axe, "commands")
    assert of_a_kill(page.problems) == []


BAD_FILES = {
    "empty.csv": b"",
    "head.csv": b"a,b\n",
    "nul.csv": b"a,b\n\0\0,\0\n",
    "latin.csv": "prompt,completion\né,ü\n".encode("latin-1"),
    "html.csv": b"<html><script>alert(1)</script></html>",
    "short.csv": b"prompt,completion\n1\n",
    "quote.csv": b'prompt,completion\n"a,b\n',
    "list.json": b"[1,2,3]",
    "deep.json": b"[" * 100_000,
    "torn.jsonl": b'{"prompt": "a", "comp',
    "number.jsonl": b"1\n2\n",
    "null.jsonl": b'{"prompt": null, "completion": null}\n' * 3,
    "nest.jsonl": b'{"messages": "hi"}\n',
    "role.jsonl": b'{"messages": [{"role": "x"}]}\n',
    "fake.parquet": b"PAR1 not really",
    "zip.parquet": b"PK\x03\x04" + b"\0" * 100,
    "bom.jsonl": b"\xef\xbb\xbf{}\n",
    "bomb.jsonl.gz": b"\x1f\x8b" + b"\0" * 50,
    "blank.txt": b"   \n\n",
    "program.exe": b"MZ",
}


def test_bad_files_are_told_in_words(server: Server, page: Any, tmp_path: Path) -> None:
    page.wait_for_selector("#state.ready")
    page.fill("#base", "tiny")
    for name, content in BAD_FILES.items():
        (tmp_path / name).write_bytes(content)
        page.evaluate("tell('')")
        page.set_input_files("#file", tmp_path / name)
        page.wait_for_selector("#problem:not([hidden])", timeout=MINUTE)
        said = page.inner_text("#problem")
        assert said and "Traceback" not in said and "halfbyte init was ended" not in said, (name, said)
    assert not [problem for problem in page.problems if "Failed to load resource" not in problem]


NAMES = {
    "Данные 1.jsonl": "Данные 1", "u\u0308ber.jsonl": "\u00fcber", "😀.jsonl": "rows", "-r.jsonl": "r",
    "a😀'b.jsonl": "a--b",
}  # fmt: skip


def test_a_file_keeps_its_name_in_any_script(server: Server, page: Any, tmp_path: Path) -> None:
    page.wait_for_selector("#state.ready")
    page.fill("#base", "tiny")
    for name, stem in NAMES.items():
        (tmp_path / name).write_text('{"prompt": "red", "completion": "cup"}\n' * 20)
        page.set_input_files("#file", tmp_path / name)
        page.wait_for_selector(f"#upload:has-text('{stem}.jsonl is in data/')", timeout=MINUTE)
        assert (server.folder / "data" / f"{stem}.jsonl").is_file()


def test_runs_are_compared_and_deleted_when_that_is_confirmed(server: Server, page: Any, axe: str) -> None:
    for name in ("left", "right"):
        made.run(server.folder / "runs" / name, made.metrics(30, evals=3))
    page.click("nav >> text=Runs")
    for name in ("left", "right"):
        page.check(f"#run-rows input[value={name}]", timeout=MINUTE)
    look(page, axe, "runs")
    page.set_viewport_size({"width": 390, "height": 900})  # a short name is on one line
    assert page.evaluate("[...document.querySelectorAll('#run-rows a')].every((a) => a.getClientRects().length === 1)")
    page.set_viewport_size({"width": 1200, "height": 900})
    page.click("#compare")
    page.wait_for_selector("#report svg.chart", timeout=MINUTE)
    assert page.inner_text("#report pre").startswith("halfbyte compare runs/")
    look(page, axe, "compare")
    page.goto(f"{server.url}#run/left")
    for answer, left in (("Keep it", True), ("Delete it for good", False)):
        page.click("#actions >> text=Delete")
        page.click(f"#sure >> text={answer}")
        page.wait_for_timeout(500)
        assert (server.folder / "runs" / "left").exists() is left
    assert not page.problems


def test_an_older_answer_does_not_overwrite_a_newer_one(server: Server, page: Any) -> None:
    """Columns of the file that was chosen first come after those of the second one."""
    for name, columns in (("slow.csv", "first,second"), ("quick.csv", "third,fourth")):
        (server.folder / "data").mkdir(exist_ok=True)
        (server.folder / "data" / name).write_text(f"{columns}\n1,2\n")
    page.wait_for_selector("#state.ready")
    page.evaluate("""() => {
      const real = window.fetch;
      window.fetch = async (path, ...more) => {
        if (String(path).includes("data/slow.csv")) await new Promise((done) => setTimeout(done, 800));
        return real(path, ...more);
      };
    }""")
    page.evaluate("Promise.all([showColumns('slow.csv', {}), showColumns('quick.csv', {})])")
    there = page.locator("#columns select").first.locator("option").all_text_contents()
    assert there[1:] == ["third", "fourth"]
    page.evaluate("() => { const late = showColumns('slow.csv', {}); leaveRecipe(); return late; }")
    assert page.locator("#columns select").count() == 0
