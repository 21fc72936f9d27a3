"""Hugging Face folders as GGUF files, the way llama.cpp's converter makes them (conversion/*.py of
github.com/ggml-org/llama.cpp): names, permuted q and k, Gemma's norms, frequency factors, tokenizer, chat template.

Written with the `gguf` package, so that what reads them is not tested against itself.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, TokenType
from safetensors.torch import load_file

Quantise = Callable[[np.ndarray], np.ndarray]
"""float32 [rows, cols] to the bytes of the rows, uint8 [rows, row bytes]."""

_ARCHITECTURES = {
    "LlamaForCausalLM": gguf.MODEL_ARCH.LLAMA,
    "MistralForCausalLM": gguf.MODEL_ARCH.LLAMA,
    "Qwen2ForCausalLM": gguf.MODEL_ARCH.QWEN2,
    "Qwen3ForCausalLM": gguf.MODEL_ARCH.QWEN3,
    "Gemma2ForCausalLM": gguf.MODEL_ARCH.GEMMA2,
    "Gemma3ForCausalLM": gguf.MODEL_ARCH.GEMMA3,
}


def make_gguf(
    folder: Path,
    out: Path,
    *,
    types: Mapping[str, str] | None = None,
    quantise: Mapping[str, Quantise] | None = None,
    pre: str = "llama-bpe",
    metadata: Mapping[str, object] | None = None,
) -> Path:
    """Write the model in `folder` to `out` and answer it.

    `types`: GGML types by pattern of the tensor's name in the file, as {"*": "Q8_0", "blk.*.ffn_*": "F16"}, of which
    the last that fits counts; vectors are always F32, and so is what none fits. `quantise`: how to make the types that
    `gguf` cannot, by type. `pre`: what the file says of a byte-level BPE. `metadata`: keys to set over what the
    converter writes; None leaves one out.
    """
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    config.setdefault("rope_parameters", {"rope_theta": config.get("rope_theta")})  # transformers before 5
    arch = _ARCHITECTURES[config["architectures"][0]]
    name = gguf.MODEL_ARCH_NAMES[arch]
    writer = _Writer(out, name, dict(metadata or {}))
    _add_shape(writer, config, name)
    add_tokenizer(writer, folder, num_tokens=config["vocab_size"], pre=pre)
    names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    for tensor_name, tensor in _tensors(folder, config, name):
        stored_name = names.get_name(tensor_name, try_suffixes=(".weight", ".bias")) or tensor_name
        _add_tensor(writer, stored_name, tensor, types or {}, quantise or {})
    return writer.finish()


def make_vocabulary(
    folder: Path,
    out: Path,
    *,
    num_tokens: int | None = None,
    pre: str = "llama-bpe",
    metadata: Mapping[str, object] | None = None,
) -> Path:
    """Write the tokenizer in `folder` to `out`, without any tensor."""
    writer = _Writer(out, "llama", dict(metadata or {}))
    add_tokenizer(writer, folder, num_tokens=num_tokens, pre=pre)
    return writer.finish()


def write_metadata(out: Path, metadata: Mapping[str, object], tensors: Mapping[str, np.ndarray] | None = None) -> Path:
    """Write a file of these keys and float32 tensors alone."""
    writer = _Writer(out, "llama", metadata)
    for name, data in (tensors or {}).items():
        writer.add_tensor(name, data.astype(np.float32))
    return writer.finish()


def dequantised(folder: Path, file: Path) -> dict[str, torch.Tensor]:
    """What `gguf` makes of a llama file's tensors in float32, under their names in `folder`, that it was made from."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    stored = {
        tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type) for tensor in gguf.GGUFReader(file).tensors
    }
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    found = {}
    for name in load_file(folder / "model.safetensors"):
        tensor = torch.from_numpy(np.array(stored[names.get_name(name, try_suffixes=(".weight", ".bias"))]))
        if ".q_proj." in name or ".k_proj." in name:
            heads = config["num_attention_heads" if ".q_proj." in name else "num_key_value_heads"]
            tensor = tensor.reshape(heads, -1, 2, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)
        found[name] = tensor
    return found


