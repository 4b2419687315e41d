"""The slots of a tape: which number of an operation stands where. `layers/decoding/tape.py` writes, the kernels read.

An operation is a row of `WIDTH` slots, each an int64: a number, the address of a buffer or weight, or, marked `float`,
the bits of a float64. Lengths of rows are in elements, but for those in bytes. 0 as an address: there is none.

    TAPE_*, slots of a run                   the operations, one row each
    +--------------------+     +---------------------------------------------------------+
    | TAPE_OPERATIONS  --|---> | KIND ITEMS AFTER UNTIL | what its kind reads | .. NEXT_* |
    | TAPE_FIRST, .. LAST|     | KIND ITEMS AFTER UNTIL | X --> buffer, W --> weight, OUT -->
    | TAPE_COUNTERS    --|--+  | ...                                                      |
    +--------------------+  |
                            +> of each operation a cache line a thread (how many items of its share are taken), and one
                               (how many items are done); an operation begins when those AFTER .. UNTIL are done

Letters: M vectors (texts at once), D in, O out, D' D filled up to whole chunks, H query heads, K key heads, d numbers
of a head, T max_tokens, R rotary width.
"""

WIDTH = 32
# What an operation does.
NORM, CODES, DENSE, ROTATE, ATTEND, GATE, HEAD_ROUGH, HEAD_EXACT, BLOCKS, CONV, DELTA, SCAN, GATED, PAIRS, QUADS = (
    range(15)
)

# Every operation.
KIND = 0
ITEMS = 1  # parts that threads take
AFTER, UNTIL = 2, 3  # the range of operations that must be done before
USED = 27  # how many of the M vectors there are now
NEXT_W = 28  # the next matrix from this operation on, itself included
NEXT_ITEMS, NEXT_ITEM_BYTES = 29, 30

# Products with a matrix: CODES, BLOCKS, DENSE, HEAD_*. PAIRS: X, (M, D') in fp32, to OUT, as CODES read it by
# AMX. QUADS: X, (M, D') in whole numbers of 16 bits, to OUT, as HEAD_ROUGH reads it by AMX.
W = 4  # (O, D): 4-bit codes, numbers of the tape's type, or 8-bit numbers
D, O = 5, 6  # noqa: E741
X = 7  # (M, ..): CODES and BLOCKS one of `Vectors.orders`, else fp32
X_ROW = 8  # bytes
OUT, OUT_ROW = 9, 10  # (M, ..) fp32; DENSE with a scale: of the tape's type
ADD = 11  # whether it is added to what is in OUT
BIAS = 12  # (O,) fp32
ITEM_ROWS = 13  # rows of W in an item
VECTORS = 14  # M

CODES_SCALES = 15  # of blocks of 64: fp32, or a byte with the next three
CODES_TABLE = 16  # (256,) fp32 that a byte stands for, or in planes
CODES_IN_PLANES = 17
CODES_OUTER = 18  # fp32, of each 256 blocks
CODES_OFFSET = 19  # float
CODES_LEVELS = 20  # the 16 levels as the kernel looks them up
CODES_UP, CODES_UP_ROW = 21, 22  # LoRA's B; bytes; BLOCKS too
CODES_H, CODES_H_ROW = 23, 24  # x times LoRA's A; bytes
CODES_PIECES = 25  # of H's row: of 32 bytes in bf16, of one rank in fp32

BLOCKS_TYPE = 15  # of a file's blocks, ggml's number
BLOCKS_ROW_BYTES = 16
BLOCKS_ORDER = 17  # (O,) int32: which row of W each one is, or 0

DENSE_SCALED, DENSE_SCALE = 15, 16  # float
DENSE_USES = 17  # (M,) fp32: a vector whose number is 0.0 gives zeros
DENSE_TYPE = 18  # of W's blocks, ggml's number; 0: numbers of the tape's type
DENSE_BLOCKS, DENSE_ROW_BYTES = 19, 20  # of a row of W
DENSE_ORDER = 21  # (O,) int32: which row of W each one is, or 0

HEAD_SCALES, HEAD_BOUNDS = 15, 16  # (O,) fp32
HEAD_LENGTHS = 17  # (M,) fp32, of x
HEAD_ENDS = 18  # (2, items, M) fp32: what the largest logit of an item's rows is at least, and at most
HEAD_INTS, HEAD_INTS_ROW = 19, 20  # x in 16-bit integers (M, D'); bytes
HEAD_STEPS = 21  # (M,) fp32, of those
HEAD_ITEMS = 22  # items of HEAD_ROUGH
HEAD_QUADS = 23  # HEAD_INTS as AMX reads them, or 0

NORM_X, NORM_X_ROW = 4, 5  # (M, D..) fp32
NORM_WEIGHT = 6  # (D,) of the tape's type; 0: no norm, only the order
NORM_D = 7
NORM_EPS = 8  # float
NORM_ONE_PLUS = 9  # whether the factor is 1 + weight
NORM_PLAIN, NORM_WIDTH = 10, 12  # `Vectors`; D'
NORM_CENTRED = 11  # whether the mean is taken off
NORM_ADD_TO = 13  # (M, D) fp32 that the norm is added to, instead of writing vectors
NORM_BIAS = 23  # (D,) of the tape's type, or 0
NORM_TO_ROW = 24  # of NORM_ADD_TO
NORM_SET = 25  # whether the norm is written there, not added
NORM_LENGTHS = 14  # (M,) fp32 or 0
NORM_INTS, NORM_STEPS = 15, 16  # as HEAD_INTS, or 0
NORM_MAX_INT = 17  # float
NORM_ORDERS = 18  # `Vectors.orders`, five addresses: of what CODES reads, then by BLOCKS' orders; 0 where nothing asks

