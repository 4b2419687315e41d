"""The page in each of its states (choosing, planned, preparing, training, evaluating, exporting): a reload and a killed
server change nothing; several tabs; the commands of its buttons. Commands are told what to do (`told.py`), so it is
quick; the whole story with real ones is in `test_browser.py`. Needs playwright (PyPI) and a browser."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from tests.report import made
from tests.report.test_plots import NARROW
from tests.serving.http.test_page import CHROMIUM
from tests.studio import driven, told
from tests.studio.driven import MOVE, Server, look, of_a_kill, page_of

pytest.importorskip("playwright.sync_api")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no Chromium here")
SECONDS = 30_000


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path, (str(Path(told.__file__)),))
    yield server
    server.end()


@pytest.fixture
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "odd.csv"
    path.write_text(",".join(told.COLUMNS) + "\n1,2,3\n")
    return path


def go(server: Server, name: str) -> None:
    (server.folder / "go" / name).touch()


def stays(page: Any, server: Server, seen: Callable[[], None]) -> None:
    """What is seen is seen after a reload, after a killed server that is started anew, and after both."""
    seen()
    page.reload()
    seen()
    server.kill()
    page.wait_for_selector("#state.bad", timeout=SECONDS)
    server.start()
    page.wait_for_selector("#state.ready", timeout=SECONDS)
    seen()


def begin(page: Any, odd: Path) -> None:
    """Rows, columns, a recipe, a plan."""
    page.set_input_files("#file", odd)
    page.wait_for_selector("#columns select[name=prompt]", timeout=SECONDS)
    page.select_option("#columns select[name=prompt]", "frage")
    page.select_option("#columns select[name=completion]", "antwort")
    page.wait_for_selector("#plan dd[data-of=memory]", timeout=SECONDS)


def test_a_reload_and_a_killed_server_in_every_state(server: Server, page: Any, odd: Path) -> None:
    def wait(selector: str) -> None:
        page.wait_for_selector(selector, timeout=SECONDS)

    def command(words: str) -> None:
        wait(f"#job pre:has-text('halfbyte {words}')")

    page.fill("#base", "org/mine")
    page.set_input_files("#file", odd)

    def choosing() -> None:
        wait("#columns select[name=completion]")
        assert (page.input_value("#base"), page.input_value("#rows")) == ("org/mine", "odd.csv")
        assert page.locator("#draft").is_hidden()

    stays(page, server, choosing)
    assert list((server.folder / "recipes").iterdir()) == []
    page.select_option("#columns select[name=prompt]", "frage")
    page.select_option("#columns select[name=completion]", "antwort")

    def planned() -> None:
        wait("#plan dd[data-of=memory]:has-text('0.16 GB')")
        wait("#examples .piece.on")
        wait("#columns select[name=completion]")
        page.wait_for_function("document.querySelector('#columns select[name=completion]').value === 'antwort'")
        assert "data.fields" in page.inner_text("#text") or "prompt: frage" in page.text_content("#text")

    stays(page, server, planned)
    recipe = yaml.safe_load((server.folder / "recipes" / "odd.yaml").read_text())
    assert recipe["data"]["fields"] == {"prompt": "frage", "completion": "antwort"}
    page.click("#start")

    def preparing() -> None:
        command("train recipes/odd.yaml --output runs/odd")
        wait("#job .log:has-text('opening recipes/odd.yaml')")
        wait("#actions >> text=Stop")
        assert not (server.folder / "runs" / "odd").exists()

    stays(page, server, preparing)
    go(server, "odd-begin")

    def training() -> None:
        wait("#run-name .running")
        before = page.locator("#charts svg").first
        before.wait_for(timeout=SECONDS)
        last = before.get_attribute("aria-label")
        page.wait_for_function("(last) => document.querySelector('#charts svg').ariaLabel !== last", arg=last)

    stays(page, server, training)
    page.click("#actions >> text=Stop")
    wait("#actions >> text=Go on")
    wait("#run-name .crashed")  # it has no checkpoint
    stays(page, server, lambda: wait("#actions >> text=Go on"))
    page.click("#actions >> text=Go on")
    command("train runs/odd --resume")
    training()
    go(server, "odd-end")
    wait("#run-name .finished")
    for button, words, done in (
        ("Score", "eval runs/odd --base", "eval"),
        ("Export GGUF", "export runs/odd --gguf Q4_K_M --ollama", "export"),
        ("Merge", "merge runs/odd", "merge"),
        ("Verify", "verify runs/odd", "verify"),
        ("Export adapter", "export runs/odd --peft", "export"),
    ):
        (server.folder / "go" / f"{done}-end").unlink(missing_ok=True)
        if "GGUF" in button:
            page.select_option("#actions select", "Q4_K_M")
        page.click(f"#actions >> text={button}")

        def running(words: str = words) -> None:
            command(words)
            wait("#actions >> text=Stop")

        running() if button in ("Merge", "Verify", "Export adapter") else stays(page, server, running)
        go(server, f"{done}-end")
        wait(f"#result:has-text('{done} ')")
    buttons = page.locator("#words pre").all_text_contents()
    assert "halfbyte eval runs/odd --base" in buttons and "halfbyte export runs/odd --peft" in buttons
    assert of_a_kill(page.problems) == []


def test_tabs_see_each_other_and_start_one_run(server: Server, opened: Any, odd: Path) -> None:
    first, second = page_of(opened, server), page_of(opened, server)
    first.wait_for_selector("#state.ready")
    begin(first, odd)
    second.wait_for_selector("#recipe option[value='odd.yaml']", state="attached", timeout=SECONDS)
    second.select_option("#recipe", "odd.yaml")
    second.wait_for_selector("#plan dd:has-text('0.16 GB')", timeout=SECONDS)
    second.locator("input[name='lora.r']").evaluate(MOVE, 5)
    for tab in (first, second):
        tab.wait_for_selector("#plan dd:has-text('0.32 GB')", timeout=SECONDS)
        assert tab.inner_text("#out-lora\\.r") == "32"
    first.click("#start")
    first.wait_for_selector("#job .log", timeout=SECONDS)
    second.wait_for_selector("#going:has-text('being trained')", timeout=SECONDS)
    jobs = list((server.folder / ".studio" / "jobs").iterdir())
    assert len(jobs) == 1
    go(server, "odd-begin")
    second.click("nav >> text=Runs")
    second.wait_for_selector("#run-rows a:has-text('odd')", timeout=SECONDS)
    second.click("#run-rows a")
    second.wait_for_selector("#charts svg", timeout=SECONDS)
    go(server, "odd-end")
    for tab in (first, second):
        tab.wait_for_selector("#run-name .finished", timeout=SECONDS)
        assert of_a_kill(tab.problems) == []


def test_a_preset_a_format_and_bases_that_are_stored(server: Server, page: Any, odd: Path) -> None:
    page.wait_for_selector("#bases option[value='org/stored']", state="attached", timeout=SECONDS)
    assert "/a/folder" not in page.inner_html("#bases")
    page.select_option("#kind", "style")
    page.set_input_files("#file", odd)
    page.wait_for_selector("#plan dd[data-of=memory]", timeout=SECONDS)
    page.select_option("#format", "alpaca")
    page.wait_for_selector("#columns select[name=instruction]", timeout=SECONDS)
    page.wait_for_selector("#pending", state="hidden")
    recipe = yaml.safe_load((server.folder / "recipes" / "odd.yaml").read_text())
    assert recipe["data"]["format"] == "alpaca"
    for _ in range(4):  # by keyboard alone: everything that is offered can be reached, and is seen when it is
        page.keyboard.press("Tab")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"


def test_an_upload_that_ends_later_leaves_the_user_where_he_went(server: Server, page: Any, odd: Path) -> None:
    page.fill("#base", "org/mine")
    page.evaluate(
        """() => {
            const plain = window.fetch;
            window.fetch = async (...args) => {
                const answer = await plain(...args);
                if ((args[1] || {}).method === "PUT") await new Promise((resolve) => { window.release = resolve; });
                return answer;
            };
        }"""
    )
    page.set_input_files("#file", odd)
    page.wait_for_function("Boolean(window.release)", timeout=SECONDS)
    page.evaluate("location.hash = 'runs'")
    page.wait_for_selector("#runs:not([hidden])", timeout=SECONDS)
    page.evaluate("window.release()")
    page.wait_for_function("document.querySelector('#upload').textContent.includes('is in data/')", timeout=SECONDS)
    page.wait_for_timeout(500)
    assert page.evaluate("location.hash") == "#runs" and page.locator("#runs").is_visible()
    assert page.evaluate("[...document.querySelector('#rows').options].some((o) => o.value === 'odd.csv')")


def test_each_tick_of_a_chart_has_a_label_of_its_own(page: Any) -> None:
    """Each label is its value: equally far from the next, as ticks are."""
    ticks = """(ys) => {
      const figure = chart("title", "", [["name", "raw", ys.map((_, n) => n), ys]]);
      return [...figure.querySelectorAll(".tick.end")].map((tick) => tick.textContent);
    }"""
    for values in NARROW:
        labels = page.evaluate(ticks, [*values])
        steps = np.diff([float(label) for label in labels])
        assert len(steps) > 1 and steps.min() > 0 and max(map(len, labels)) <= 9, (values, labels)
        np.testing.assert_allclose(steps, steps[0], rtol=1e-6)


@pytest.mark.slow
def test_each_page_is_looked_at(server: Server, page: Any, odd: Path, axe: str) -> None:
    page.wait_for_selector("#state.ready")
    look(page, axe, "empty")
    page.set_input_files("#file", odd)
    page.wait_for_selector("#columns select", timeout=SECONDS)
    look(page, axe, "choosing")
    begin(page, odd)
    look(page, axe, "planned")
    run = made.finished(server.folder / "runs" / "done", made.metrics(40, evals=4))
    assert json.loads(run.report.read_text())
    page.goto(f"{server.url}#run/done")
    page.wait_for_selector("#charts svg", timeout=SECONDS)
    page.click("#their-words summary")
    look(page, axe, "run-finished")
    page.click("#actions >> text=Delete")
    look(page, axe, "delete")
    assert driven.of_a_kill(page.problems) == []
