"""`halfbyte merge RUN` and `halfbyte export RUN`: base and adapter as one folder of weights, a GGUF file, a GGUF
adapter, a Modelfile for Ollama, or a PEFT folder, each proven.

Cost: the source read once and the result written once for each base that is tried (K-quants: an F16 file first), and
what the proof asks.
"""

import gc
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from gguf import GGUFWriter

from halfbyte.base.config import open_config
from halfbyte.data.encoding.chatml import chat_template
from halfbyte.errors import ExportError, HalfbyteError, typed
from halfbyte.export import folder, gguf, gguf_tokenizer, inputs, llama_cpp, lora, ollama
from halfbyte.export.job import BaseChoice, DraftExport, ExportJob, bases, better, describe, notes
from halfbyte.export.weights import BaseKind, MergedModel
from halfbyte.export.witness import training_rows
from halfbyte.inference.load import tokenizer_of
from halfbyte.inference.target import Target
from halfbyte.models.gguf import blocks
from halfbyte.models.sources.lookup import find_model
from halfbyte.proofs import programs
from halfbyte.proofs.export import Exported
from halfbyte.recipe.task import CAUSAL_LM, HEADS
from halfbyte.types import Config, Tokenizer

NO_LLAMA = f"not proven: llama.cpp is not installed ({programs.INSTALL})"


# ------------------------------------------------------------------ merged folder
def merge(job: ExportJob, choice: BaseChoice = "auto", *, quantise: bool = False) -> Exported:
    """Write base and adapter as one model that plain transformers opens. `quantise`: quantise it again, as the run's
    base is; what that costs is measured. Raises ExportError: no space, or what was written does not say what the run
    says; nothing is left then."""
    out = job.out_folder("merged")
    run = job.checked_target((CAUSAL_LM, *HEADS))
    kinds = bases(run, choice)
    if run.recipe.task in HEADS:
        if quantise:
            raise ExportError("a merged model with a head is not quantised again.", fix="leave --quantise out")
        return _merge_head(job, run, out, kinds[-1])
    if quantise and (not run.recipe.quant.quantises or run.recipe.quant.in_file):
        what = "is a file's own blocks" if run.recipe.quant.in_file else "is in 16 bits"
        fix = f"halfbyte export {typed(run.path)} --gguf Q8_0"
        raise ExportError(f"the run's base {what}: it says no format to quantise to.", fix=fix)
    with job.draft(run, out, copies=len(kinds)) as draft:
        for kind in kinds:
            (place := draft.folder / kind).mkdir()
            dtype = write_merged(job, run, kind, place, copies=len(kinds))
            if draft.witness is not None:
                name = f"merged-{kind}"
                proven = draft.witness.prove(place, "transformers", dtype, name, base=kind, others=(dtype,))
                draft.proofs[kind], draft.losses[kind] = proven
        base = better(draft.proofs, draft.losses, kinds)
        for kind in kinds:
            if kind != base:
                shutil.rmtree(draft.folder / kind)
        result = draft.result("merged model", base, list(notes(kinds, draft.proofs, draft.losses, base)))
        if quantise:
            result = _quantise(job, draft, result, draft.folder / base)
        draft.keep("store" if quantise else base)
        return draft.finish(result)


def _merge_head(job: ExportJob, run: Target, out: Path, base: BaseKind) -> Exported:
    """Base, adapter and head as one model that transformers' class for the task opens."""
    from halfbyte.export import head

    with job.draft(run, out, prove=False, copies=1) as draft:
        (place := draft.folder / base).mkdir()
        dtype, note = write_merged(job, run, base, place), "not proven: it was not asked for (--no-proof)"
        if job.prove:
            job.tell.say(f"{place.name} is opened by transformers, and the run beside it", label="proof")
            asked = {"run": str(job.run), "place": str(place), "base": base, "dtype": dtype, "force": job.force,
                     "overrides": list(job.overrides), "data": job.data and str(job.data)}  # fmt: skip
            note = head.proof(asked, draft.folder / "asked.json")
            (draft.folder / "asked.json").unlink(missing_ok=True)
        draft.keep(base)
        return draft.finish(draft.result("merged model with a head", base, [f"into {describe(base)}", note]))


