"""A studio whose commands are told what to do: quick, and each state lasts as long as a test wants.

    python tests/studio/told.py FOLDER --port N        # the server
    python tests/studio/told.py COMMAND ...            # a command of it, in the studio's folder

Short commands have canned answers. A long one says that it began, and waits until there is a file `go/NAME-WORD` in the
folder: `train` before its run's folder is there (word `begin`), then between steps (`end`); the others for `end`.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[0] = str(ROOT)

import yaml  # noqa: E402

from halfbyte.runs.folder import RunFolder, write_json  # noqa: E402
from halfbyte.serving.http.refusal import Refusal  # noqa: E402
from halfbyte.studio.jobs import Worker  # noqa: E402
from tests.report import made  # noqa: E402

COLUMNS = ["frage", "antwort", "quelle"]


class Told(Worker):
    """`init` refuses rows whose columns are not said; `data check` shows a plan that follows rank and rows a step."""

    def run(self, *words: str) -> Any:
        if words[0] == "init":
            return self._init(*words)
        if words[:2] == ("data", "check"):
            return check(yaml.safe_load((self.folder / words[2]).read_text()))
        if words[0] in ("report", "compare"):
            names = [Path(word).name for word in words[1:]]
            text = f"<main><h1>{' and '.join(names)}</h1></main>"
            page = self.folder / words[1] / "report.html" if len(names) == 1 else self.folder / "runs" / "compare.html"
            page.write_text(text)
        return {"entries": [{"source": {"id": "org/stored"}}, {"source": {"id": "/a/folder"}}, {"source": None}]}

    def _init(self, _: str, path: str, *options: str) -> Any:
        given = dict(option.removeprefix("--").split("=", 1) for option in options if "=" in option)
        sets = [option.removeprefix("--set=").split("=", 1) for option in options if option.startswith("--set=")]
        if not sets and "for" not in given:
            raise Refusal(422, "cannot tell the format.", code="DataError", param="name the columns")
        recipe: dict[str, Any] = {"model": given["model"], "data": {"train": given["data"]}, "lora": {"r": 16}}
        for field, value in sets:
            section, *keys = field.split(".")
            inner = recipe.setdefault(section, {})
            for key in keys[:-1]:
                inner = inner.setdefault(key, {})
            inner[keys[-1]] = yaml.safe_load(value)
        (self.folder / path).write_text(yaml.safe_dump(recipe | {"output": f"runs/{Path(path).stem}"}))
        return {"recipe": path, "remarks": ["the columns are said"], "plan": check(recipe)["plan"]}


def check(recipe: dict[str, Any]) -> dict[str, Any]:
    rank, rows = recipe["lora"]["r"], recipe.get("train", {}).get("per_device_train_batch_size", 4)
    line = {"name": "adapters", "bytes": rank * 10_000_000, "where": "private", "how": f"rank {rank}"}
    plan = {
        "peak_bytes": rank * 10_000_000, "available_bytes": 2_000_000_000, "short_bytes": 0, "fixes": [],
        "memory_line": "it fits", "lines": [line], "host_lines": [], "disk": [{**line, "where": "disk"}],
        "warnings": [], "time": {"steps": 400 // rows, "step_s": 0.5, "around": {"start": 3.0}},
    }  # fmt: skip
    pieces = [
        {"text": "<s>", "labelled": False, "special": True},
        {"text": "ask ", "labelled": False, "special": False},
    ]
    row = {"row": 1, "where": "odd.csv:2", "tokens": 3, "labelled": 1, "pieces": [
        *pieces, {"text": "say", "labelled": True, "special": False}]}  # fmt: skip
    gates = [{"level": "ok", "gate": "labels", "found": "1 of 3", "fix": ""}]
    return {"plan": plan, "within": [], "notices": [], "refused": False, "train": {"used": 9}, "rows": [row],
            "gates": gates, "histogram": [{"least": 0, "most": 15, "rows": 9}]}  # fmt: skip


def wait(name: str, word: str) -> None:
    while not Path("go", f"{name}-{word}").exists():
        time.sleep(0.05)


def train(target: str, *options: str) -> None:
    name = Path(target if "--resume" in options else options[options.index("--output") + 1]).name
    print(f"opening {target}", flush=True)
    wait(name, "begin")
    run = RunFolder(Path("runs") / name)
    if not run.path.exists():
        made.run(run.path, made.metrics(3), steps=100_000)
    with run.lock():
        step = 4
        while not Path("go", f"{name}-end").exists():
            run.append_metrics({**made.metrics(1)[0], "step": step, "loss": 3 / step})
            step += 1
            time.sleep(0.1)
        run.adapter.mkdir()
        write_json(run.adapter / "adapter_config.json", {"r": 8})
        write_json(run.report, {"notices": [], "eval_loss": 1.0})
    print("finished", flush=True)


def command(name: str, target: str, *options: str) -> None:
    print(f"{name} of {target} {' '.join(options)}", flush=True)
    wait(name, "end")
    print(f"{name}: whole", flush=True)


def serve(folder: Path, port: int) -> None:
    import uvicorn

    from halfbyte.serving.http import pages
    from halfbyte.serving.settings import Settings
    from halfbyte.studio import jobs
    from halfbyte.studio.app import Studio, application
    from halfbyte.studio.workspace import Workspace

    jobs._PYTHON = (sys.executable, __file__)  # type: ignore[assignment]
    space = Workspace(folder, upload_bytes=1_000_000)
    key = space.begin()
    (folder / "go").mkdir(exist_ok=True)
    studio = Studio(space, jobs.Jobs(space), Told(folder))
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(("127.0.0.1", port))
    app = pages.config(application(studio), Settings(key=key, grace_s=1.0, uploads="/api/data/"), "off")
    pages.run(uvicorn.Server(app), sock, lambda: print(f"studio at #key={key}", flush=True))


if __name__ == "__main__":
    first, *more = sys.argv[1:]
    signal.signal(signal.SIGTERM, lambda *_: os._exit(3))
    if more[:1] == ["--port"]:
        serve(Path(first), int(more[1]))
    elif first == "train":
        train(*more)
    else:
        command(first, *more)
