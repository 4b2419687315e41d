"""A model of the Hugging Face hub -> a local snapshot, through `huggingface_hub.snapshot_download`.

Its cache, token and environment variables are what users already have; this module chooses the files, and turns each
of its failures into one message with the next step.
Cost: two requests to find the commit and its files; a whole snapshot that is cached needs no download.
"""

import errno
import logging
import re
import threading
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NoReturn, Self

from halfbyte.errors import SourceError, first_line
from halfbyte.models.sources import checkpoint
from halfbyte.models.sources.safetensors import INDEX, SINGLE, indexed_files

log = logging.getLogger("halfbyte")
HUB_ID = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[^@\s]+))?")
# Everything a model needs but its weights. Code is fetched because it is small; running it is another question.
NO_WEIGHTS = ["config.json", "adapter_config.json", "1_Pooling/config.json", "*.py", *checkpoint.DESCRIPTIONS]
# Not `*.safetensors`: some repositories hold the same weights a second time under another name.
WEIGHTS = [SINGLE, INDEX, "model-*.safetensors"]
PICKLED_WEIGHTS = [checkpoint.PICKLE, checkpoint.PICKLE_INDEX, "pytorch_model-*.bin"]
# fnmatch's star crosses folders; what lies in one (onnx/, original/) is never read, but for sentence-transformers' own.
NESTED = ["[!1]*/*", "1[!_]*/*"]
# How long the hub may take until it is connected (name service, proxy, TCP), and from there to its first line.
CONNECTS_S, ANSWERS_S = 4.0, 20.0
_SLICE_S = 0.1
_BROKEN = frozenset({"RemoteProtocolError", "ReadError", "WriteError", "CloseError"})


class NotAtHand(SourceError):
    """A model of the hub that is not cached, while the hub cannot be reached."""


@cache
def is_out_of_reach() -> bool:
    """Whether the hub gives no answer of any kind, asked once in a process; told in one line. huggingface_hub tries six
    times over 24 seconds, and logs each. The thread bounds what a client's timeouts do not: the name service, and
    several addresses one after another."""
    from huggingface_hub import constants, get_session

    connected, ended = threading.Event(), threading.Event()
    answers: list[bool] = []

    def trace(event: str, _details: object) -> None:
        if event == "connection.connect_tcp.complete":
            connected.set()

    def ask() -> None:
        try:
            session.head(constants.ENDPOINT, timeout=None, extensions={"trace": trace})
            answers.append(True)
        except Exception as error:  # httpx's under one of two names; a connection that breaks is worth another try
            answers.append(type(error).__name__ in _BROKEN)
        finally:
            connected.set()
            ended.set()

    if constants.HF_HUB_OFFLINE:
        return True
    session = get_session()  # imports a client and reads certificates: not the hub's time
    threading.Thread(target=ask, daemon=True).start()
    if _happens(connected, CONNECTS_S) and _happens(ended, ANSWERS_S) and answers[0]:
        return False
    log.warning("%s cannot be reached; only what is cached is used", constants.ENDPOINT)
    return True


def _happens(event: threading.Event, seconds: float) -> bool:
    """Wait for `event`. While this process or its machine stands still (stopped, frozen, asleep) no time goes by."""
    return any(event.wait(_SLICE_S) for _ in range(round(seconds / _SLICE_S)))


def fetch(model: str, *, allow_pickle: bool) -> checkpoint.Checkpoint:
    """Fetch `org/name[@revision]`, or find it in the hub's cache. Raises SourceError: not found, not allowed, unknown
    revision, offline and not cached, no network, or cut."""
    match = HUB_ID.fullmatch(model)
    if match is None:
        raise SourceError(f"{model!r} is not a hub id; allowed: org/name or org/name@revision")
    repo, revision = match["id"], match["revision"]
    folder = _download(repo, revision, NO_WEIGHTS + WEIGHTS)
    # The snapshot folder is named by its commit; what follows must come from the same one.
    commit = folder.name
    if (folder / INDEX).is_file() and not (folder / SINGLE).is_file():
        if lacking := [shard for shard in indexed_files(folder / INDEX) if not (folder / shard).is_file()]:
            _download(repo, commit, lacking)
    elif not (folder / SINGLE).is_file():
        _other_weights(repo, commit, allow_pickle=allow_pickle)
    pickled = checkpoint.check_folder(folder, allow_pickle=allow_pickle, label=model)
    return checkpoint.Checkpoint(path=folder, id=repo, revision=commit, kind="hub", pickle=pickled)


