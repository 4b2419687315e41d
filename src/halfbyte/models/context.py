"""How many tokens a model reads at once, as its config says.

Why: beyond them rotary positions give garbage without an error, and learned positions have no row.
Source: transformers' `max_position_embeddings`, and `rope_parameters` (`rope_scaling` in older configs): yarn, longrope
and llama3 stretch `original_max_position_embeddings` by `factor`, linear and dynamic what the config has.
"""

from dataclasses import dataclass

from halfbyte.errors import DataError
from halfbyte.types import Config

_STRETCHED = ("linear", "dynamic")


@dataclass(frozen=True)
class Context:
    tokens: int
    why: str
    """Which fields of the config say so."""

    def check(self, prompt: int, new_tokens: int) -> None:
        """Raise a DataError if a prompt of so many tokens and its answer do not fit."""
        if prompt + new_tokens <= self.tokens:
            return
        room = self.tokens - prompt
        raise DataError(
            f"the prompt has {prompt:,} tokens and the answer up to {new_tokens:,}; the model reads "
            f"{self.tokens:,} ({self.why}).",
            fix=f"--max-new-tokens {room}" if room > 0 else f"a prompt of fewer than {self.tokens:,} tokens",
        )


def context_of(config: Config) -> Context | None:
    """None where nothing limits it: no positions (state spaces), or ALiBi."""
    text = config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions < 1 or getattr(text, "alibi", False):
        return None
    why = f"max_position_embeddings {positions:,}"
    rope = getattr(text, "rope_parameters", None) or {}
    kind, factor = rope.get("rope_type", "default"), rope.get("factor")
    if kind == "default":
        return Context(positions, f"{why}, no rope scaling" if rope else why)
    original = rope.get("original_max_position_embeddings") or (positions if kind in _STRETCHED else None)
    stretched = int(original * factor) if original and factor else 0
    if stretched > positions:
        return Context(stretched, f"rope scaling {kind}: {original:,} x {factor:g}")
    return Context(positions, f"{why}, with rope scaling {kind}")
