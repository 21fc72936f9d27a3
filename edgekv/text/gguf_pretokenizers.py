"""How each kind of byte-level BPE cuts a text into the parts that are merged, by the name that GGUF files give it.

The names are llama.cpp's (`tokenizer.ggml.pre`, src/llama-vocab.cpp); the expressions are those of the models' own
tokenizer.json, where llama.cpp has others that its engine understands. Each expression cuts every part that those
before it made, into its matches and what lies between.

Runs in: anywhere; owns: nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from tokenizers import Regex, normalizers, pre_tokenizers


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """`nfc`: texts are composed first (Unicode's NFC). `ignore_merges`: a part that is a token is not put together from
    smaller ones. `add_bos`: what a file means that does not say whether a text begins with a token of its own.
    """

    expressions: tuple[str, ...]
    nfc: bool = False
    ignore_merges: bool = False
    add_bos: bool = False

    def normalizer(self) -> normalizers.Normalizer | None:
        """As the library wants it."""
        return normalizers.NFC() if self.nfc else None

    def pre_tokenizer(self) -> pre_tokenizers.PreTokenizer:
        """As the library wants it: bytes become characters at the end."""
        cuts = [pre_tokenizers.Split(Regex(expression), behavior="isolated") for expression in self.expressions]
        return pre_tokenizers.Sequence([*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


# The beginning and the end that most have since cl100k (github.com/openai/tiktoken, openai_public.py).
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_THREE_DIGITS = rf"{_WORDS}|\p{{N}}{{1,3}}|{_REST}"
_ONE_DIGIT = rf"{_WORDS}|\p{{N}}|{_REST}"
_GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Words begin with capitals or do not: tekken, and with contractions at their end o200k.
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SLASHED_REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
# The letters with case that deepseek-llm's tokenizer.json lists one by one.
_CASED_LETTERS = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373"
    "\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481"
    "\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b"
    "\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b"
    "\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb"
    "\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128"
    "\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4"
    "\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf"
    "\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3"
    "\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)
_ASIAN = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_PUNCTUATION = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"

_LLAMA_3 = PreTokenizer((_THREE_DIGITS,), ignore_merges=True, add_bos=True)
_LLAMA_3_MERGED = PreTokenizer((_THREE_DIGITS,))
_QWEN = PreTokenizer((_ONE_DIGIT,))
_GPT = PreTokenizer((_GPT_2,))
_DIGITS_GPT = PreTokenizer((r"\p{N}", _GPT_2))
_O200K = PreTokenizer((rf"{_CASED % (_CONTRACTION, _CONTRACTION)}|\p{{N}}{{1,3}}|{_SLASHED_REST}",))
_DEEPSEEK_3 = PreTokenizer((
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    _PUNCTUATION
    + r"[A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
))  # fmt: skip

PRE_TOKENIZERS: Mapping[str, PreTokenizer] = MappingProxyType({
    "default": PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT_2, r"\p{N}+", r"[0-9][0-9][0-9]")),
    "llama-bpe": _LLAMA_3,
    "llama3": _LLAMA_3,
    "llama-v3": _LLAMA_3,
    "falcon3": _LLAMA_3,
    "pixtral": _LLAMA_3,
    "smaug-bpe": _LLAMA_3_MERGED,
    "dbrx": _LLAMA_3_MERGED,
    "qwen2": PreTokenizer((_ONE_DIGIT,), nfc=True),
    "deepseek-r1-qwen": _QWEN,
    "megrez": _QWEN,
    "gpt-2": _GPT,
    "phi-2": _GPT,
    "mpt": PreTokenizer((_GPT_2,), nfc=True),
    "olmo": PreTokenizer((_GPT_2,), nfc=True),
    "exaone4": _GPT,
    "gigachat": _GPT,
    "a.x-4.0": _GPT,
    "mellum": _GPT,
    "smollm": _DIGITS_GPT,
    "starcoder": _DIGITS_GPT,
    "refact": _DIGITS_GPT,
    "command-r": PreTokenizer((r"\p{N}", _GPT_2), nfc=True),
    "exaone": _DIGITS_GPT,
    "minerva-7b": _DIGITS_GPT,
    "deepseek-llm": PreTokenizer((
        r"[\r\n]", rf"\s?[{_CASED_LETTERS}]+",
        "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+", r"\s+$", _ASIAN, r"\p{N}+",
    )),
    "deepseek-coder": PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _ASIAN, r"\p{N}")),
    "deepseek-v3": _DEEPSEEK_3,
    "tekken": PreTokenizer(
        (rf"{_CASED % ('', '')}|\p{{N}}|{_SLASHED_REST}",), ignore_merges=True, add_bos=True
    ),
    "gpt-4o": _O200K,
    "llama4": _O200K,
})  # fmt: skip
"""By the value of `tokenizer.ggml.pre`."""
