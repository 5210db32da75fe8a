"""What fitting a predictor holds in memory, known before torch is loaded."""

from __future__ import annotations

#: Scores computed at once: of so many tokens, or as many as give so many values.
CHUNK_TOKENS, CHUNK_VALUES = 4096, 1 << 24
#: Tokens of a step of the fit, and of the linear start, are bounded by their scores too.
BATCH_TOKENS, BATCH_VALUES = 4096, 1 << 26
START_TOKENS = 4 * CHUNK_TOKENS
#: Gate rows in double precision at once.
DOUBLE_ROWS = 4096
#: What the interpreter grows by when torch is loaded and has run.
TORCH_BYTES = 420 << 20
_OPEN_SHARE = 0.25  # of the neurons, at most, for the scores that the threshold is sorted out of


def token_bytes(hidden: int, neurons: int) -> int:
    """Of one captured token: its input in half floats, a bit per neuron."""
    return 2 * hidden + -(-neurons // 8)


def fit_bytes(tokens: int, hidden: int, neurons: int, rank: int) -> int:
    """Peak of fitting one layer's predictor, torch itself aside."""
    batch = min(BATCH_TOKENS, BATCH_VALUES // neurons, tokens)
    start = min(START_TOKENS, BATCH_VALUES // neurons, tokens)
    gate = 3 * 4 * neurons * hidden  # as the file has it, decoded, and on the way
    squares = 8 * 8 * hidden * hidden + 3 * 8 * min(DOUBLE_ROWS, neurons) * hidden
    factors = 28 * rank * (hidden + neurons)  # values, gradients, two moments, half copies
    steps = max(12 * batch * neurons + 8 * batch * hidden, 12 * start * neurons, 12 * CHUNK_VALUES)
    threshold = int(12 * 0.1 * _OPEN_SHARE * tokens * neurons)
    return tokens * token_bytes(hidden, neurons) + gate + factors + max(squares, steps, threshold)


def most_tokens(room_bytes: int, hidden: int, neurons: int, rank: int) -> int:
    """Tokens whose fit stays within ``room_bytes``; 0 when none do."""
    low, high = 0, 1 << 32
    while low < high:
        middle = (low + high + 1) // 2
        if fit_bytes(middle, hidden, neurons, rank) <= room_bytes:
            low = middle
        else:
            high = middle - 1
    return low
