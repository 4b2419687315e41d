"""`started.json`: what is known of a run before its first step, and what its page shows beside the metrics.

Why: where a value came from, how a row looks to the model and what was proven is known only then.
Cost: three rows as text, one small file.
"""

import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict

import numpy as np

from halfbyte.adapters.assembly import AdaptedBase
from halfbyte.data import pack
from halfbyte.proofs.integers import Decision
from halfbyte.recipe.schema import Loaded
from halfbyte.runs.folder import RunFolder, read_json, write_json
from halfbyte.system.libraries import versions
from halfbyte.training import prepare, preview
from halfbyte.training.fit import PlannedRun
from halfbyte.types import Document

MAX_CHARACTERS = 3_000  # of a row; the rest is left out
_log = logging.getLogger(__name__)


def write(run: RunFolder, make: Callable[[], Document]) -> None:
    """Write what `make` (`facts`) returns. That it fails is a warning: a run is worth more than its page."""
    try:
        write_json(run.started, make())
    except Exception as error:
        _log.warning(f"{run.started} could not be written: {type(error).__name__}: {error}")


def facts(
    run: RunFolder, loaded: Loaded, job: PlannedRun, base: AdaptedBase, compute: Decision, notices: Sequence[str],
    from_step: int,
) -> Document:  # fmt: skip
    """The document; a resumed run (`from_step` > 0) has its earlier processes in it too."""
    prepared, before = job.prepared, read_json(run.started) if from_step else {}
    # a resumed run reads its own recipe.yaml; where its values came from at first says more
    first = before.get("values", {})
    values = {
        field: {"value": json.loads(json.dumps(value, default=str)), "from": origin.kind, "why": origin.why}
        for field, value, origin in preview.resolve_fields(loaded, job)
    }
    values |= {name: old for name, old in first.items() if name in values and old["value"] == values[name]["value"]}
    return {
        "processes": [*before.get("processes", []), {"step": from_step, "time": time.time()}],
        "model": {"id": prepared.checkpoint.id, "revision": prepared.checkpoint.revision},
        "values": values,
        "data": prepare.data_report(prepared),
        "lengths": {
            name: None if rows is None else lengths(rows.lengths)
            for name, rows in (("train", prepared.train), ("eval", prepared.evaluation))
        },
        "histogram": [asdict(part) for part in preview.histogram(prepared.train.lengths)],
        "examples": examples(prepared),
        "proofs": proofs(base, compute),
        "notices": list(notices),
        "versions": versions(),
        "machine": job.machine.to_json(),
    }


def lengths(values: pack.Sizes) -> Document:
    """The shortest row, quartiles and the longest, in tokens."""
    cuts = np.percentile(np.asarray(values), (0, 25, 50, 75, 100)).round().astype(int)
    return dict(zip(("shortest", "quarter", "median", "three_quarters", "longest"), map(int, cuts), strict=True))


def examples(prepared: prepare.Prepared) -> list[Document]:
    """Three rows as the model sees them: the shortest, one in the middle, the longest."""
    order = np.argsort(np.asarray(prepared.train.lengths), kind="stable")
    chosen = dict.fromkeys(int(order[i]) for i in (0, len(order) // 2, len(order) - 1))
    return [cut(asdict(preview.show_row(prepared.train.examples[n], n + 1, prepared.tokenizer))) for n in chosen]


def cut(row: Document) -> Document:
    """The row with at most the last `MAX_CHARACTERS` of its text, where its labels are."""
    left, pieces = MAX_CHARACTERS, list[Document]()
    for piece in reversed(row["pieces"]):
        if left <= 0:
            break
        text = piece["text"]
        pieces.append({**piece, "text": text if len(text) <= left else "… " + text[-left:]})
        left -= len(text)
    return {**row, "pieces": pieces[::-1], "cut": left < 0}


def proofs(base: AdaptedBase, compute: Decision) -> list[Document]:
    named = (("base", base.dequantised), ("packing", base.packed), ("engine", base.fused))
    rows = [{"name": name, "ok": bool(proof.ok), "said": proof.reason} for name, proof in named]
    if compute.tried:
        rows.append({"name": "compute", "ok": compute.tried[-1][1].ok, "said": str(compute)})
    return rows
