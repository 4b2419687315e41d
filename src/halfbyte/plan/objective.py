"""What an objective of training takes beside a forward and a backward of its rows, as the plan counts it.

The objectives themselves are in `objectives/`, which needs torch; this is their share of memory and time.
Cost: none; no torch.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class ObjectiveCost:
    """What comes on top of a loss that is made of its logits a chunk at a time (`layers/loss.py`)."""

    whole_logits: int = 0
    """Tensors of logits, (labelled tokens, vocabulary) in fp32, that exist at once in its loss."""
    forwards: float = 0.0
    """More forwards without gradients for each micro-batch, such as 1 of a reference model."""


NO_COST = ObjectiveCost()
