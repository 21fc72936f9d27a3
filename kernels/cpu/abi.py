"""The types of src/ek.h for ctypes, field by field; tests/kernels/cpu/test_abi.py holds the two together.

Runs in: anywhere; owns: nothing. Pointers are plain addresses: whoever fills a structure in keeps alive what it points
to.
"""

from ctypes import Structure, c_float, c_int32, c_int64, c_void_p
from enum import IntEnum, IntFlag

ABI_VERSION = 1
PANEL, GROUP, SUPER = 16, 32, 256  # rows of a panel; columns of a group and of a super-block
SCRATCH_BYTES = 2 << 20  # of each thread: EK_SCRATCH


class Error(IntEnum):
    """What the exported functions answer instead of 0."""

    NULL = 1
    KIND = 2
    SHAPE = 3
    TOKEN = 4
    BATCH = 5
    BLOCK = 6
    BUSY = 7


class Format(IntEnum):
    """How a matrix's panels are laid out."""

    F32 = 0
    F16 = 1
    BF16 = 2
    Q8 = 3
    Q8F = 4
    Q4 = 5
    Q4Z = 6
    Q4K = 7
    Q5K = 8
    Q6K = 9
    Q8M = 10


class Form(IntFlag):
    """In what form a matrix takes the activations it is multiplied with."""

    F32 = 1
    BF16 = 2
    Q8 = 4


class Epilogue(IntEnum):
    """What a linear layer does with y = W x + bias."""

    STORE = 0
    ADD = 1
    SILU_MUL = 2
    GELU_MUL = 3


class KvFormat(IntEnum):
    """How the KV cache keeps its numbers."""

    F32 = 0
    F16 = 1
    BF16 = 2
    INT8 = 3


class OpKind(IntEnum):
    """The operations of a program."""

    EMBED = 0
    ROPE_TABLE = 1
    NORM = 2
    NORM_ADD = 3
    PREPARE = 4
    LINEAR = 5
    ROPE_APPEND = 6
    ATTEND = 7
    SOFTCAP = 8
    GATHER = 9


class Matrix(Structure):
    """`ek_matrix`."""

    _fields_ = (("data", c_void_p), ("format", c_int32), ("rows", c_int32), ("cols", c_int32), ("group", c_int32))


class Acts(Structure):
    """`ek_acts`."""

    _fields_ = (
        ("f32", c_void_p),
        ("bf16", c_void_p),
        ("q8", c_void_p),
        ("q8_scale", c_void_p),
        ("q8_sum", c_void_p),
        ("f32_stride", c_int64),
        ("bf16_stride", c_int64),
        ("q8_stride", c_int64),
        ("group_stride", c_int64),
    )


class Linear(Structure):
    """`ek_linear`."""

    _fields_ = (
        ("parts", c_void_p),
        ("num_parts", c_int32),
        ("epilogue", c_int32),
        ("bias", c_void_p),
        ("acts", c_void_p),
        ("out", c_void_p),
        ("out_stride", c_int64),
        ("tokens", c_int64),
    )


class Segment(Structure):
    """`ek_segment`."""

    _fields_ = (("data", c_void_p), ("num_blocks", c_int64))


class Cache(Structure):
    """`ek_cache`."""

    _fields_ = (
        ("segments", c_void_p),
        ("num_segments", c_int32),
        ("segment_shift", c_int32),
        ("format", c_int32),
        ("num_layers", c_int32),
        ("kv_heads", c_int32),
        ("head_dim", c_int32),
        ("block_size", c_int32),
    )


class Batch(Structure):
    """`ek_batch`."""

    _fields_ = (
        ("tokens", c_int64),
        ("spans", c_int64),
        ("samples", c_int64),
        ("token_ids", c_void_p),
        ("positions", c_void_p),
        ("sample_rows", c_void_p),
        ("starts", c_void_p),
        ("lengths", c_void_p),
        ("first_rows", c_void_p),
        ("blocks", c_void_p),
        ("table_starts", c_void_p),
    )


class Attend(Structure):
    """`ek_attend`."""

    _fields_ = (
        ("cache", c_void_p),
        ("batch", c_void_p),
        ("layer", c_int32),
        ("heads", c_int32),
        ("window", c_int32),
        ("scale", c_float),
        ("softcap", c_float),
        ("q", c_void_p),
        ("q_stride", c_int64),
        ("k", c_void_p),
        ("k_stride", c_int64),
        ("v", c_void_p),
        ("v_stride", c_int64),
        ("out", c_void_p),
        ("out_stride", c_int64),
        ("shared", c_void_p),
    )


class Op(Structure):
    """`ek_op`."""

    _fields_ = (
        ("kind", c_int32),
        ("src", c_int32),
        ("dst", c_int32),
        ("width", c_int32),
        ("forms", c_int32),
        ("of_samples", c_int32),
        ("layer", c_int32),
        ("window", c_int32),
        ("rope", c_int32),
        ("num_parts", c_int32),
        ("epilogue", c_int32),
        ("eps", c_float),
        ("scale", c_float),
        ("softcap", c_float),
        ("parts", c_void_p),
        ("weight", c_void_p),
        ("weight2", c_void_p),
        ("bias", c_void_p),
    )


class Buffer(Structure):
    """`ek_buffer`."""

    _fields_ = (("data", c_void_p), ("stride", c_int64))


class Program(Structure):
    """`ek_program`."""

    _fields_ = (
        ("ops", c_void_p),
        ("num_ops", c_int32),
        ("heads", c_int32),
        ("kv_heads", c_int32),
        ("head_dim", c_int32),
        ("rope_dim", c_int32),
    )


class Step(Structure):
    """`ek_step`."""

    _fields_ = (
        ("batch", c_void_p),
        ("cache", c_void_p),
        ("buffers", c_void_p),
        ("prepared", Acts),
        ("rope_tables", c_void_p),
        ("attend_shared", c_void_p),
        ("op_ns", c_void_p),
    )