def write_merged(job: ExportJob, run: Target, base: BaseKind, place: Path, *, copies: int = 1) -> str:
    """Write the merged folder; returns the dtype of its matrices."""
    merged = MergedModel(run, base, job.tell)
    nbytes = folder.nbytes(merged)
    folder.check_space(place, copies * nbytes)
    job.tell.say(f"into {describe(base)}: {nbytes / 1e9:.2f} GB", label="merge")
    folder.write(merged, place)
    dtypes = [item.source.dtype for item in merged.items if len(item.source.shape) > 1]
    del merged
    gc.collect()
    return max(set(dtypes), key=dtypes.count) if dtypes else "F32"


def _quantise(job: ExportJob, draft: DraftExport, merged: Exported, place: Path) -> Exported:
    """Quantise the merged folder at `place` again, into the folder `store` beside it."""
    from halfbyte.base.quantize import quantize

    quant = draft.run.recipe.quant
    recipe = draft.run.recipe.model_copy(update={"model": str(place), "revision": None})
    store = draft.folder / "store"
    try:
        quantize(recipe, out=store, tell=job.tell)
    except HalfbyteError as error:
        raise ExportError(f"the merged model cannot be quantised: {error.message}", fix=error.fix) from error
    if draft.witness is None:
        return merged
    name = f"{quant.type} of {merged.base}"
    proven = draft.witness.prove(store, "transformers", "Q4_0", "quantised", base="4bit", bounded=False)
    draft.proofs[name], draft.losses[name] = proven
    return draft.result(f"merged model in {quant.type}", name, merged.notes)


# ------------------------------------------------------------------ GGUF
def to_gguf(
    job: ExportJob, kind: str, choice: BaseChoice = "auto", *, modelfile: bool = False, repair: bool = False
) -> Exported:
    """The merged model as one GGUF file in a folder, with `--ollama` a Modelfile beside it. `repair`: its matrices are
    rounded anew on the run's own rows (`repair.py`), and the file that loses less is kept. Raises RecipeError: no such
    format, or none that is rounded. ExportError: the architecture is not written here, llama.cpp is not there for a
    K-quant or a repair, no space, or what was written does not say what the run says; nothing is left then."""
    kind = inputs.gguf_format(kind, repair=repair)
    if kind in inputs.K_QUANTS or repair:
        llama_cpp.need("a repaired file" if repair else kind)
    out = job.out_folder(f"gguf-{kind.lower()}")
    if (model_type := str(_config(job.target()).model_type)) not in gguf.ARCHITECTURES:
        llama_cpp.converter(model_type)
    run = job.checked_target()
    kinds = bases(run, choice)
    window = _unread_window(run)
    _refuse_early(run, MergedModel(run, kinds[-1]))
    with job.draft(run, out, copies=2, window=window) as draft:
        remarks = _of_window(window)
        for each in kinds if _proves(draft) else [better({}, {}, kinds)]:
            (place := draft.folder / each).mkdir()
            path = place / f"{file_name(run)}-{kind}.gguf"
            remarks += _write_gguf(job, run, each, path, kind)
            _prove(draft, path, kind, each)
        base = better(draft.proofs, draft.losses, kinds)
        remarks += _notes(draft, kinds, base)
        name: str = base
        if repair:
            name, remark = _repaired(job, draft, base, kind)
            remarks.append(remark)
        result = draft.result(f"GGUF file in {kind}", name, [*dict.fromkeys(remarks)])
        draft.keep(name)
        if modelfile:
            file = next(draft.folder.glob("*.gguf"))
            ollama.write(draft.folder / "Modelfile", file.name, _tokenizer(run), run.recipe)
        return draft.finish(result)