def is_cached(model: str) -> bool:
    """Whether the hub's cache has `org/name[@revision]` with its weights."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    if (match := HUB_ID.fullmatch(model)) is None:
        return False
    try:
        folder = Path(snapshot_download(match["id"], revision=match["revision"], local_files_only=True))
    except (LocalEntryNotFoundError, ValueError, OSError):
        return False
    if (folder / SINGLE).is_file():
        return True
    return (folder / INDEX).is_file() and all((folder / shard).is_file() for shard in indexed_files(folder / INDEX))


def _other_weights(repo: str, commit: str, *, allow_pickle: bool) -> None:
    """No safetensors: fetch the pickled weights if that is allowed, else say what the repository has."""
    if allow_pickle:
        _download(repo, commit, PICKLED_WEIGHTS)
        return
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    try:
        files = {file.path for file in get_cached_repo_tree(repo, revision=commit)}
    except CachedRepoTreeNotFoundError:
        return
    if files & {checkpoint.PICKLE, checkpoint.PICKLE_INDEX}:
        raise checkpoint.only_pickled(repo)
    if ggufs := sorted(file for file in files if file.endswith(".gguf")):
        raise SourceError(
            f"{repo} has only GGUF files: {', '.join(ggufs[:5])}",
            fix=f"fetch one and give its path as the model: hf download {repo} {ggufs[0]}",
        )


def _download(repo: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        path = snapshot_download(
            repo, revision=revision, allow_patterns=patterns, ignore_patterns=NESTED, local_files_only=is_out_of_reach()
        )
    # Every failure of a download ends as one of ours; what is not recognised is raised again as it is.
    except Exception as error:
        explain(error, repo, revision or "main")
    return Path(path)


def small_file(repo: str, file: str, revision: str | None) -> Path | None:
    """One small file of a model (its config, an index) through the hub's cache; None where the model has it not."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(repo, file, revision=revision, local_files_only=is_out_of_reach()))
    except LocalEntryNotFoundError as error:
        explain(error, repo, revision or "main")
    except EntryNotFoundError:
        return None
    except Exception as error:  # of any kind, as in `_download`
        explain(error, repo, revision or "main")


# After a connection that ended without an answer, or a server that is busy: three seconds in all.
RETRIES, WAIT_S = 4, 0.2


@dataclass
class Remote:
    """A file on the hub that is read in parts."""

    url: str
    name: str
    size: int
    read_bytes: int = 0

    @classmethod
    def open(cls, repo: str, file: str, revision: str) -> Self | None:
        """Ask for the size; None where the model has no such file."""
        from huggingface_hub import get_hf_file_metadata, hf_hub_url
        from huggingface_hub.errors import EntryNotFoundError

        url = hf_hub_url(repo, file, revision=revision)
        try:
            metadata = get_hf_file_metadata(url, retry_on_errors=True)
        except EntryNotFoundError:
            return None
        except Exception as error:  # of any kind, as in `_download`
            explain(error, repo, revision)
        return cls(url, f"{repo}/{file}", metadata.size or 0)

    def read(self, start: int, end: int) -> bytes:
        """Bytes `start` to `end` of the file, or to its end. Raises SourceError: the server ignores ranges (it would
        send the whole model), or breaks off."""
        from huggingface_hub.utils._headers import build_hf_headers
        from huggingface_hub.utils._http import hf_raise_for_status, http_stream_backoff

        span = f"bytes={start}-{min(end, self.size) - 1}"
        headers = {**build_hf_headers(), "Range": span, "Accept-Encoding": "identity"}
        repo = self.name.rpartition("/")[0]
        try:
            # a connection that the server had closed while it was idle is opened again
            with http_stream_backoff(
                "GET", self.url, max_retries=RETRIES, base_wait_time=WAIT_S, headers=headers, follow_redirects=True
            ) as response:
                hf_raise_for_status(response)
                if response.status_code != 206:
                    raise SourceError(
                        f"the server ignores ranges: it would send all {self.size / 1e9:.2f} GB of {self.name} for its "
                        f"header (HTTP {response.status_code} instead of 206).",
                        fix=f"download the model, and give its folder: hf download {repo}",
                    )
                data = b"".join(response.iter_bytes())
        except SourceError:
            raise
        except Exception as error:  # of any kind, as in `_download`
            explain(error, repo, "main")
        self.read_bytes += len(data)
        return data


