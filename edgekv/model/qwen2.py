"""Qwen 2 and 2.5 (arXiv:2407.10671): Llama's layers with a bias on q, k and v (`spec.qkv_bias`), rarely with windows.

Runs in: engine thread; owns: the weights of one model.
"""

from edgekv.model.llama import LlamaForCausalLM


class Qwen2ForCausalLM(LlamaForCausalLM):
    """Qwen 2."""
