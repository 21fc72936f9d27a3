"""A GGUF file's tensors by the names and in the order of rows that Hugging Face's checkpoints have.

Runs in: the thread that loads (no torch); owns: the open files. Names: gguf-py/gguf/tensor_mapping.py; what the
converter changes on the way: conversion/llama.py and conversion/gemma.py (github.com/ggml-org/llama.cpp). Only two
things of the bytes differ, and both are put back as rows are read:

- llama: rows of q and k. ggml turns neighbouring pairs of rows (2i, 2i + 1), Hugging Face's code and ours row i of a
  head with row i + head_dim / 2. A permutation of whole rows, so blocks stay as they are.
- gemma: norms are stored with the 1 added that our code adds.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np

from edgekv.errors import ModelError
from edgekv.formats.gguf_checkpoint import GgufCheckpoint, Located
from edgekv.kernels.quant.encodings import F32, Encoding
from edgekv.model.gguf_keys import ArchitectureKeys
from edgekv.model.stored import StoredTensor

_OUTSIDE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_INSIDE = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LLAMA = {**_INSIDE, "ffn_norm": "post_attention_layernorm"}
_GEMMA = {
    **_INSIDE,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
# Parts of a layer by architecture. Mistral's files say llama.
_LAYERS = {"llama": _LLAMA, "qwen2": _LLAMA, "qwen3": _LLAMA, "gemma2": _GEMMA, "gemma3": _GEMMA}
_OF_LAYER = re.compile(r"blk\.(?P<layer>0|[1-9]\d{0,4})\.(?P<part>\w+)\.(?P<kind>weight|bias)")
_ROPE_FACTORS = "rope_freqs.weight"
# A table that old converters saved and that is computed from the metadata.
_HARMLESS = re.compile(r"blk\.\d+\.attn_rot_embd\.weight")
_MAX_HEADS = 4096
_MAX_HEAD_ROWS = 4096


class GgufTensor:
    """A tensor whose rows are as the file has them."""

    def __init__(self, located: Located) -> None:
        """Raises ModelError for what is neither a matrix nor a vector of plain numbers."""
        self._file, self._info = located.file, located.info
        if len(self.shape) > 2 or (len(self.shape) == 1 and not self.encoding.is_float):
            raise self.fault(f"{self.encoding.name} {list(self.shape)}: expected a matrix or a vector of plain numbers")
        self._row_bytes = self.num_bytes // self.shape[0]

    @property
    def path(self) -> Path:
        """The file it lies in."""
        return self._file.path

    @property
    def name(self) -> str:
        """What that file calls it."""
        return self._info.name

    @property
    def shape(self) -> tuple[int, ...]:
        """[outputs, inputs], or [elements]."""
        return self._info.shape

    @property
    def encoding(self) -> Encoding:
        """What the bytes of a row mean."""
        return self._info.encoding

    @property
    def num_bytes(self) -> int:
        """Bytes of all rows."""
        return self._info.num_bytes

    def fault(self, message: str) -> ModelError:
        """The error to raise about it."""
        return ModelError(f"{self.path}: tensor '{self.name}': {message}")

    def read_rows(self, first: int, target: memoryview) -> None:
        """Fill `target` with whole rows from row `first` on; raises ModelError where the file fails."""
        if len(target) % self._row_bytes:
            raise ValueError(f"{self.name}: {len(target)} bytes are no whole rows of {self._row_bytes}")
        self._file.read_into(self._info, first * self._row_bytes, target)


class _PairedRows(GgufTensor):
    """Rows 2i and 2i + 1 of a head in the file are its rows i and i + half: LlamaModel.permute, undone."""

    def __init__(self, located: Located, heads: int) -> None:
        super().__init__(located)
        self._head_rows, rest = divmod(self.shape[0], heads)
        if rest or self._head_rows % 2 or self._head_rows > _MAX_HEAD_ROWS:
            raise self.fault(f"{self.shape[0]:,} rows cannot be {heads:,} heads of an even number of rows")
        self._order = np.arange(self._head_rows).reshape(-1, 2).T.reshape(-1)

    def read_rows(self, first: int, target: memoryview) -> None:
        rows = np.frombuffer(target, np.uint8).reshape(-1, self._row_bytes)
        stop, size = first + len(rows), self._head_rows
        head = np.empty((size, self._row_bytes), np.uint8)
        for start in range(first - first % size, stop, size):
            super().read_rows(start, head.reshape(-1).data)
            low, high = max(first, start), min(stop, start + size)
            np.take(head, self._order[low - start : high - start], 0, rows[low - first : high - first], mode="clip")


class _LessOne(GgufTensor):
    """A norm whose file holds weight + 1, in float32."""

    def __init__(self, located: Located) -> None:
        super().__init__(located)
        if self.encoding != F32:
            raise self.fault(f"a norm of type {self.encoding.name}, which must be f32")

    def read_rows(self, first: int, target: memoryview) -> None:
        super().read_rows(first, target)
        values = np.frombuffer(target, "<f4")
        with np.errstate(invalid="ignore"):  # NaN stays NaN
            np.subtract(values, np.float32(1), values)


class GgufTensors:
    """The StoredTensors of a GGUF checkpoint.

    An absent output.weight is an absent lm_head.weight: the head is the embedding.
    """

    def __init__(self, checkpoint: GgufCheckpoint) -> None:
        """Raises ModelError for an architecture or a tensor that has no name here; the caller then closes the file."""
        self._checkpoint = checkpoint
        architecture = checkpoint.metadata.text("general.architecture")
        if architecture not in _LAYERS:
            raise checkpoint.metadata.fault(
                "general.architecture", f"{architecture!r:.80} is not supported: {', '.join(_LAYERS)}"
            )
        translate, kind_of = _names(architecture), _kinds(architecture, checkpoint)
        tensors: dict[str, StoredTensor] = {}
        for name, located in checkpoint.tensors.items():
            if name == _ROPE_FACTORS or _HARMLESS.fullmatch(name):
                continue
            ours = translate(name)
            if ours is None:
                raise ModelError(f"{located.file.path}: tensor '{name}': is not part of a {architecture} model")
            tensors[ours] = kind_of(ours, located)
        self.tensors: Mapping[str, StoredTensor] = MappingProxyType(tensors)

    @property
    def source(self) -> Path:
        """The file, of several the first."""
        return self._checkpoint.source

    def close(self) -> None:
        """Close all files; may be called again."""
        self._checkpoint.close()


def _names(architecture: str) -> Callable[[str], str | None]:
    parts = _LAYERS[architecture]

    def translate(name: str) -> str | None:
        found = _OF_LAYER.fullmatch(name)
        if found is None or found["part"] not in parts:
            return _OUTSIDE.get(name)
        return f"model.layers.{found['layer']}.{parts[found['part']]}.{found['kind']}"

    return translate


def _kinds(architecture: str, checkpoint: GgufCheckpoint) -> Callable[[str, Located], StoredTensor]:
    if architecture.startswith("gemma"):
        return lambda name, located: (_LessOne if name.endswith("norm.weight") else GgufTensor)(located)
    if architecture != "llama":
        return lambda name, located: GgufTensor(located)
    keys = ArchitectureKeys(checkpoint, architecture)
    heads = kv_heads = keys.same_in_every_layer("attention.head_count", 1, _MAX_HEADS)
    if "attention.head_count_kv" in keys:
        kv_heads = keys.same_in_every_layer("attention.head_count_kv", 1, _MAX_HEADS)

    def of_llama(name: str, located: Located) -> StoredTensor:
        if ".q_proj." in name:
            return _PairedRows(located, heads)
        return _PairedRows(located, kv_heads) if ".k_proj." in name else GgufTensor(located)

    return of_llama
