"""`train.learning_rate: auto`: a law of the model's width, the adapter's scale and the rows of a step.

Why: rate, targets and rows a step decide most of what an adapter learns in some minutes, and the best rate is flat: a
third or three times of it costs little. So a law of what is known before the first step is enough where nobody probes.
What: 5e-4 (2000 / width)^0.781, AdamW's rate for lora_alpha 32 at steps of 4 rows. With one alpha the best rate is
the same at any rank; of an adapter whose output is multiplied by more it is lower by as much. It grows with the root
of the rows of a step, to twice as much; and is `MOST` at most, above which runs diverge.
Source: tinker-cookbook, `skills/research/references/hyperparams.md` and `sft_sweep.md`; LoRA Without Regret. Measured
on SmolLM2 and gemma3: docs/log/2026-11.md, "Defaults that are measured".
Cost: the model's shape, from headers.
"""

from halfbyte.errors import SourceError
from halfbyte.models import describe
from halfbyte.recipe.command import with_rate
from halfbyte.recipe.number_formats import AUTO
from halfbyte.recipe.schema import Loaded, Lora

RATE, WIDTH = 5e-4, 2000
POWER = 0.781
ALPHA, ROWS = 32, 4
MOST_OF_ROWS, MOST = 2.0, 3e-3


def law(width: int, lora: Lora, rows: int) -> float:
    """AdamW's rate, with two digits. `width`: numbers of a hidden state; `rows`: of an optimiser step."""
    alpha = lora.lora_alpha * (lora.r**0.5 if lora.use_rslora else 1)
    rate = RATE * (WIDTH / width) ** POWER * ALPHA / alpha * min(MOST_OF_ROWS, (rows / ROWS) ** 0.5)
    return float(f"{min(MOST, rate):.2g}")


def settle(loaded: Loaded) -> Loaded:
    """A recipe whose rate is a number, with the law as its origin; one that gives a number stays as it is."""
    recipe = loaded.recipe
    if recipe.train.learning_rate != AUTO:
        return loaded
    lora, rows = recipe.lora, recipe.train.rows_per_step
    try:
        width = describe.describe(recipe.model, recipe.revision).facts.hidden
    except SourceError:  # the model may be opened all the same
        return with_rate(loaded, RATE, f"the law's at a width of {WIDTH:,}; the model's is not known before it is here")
    rate = law(width, lora, rows)
    about = f"rank {lora.r}, alpha {lora.lora_alpha}{' (rsLoRA)' * lora.use_rslora}"
    return with_rate(loaded, rate, f"law of width {width:,}, {about}, {rows} rows a step: {rate:.2g}")
