"""Qwen 3, the dense ones (arXiv:2505.09388): Llama's layers with an RMSNorm over each head of q and k (`spec.qk_norm`).

Runs in: engine thread; owns: the weights of one model.
"""

from edgekv.model.llama import LlamaForCausalLM


class Qwen3ForCausalLM(LlamaForCausalLM):
    """Qwen 3."""
