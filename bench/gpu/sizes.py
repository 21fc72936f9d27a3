"""How large what is measured is: on a card, quickly on a card, and on fibers. Runs in: anywhere; owns: nothing."""

from dataclasses import dataclass

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Heads:
    """Of an attention layer."""

    queries: int
    keys: int
    dim: int


@dataclass(frozen=True, slots=True)
class Sizes:
    """What the measurements are made with.

    Attributes:
        arena_bytes: what the buffers of one piece of work add up to, at least: far more than any cache holds.
        stream_bytes: of the tensors that bandwidth is measured with.
        matmul: n of a product of two [n, n].
        heads: of attention.
        contexts: (sequences, tokens of each) of decode steps.
        model_layers: of a cache whose orders are compared.
        order: (sequences, tokens of each) there.
        layers: (rows, cols) of matrices, large ones and small ones, by what they are called.
        chunks: (tokens before, new tokens) of prompts.
        rows: of activations that small kernels see.
        width: numbers of each.
        vocab: tokens of a vocabulary.
        sampled: rows that are sampled at once.
        launches: that are timed on the host.
        streams: sequences of a whole model at once, and the tokens that each has before.
        steps: of a whole model that are timed.
        rounds: least and most samples of a piece of work.
        budget_s: time for one comparison, in which further rounds are made.
    """

    arena_bytes: int
    stream_bytes: int
    matmul: int
    heads: Heads
    contexts: tuple[tuple[int, int], ...]
    model_layers: int
    order: tuple[int, int]
    layers: tuple[tuple[str, int, int], ...]
    chunks: tuple[tuple[int, int], ...]
    rows: int
    width: int
    vocab: int
    sampled: tuple[int, ...]
    launches: int
    streams: tuple[tuple[int, int], ...]
    steps: int
    rounds: tuple[int, int]
    budget_s: float


# The layers of Llama-3.1-8B: gate and up, down; q, k and v, output.
_LAYERS = (("large", 28672, 4096), ("large", 4096, 14336), ("small", 6144, 4096), ("small", 4096, 4096))

FULL = Sizes(
    arena_bytes=1024 * MIB,
    stream_bytes=2048 * MIB,
    matmul=8192,
    heads=Heads(32, 8, 128),
    contexts=((1, 16384), (8, 2048), (32, 4096), (8, 16384)),
    model_layers=32,
    order=(8, 2048),
    layers=_LAYERS,
    chunks=((0, 2048), (8192, 512), (0, 8192)),
    rows=8192,
    width=4096,
    vocab=128256,
    sampled=(1, 8, 32),
    launches=500,
    streams=((1, 128), (1, 2048), (8, 512)),
    steps=100,
    rounds=(9, 200),
    budget_s=0.5,
)
QUICK = Sizes(
    arena_bytes=512 * MIB,
    stream_bytes=1024 * MIB,
    matmul=8192,
    heads=Heads(32, 8, 128),
    contexts=((1, 16384), (8, 2048)),
    model_layers=32,
    order=(8, 2048),
    layers=(_LAYERS[0], _LAYERS[3]),
    chunks=((0, 2048), (8192, 512)),
    rows=8192,
    width=4096,
    vocab=128256,
    sampled=(1, 32),
    launches=300,
    streams=((1, 128), (8, 512)),
    steps=60,
    rounds=(7, 50),
    budget_s=0.2,
)
ON_HOST = Sizes(
    arena_bytes=1,
    stream_bytes=1 << 16,
    matmul=32,
    heads=Heads(4, 2, 64),
    contexts=((2, 40),),
    model_layers=2,
    order=(2, 40),
    layers=(("large", 64, 512), ("small", 32, 256)),
    chunks=((0, 20), (16, 8)),
    rows=2,
    width=256,
    vocab=512,
    sampled=(1, 2),
    launches=3,
    streams=((1, 9), (2, 9)),
    steps=4,
    rounds=(1, 1),
    budget_s=0.0,
)
