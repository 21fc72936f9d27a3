"""Products with a model's matrices on the card, by how many tokens there are at once.

    tokens   quantised (planes.py)                          plain numbers
    1-8      acts, once for all matrices of x, then gemv    wide_gemv
    9-32     gemm                                           torch
    more     dequant to a scratch tensor, then torch        torch

One to eight tokens cost what reading W costs, so W is read as it is stored, once. With more of them the arithmetic of
gemv counts: gemm unpacks W once for 16 or 32 tokens, for matrix units, and reads it once too. From some tens on torch's
products gain more than writing W out in 16 bits costs. Where exactly one way overtakes the next depends on the card
(one with much bandwidth for its arithmetic, as an H100, leaves gemv earlier), and is for measurements to say.

gemv rounds activations to int8, which the others do not. gemm's are bfloat16 or float16, of sm_75 float16 alone; with
float32 activations 9 and more tokens are torch's. What there are no kernels for (`planes.is_supported`,
`wide_gemv.is_supported`) is for torch as well.

For the same matrix and card a token comes out of each of these the same to the bit, however many others there are.
"""
