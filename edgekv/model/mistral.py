"""Mistral 7B (arXiv:2310.06825): Llama's layers, and a sliding window in every one (`spec.windows`) where it has one.

Runs in: engine thread; owns: the weights of one model.
"""

from edgekv.model.llama import LlamaForCausalLM


class MistralForCausalLM(LlamaForCausalLM):
    """Mistral."""