# ROTATE and ATTEND; ATTEND rotates itself where it has ATTEND_COS.
ATTEND_QKV = 4  # (M, (H + 2 K) d) fp32
ATTEND_HEADS, ATTEND_KEY_HEADS, ATTEND_HEAD_SIZE = 5, 6, 7
ATTEND_ROTARY = 8  # R
ATTEND_COS, ATTEND_SIN = 9, 10  # (M, R) fp32
ATTEND_Q_NORM, ATTEND_K_NORM = 11, 12  # (d,) of the tape's type, or 0
ATTEND_EPS = 13  # float
ATTEND_ONE_PLUS = 14
ATTEND_KEYS, ATTEND_VALUES = 15, 16  # caches (M, K, T, d')
ATTEND_CACHE_ROW = 17  # bytes of d'
ATTEND_MAX_TOKENS = 18  # T
ATTEND_POSITIONS = 19  # (M,) int64; below 0: a place without a text, of which nothing is computed
ATTEND_PLACES = 20  # (M,) int64, whose cache; 0: its own
ATTEND_SCALE, ATTEND_CAP = 21, 22  # float
ATTEND_WINDOW = 23  # tokens seen; 0: all
ATTEND_OUT, ATTEND_OUT_ROW = 24, 25  # (M, D') fp32
ATTEND_SLOPES = 26  # (H,) fp32 of ALiBi, or 0
ATTEND_LAYOUT = 31  # of bits: a head's query, key and value lie together; rotary turns neighbours; a gate is behind
# each query

GATE_G, GATE_U, GATE_ROW = 4, 5, 6  # (M, ..) fp32
GATE_INNER = 7  # numbers of both
GATE_ACTIVATION = 8
GATE_VECTORS = 9
GATE_PLAIN, GATE_WIDTH = 10, 12  # `Vectors` of the product
GATE_ORDERS = NORM_ORDERS

# Recurrent layers: CONV, DELTA, SCAN. Where they have places, vectors of one text are computed in their order.
STATE = 15  # (places, ..) fp32; a text's begins at position 0, whatever is in it
STATE_BYTES = 16  # of a place
STATE_POSITIONS, STATE_PLACES = ATTEND_POSITIONS, ATTEND_PLACES
STATE_X, STATE_X_ROW = 4, 5  # (M, ..) fp32
STATE_OUT, STATE_OUT_ROW = 24, 25  # (M, ..) fp32

CONV_WIDTH, CONV_TAPS = 6, 7  # W, J; the state: (J - 1, W), token t in row t % (J - 1)
CONV_W, CONV_BIAS = 8, 9  # (J, W), the newest tap first, and (W,): fp32
CONV_BEFORE, CONV_AFTER = 10, 11  # what x and what comes out are multiplied by, with STATE_X_ROW; or 0
CONV_SILU = 12

# DELTA: x is queries and keys of G heads of N numbers, values of H heads of P. SCAN: x of H heads of P, b and c of G
# groups of N. The state: (H, N, P).
SCAN_HEADS, SCAN_GROUPS = 6, 7
SCAN_ROWS, SCAN_COLUMNS = 8, 9  # N, P
SCAN_A, SCAN_BIAS = 10, 11  # (H,) fp32: minus e^A_log; of dt
SCAN_DT, SCAN_ROW = 12, 13  # (M, H) fp32
SCAN_FACTOR = 14  # float: of DELTA's beta, of SCAN's dt
SCAN_BETA = 17  # DELTA: (M, H) fp32, with SCAN_ROW
SCAN_SKIP = 18  # SCAN: (H,) fp32

GATED_X, GATED_X_ROW = 4, 5  # (M, ..) fp32
GATED_GATE, GATED_GATE_ROW = 6, 7  # (M, ..) fp32, or 0
GATED_STEP, GATED_WIDTH = 8, 9  # from a group's gate to the next one's; of a group
GATED_GROUPS = 11
GATED_PLAIN, GATED_TO_WIDTH = NORM_PLAIN, NORM_WIDTH  # with NORM_ORDERS
GATED_WEIGHT, GATED_EACH = 13, 14  # fp32 of an RMS norm of each group, or 0; whether each has its own
GATED_EPS = 15  # float
GATED_FIRST = 16  # whether the gate comes before the norm
GATED_SIGMOID = 17  # the gate's activation; else SiLU
GATED_FACTOR, GATED_OUT_FACTOR = 24, 25  # float, of the gate before its activation; of what comes out

# A run of a tape.
TAPE_OPERATIONS, TAPE_COUNT = 0, 1
TAPE_FIRST, TAPE_LAST = 2, 3
TAPE_COUNTERS = 4
TAPE_GROUPS = 5  # groups of 256 blocks that an item of CODES has at most
TAPE_MAX_TOKENS = 6  # T
TAPE_SCRATCH_BYTES = 7
TAPE_YIELD = 8  # the function that offers the core to other threads, or 0
TAPE_THREADS, TAPE_ARRIVED = 9, 10
TAPE_VECTORS = 11  # M
