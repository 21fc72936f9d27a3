"""Gemma 3, text (arXiv:2503.19786): Gemma 2's layers, q/k norms for its attention soft-cap, five windows to one global.

The global layers have rotary positions of their own (`spec.ropes`).
Runs in: engine thread; owns: the weights of one model.
"""

from edgekv.model.gemma2 import Gemma2ForCausalLM


class Gemma3ForCausalLM(Gemma2ForCausalLM):
    """Gemma 3."""
