"""How many tokens of an expert are multiplied at once: what the engine does and the plan counts. No torch."""

# Rows of a product are filled up with zeros to a multiple of this, or of a sixteenth of them: oneDNN compiles each
# shape (2 ms) and keeps it, and every expert of every micro-batch would have one of its own.
FILL = 16
# Tokens of one expert that are taken at once: at most so many times the mean of all experts, or so many. It bounds what
# is in memory for a moment, however a router chooses; an expert with more is dequantised once more for each part.
BUSIEST, LEAST_AT_ONCE = 2, 256


def padded_rows(rows: int) -> int:
    """Rows of a product for so many tokens of one expert."""
    step = max(FILL, (1 << (rows - 1).bit_length()) // FILL)
    return -(-rows // step) * step


def max_at_once(pairs: int, experts: int) -> int:
    """Tokens of one expert that are taken at once, where tokens and their experts make so many pairs."""
    return max(LEAST_AT_ONCE, BUSIEST * -(-pairs // max(1, experts)))
