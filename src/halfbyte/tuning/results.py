"""What a search has come to: in the recipe, in words, for the report; and what more time would bring.

Source: paired differences with their intervals (`scoring/intervals.py`); loss falls about linearly in the logarithm of
the rows that a rate has fallen to 0 over, so that a line through finished runs tells of a longer one. Cost:
milliseconds; no torch.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from halfbyte.recipe.file import relative_to_run, to_yaml
from halfbyte.recipe.schema import SECTIONS, Loaded, Origin, Recipe
from halfbyte.runs import listing
from halfbyte.runs.folder import RunFolder
from halfbyte.system import files
from halfbyte.system.words import duration
from halfbyte.tuning.search import BATCH, RANK, RATE, TARGETS, Rung, SearchState
from halfbyte.types import Document

FIELDS = {"rate": RATE, "targets": TARGETS, "rows a step": BATCH, "rank": RANK}
REPEAT = "repeat.yaml"
SAVES = 20  # checkpoints in the time that is given, at least a minute apart


def file(run: RunFolder) -> Path:
    return run.path / listing.SEARCH


def with_values(recipe: Recipe, values: Mapping[str, object]) -> Recipe:
    """A recipe with other values, by their dotted names."""
    sections: dict[str, Document] = {}
    for dotted, value in values.items():
        section, _, field = dotted.rpartition(".")
        sections.setdefault(section, dict(getattr(recipe, section)))[field] = value
    return recipe.model_copy(update={name: SECTIONS[name].model_validate(v) for name, v in sections.items()})


def settle(loaded: Loaded, state: SearchState | None) -> Loaded:
    """The recipe of a run in a given time: with the values that a search has chosen, and more checkpoints."""
    values: Document = {} if state is None or state.winner is None else {**state.winner}
    why, within_s = "short runs on these rows have chosen it", loaded.recipe.train.within_s
    if within_s is not None and loaded.origins["train.save_minutes"].kind == "default":
        values["train.save_minutes"] = round(max(1.0, min(15.0, within_s / 60 / SAVES)), 1)
    origins = {name: Origin("auto", "of train.within" if "save" in name else why) for name in values}
    return loaded._replace(recipe=with_values(loaded.recipe, values), origins={**loaded.origins, **origins})


def name(arm: Document, what: str) -> str:
    """What an arm is called among those that differ in `what`: `rate 0.0013`."""
    value = arm.get(FIELDS[what])
    text = f"{value:.2g}" if isinstance(value, float) else ", ".join(value) if isinstance(value, list) else value
    return f"{what} {text}"


def row(rung: Rung, number: int) -> Document:
    """A finished probe, as page and report have it."""
    result, loss = rung.results[number], rung.losses()[number]
    best = number == rung.order[0]
    behind = None if best else rung.behind(number)
    return {
        "what": rung.what,
        "arm": name(rung.arms[number], rung.what),
        "rate": result.rate,
        "rows": rung.rows,
        "steps": result.steps,
        "loss": loss if math.isfinite(loss) else None,
        "behind": None if behind is None else [behind[0], list(behind[1])],
        "seconds": result.seconds,
        "best": best,
    }


def line(rung: Rung, number: int) -> str:
    """A finished probe in a sentence."""
    probe = row(rung, number)
    loss = "diverged" if probe["loss"] is None else f"loss {probe['loss']:.4f} on {len(rung.names)} held-out rows"
    rows = f"{rung.rows} rows (highest rate there {probe['rate']:.2g}) in {duration(probe['seconds'])}"
    return f"{probe['arm']}: {loss}, after {rows}"


def verdicts(state: SearchState) -> list[str]:
    """What won in each thing that was searched, by how much and how sure; or why it was not searched."""
    sentences = list[str]()
    for rung in {rung.what: rung for rung in state.rungs if rung.results}.values():  # the last of each
        best, *others = rung.order
        won, behind = name(rung.arms[best], rung.what), rung.behind(others[0]) if others else None
        if behind is None:
            sentences.append(f"{won}: {'the others diverged' if others else 'the only one there was time for'}")
            continue
        value, (low, high) = behind
        second = name(rung.arms[others[0]], rung.what)
        sure = f"{value:.4f} [{low:.4f}, {high:.4f}] lower than {second}"
        sure = sure if low > 0 else f"no difference from {second} is measured, {sure}"
        sentences.append(f"{won}: {sure}, on {len(rung.names)} held-out rows, after {rung.rows} rows each")
    return sentences + [f"{what} was not probed: {why}" for what, why in state.skipped.items()]


def more(state: SearchState, *, rows: int, seconds: float, sums: Mapping[str, Sequence[float]], at_end: bool) -> str:
    """What as much time again would bring, in words.

    Args:
        rows: that the run has trained on, in so many `seconds`. sums: what it has lost on each row that it is compared
            on. at_end: whether it has made all the passes that it may.
    """
    if at_end:
        return "more time brings nothing: all passes over the rows are made (train.num_train_epochs)"
    again = f"another {duration(state.within_s)}"
    tried = [(r.rows, r.results[r.arms.index(state.best)]) for r in state.rungs if state.best in r.arms and r.results]
    tried = [(count, result) for count, result in tried if result.sums]
    names = sorted(set(sums).intersection(*(result.sums for _, result in tried)))
    if not tried or not names:
        return f"{again}: not known, as nothing was probed"
    loss, counted = np.array([sums[name] for name in names])[:, :2].sum(0)
    losses = [*(result.on(names).value for _, result in tried), loss / counted]
    slope, _ = np.polyfit(np.log([*(count for count, _ in tried), rows]), losses, 1)
    change = float(slope) * math.log1p(state.within_s / max(seconds, 1e-9))
    return f"{again}: about {change:+.3f}" if change < 0 else f"{again}: nothing, as far as the probes show"


def write_repeat(recipe: Recipe, run: Path, steps: int, *, local: bool) -> None:
    """Write the recipe that does the same without probes and without a time. `local`: the model is a path."""
    again = with_values(recipe, {"train.within": None, **({"train.max_steps": steps} if steps else {})})
    again = again.model_copy(update={"output": f"{recipe.output}-again"})
    files.write(run / REPEAT, to_yaml(relative_to_run(again, run, model=local)).encode())


def document(run: RunFolder) -> Document:
    """What page and report have of a search, finished or not; empty without one."""
    state = SearchState.read(file(run))
    if state is None:
        return {}
    return {
        "within_s": state.within_s,
        "spent_s": state.spent_s,
        "probes": [row(rung, number) for rung in state.rungs for number in range(len(rung.results))],
        "verdicts": verdicts(state),
        "winner": state.winner,
    }
