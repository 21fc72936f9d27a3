"""A local LLM server whose KV cache never spills out of the card's memory."""

__version__ = "0.1.0"
