"""The hub: the model card (README.md) of an export, by huggingface_hub's own classes, and `halfbyte push`.

The card says what is known: the base and its revision, the rows, the figures of `report.json`, of the evaluation and of
the proof, the recipe, and how the export is used. PEFT's own card may name a local path as the base; this one names a
base that others can find, or says that it is local. A push is private unless asked to be public; only huggingface_hub
reads the token (`hf auth login`, HF_TOKEN), which is never shown.
"""

import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from halfbyte.errors import ExportError, HalfbyteError, RecipeError, RunError, first_line
from halfbyte.inference import target
from halfbyte.models.sources import pypi
from halfbyte.models.sources.hub import HUB_ID
from halfbyte.models.sources.lookup import find_model
from halfbyte.proofs.export import Exported
from halfbyte.recipe.adapter_folder import ADAPTER_FILES, PASSPORT
from halfbyte.recipe.task import TASKS
from halfbyte.runs.folder import RunFolder, read_json
from halfbyte.scoring.intervals import CONFIDENCE
from halfbyte.scoring.sheet import SCORES, other_adapter
from halfbyte.system import files
from halfbyte.system.libraries import versions

CARD, MODELFILE = "README.md", "Modelfile"
# The hub's names of what a run with a head does.
_DOES = {"classify": "text-classification", "regress": "text-classification", "tag": "token-classification"}
# In a recipe: paths of this machine, of which a card has the last part.
_LOCAL = re.compile(r"(?<=[\s'\"\[])(?:~|\.\.?|[A-Za-z]:)?[/\\][^\s'\",\]]+")


def write(folder: Path, run: target.Target, export: Exported) -> None:
    """Write the card of an export."""
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    base, revision = run.recipe.model, run.recipe.revision
    public, does = HUB_ID.fullmatch(base.partition("@")[0]) is not None, _DOES.get(run.recipe.task, "text-generation")
    results = [
        EvalResult(task_type=does, dataset_type="local", dataset_name=name, metric_type=metric,
                   metric_value=value, verified=None)
        for name, metric, value, _ in metrics(run, export)
    ]  # fmt: skip
    kind = "gguf" if "GGUF" in export.kind else "peft" if "adapter" in export.kind else "transformers"
    data = ModelCardData(
        base_model=base.partition("@")[0] if public else None, library_name=kind, license=licence(run),
        tags=["halfbyte", "qlora", "lora"], pipeline_tag=does, model_name=export.path.name if results else None,
        eval_results=results or None,
    )  # fmt: skip
    text = f"---\n{data.to_yaml()}\n---\n{body(run, export, base, revision, public=public)}"
    if file := next(folder.glob("*.gguf"), None):
        text = text.replace("FILE.gguf", file.name)
    ModelCard(text).save(folder / CARD)


def metrics(run: target.Target, export: Exported) -> list[tuple[str, str, float, str]]:
    """(rows, metric, value, its interval in words) of the evaluation of this very adapter, else of the proof."""
    scores = read_json(run.run.path / "eval" / SCORES) if run.run is not None else {}
    other = run.run is not None and other_adapter(scores, run.run.adapter)
    rows = []
    for metric in [] if other else scores.get("metrics") or []:
        if (adapter := metric.get("adapter")) is not None:
            ends = adapter.get("interval")
            words = f"{CONFIDENCE:.0%} {ends[0]:.4g} to {ends[1]:.4g}" if ends else ""
            rows.append(("held-out rows", str(metric["name"]), float(adapter["value"]), words))
    if not rows and (proven := export.proven) is not None:
        where = f"{(export.held_out or {}).get('compared_on', 'rows')} of the proof"
        rows = [(where, "loss", round(proven.loss, 4), "")]
        if proven.references:
            share = f"{proven.exact} of {proven.references}"
            rows.append((where, "exact_match", round(proven.exact / proven.references, 4), share))
    return rows


