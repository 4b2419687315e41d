"""`python -m halfbyte.export.head ASKED.json`: in a process of its own, whether a merged model with a head scores texts
as the run does.

What: at most `witness.ROWS` held-out rows, by the run on the weights that were merged into, and by transformers' class
for the task, each alone: the distance of all scores. The bound is that of logits (`proofs/export.py`).
Cost: the run opened, then the merged model.
"""

import gc
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

from halfbyte.errors import ExportError
from halfbyte.export.weights import starts_residual
from halfbyte.export.witness import ROWS, rows_of
from halfbyte.inference import labels, target
from halfbyte.inference.load import open_target
from halfbyte.layers import heads
from halfbyte.objectives.labels import Labels, Tags
from halfbyte.proofs.closeness import distance
from halfbyte.proofs.export import rounding_bound
from halfbyte.recipe.adapter import read_config
from halfbyte.recipe.adapter_folder import folder_of
from halfbyte.recipe.task import HEADS
from halfbyte.system import files
from halfbyte.system.children import child, run_child
from halfbyte.types import Document


def proof(asked: Document, task: Path) -> str:
    """What was seen, in words. `asked`: `run`, `place` (the merged folder), what it is merged into (`base`), `dtype`,
    `overrides`, `force`, `data`. Raises ExportError: the merged model does not score as the run does."""
    if asked["base"] == "16bit" and starts_residual(folder_of(asked["run"])):
        return "not proven: no run says what an adapter that began at what quantising has lost does on 16-bit weights"
    files.write(task, files.as_json(asked))
    run_child(["halfbyte.export.head", str(task)], "comparing the merged model with the run")
    seen = json.loads(task.read_text(encoding="utf-8"))
    what = f"scores of {seen['rows']} rows by transformers differ by {seen['off']:.2g} of their size"
    if not seen["off"] <= seen["bound"]:
        raise ExportError(f"{what}; rounding explains {seen['bound']:.2g}. Nothing of it is left.")
    return f"{what} (rounding explains {seen['bound']:.2g})"


@torch.no_grad()
def compare(asked: Document) -> Document:
    run = target.find(Path(asked["run"]), asked["overrides"], HEADS)
    quant = run.recipe.quant
    other = asked["base"] == "16bit" and quant.quantises and not quant.in_file
    run = replace(run, recipe=run.recipe.model_copy(update={"quant": quant.in_type("none") if other else quant}))
    opened, folder = open_target(run, force=asked["force"] or other), folder_of(asked["run"])
    objective, config = Labels.at(folder), opened.model.config.get_text_config()
    rows, _ = rows_of(opened, Path(asked["data"]) if asked["data"] else None, ROWS)
    tags, dtype = objective if isinstance(objective, Tags) else None, str(opened.model.dtype).removeprefix("torch.")
    ours = labels.tag_scores(opened, tags, rows) if tags else labels.scores_of(opened, objective, rows)
    del opened
    gc.collect()
    auto = heads.AUTO[read_config(folder)["task_type"]]
    model, theirs = auto.from_pretrained(asked["place"]).eval(), list[torch.Tensor]()
    for batch in (objective.collate([row]) for row in rows):
        types = {"token_type_ids": batch["token_types"]} if "token_types" in batch else {}
        scores = model(input_ids=batch["input_ids"], **types).logits[0].float()
        theirs.append(scores[batch["keep"]] if tags else scores[None])
    wanted = torch.cat([torch.as_tensor(each).reshape(-1, objective.width) for each in ours])
    bound = rounding_bound((asked["dtype"], dtype, dtype), config.num_hidden_layers)
    return {"rows": len(rows), "off": distance(torch.cat(theirs), wanted), "bound": bound}


if __name__ == "__main__":
    with child():
        path = Path(sys.argv[1])
        files.write(path, files.as_json(compare(json.loads(path.read_text(encoding="utf-8")))))
