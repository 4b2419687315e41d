"""Lines of memory of the frozen base: in private memory, mapped, streamed, or a share of it; and tables beside it.

Cost: none; no torch.
"""

from halfbyte.plan.job import Job
from halfbyte.plan.result import Line, Placement, Where
from halfbyte.quant import formats

TOUCHED_BYTES_PER_TOKEN = 65536  # the kernel maps sixteen pages around each one that is touched
AHEAD = 2  # layers that are read ahead of a streamed one


def base_lines(job: Job, placement: Placement, cards: int, where: Where, cache_bytes: float) -> tuple[Line, ...]:
    """The frozen base; beside it the table of per-layer embeddings, where the model has one."""
    base = _placed(job, placement, cards, where, cache_bytes)
    if not (table := job.table_bytes):
        return base
    words = f"a table of {table / 1e9:.3f} GB in its file: the rows of the data's tokens"
    return (*base, Line("per-layer embeddings", _touched(job, table), words, "base/stream.py", "file"))


def _placed(job: Job, placement: Placement, cards: int, where: Where, cache_bytes: float) -> tuple[Line, ...]:
    """The frozen base, where it computes. `cache_bytes`: for pages of a mapped base; what does not stay is read from
    disk again."""
    quant = job.recipe.quant
    kind = f"{len(job.specs)} tensors, {job.parameters / 1e6:.1f} M weights, quant.type {quant.type}"
    source, inner = formats.of(quant).source, job.base_bytes - (job.values_bytes or job.outer_bytes)
    values = Line("base's values", job.values_bytes, "embeddings, head, norms: not in blocks", source, where)
    beside = (values,) if quant.in_file else ()
    if placement == "streamed":
        how = f"streamed: {1 + AHEAD} layers of {job.facts.layers}, or one and the head"
        return (Line("base", busy_file_bytes(job), how, source, "file"), *beside)
    if placement == "split":
        share = -(-inner // cards) + job.outer_bytes
        return (Line("base", share, f"a card's share of {cards}: {kind}", source, where),)
    if placement == "sharded":
        scales = inner // 32 if quant.quantises else 0
        share = job.outer_bytes + scales + -(-(inner - scales) // job.ranks) + 2 * job.layer_bytes
        return (Line("base", share, f"a share of {job.ranks} of the layers, and one whole: {kind}", source, where),)
    if placement == "mapped":
        mapped = inner + _touched_outer_bytes(job)
        resident = min(mapped, max(busy_file_bytes(job), int(cache_bytes)))
        part = "" if resident == mapped else f"{resident / mapped:.0%} of "
        return (Line("base", resident, f"mapped: {part}{kind}", source, "file"), *beside)
    return (Line("base", job.base_bytes, kind, source, where),)


def busy_file_bytes(job: Job) -> int:
    """Pages of a mapped or streamed base that are in use at once.

    The layer that computes, with all its experts, and those that are read ahead; or the head beside the last layer.
    """
    return min(job.base_bytes, job.layer_bytes + max(AHEAD * job.dense_layer_bytes, _touched_outer_bytes(job)))


def _touched_outer_bytes(job: Job) -> int:
    """Of an embedding that is not the head too, only the rows of the data's tokens are read."""
    if job.recipe.quant.in_file or job.facts.tied_head:
        return job.outer_bytes * (not job.recipe.quant.in_file)
    embedding = job.itemsize * job.embedding_numel
    return job.outer_bytes - embedding + _touched(job, embedding)


def _touched(job: Job, table_bytes: int) -> int:
    """Of a table with a row for each entry of the vocabulary, what the data's tokens bring into memory."""
    distinct = min(job.facts.vocab, max(1, round(0.2 * job.rows.tokens)))
    row = max(TOUCHED_BYTES_PER_TOKEN, table_bytes // max(1, job.facts.vocab))
    return min(table_bytes, distinct * row)