def licence(run: target.Target) -> str | None:
    """The base's, as its own card says it; None where it has none."""
    from huggingface_hub import ModelCard

    try:
        card = find_model(run.recipe).path / CARD
        name = ModelCard.load(card).data.to_dict().get("license") if card.is_file() else None
    except (HalfbyteError, OSError, ValueError):
        return None
    return name if isinstance(name, str) else None


def body(run: target.Target, export: Exported, base: str, revision: str | None, *, public: bool) -> str:
    """Everything below the metadata."""
    name = base.partition("@")[0] if public else Path(base).name
    local = "" if public else " (a local model: say where others can find it)"
    if (packaged := pypi.MODELS.get(base)) is not None:
        local = f" (from PyPI: {packaged.parts[0].package} {packaged.parts[0].version})"
    at = f" at revision `{revision}`" if revision else ""
    lines = [f"# {name}, fine-tuned with QLoRA", "", f"A {export.kind}. Base: `{name}`{at}{local}.", ""]
    lines += ["## Training", "", *_training(run), ""]
    if rows := metrics(run, export):
        lines += ["## Evaluation", "", "| rows | metric | value | interval |", "| --- | --- | --- | --- |"]
        lines += [f"| {rows_} | {metric} | {value:g} | {words or '-'} |" for rows_, metric, value, words in rows] + [""]
    lines += ["## Proof", "", *_proof(export), "", "## Use", "", "```", *_use(export, run.recipe.task), "```", ""]
    return "\n".join(lines)


def _training(run: target.Target) -> list[str]:
    recipe, report = run.recipe, read_json(run.run.report) if run.run is not None else {}
    names = recipe.data.train if isinstance(recipe.data.train, str) else ", ".join(map(str, recipe.data.train or ()))
    lora = recipe.lora
    lines = [f"- rows: {', '.join(Path(n).name for n in names.split(', ')) or 'not known'}"]
    lines.append(
        f"- base in {recipe.quant.type}; LoRA rank {lora.r}, alpha {lora.lora_alpha}, on {lora.target_modules}"
    )
    for key, words in (("tokens", "{:,} tokens"), ("steps", "{:,} steps"), ("train_seconds", "{:,.0f} s"),
                       ("peak_rss_bytes", "{:.2f} GB of memory at most")):  # fmt: skip
        if isinstance(value := report.get(key), (int, float)):
            lines.append(f"- {words.format(value / 1e9 if key == 'peak_rss_bytes' else value)}")
    if run.run is not None and run.run.recipe.is_file():
        text = _LOCAL.sub(lambda path: Path(path[0]).name, run.run.recipe.read_text(encoding="utf-8").rstrip())
        lines += ["", "<details><summary>recipe</summary>", "", "```yaml", text, "```", "", "</details>"]
    return [*lines, "", f"halfbyte {versions().get('halfbyte', '')}"]


def _proof(export: Exported) -> list[str]:
    if (proven := export.proven) is None:
        return list(export.notes) or ["Not proven."]
    figures = (
        f"Opened by {proven.program} and compared with the run on {proven.positions} labelled tokens and "
        f"{proven.answers} prompts: logits differ by {proven.difference:.3g} of their spread, {proven.same_answers} "
        "greedy answers are the same token for token."
    )
    seen = export.held_out or {}
    held_out = [seen[name] for name in ("text", "advice") if seen.get(name)]
    return [figures, "", *(f"- {line}" for line in (*held_out, *export.notes))]


def _use(export: Exported, task: str) -> list[str]:
    if export.kind.startswith("GGUF file"):
        return ["llama-cli -m FILE.gguf -cnv", "ollama create NAME -f Modelfile   # where there is one"]
    if export.kind.startswith("GGUF adapter"):
        return ["llama-cli -m BASE.gguf --lora FILE.gguf -cnv"]
    if export.kind.startswith("PEFT"):
        return [*export.notes, "PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), FOLDER)"]
    if task in _DOES:
        return [f'pipeline("{_DOES[task]}", model=FOLDER)   # transformers']
    return ["AutoModelForCausalLM.from_pretrained(FOLDER)   # transformers", "vllm serve FOLDER"]


