"""How many tokens a model reads at once, as its config says.

Why: beyond them rotary positions give garbage without an error, and learned positions have no row.
Source: transformers' `max_position_embeddings`, and `rope_parameters` (`rope_scaling` in older configs): yarn, longrope
and llama3 stretch `original_max_position_embeddings` by `factor`, linear and dynamic what the config has. Gemma 3's
scaling is of its full-attention layers alone, and its positions count it already.
"""

from dataclasses import dataclass

from halfbyte.errors import DataError
from halfbyte.models.families import FAMILIES
from halfbyte.types import Config, ConfigFile, Document

_STRETCHED = ("linear", "dynamic")
CHANGING_ROPES = {"dynamic", "longrope"}  # other frequencies for all of a text, where it is longer


@dataclass(frozen=True)
class Context:
    tokens: int
    why: str  # which fields of the config say so

    def left(self, prompt: int) -> int:
        """Tokens of an answer after a prompt of so many; 0 or less: there is no place for one."""
        return self.tokens - prompt

    def check(self, prompt: int, new_tokens: int) -> None:
        """Raise a DataError if a prompt of so many tokens and its answer do not fit."""
        room = self.left(prompt)
        if new_tokens <= room:
            return
        raise DataError(
            f"the prompt has {prompt:,} tokens and the answer up to {new_tokens:,}; the model reads "
            f"{self.tokens:,} ({self.why}).",
            fix=f"--max-new-tokens {room}" if room > 0 else f"a prompt of fewer than {self.tokens:,} tokens",
        )

    def fitting(self, prompt: int, new_tokens: int) -> int:
        """As many of the new tokens as the model reads after a prompt of so many; at least one."""
        return max(1, min(new_tokens, self.left(prompt)))


def context_of(config: Config) -> Context | None:
    """None where nothing limits it: no positions (state spaces), or ALiBi."""
    text = config.get_text_config()
    if getattr(text, "alibi", False):
        return None
    name = _field(text.model_type)
    positions = _usable(text.model_type, getattr(text, name, None), getattr(text, "pad_token_id", None))
    return _context(name, positions, getattr(text, "rope_parameters", None) or {})


def rope_changes_at(config: Config) -> int | None:
    """The tokens of the longest text that is turned by the frequencies of short ones; None where all texts are."""
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    each = [kind for kind in (rope, *rope.values()) if isinstance(kind, dict)]
    scaled = [kind for kind in each if kind.get("rope_type") in CHANGING_ROPES]
    edges = [kind.get("original_max_position_embeddings") or text.max_position_embeddings for kind in scaled]
    return min(edges, default=None)


def context_in(config: ConfigFile) -> Context | None:
    """The same of a `config.json` as it is read, without transformers."""
    text = config.get("text_config") or config
    if text.get("alibi") or text.get("model_type") == "bloom":
        return None
    rope = dict(text.get("rope_parameters") or text.get("rope_scaling") or {})
    if str(text.get("model_type", "")).startswith("gemma3"):
        rope = {"rope_type": "default"} if rope else {}
    if "type" in rope:
        rope.setdefault("rope_type", rope["type"])
    original = text.get("original_max_position_embeddings")
    if original and rope:
        rope.setdefault("original_max_position_embeddings", original)
    name = _field(text.get("model_type"))
    positions = _usable(text.get("model_type"), text.get(name) or text.get("n_positions"), text.get("pad_token_id", 1))
    return _context(name, positions, rope)


def _usable(model_type: object, positions: object, padding: int | None) -> object:
    """The positions of a text, which in some families begin behind the number of its padding."""
    family = FAMILIES.get(str(model_type))
    behind = (padding or 0) + 1 if family is not None and family.behind_padding else 0
    return positions - behind if isinstance(positions, int) else positions


def _field(model_type: object) -> str:
    """MPT has ALiBi, and a table of its biases that is as long as this."""
    return "max_seq_len" if model_type == "mpt" else "max_position_embeddings"


def _context(name: str, positions: object, rope: Document) -> Context | None:
    if not isinstance(positions, int) or positions < 1:
        return None
    why = f"{name} {positions:,}"
    kind, factor = rope.get("rope_type", "default"), rope.get("factor")
    if kind == "default":
        return Context(positions, f"{why}, no rope scaling" if rope else why)
    original = rope.get("original_max_position_embeddings") or (positions if kind in _STRETCHED else None)
    stretched = int(original * factor) if original and factor else 0
    if stretched > positions:
        return Context(stretched, f"rope scaling {kind}: {original:,} x {factor:g}")
    return Context(positions, f"{why}, with rope scaling {kind}")
