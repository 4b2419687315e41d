"""A thread's memory in the recurrent kernels: what they ask for and a plan counts. No torch, no numba.

Letters: N a state's rows, P its columns (of the delta rule D and O).
"""

CHUNK = 96  # tokens at once: whole tiles of rows, of columns, and of sums of pairs
SPARE = 15  # rows behind a state's last: the most that a tile has there
MOST_HEADS = 8  # of a task of the scan: their states lie in a thread's memory, one for each chunk
TILE = 12, 32  # rows and columns of an fp32 tile where a register holds 16 numbers; elsewhere it is smaller
SCAN_MATRICES, DELTA_MATRICES = 11 + 19, 12 + 23  # of a chunk: in fp32, and operands of products
_PAGE, _LINE = 4096, 64


def up_to(n: int, step: int) -> int:
    """The next multiple of `step`."""
    return -(-n // step) * step


def parts_of(heads: int, groups: int) -> int:
    """Into how many tasks the scan splits the heads of a group."""
    return -(-heads // groups // MOST_HEADS)


def matrix_numbers(n: int, p: int, tile: tuple[int, int]) -> int:
    """Of each of a thread's matrices."""
    return (max(CHUNK, n, p) + SPARE) * max(CHUNK, up_to(n, tile[1]), up_to(p, tile[1])) + tile[1]


def thread_bytes(
    heads: int, groups: int, n: int, p: int, longest: int, tile: tuple[int, int] = TILE, *, scan: bool
) -> int:
    """In backward, where the longest example has so many tokens: matrices, and of each chunk the states, by the delta
    rule also what is made again of keys, u and values. Pages and a line, so that threads compete for no lines."""
    state, chunks = (n + SPARE) * up_to(p, tile[1]), -(-longest // CHUNK)
    if scan:
        more = (heads // (groups * parts_of(heads, groups)) + 1) * state * (1 + chunks)
    else:
        more = chunks * (state + CHUNK * (up_to(p, tile[1]) + 2 * up_to(n, tile[1])))
    numbers = (SCAN_MATRICES if scan else DELTA_MATRICES) * matrix_numbers(n, p, tile) + more + tile[0] * tile[1]
    return up_to(4 * numbers, _PAGE) + _LINE