class _Writer(GGUFWriter):
    """Keeps keys from being written that are to have another value."""

    def __init__(self, out: Path, arch: str, overrides: Mapping[str, object]) -> None:
        self._out, self._overrides = out, overrides
        super().__init__(out, arch)

    def add_key_value(self, key: str, *value: Any, **named: Any) -> None:
        if key not in self._overrides:
            super().add_key_value(key, *value, **named)

    def finish(self) -> Path:
        overrides, self._overrides = self._overrides, {}
        for key, value in overrides.items():
            _add_value(self, key, value)
        self.write_header_to_file()
        self.write_kv_data_to_file()
        self.write_tensors_to_file()
        self.close()
        return self._out


def _add_value(writer: GGUFWriter, key: str, value: object) -> None:
    match value:
        case None:
            return
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_int32(key, value) if value < 0 else writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case list():
            writer.add_array(key, value)
        case _:
            raise TypeError(f"{key}: {value!r}")


def _add_shape(writer: GGUFWriter, config: dict[str, Any], arch: str) -> None:
    """As `TextModel.set_gguf_parameters` and what its subclasses add."""
    writer.add_type("model")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if (head_dim := config.get("head_dim")) is not None:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if arch == "llama":
        writer.add_vocab_size(config["vocab_size"])
        writer.add_rope_dimension_count(_head_dim(config))
    if arch != "gemma2":
        _add_rope(writer, config["rope_parameters"])
    if arch == "gemma2":
        writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
        writer.add_sliding_window(config["sliding_window"])
    if arch == "gemma3":
        writer.add_sliding_window(config["sliding_window"])
    if config.get("final_logit_softcapping"):
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    scalar = config.get("query_pre_attn_scalar")
    if scalar not in (None, head_dim):
        # The converter writes none, since readers know the scale of every real Gemma; not that of a tiny one.
        writer.add_attention_scale(scalar**-0.5)


def _add_rope(writer: GGUFWriter, parameters: dict[str, Any]) -> None:
    wide = parameters.get("full_attention", parameters)
    match wide.get("rope_type"):
        case "linear":
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(wide["factor"])
        case "yarn":
            writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
            writer.add_rope_scaling_factor(wide["factor"])
            writer.add_rope_scaling_orig_ctx_len(wide["original_max_position_embeddings"])
            for field, add in (
                ("attention_factor", writer.add_rope_scaling_yarn_attn_factor),
                ("beta_fast", writer.add_rope_scaling_yarn_beta_fast),
                ("beta_slow", writer.add_rope_scaling_yarn_beta_slow),
            ):
                if wide.get(field) is not None:
                    add(wide[field])
    writer.add_rope_freq_base(wide["rope_theta"])
    if "sliding_attention" in parameters:
        base = parameters["sliding_attention"]["rope_theta"]
        writer.add_float32(f"{writer.arch}.rope.freq_base_swa", base)


def _tensors(folder: Path, config: dict[str, Any], arch: str) -> Iterator[tuple[str, torch.Tensor]]:
    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            if arch == "llama" and ".q_proj." in name:
                tensor = _paired(tensor, config["num_attention_heads"])
            elif arch == "llama" and ".k_proj." in name:
                tensor = _paired(tensor, config["num_key_value_heads"])
            elif arch.startswith("gemma") and name.endswith("norm.weight"):
                tensor = tensor.float() + 1
            yield name, tensor
    if config["rope_parameters"].get("rope_type") == "llama3":
        yield "rope_freqs.weight", _frequency_factors(config["rope_parameters"], _head_dim(config))


