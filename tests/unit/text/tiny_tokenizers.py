"""Tiny real tokenizers, trained in a fraction of a second on generated text and saved in Hugging Face's forms."""

import io
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
UNK, BOS, EOS, IM_START, IM_END = SPECIALS = ("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")
STEMS = "garden water plant soil seed light morning river stone cloud winter spring leaf root bird house".split()
ENDS = ("", "s", "ed", "ing", "er", "ly", ", and", ".", "?", "!", ": 12", " 3.5", " été", " naïve", " 水", " Ж")


def sentences(seed: int = 0, count: int = 1500) -> Iterator[str]:
    rng = random.Random(seed)
    for _ in range(count):
        words = [rng.choice(STEMS) + rng.choice(ENDS) for _ in range(rng.randint(3, 12))]
        yield " ".join(words).capitalize()


def sentencepiece_model(
    *, vocab: int = 700, model_type: str = "bpe", user_defined: tuple[str, ...] = (), **options: Any
) -> bytes:
    """A tokenizer.model: <unk> 0, <s> 1, </s> 2, <|im_start|> 3, <|im_end|> 4, then bytes and pieces."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=sentences(), model_writer=written, model_type=model_type, vocab_size=vocab,
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True,
        allow_whitespace_only_pieces=True, unk_id=0, bos_id=1, eos_id=2, pad_id=-1, hard_vocab_limit=False,
        control_symbols=[IM_START, IM_END], user_defined_symbols=list(user_defined), minloglevel=2, num_threads=1,
        **options,
    )  # fmt: skip
    return written.getvalue()


def write_sentencepiece(
    folder: Path, *, vocab: int = 700, model_type: str = "bpe", with_json: bool = False, **config: Any
) -> Path:
    """A folder with tokenizer.model (and the equal tokenizer.json when `with_json`) and a ChatML template."""
    folder.mkdir(parents=True, exist_ok=True)
    model = sentencepiece_model(vocab=vocab, model_type=model_type)
    (folder / "tokenizer.model").write_bytes(model)
    if with_json:
        sentencepiece_as_json(model).save(str(folder / "tokenizer.json"))
    write_config(folder, **{"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": False} | config)
    return folder


def sentencepiece_as_json(model: bytes) -> tokenizers.Tokenizer:
    """The `tokenizers` form of a sentencepiece BPE model, the way Llama-2's is converted."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    vocab = {processor.id_to_piece(i): i for i in range(processor.get_piece_size())}
    merges = []
    for piece, token_id in vocab.items():
        if len(piece) < 2 or processor.is_control(token_id) or processor.is_byte(token_id):
            continue
        splits = [(piece[:k], piece[k:]) for k in range(1, len(piece)) if piece[:k] in vocab and piece[k:] in vocab]
        splits.sort(key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
        merges += [(-processor.get_score(token_id), left, right) for left, right in splits]
    merges.sort(key=lambda merge: merge[0])
    pairs = [(left, right) for _, left, right in merges]
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, pairs, unk_token=UNK, fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([tokenizers.AddedToken(t, special=True, normalized=False) for t in SPECIALS])
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 1)])
    return tokenizer


def write_byte_bpe(folder: Path, *, vocab: int = 600, **config: Any) -> Path:
    """A folder with a byte-level tokenizer.json as Llama-3 and Qwen have, and a ChatML template.

    `<think>` and `</think>` are added tokens that are not special.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(
            tokenizers.Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"),
            behavior="isolated",
        ),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(sentences(), trainer)
    tokenizer.add_special_tokens([tokenizers.AddedToken(t, special=True, normalized=False) for t in SPECIALS[1:]])
    tokenizer.add_tokens([tokenizers.AddedToken(t, normalized=False) for t in ("<think>", "</think>")])
    bos = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.Sequence([
        processors.ByteLevel(trim_offsets=False),
        processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, bos)]),
    ])  # fmt: skip
    tokenizer.save(str(folder / "tokenizer.json"))
    write_config(folder, **{"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": None} | config)
    return folder


def write_config(folder: Path, **config: Any) -> None:
    """tokenizer_config.json; a keyword that is None takes the default away."""
    defaults = {"bos_token": BOS, "eos_token": IM_END, "unk_token": UNK, "clean_up_tokenization_spaces": False}
    merged = defaults | {"chat_template": CHATML} | config
    text = json.dumps({key: value for key, value in merged.items() if value is not None}, indent=1)
    (folder / "tokenizer_config.json").write_text(text)
    if not (folder / "config.json").exists():
        (folder / "config.json").write_text('{"model_type": "llama"}')