# Files of a pushed folder that stay here.
NOT_PUSHED = ("lock", "*.lock", "checkpoints/*", "*.tmp", ".*")


@contextmanager
def folder_of(path: Path) -> Iterator[Path]:
    """What is pushed: an export's folder; of a run's adapter a copy, with a card; of both no path of this machine."""
    if not any((path / name).is_file() for name in ("recipe.yaml", "config.json", *ADAPTER_FILES[1:], "export.json")):
        raise RunError(f"{path} is neither a run nor an export.", fix="halfbyte merge RUN, halfbyte export RUN")
    source, modelfile = RunFolder.open(path).adapter if (path / "recipe.yaml").is_file() else path, path / MODELFILE
    text = modelfile.read_text(encoding="utf-8") if modelfile.is_file() else ""
    origin = re.search(r"^FROM ((?:[A-Za-z]:)?[/\\].*)$", text, re.MULTILINE)
    if not origin and not (source / PASSPORT).is_file():
        yield path
        return
    with tempfile.TemporaryDirectory() as alone:
        folder = Path(shutil.copytree(source, Path(alone, "folder"), ignore=shutil.ignore_patterns(*NOT_PUSHED)))
        if (folder / PASSPORT).is_file():
            for name in (ADAPTER_FILES[1], PASSPORT):
                values = {key: shipped(value) for key, value in read_json(folder / name).items()}
                files.write(folder / name, files.as_json(values))
            write(folder, target.find(path, (), TASKS), Exported(path.absolute(), "PEFT adapter", "4bit", {}))
        if origin:
            name = Path(origin[1]).name
            beside = f"# {name}, which this was trained on, is not here: put it beside this file.\nFROM ./{name}"
            (folder / MODELFILE).write_text(text.replace(origin[0], beside), encoding="utf-8")
        yield folder


def shipped(value: object) -> object:
    """The same with names in the place of this machine's paths."""
    if isinstance(value, dict):
        return {key: shipped(each) for key, each in value.items()}
    if isinstance(value, list):
        return [shipped(each) for each in value]
    local = isinstance(value, str) and (Path(value).is_absolute() or value.startswith(("~", "./", "../")))
    return Path(str(value)).name if local else value


def push(path: Path, repo: str, *, public: bool = False) -> str:
    """Upload a folder; returns its address. Raises RunError: nothing that can be pushed. RecipeError: a name
    that is none. ExportError: what the hub has refused."""
    from huggingface_hub import HfApi, get_session
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if (name := HUB_ID.fullmatch(repo)) is None or name["revision"]:
        raise RecipeError(f"{repo!r} is no name of a repository.", fix="USER/NAME")
    api, client = HfApi(), sys.modules[type(get_session()).__module__.partition(".")[0]]  # httpx, by one of two names
    try:
        with folder_of(path) as folder:
            address = api.create_repo(repo, private=not public, exist_ok=True)
            if not public and not api.repo_info(address.repo_id).private:
                raise ExportError(
                    f"{repo} is there and is public; nothing was pushed.", fix="--public, or another name"
                )
            api.upload_folder(repo_id=address.repo_id, folder_path=folder, ignore_patterns=list(NOT_PUSHED))
    except (HfHubHTTPError, HFValidationError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        fix = "hf auth login, with a token that may write" if status in (401, 403) else None
        raise ExportError(f"the hub refused {repo}: {first_line(error)}", fix=fix) from error
    except (OSError, client.TransportError) as error:
        fix = "check the network (HF_ENDPOINT, proxy)"
        raise ExportError(f"the hub cannot be reached: {first_line(error)}", fix=fix) from error
    return str(address)