def _repaired(job: ExportJob, draft: DraftExport, base: BaseKind, kind: str) -> tuple[str, str]:
    """Repair a copy of the file that was merged into `base`. Returns the name of the better one of both, and a note."""
    from halfbyte.export import repair

    name, run = f"{base}, repaired", draft.run
    places = draft.folder / name, draft.folder / "merged"
    for place in places:
        place.mkdir()
    file = next((draft.folder / base).glob("*.gguf"))
    folder.check_space(draft.folder, file.stat().st_size)
    copied = Path(shutil.copy(file, places[0]))
    write_merged(job, run, base, places[1])
    rows = training_rows(run, _tokenizer(run), repair.TOKENS)
    job.tell.say(f"{copied.name} is rounded anew on {len(rows)} of the run's rows", label="repair")
    note = repair.repair(copied, places[1], rows)
    shutil.rmtree(places[1])
    _prove(draft, copied, kind, base, name=name)
    if base not in draft.losses:
        return name, note
    plain, other = (draft.losses[each].export.value for each in (base, name))
    if draft.proofs[name].problems or other >= plain:
        return base, f"{note}; that is not better (loss {other:.4f}), so it was left out"
    kept = draft.losses[base].kept
    left = "" if kept is None else f", {kept[0]:.0%} of the gain"
    return name, f"{note}; without that: loss {plain:.4f}{left}"


def to_gguf_lora(job: ExportJob, *, modelfile: bool = False) -> Exported:
    """The adapter as a GGUF adapter, proven on a GGUF file of its base, which does not stay. Raises ExportError: it
    holds what such an adapter cannot, or does not say what the run says."""
    out = job.out_folder("gguf-lora")
    run = job.checked_target()
    merged = MergedModel(run, "16bit", job.tell)
    file = merged.checkpoint.blocks[0] if merged.checkpoint.blocks else None
    window = _unread_window(run)
    lora.GgufLayers.of(merged)  # refuses before the run is asked
    if file is None and job.prove and programs.has_llama():
        _refuse_early(run, merged)
    with job.draft(run, out, window=window) as draft:
        path = draft.folder / f"{file_name(run)}-lora.gguf"
        lora.write_gguf(merged, path)
        if _proves(draft) and file is not None:
            _prove(draft, file, "Q8_0", "16bit", path)  # its weights are the run's: what it rounds are inputs
        elif _proves(draft):
            alone = draft.folder / "base.gguf"
            _write_gguf(job, Target(run.path, run.recipe, None, run.run), "16bit", alone, "F16")
            _prove(draft, alone, "F16", "16bit", path)
            alone.unlink()
        use = f"llama-cli -m BASE.gguf --lora {path.name}, on a GGUF file of {file_name(run)} in 16 bits"
        if file is not None:
            known = blocks.read(merged.checkpoint.path)
            use = f"llama-cli -m {file.name} --lora {path.name}: the very file that it was trained on"
            use += f" (sha256 {known.sha256[0]})" if known is not None else ""
        result = draft.result("GGUF adapter", "16bit", [use, *_of_window(window), *_notes(draft, ["16bit"], "16bit")])
        if modelfile:
            name = "BASE.gguf" if file is None else str(file.absolute())
            ollama.write(draft.folder / "Modelfile", name, _tokenizer(run), run.recipe, adapter=path.name)
        return draft.finish(result)


def _write_gguf(job: ExportJob, run: Target, base: BaseKind, path: Path, kind: str) -> list[str]:
    """Write one file; returns what a user should know of it."""
    merged = MergedModel(run, base, job.tell)
    ours = _config(run).model_type in gguf.ARCHITECTURES
    plain = "F16" if kind in inputs.K_QUANTS or not (ours or kind in ("F32", "BF16", "Q8_0")) else kind
    weights = sum(item.source.nbytes for item in merged.items)
    folder.check_space(path.parent, 2 * weights + folder.BESIDE_BYTES)
    job.tell.say(f"from {describe(base)}, in {kind}", label="gguf")
    first, remarks = path.with_suffix(".f16") if plain != kind else path, list[str]()
    if ours:
        gguf.write(merged, first, plain, add_tokenizer(run, merged))
    else:
        llama_cpp.convert(merged, first, plain)
        remarks.append(f"{merged.config.model_type} was written by llama.cpp's own converter")
    if plain != kind:
        llama_cpp.quantise(first, path, kind)
        first.unlink()
        remarks += llama_cpp.other_formats(path, kind)
    return remarks


