"""By how much a card's kernels may differ from their references, (of the number, absolute) unless said otherwise.

On fibers powers and roots are rounded correctly; a card's are off by one or two units in the last place (2^-22 for
ex2.approx, rsqrt.approx and lg2.approx: PTX ISA, "Floating point instructions"; about as much for AMD's v_exp_f32), and
its compilers fuse products with sums. So what is float32 arithmetic has four times the room that it has on fibers;
roundings to a type are what they are everywhere.

    kernel          what differs                                                   bound
    kv_append       queries; keys that were normed or turned                       QUERIES; KEYS, a step of the format
    decode_split    sums of weights and of weighted values about 1 wide            DECODE, then the result's rounding
    lse_merge       the same of a few parts                                        MERGED
    gather_dequant  product with a scale, and sum                                  GATHERED, then the rounding
    prefill_paged   weights and scores rounded to what is multiplied               PREFILL
    block_copy      nothing
    rmsnorm, gated, rope   one step of the type where two roundings fall apart     NORMED, GATED, TURNED
    sample          the token, where sums come near an edge; log-probabilities     SLACK, LOGPROBS
    acts            nothing
    dequant         the fused sum, then one step of the type                       DEQUANTISED
    gemv, wide_gemv, gemm   see gemm_cases.py, with PRODUCTS times the room
"""

import torch

from edgekv.kernels.attn.gpu_layout import GpuKvFormat

_BF16, _F16, _F32 = torch.bfloat16, torch.float16, torch.float32

QUERIES = (8e-6, 8e-6)
# (of the number, of the largest in its row, absolute)
KEYS = {
    GpuKvFormat.BF16: (2**-7, 0.0, 4e-6),
    GpuKvFormat.F16: (2**-10, 0.0, 4e-6),
    GpuKvFormat.E4M3: (2**-3, 0.0, 2**-9),
    GpuKvFormat.INT8: (0.0, 1.1 / 127, 0.0),
    GpuKvFormat.INT4: (0.0, 2.2 / 15, 0.0),
    GpuKvFormat.F32: (8e-6, 0.0, 8e-6),
}
DECODE = {
    GpuKvFormat.BF16: (0.0, 2e-5),
    GpuKvFormat.F16: (0.0, 2e-5),
    GpuKvFormat.E4M3: (0.0, 2e-5),
    GpuKvFormat.INT8: (0.0, 2e-5),
    GpuKvFormat.INT4: (0.0, 4e-5),
    GpuKvFormat.F32: (0.0, 2e-5),
}
MERGED = {_BF16: (2**-8, 8e-6), _F16: (2**-11, 8e-6), _F32: (8e-6, 8e-6)}
GATHERED = {
    GpuKvFormat.BF16: (0.0, 0.0),
    GpuKvFormat.F16: (0.0, 0.0),
    GpuKvFormat.E4M3: (0.0, 0.0),
    GpuKvFormat.INT8: (2**-23, 0.0),
    GpuKvFormat.INT4: (2**-22, 4e-6),
    GpuKvFormat.F32: (0.0, 0.0),
}
# By the cache's format and the coarser of what is multiplied and what comes out.
PREFILL = {
    (GpuKvFormat.BF16, _BF16): (2**-7, 2**-7),
    (GpuKvFormat.BF16, _F16): (2**-10, 2**-8),
    (GpuKvFormat.F16, _BF16): (2**-7, 2**-6),
    (GpuKvFormat.F16, _F16): (2**-10, 2**-10),
    (GpuKvFormat.E4M3, _BF16): (2**-7, 2**-7),
    (GpuKvFormat.E4M3, _F16): (2**-10, 2**-10),
    (GpuKvFormat.INT8, _BF16): (2**-7, 2**-6),
    (GpuKvFormat.INT8, _F16): (2**-10, 2**-8),
    (GpuKvFormat.INT4, _BF16): (2**-7, 2**-6),
    (GpuKvFormat.INT4, _F16): (2**-10, 2**-8),
}
NORMED = {_BF16: (2**-7, 2**-6), _F16: (2**-10, 2**-9), _F32: (2e-5, 8e-6)}
GATED = {_BF16: (2**-7, 4e-6), _F16: (2**-9, 4e-6), _F32: (4e-5, 4e-6)}
TURNED = {_BF16: (2**-7, 8e-6), _F16: (2**-10, 8e-6), _F32: (4e-6, 8e-6)}

SLACK = 4e-5
LOGPROBS = (4e-6, 2e-5)

# Absolute: of the largest number in its group of 32 columns.
DEQUANTISED_OF_LARGEST = 2**-21
DEQUANTISED = {_BF16: 2**-7, _F16: 2**-10, _F32: 2**-22}
PRODUCTS = 4.0

# Logits of whole models, in units of their standard deviation, against float32 on the CPU: test_engine.py.
