"""The page of a run while it trains: on 127.0.0.1 alone, under that name alone, and gone with the run."""

from __future__ import annotations

import http.client
import socket
import threading
from pathlib import Path

import pytest

from halfbyte.errors import RunError
from halfbyte.report import live
from tests.report import made


def ask(address: str, host: str | None = None, path: str = "/", method: str = "GET") -> tuple[int, str]:
    name, port = address.removeprefix("http://").rstrip("/").split(":")
    connection = http.client.HTTPConnection(name, int(port), timeout=10)
    connection.putrequest(method, path, skip_host=True)
    if host != "":
        connection.putheader("Host", host or f"{name}:{port}")
    connection.endheaders()
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, text


def test_the_page_is_served_and_renewed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "MIN_REST_S", 0.0)
    monkeypatch.setattr(live, "REST", 0.0)
    with live.serve(tmp_path / "run") as address:
        assert address.startswith("http://127.0.0.1:")
        status, text = ask(address)
        assert status == 200 and "has not begun" in text
        run = made.run(tmp_path / "run", made.metrics(10), steps=50)
        status, text = ask(address)
        assert status == 200 and "10 of 50" in text and 'data-live="5"' in text
        run.append_metrics({"step": 11, "loss": 1.0, "tokens": 1, "seconds": 1.0})
        assert "11 of 50" in ask(address)[1]


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1", "127.0.0.1:1", "", "localhost"])
def test_another_name_is_refused(tmp_path: Path, host: str) -> None:
    made.run(tmp_path / "run", made.metrics(3))
    with live.serve(tmp_path / "run") as address:
        status, text = ask(address, host)
        assert status == 421 and "loss" not in text.lower()
        assert ask(address, address.removeprefix("http://").rstrip("/").replace("127.0.0.1", "localhost"))[0] == 200


def test_there_is_one_page_and_it_can_only_be_read(tmp_path: Path) -> None:
    with live.serve(tmp_path / "run") as address:
        assert ask(address, path="/../../etc/passwd")[0] == 404
        assert ask(address, path="/metrics.jsonl")[0] == 404
        assert ask(address, method="POST")[0] == 501


def test_it_listens_on_this_machine_alone_and_ends_with_the_run(tmp_path: Path) -> None:
    with live.serve(tmp_path / "run") as address:
        port = int(address.rstrip("/").rpartition(":")[2])
        listening = [
            line.split()[1] for line in Path("/proc/net/tcp").read_text().splitlines() if f":{port:04X} " in line
        ]
        assert listening[0] == f"0100007F:{port:04X}"
    with pytest.raises(OSError), socket.create_connection(("127.0.0.1", port), timeout=2):
        pass
    assert not [t for t in threading.enumerate() if t.name == "halfbyte-live"]


def test_a_page_that_cannot_be_made_is_an_answer_and_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    made.run(tmp_path / "run", made.metrics(3))
    monkeypatch.setattr(live.record, "read", lambda run: 1 / 0)
    with live.serve(tmp_path / "run") as address:
        status, text = ask(address)
    assert status == 500 and "ZeroDivisionError" in text
    assert capfd.readouterr() == ("", "")


def test_a_port_that_is_taken_is_an_error(tmp_path: Path) -> None:
    with live.serve(tmp_path / "a") as address:
        again = live.serve(tmp_path / "b", int(address.rstrip("/").rpartition(":")[2]))
        with pytest.raises(RunError, match="cannot be used"), again:
            pass
