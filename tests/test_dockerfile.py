"""The Dockerfile: rules that hadolint has, and its steps in a fresh folder, where no Docker is."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCKERFILE = ROOT / "Dockerfile"
Step = tuple[str, str]


def steps(text: str) -> list[Step]:
    """The instructions: name and argument, lines joined."""
    text = re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ")
    lines = (line.split(None, 1) for line in text.splitlines() if line.strip())
    return [(name.upper(), re.sub(r"\s+", " ", rest).strip()) for name, rest in lines]


def problems(text: str) -> list[str]:
    """What hadolint would say, of its rules for what this file may hold; in our words."""
    found, all_steps = list[str](), steps(text)
    last = dict(all_steps)
    for name, rest in all_steps:
        if name == "FROM" and (":" not in rest or ":latest" in rest):
            found.append(f"DL3006, DL3007: {rest} has no version")
        if name == "RUN" and re.search(r"pip (install|wheel) (?!--no-cache-dir)", rest):
            found.append("DL3042: pip keeps its cache")
        if name == "RUN" and re.search(r"\bsudo\b|\bcd /|apt-get (upgrade|dist-upgrade)", rest):
            found.append(f"DL3003, DL3004, DL3005: {rest}")
        if name == "RUN" and "apt-get install" in rest and not ("-y" in rest and "--no-install-recommends" in rest):
            found.append("DL3014, DL3015: apt asks, or installs more")
        if name == "RUN" and ("curl" in rest or "wget" in rest) and "|" in rest:
            found.append("DL4006: a pipe whose first half may fail")
        if name == "ADD":
            found.append("DL3020: COPY instead of ADD")
        if name == "MAINTAINER":
            found.append("DL4000")
        if name in ("CMD", "ENTRYPOINT") and not rest.startswith("["):
            found.append("DL3025: no shell around it")
        if name == "WORKDIR" and not rest.startswith("/"):
            found.append("DL3000: an absolute WORKDIR")
        if name == "ENV" and re.search(r"key|token|secret|password", rest, re.IGNORECASE):
            found.append("a secret in the image")
    if last.get("USER", "root").partition(":")[0] in ("root", "0"):
        found.append("DL3002: the last user is root")
    return found


def test_the_dockerfile_has_no_problem_and_keeps_what_lasts_in_volumes() -> None:
    text = DOCKERFILE.read_text(encoding="utf-8")
    assert problems(text) == []
    there = dict(steps(text))
    assert there["VOLUME"] == '["/cache", "/work"]' and "HALFBYTE_CACHE=/cache" in there["ENV"]
    assert there["ENTRYPOINT"] == '["halfbyte"]'
    copied = [word for name, rest in steps(text) if name == "COPY" and "--from" not in rest for word in rest.split()]
    assert all((ROOT / word).exists() for word in copied if not word.startswith("./"))
    allowed = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    assert allowed[0] == "*" and {f"!{word}" for word in copied if not word.startswith("./")} <= set(allowed)


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("USER 1000:1000\n", "", "DL3002"),
        ("FROM python:3.13-slim AS", "FROM python AS", "DL3006"),
        ("--no-cache-dir --index-url", "--index-url", "DL3042"),
        ('ENTRYPOINT ["halfbyte"]', "ENTRYPOINT halfbyte", "DL3025"),
        ("COPY src", "ADD src", "DL3020"),
        ("ENV PATH", "ENV API_KEY=abc PATH", "secret"),
    ],
)
def test_the_check_sees_a_fault(before: str, after: str, said: str) -> None:
    text = DOCKERFILE.read_text(encoding="utf-8")
    assert before in text
    assert any(said in problem for problem in problems(text.replace(before, after, 1)))


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="no hadolint here")
def test_hadolint_says_nothing() -> None:
    done = subprocess.run(["hadolint", str(DOCKERFILE)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def torch_index(url: str) -> str:
    """The index that the image takes torch from; where it cannot be reached, the one that pip uses here."""
    try:
        urllib.request.urlopen(f"{url}/torch/", timeout=30).close()
    except OSError:
        asked = [sys.executable, "-m", "pip", "config", "list"]
        said = subprocess.run(asked, capture_output=True, text=True, check=True).stdout
        given = dict(re.findall(r"^(?:\w+|:env:)\.(\S+)='(.*)'$", said, re.MULTILINE))
        return given.get("index-url", "https://pypi.org/simple")
    return url


def settings_of_pip() -> dict[str, str]:
    """What of this machine pip goes by: mirrors, wheels, certificates, proxies; of a HOME of its own."""
    ours = {n: v for n, v in os.environ.items() if n.startswith("PIP_") or n.lower().endswith("_proxy")}
    return {"XDG_CONFIG_HOME": os.environ.get("XDG_CONFIG_HOME", str(Path.home() / ".config")), **ours}


@pytest.mark.slow  # fetches torch and all else, more than 1 GB
def test_its_steps_run_in_a_fresh_folder(tmp_path: Path) -> None:
    """RUN, COPY and ENV as they are, with the image's folders below a folder of here; then the entry point as a user
    without rights: a recipe for the packaged base, and its rows checked. Users are not made, and this Python stands for
    the image's."""
    image = tmp_path / "image"
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), **settings_of_pip()}
    (image / "bin").mkdir(parents=True)
    (image / "bin" / "python").symlink_to(sys.executable)
    environment["PATH"] = f"{image / 'bin'}:{environment['PATH']}"
    place, words = image, list[str]()

    def inside(text: str) -> str:
        return re.sub(r"(?<![\w/.:])/(?=(source|wheels|opt|cache|work)\b)", f"{image}/", text)

    for name, rest in steps(DOCKERFILE.read_text(encoding="utf-8")):
        if name == "WORKDIR":
            (place := Path(inside(rest))).mkdir(parents=True, exist_ok=True)
        elif name == "COPY" and not rest.startswith("--from"):
            *sources, target = rest.split()
            for source in sources:
                whole = shutil.copytree if (ROOT / source).is_dir() else shutil.copy
                whole(ROOT / source, place / (target if (ROOT / source).is_dir() else ""))
        elif name == "ARG":
            argument, _, value = rest.partition("=")
            environment[argument] = torch_index(value) if argument == "TORCH_INDEX" else value
        elif name == "ENV":
            given = dict(pair.split("=", 1) for pair in shlex.split(inside(rest)))
            environment |= {key: value.replace("$PATH", environment["PATH"]) for key, value in given.items()}
        elif name == "RUN":
            parts = [part for part in inside(rest).split(" && ") if not part.startswith(("useradd", "chown"))]
            script = " && ".join(parts)
            done = subprocess.run(["bash", "-ec", script], cwd=place, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, f"{script}\n{done.stdout}{done.stderr}"
        elif name == "ENTRYPOINT":
            words = [*map(str, re.findall(r'"([^"]+)"', rest))]
    no_root = ("setpriv", "--bounding-set=-dac_override") if os.geteuid() == 0 else ()
    for folder in (path for path in (image / "opt").rglob("*") if path.is_dir()):
        folder.chmod(0o555)

    def run(*more: str) -> str:
        done = subprocess.run([*no_root, *words, *more], cwd=place, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert run("--version").startswith("halfbyte ") and "starlette" in str(list((image / "opt").rglob("starlette")))
    rows = (ROOT / "examples" / "orders" / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (place / "rows.jsonl").write_text("".join(rows[:8]), encoding="utf-8")
    run("init", "recipe.yaml", "--data", "rows.jsonl", "--for", "json")  # fetches the base into the cache
    assert "8 rows" in run("data", "check", "recipe.yaml", "--set", "data.eval=none")
    assert (image / "work" / "recipe.yaml").is_file() and list((image / "cache" / "packaged").iterdir())