def explain(error: Exception, repo: str, revision: str) -> NoReturn:
    """Turn a failure of huggingface_hub into a SourceError."""
    from huggingface_hub import constants, errors

    hub = constants.ENDPOINT
    login = "hf auth login (or export HF_TOKEN=...)"
    status = getattr(getattr(error, "response", None), "status_code", None)
    fix: str | None = "run the same command again; files that are already whole are kept"
    # The HTTP client's own errors (httpx, httpx2), a file of the wrong length, and Xet's: a broken transfer.
    transport = type(error).__module__.partition(".")[0] in ("httpx", "httpx2", "httpcore", "httpcore2")
    if isinstance(error, errors.HFValidationError):
        what, fix = f"{repo!r} is not a hub id: {error}", None
    elif isinstance(error, errors.GatedRepoError):
        what = f"{repo} is gated: its owner must grant you access"
        fix = f"accept its terms at {hub}/{repo}, then {login}"
    elif isinstance(error, errors.RevisionNotFoundError):
        what = f"{repo} has no revision {revision!r}; allowed: a branch, a tag or a commit of it"
        fix = f"see {hub}/{repo}/tree/main, or leave the revision out"
    elif isinstance(error, errors.RepositoryNotFoundError) and status == 404:
        what, fix = f"{hub} has no model {repo}", f"check the name at {hub}/models"
    elif isinstance(error, errors.RepositoryNotFoundError) or status in (401, 403):
        reasons = "it does not exist, is private, or the token is wrong"
        what = f"{hub} does not show {repo} to you (HTTP {status}): {reasons}"
        fix = f"check the name; if it is private: {login}"
    elif isinstance(error, errors.LocalEntryNotFoundError):
        _explain_not_cached(error, repo, revision, hub)
    elif isinstance(error, OSError) and error.errno == errno.ENOSPC:
        what = f"no space left while {repo} was downloaded to {constants.HF_HUB_CACHE}"
        fix = "free some space, or name another folder: export HF_HUB_CACHE=/path/with/space"
    elif isinstance(error, PermissionError):
        what = f"the hub's cache cannot be written: {error}"
        fix = "name a folder that you can write: export HF_HUB_CACHE=/path/with/space"
    elif isinstance(error, errors.HfHubHTTPError):
        what = f"{hub} answered HTTP {status} while {repo} was downloaded"
    elif transport or isinstance(error, (OSError, errors.XetDownloadError)):
        what = f"the download of {repo} was cut: {first_line(error)}"
    else:
        raise error
    raise SourceError(what, fix=fix) from error


def _explain_not_cached(error: Exception, repo: str, revision: str, hub: str) -> NoReturn:
    from huggingface_hub import constants, errors

    state = "only partly" if isinstance(error, errors.IncompleteSnapshotError) else "not"
    where = f"{repo} (revision {revision}) is {state} in the cache {constants.HF_HUB_CACHE}"
    if constants.HF_HUB_OFFLINE:
        raise NotAtHand(
            f"{where}, and HF_HUB_OFFLINE is set",
            fix="run once with a network and HF_HUB_OFFLINE=0, or give a local folder as the model",
        ) from error
    raise NotAtHand(
        f"{hub} cannot be reached, and {where}",
        fix="check the network (HF_ENDPOINT, proxy), or give a local folder, a .gguf file or smollm2-135m as the model",
    ) from error
