"""The main job (train, save, resume, generate) on a Linux from which all is taken away that Windows or macOS lacks.

    python tests/system/platforms/without.py windows | macos | linux FOLDER

Prints one JSON object: losses of a whole run and of one that is stopped and resumed, what the adapter answers, notes.
Libraries are imported before, as they are whole on those systems. portalocker is itself here (its POSIX half).
"""

from __future__ import annotations

import builtins
import ctypes
import errno
import io
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Functions of os by what the page of Python's `os` says of their availability.
NOT_ON_WINDOWS = (
    "preadv", "pwritev", "pread", "pwrite", "posix_fadvise", "posix_fallocate", "sched_getaffinity",
    "sched_setaffinity", "sysconf", "fchmod", "fchown", "fork", "getuid", "geteuid", "getgid", "killpg", "getpgid",
    "setsid", "sync", "sendfile", "memfd_create", "eventfd", "mkfifo", "register_at_fork", "uname", "wait3", "wait4",
    "nice", "O_DIRECTORY", "O_CLOEXEC", "O_NOFOLLOW",
)  # fmt: skip
NOT_ON_MACOS = ("posix_fadvise", "posix_fallocate", "sched_getaffinity", "sched_setaffinity", "memfd_create", "eventfd")
NO_MODULES_ON_WINDOWS = ("fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "syslog")
NO_SIGNALS_ON_WINDOWS = ("SIGHUP", "SIGKILL", "SIGALRM", "SIGUSR1", "SIGUSR2", "SIGCHLD", "SIGPIPE", "SIGSTOP")


def import_libraries() -> None:
    import accelerate
    import bitsandbytes
    import datasets
    import numba
    import peft
    import portalocker
    import psutil
    import transformers
    from peft.tuners import lora
    from transformers import LlamaForCausalLM, Trainer, masking_utils

    assert all((accelerate, bitsandbytes, datasets, numba, peft, portalocker, psutil, transformers))
    assert all((lora, LlamaForCausalLM, Trainer, masking_utils))
    for name in [name for name in sys.modules if name.partition(".")[0] == "halfbyte"]:
        del sys.modules[name]  # bitsandbytes' entry point


def callers(most: int = 6) -> list[str]:
    """The files of the nearest callers."""
    frame, found = sys._getframe(2), list[str]()
    while frame is not None and len(found) < most:
        found.append(frame.f_code.co_filename)
        frame = frame.f_back  # type: ignore[assignment]
    return found


def no_system_files() -> None:
    """No /proc and no /sys, but for psutil, which asks other systems in other ways."""

    def is_gone(path: Any) -> bool:
        if not isinstance(path, str | bytes | os.PathLike) or not os.fsdecode(path).startswith(("/proc", "/sys")):
            return False
        return not any("psutil" in name for name in callers())

    def refusing(own: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, *args: Any, **kwargs: Any) -> Any:
            if is_gone(path):
                raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(path))
            return own(path, *args, **kwargs)

        return call

    builtins.open = io.open = refusing(io.open)  # type: ignore[assignment]
    for name in ("open", "stat", "listdir", "scandir", "access"):
        setattr(os, name, refusing(getattr(os, name)))


def no_c_library() -> None:
    """`CDLL(None)` is a TypeError on Windows."""
    own = ctypes.CDLL

    def load(name: Any, *args: Any, **kwargs: Any) -> Any:
        if name is None:
            raise TypeError("bad argument type for built-in operation")
        return own(name, *args, **kwargs)

    ctypes.CDLL = load  # type: ignore[misc, assignment]


def folders_cannot_be_opened() -> None:
    """And a file that is open for reading alone cannot be flushed."""
    own_open, own_sync, flags_of = os.open, os.fsync, dict[int, int]()

    def opened(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if os.path.isdir(path) and not any("shutil" in name for name in callers()):  # which is another on Windows
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        descriptor = own_open(path, flags, *args, **kwargs)
        flags_of[descriptor] = flags
        return descriptor

    def flushed(descriptor: int) -> None:
        if flags_of.get(descriptor, os.O_RDWR) & (os.O_WRONLY | os.O_RDWR) == 0:
            raise OSError(errno.EBADF, "Bad file descriptor")
        own_sync(descriptor)

    os.open, os.fsync = opened, flushed


def no_links() -> None:
    """An ordinary user of Windows may not make symbolic links."""

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EPERM, "A required privilege is not held by the client")

    os.symlink = refuse  # type: ignore[assignment]


def take_away(system: str) -> None:
    if system == "linux":
        return
    import psutil

    windows = system == "windows"
    for name in NOT_ON_WINDOWS if windows else NOT_ON_MACOS:
        if hasattr(os, name):
            delattr(os, name)
    for name in [name for name in dir(os) if name.startswith("POSIX_FADV")]:
        delattr(os, name)
    if windows:
        for name in NO_MODULES_ON_WINDOWS:
            sys.modules[name] = None  # type: ignore[assignment]
        for name in NO_SIGNALS_ON_WINDOWS:
            delattr(signal, name)
        folders_cannot_be_opened()
        no_links()
        no_c_library()
    else:
        del psutil.Process.cpu_affinity
    no_system_files()
    sys.platform = "win32" if windows else "darwin"


def work(folder: Path) -> dict[str, Any]:
    """4 steps; the same stopped after 2 and resumed; an answer of the adapter."""
    from halfbyte import finetune
    from halfbyte.inference import generate, load
    from halfbyte.training.events import Listener
    from halfbyte.writing.sampling import SamplingParams
    from tests import tiny_run

    class Notes(Listener):
        def __init__(self) -> None:
            self.notes: list[str] = []
            self.rows: list[float] = []

        def note(self, label: str, text: str) -> None:
            self.notes.append(f"{label}: {text}")

        def step(self, row: Any) -> None:
            self.rows.append(row["loss"])

    # with shared beginnings a loss may differ by 5e-7 between processes (docs/log)
    options = {"quant__type": "nf4", "train__save_strategy": "steps", "train__save_steps": 2}
    options["data__share_prefixes"] = "off"
    recipe, told, again = tiny_run.recipe(folder, **options), Notes(), Notes()
    report = finetune.train(recipe, listener=told).report
    (folder / "run/report.json").unlink()  # as if it had been stopped after its second step
    shutil.rmtree(folder / "run/checkpoints/step-000004")
    finetune.train(recipe, resume=True, listener=again)
    used = load.open_run(folder / "run")
    prompt = generate.chat_ids(used.tokenizer, [{"role": "user", "content": "red green"}])
    said = generate.generate(used.model, used.tokenizer, [prompt], SamplingParams(8))
    peak = report["peak_rss_bytes"]
    return {"losses": told.rows, "resumed": again.rows, "said": said, "notes": told.notes, "peak": peak}


if __name__ == "__main__":
    import_libraries()
    take_away(sys.argv[1])
    print(json.dumps(work(Path(sys.argv[2]))))
