"""`halfbyte merge`, `export` and `push`: a run for other programs; `serve`: a run behind OpenAI's interface."""

import os
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Annotated

import typer

from halfbyte.cli import labels, progress, show
from halfbyte.cli.options import AllowHost, Force, Host, Json, KeyFile, Port, Quiet, Set, argument, flag, option
from halfbyte.errors import RecipeError, typed
from halfbyte.system import libraries

if TYPE_CHECKING:
    from halfbyte.proofs.export import Exported


Compared = Annotated[
    Path | None, typer.Option("--data", help="Rows to compare on; default: those held out.", metavar="ROWS")
]
Proven = Annotated[bool, typer.Option("--proof/--no-proof", help="Open what was written, and compare it with the run.")]
Prompts = Annotated[int, typer.Option("--prompts", min=1, help="Held-out prompts that both answer, for the proof.")]


class BaseOption(StrEnum):
    auto = "auto"
    full = "16bit"
    trained = "4bit"


class ProgramOption(StrEnum):
    transformers = "transformers"
    vllm = "vllm"
    mlx = "mlx"


def merge(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, or an adapter's.")],
    base: BaseOption = option(
        BaseOption.auto, "--base", "Which weights: 16bit, 4bit (as trained on, dequantised), or auto: the nearer."
    ),
    out: Path | None = option(None, "--out", "Default: RUN/merged.", metavar="DIR"),
    quantise: bool = flag("--quantise", "Quantise it again, as the run's base is, and measure what that costs."),
    data: Compared = None,
    proof: Proven = True,
    prompts: Prompts = 20,
    set_: Set = [],  # noqa: B006
    force: Force = False,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Base and adapter as one model that plain transformers opens, with a proof that it says what the run says."""
    from halfbyte.export import inputs
    from halfbyte.recipe.task import CAUSAL_LM, HEADS

    inputs.check_rows(inputs.adapter_of(run, set_, (CAUSAL_LM, *HEADS)), data)
    inputs.out_folder(run, out, "merged")
    with progress.quantizing(silent=json_ or quiet) as tell:
        with libraries.loading():
            from halfbyte.export import export as exporting
            from halfbyte.export.job import ExportJob

        job = ExportJob(run, out, tuple(set_), force, data, proof, prompts, tell)
        result = exporting.merge(job, base.value, quantise=quantise)
    _show(result, json_=json_)


def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, or an adapter's.")],
    gguf: str | None = option(None, "--gguf", "Base and adapter as a GGUF file.", metavar="F16|BF16|Q8_0|Q4_K_M|..."),
    gguf_lora: bool = flag("--gguf-lora", "The adapter alone, for a GGUF file of its base."),
    ollama: bool = flag("--ollama", "Also a Modelfile; alone it takes a GGUF file in Q8_0."),
    repair: bool = flag("--repair", "With --gguf: round its matrices anew, on the run's own rows."),
    peft: bool = flag("--peft", "The adapter alone, within the limits of vLLM."),
    program: ProgramOption | None = option(
        None, "--for", "With --peft: under this program's names for layers; default: the checkpoint's."
    ),
    base: BaseOption = option(BaseOption.auto, "--base", "As of merge."),
    out: Path | None = option(None, "--out", "Default: a folder in RUN.", metavar="DIR"),
    data: Compared = None,
    proof: Proven = True,
    prompts: Prompts = 20,
    set_: Set = [],  # noqa: B006
    force: Force = False,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """A run for llama.cpp, Ollama, vLLM or plain PEFT, with a proof that it says what the run says."""
    if repair and (gguf_lora or peft):
        raise RecipeError("--repair is of a GGUF file that is merged: an adapter is not rounded.", fix="leave it out")
    if base is not BaseOption.auto and (gguf_lora or peft):
        raise RecipeError("--base is of a file that is merged: an adapter is exported alone.", fix="leave --base out")
    if data is not None and peft:
        raise RecipeError("--data names rows to compare on, and --peft compares nothing.", fix="leave --data out")
    flags = {"--gguf": gguf is not None, "--gguf-lora": gguf_lora, "--peft": peft, "--ollama": ollama and peft}
    if len(given := [name for name, is_given in flags.items() if is_given]) > 1:
        raise RecipeError(f"{' and '.join(given)} exclude each other.", fix=f"leave out all but one: {given[0]}")
    if program is not None and not peft:
        raise RecipeError("--for names the program that reads an adapter.", fix=f"--peft --for {program.value}")
    if repair and not (gguf or ollama):
        raise RecipeError("--repair is of a GGUF file, and none is asked for.", fix="--gguf Q4_0 --repair")
    if not (gguf or gguf_lora or peft or ollama):
        what = "what is exported is not said: --gguf FORMAT, --gguf-lora, --peft or --ollama is needed."
        raise RecipeError(what, fix=f"halfbyte export {typed(run)} --gguf Q8_0")
    from halfbyte.export import inputs

    kind = "" if gguf_lora or peft else inputs.gguf_format(gguf or "Q8_0", repair=repair)
    inputs.check_rows(inputs.adapter_of(run, set_), data)
    inputs.out_folder(run, out, "peft" if peft else "gguf-lora" if gguf_lora else f"gguf-{kind.lower()}")
    with progress.quantizing(silent=json_ or quiet) as tell:
        with libraries.loading():
            from halfbyte.export import export as exporting
            from halfbyte.export.job import ExportJob

        job = ExportJob(run, out, tuple(set_), force, data, proof, prompts, tell)
        if peft:
            result = exporting.to_peft(job, program.value if program else None)
        elif gguf_lora:
            result = exporting.to_gguf_lora(job, modelfile=ollama)
        else:
            result = exporting.to_gguf(job, kind, base.value, modelfile=ollama, repair=repair)
    _show(result, json_=json_)


def push(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="An export's folder, or a run, whose adapter is meant.")],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="USER/NAME on the hub.")],
    public: bool = flag("--public", "For everyone to see; else it is private."), json_: Json = False,
) -> None:  # fmt: skip
    """Upload to the hub: private unless --public."""
    with progress.waiting("uploading", silent=json_), libraries.loading():
        from halfbyte.export import hub

        address = hub.push(run, repo, public=public)
    show.document({"address": address, "public": public}) if json_ else show.text(f"pushed to {address}")


def serve(
    runs: Annotated[
        list[str], typer.Argument(metavar="[NAME=]RUN...", help="Runs, adapters' folders, or a model; all on one base.")
    ],
    host: Host = "127.0.0.1",
    port: Port = 8000,
    context: int | None = option(None, "--context", "Most tokens of a prompt and its answer; default: 4,096.", min=16),
    at_once: int | None = option(None, "--at-once", "Most texts written at once.", min=1, max=16),
    queue: int = option(128, "--queue", "Most texts that wait; beyond them, 429.", min=0),
    pack: bool = flag("--pack", "Read waiting prompts together: faster, and rounded as it comes."),
    time_limit: float = option(600.0, "--time-limit", "Seconds of an answer.", min=1.0),
    grace: float = option(60.0, "--grace", "Seconds for running answers at the end.", min=1.0),
    key_file: KeyFile = None,
    allow_adapters: list[Path] = option(
        [], "--allow-adapters", "A folder from which clients may load adapters; repeatable."
    ),
    allow_host: AllowHost = [],  # noqa: B006
    set_: Set = [],  # noqa: B006
    force: Force = False,
    quiet: Quiet = False,
) -> None:
    """OpenAI's HTTP interface for adapters and their base, and a page to talk to them, on this machine alone; of a run
    with labels or vectors /classify, /v1/embeddings, /rerank."""
    from halfbyte.serving import names
    from halfbyte.serving import settings as where
    from halfbyte.serving.folders import AdapterFolders

    other = names.of_other_task(runs, set_)
    named = None if other is not None else names.find(runs, set_)
    if other is not None:
        given = {"--context": context, "--at-once": at_once, "--pack": pack, "--allow-adapters": allow_adapters}
        labels.check_served(other, given)
    where.check_installed()
    folders = AdapterFolders.of(allow_adapters, set_)
    hosts = frozenset(map(str.lower, allow_host))
    settings = where.Settings(host, port, hosts, where.key_of(key_file), time_limit, grace)
    sock = where.bind(settings)
    address = f"http://{f'[{host}]' if ':' in host else host}:{sock.getsockname()[1]}"
    if named is None:
        assert other is not None
        return labels.serve(other, (settings, sock, address), waiting=queue, force=force, quiet=quiet)
    with progress.waiting("opening base and adapters", silent=quiet) as tell:
        with libraries.loading():
            from halfbyte.serving import models
            from halfbyte.serving.engine import Engine
            from halfbyte.serving.http import app

        opened = models.open_all(named, tell, max_length=context, places=at_once, force=force)
        engine = Engine(opened, queue, pack=pack)
    sizes = f"{opened.max_length:,} tokens each, caches of {opened.cache_bytes / 1e9:.2f} GB"
    lines = [
        f"serving {', '.join(opened.by_name)} at {address}/v1, and a page at {address}/",
        f"  {engine.why}; {sizes}; {queue} may wait",
        "  Ctrl-C ends it when the answers that are being written are whole; twice: at once",
    ]
    app.serve(engine, settings, sock, lambda: show.text("\n".join(lines[: 1 if quiet else 3])), folders)
    return None


def _show(result: "Exported", *, json_: bool) -> None:
    if json_:
        show.document(result.to_json())
        return
    lines = [f"{result.kind}: {result.path}"]
    if (proven := result.proven) is not None and result.held_out is not None:
        lines += [
            f"  opened by {proven.program}: logits differ by {proven.difference:.2g} of their spread "
            + (f"(rounding explains {proven.bound:.2g}" if proven.bounded else "(not bounded by rounding")
            + f"; the adapter moves them by {proven.moved:.2g})",
            f"  {proven.same_answers} of {proven.answers} greedy answers are the run's, token for token",
            f"  exact match {proven.exact} of {proven.references}, the run {proven.run_exact}",
            f"  {result.held_out['text']}; KL from the run {proven.kl:.2g} nats",
        ]
    show.text("\n".join([*lines, *(f"  {note}" for note in result.notes)]))
    if result.held_out is not None and result.held_out["advice"]:
        show.warning(result.held_out["advice"])


def serve_studio(
    folder: Path = argument(Path(), "[FOLDER]", "Where files, recipes and runs are."),
    host: Host = "127.0.0.1",
    port: Port = 8765,
    bases: list[Path] = option([], "--bases", "Another folder with bases; repeatable.", metavar="DIR"),
    upload: float = option(2.0, "--upload", "GB of the largest file that is taken.", min=0.001),
    key_file: KeyFile = None,
    allow_host: AllowHost = [],  # noqa: B006
    quiet: Quiet = False,
) -> None:
    """A page on which a file becomes an adapter: rows, plan, training, scores, answers, export. It starts the commands
    that it shows, which go on without it."""
    from halfbyte.runs.folder import check_writable
    from halfbyte.serving import settings as where

    where.check_installed(("starlette", "uvicorn", "sse_starlette"))
    check_writable(folder, "halfbyte studio FOLDER, with one that can be written")
    hosts = frozenset(map(str.lower, allow_host))
    settings = where.Settings(host, port, hosts, where.key_of(key_file), grace_s=2.0, uploads="/api/data/")
    sock = where.bind(settings)
    import uvicorn

    from halfbyte.serving.http import pages
    from halfbyte.studio.app import Studio, application
    from halfbyte.studio.jobs import Jobs, Worker
    from halfbyte.studio.workspace import Workspace

    space = Workspace(folder.resolve(), tuple(path.resolve() for path in bases), int(upload * 1e9))
    folders = space.begin()
    key = os.environ[where.KEY] = settings.key or folders  # `serve` takes it from there
    studio = Studio(space, Jobs(space), Worker(space.folder))
    server = uvicorn.Server(pages.config(application(studio), replace(settings, key=key), "off"))
    Thread(target=studio.worker.run, args=("version",), daemon=True).start()  # its libraries, before they are needed
    address = f"http://{f'[{host}]' if ':' in host else host}:{sock.getsockname()[1]}/#key={key}"
    note = "" if quiet else "\n  who has this address can start runs as you; Ctrl-C ends the page, and runs go on"
    pages.run(server, sock, lambda: show.text(f"studio of {space.folder} at {address}{note}"))
    studio.worker.end()
