"""A text of the base's own kind: what an adapter makes a model forget shows there.

What: a few pages of ours, stories, explanations, letters, sums, talk and code, that no training set has. Every part is
a row, cut where a model reads less, so that losses have intervals and are the same whatever is trained.
Cost: some 3,000 tokens.
"""

from importlib import resources

from halfbyte.data.encoding.encoder import EncodedRows, Encoder
from halfbyte.data.encoding.examples import Examples
from halfbyte.data.reading.formats import Row
from halfbyte.recipe.data import Data
from halfbyte.types import Tokenizer

FILE = resources.files(__package__).joinpath("base_text.txt")
LONGEST = 512  # tokens of a part


def encode(tokenizer: Tokenizer, most: int) -> EncodedRows:
    """The parts as tokens, every one labelled. `most`: tokens that the model reads at once."""
    parts = FILE.read_text("utf-8").strip().split("\n\n")
    data = Data(train="base_text.txt", format="text", overlong="truncate", max_length=max(2, min(LONGEST, most)))
    batch, tally = Encoder(tokenizer, data).encode(
        [Row(where=f"base_text.txt, part {number}", text=part) for number, part in enumerate(parts, 1)]
    )
    return EncodedRows(Examples([batch]), tally)