def _proves(draft: DraftExport) -> bool:
    return draft.witness is not None and programs.has_llama()


def _prove(
    draft: DraftExport, path: Path, kind: str, base: BaseKind, adapter: Path | None = None, name: str | None = None
) -> None:
    """Compare a GGUF file with the run, by llama.cpp, where that can be done. `name`: its own; None for its base's."""
    if draft.witness is not None and programs.has_llama():
        family = kind[:4] if kind in inputs.K_QUANTS else kind
        # besides the file's blocks llama.cpp rounds what it multiplies them with: to the same float, or to blocks alike
        others = (family,) if family in inputs.FLOATS else (family, family)
        name = name or base
        draft.proofs[name], draft.losses[name] = draft.witness.prove(
            path, "llama.cpp", family, f"llama-{name}", base=base, others=others, adapter=adapter
        )


def _notes(draft: DraftExport, kinds: list[BaseKind], base: str) -> list[str]:
    return list(notes(kinds, draft.proofs, draft.losses, base)) if draft.proofs or draft.witness is None else [NO_LLAMA]


def _config(run: Target) -> Config:
    config = open_config(find_model(run.recipe).path, trust_remote_code=run.recipe.trust_remote_code)
    return config.get_text_config()


def _refuse_early(run: Target, merged: MergedModel) -> None:
    """Raises ExportError: what a file has no place for, before the run is asked and a weight is read."""
    if _config(run).model_type not in gguf.ARCHITECTURES:
        return
    try:
        with tempfile.TemporaryDirectory() as place:
            gguf.write(merged, Path(place, "header.gguf"), "F16", add_tokenizer(run, merged), weights=False)
    except ExportError as error:
        raise ExportError(error.message, fix=error.fix or f"halfbyte merge {typed(run.path)}") from error


def _unread_window(run: Target) -> int | None:
    """Tokens of a window that llama.cpp takes no notice of; None where there is none."""
    config = _config(run)
    return getattr(config, "sliding_window", None) or None if config.model_type in gguf.READ_WHOLE else None


def _of_window(window: int | None) -> list[str]:
    what = f"llama.cpp takes no notice of this model's window of {window} tokens: longer texts differ"
    return [] if window is None else [what]


def add_tokenizer(run: Target, merged: MergedModel) -> Callable[[GGUFWriter], None]:
    """A function that puts a run's tokenizer and chat template into a GGUF writer."""
    tokenizer = _tokenizer(run)
    rows = int(merged.config.get_text_config().vocab_size)
    template = chat_template(tokenizer, run.recipe.data)
    return lambda writer: gguf_tokenizer.add(writer, tokenizer, rows, merged.checkpoint, template)


def _tokenizer(run: Target) -> Tokenizer:
    return tokenizer_of(run, find_model(run.recipe))


def file_name(run: Target) -> str:
    """The base's name, for a file."""
    return Path(find_model(run.recipe).id.removesuffix(".gguf")).name


# ------------------------------------------------------------------ PEFT
def to_peft(job: ExportJob, program: lora.Program | None = None) -> Exported:
    """A PEFT folder of one rank and one scaling, as vLLM reads them. Raises ExportError: vLLM could not hold it, or
    `program`, whose names it gets, has no such layers."""
    out = job.out_folder("peft")
    run = job.checked_target()
    with job.draft(run, out, prove=False) as draft:
        remarks = lora.write_peft(MergedModel(run, "16bit", job.tell), draft.folder, program)
        return draft.finish(draft.result("PEFT adapter", "16bit", remarks))