def _paired(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows i and i + half of each head become neighbours."""
    return tensor.reshape(heads, 2, -1, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)


def _frequency_factors(rope: dict[str, Any], head_dim: int) -> torch.Tensor:
    frequencies = 1.0 / rope["rope_theta"] ** (torch.arange(0, head_dim, 2).float() / head_dim)
    context, low, high = rope["original_max_position_embeddings"], rope["low_freq_factor"], rope["high_freq_factor"]
    factors = []
    for wavelength in (2 * math.pi / frequencies).tolist():
        if wavelength < context / high:
            factors.append(1.0)
        elif wavelength > context / low:
            factors.append(rope["factor"])
        else:
            smooth = (context / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return torch.tensor(factors)


def _head_dim(config: dict[str, Any]) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _add_tensor(
    writer: GGUFWriter, name: str, tensor: torch.Tensor, types: Mapping[str, str], quantise: Mapping[str, Quantise]
) -> None:
    data = tensor.float().contiguous().numpy()
    wanted = "F32"
    if data.ndim > 1:
        wanted = next((kind for pattern, kind in reversed([*types.items()]) if fnmatch(name, pattern)), wanted)
    kind = GGMLQuantizationType[wanted]
    if wanted in quantise:
        data = quantise[wanted](data)
    elif kind != GGMLQuantizationType.F32:
        data = gguf.quants.quantize(data, kind)
    writer.add_tensor(name, data, raw_dtype=kind)


def add_tokenizer(writer: GGUFWriter, folder: Path, *, num_tokens: int | None, pre: str) -> None:
    """What the folder has: tokenizer.model, else a byte-level tokenizer.json, else none.

    Token lists are filled up to `num_tokens`, as those of a model are up to the rows of its embedding.
    """
    if (folder / "tokenizer.model").exists():
        _add_sentencepiece(writer, folder, num_tokens)
    elif (folder / "tokenizer.json").exists():
        _add_byte_level(writer, folder, num_tokens, pre)
    else:
        writer.add_tokenizer_model("none")


def _add_sentencepiece(writer: GGUFWriter, folder: Path, num_tokens: int | None) -> None:
    """As `TextModel._create_vocab_sentencepiece`."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    size = num_tokens or processor.get_piece_size()
    tokens = [f"[PAD{i}]" for i in range(size)]
    scores, kinds = [-10000.0] * size, [TokenType.UNUSED] * size
    for i in range(processor.get_piece_size()):
        tokens[i], scores[i], kinds[i] = processor.id_to_piece(i), processor.get_score(i), TokenType.NORMAL
        if processor.is_unknown(i):
            kinds[i] = TokenType.UNKNOWN
        elif processor.is_control(i):
            kinds[i] = TokenType.CONTROL
        elif processor.is_unused(i):
            kinds[i] = TokenType.UNUSED
        elif processor.is_byte(i):
            kinds[i] = TokenType.BYTE
    if (folder / "added_tokens.json").exists():
        for text, i in json.loads((folder / "added_tokens.json").read_text()).items():
            tokens[i], scores[i], kinds[i] = text, -1000.0, TokenType.USER_DEFINED
    config = json.loads((folder / "tokenizer_config.json").read_text())
    for key, token in config.get("added_tokens_decoder", {}).items():
        i, text = int(key), token["content"]
        if token.get("special") or _looks_special(text):
            kinds[i] = TokenType.CONTROL
        else:
            text, kinds[i] = text.replace("▁", " "), TokenType.USER_DEFINED
        tokens[i], scores[i] = text, -1000.0
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(kinds)
    if config.get("add_prefix_space") is not None:
        writer.add_add_space_prefix(config["add_prefix_space"])
    gguf.SpecialVocab(folder, n_vocab=size).add_to_gguf(writer, quiet=True)


def _add_byte_level(writer: GGUFWriter, folder: Path, num_tokens: int | None, pre: str) -> None:
    """As `TextModel.get_vocab_base` and `_set_vocab_gpt2`."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    text_of = {i: text for text, i in tokenizer.get_vocab(with_added_tokens=True).items()}
    added = tokenizer.get_added_tokens_decoder()
    tokens, kinds = [], []
    for i in range(num_tokens or max(text_of) + 1):
        if i not in text_of:
            tokens.append(f"[PAD{i}]")
            kinds.append(TokenType.UNUSED)
            continue
        tokens.append(text_of[i])
        if i not in added:
            kinds.append(TokenType.NORMAL)
        elif added[i].special or _looks_special(text_of[i]):
            kinds.append(TokenType.CONTROL)
        else:
            kinds.append(TokenType.USER_DEFINED)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    gguf.SpecialVocab(folder, load_merges=True).add_to_gguf(writer, quiet=True)


def _looks_special(text: str) -> bool:
    """As `TextModel.does_token_look_special`."""
    if text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]"):
        return True
    return (text.startswith(("<|", "<｜")) and text.endswith(("|>", "｜>"))) or (
        text.startswith("<unused") and text.endswith(">")
    )
