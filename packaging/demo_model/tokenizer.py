"""One tokenizer in two files: ``tokenizer.model`` for sentencepiece and ``tokenizer.json`` for tokenizers.

A byte-pair model of 2,048 pieces with byte fallback, no normalisation and no space put in front, so that text is
encoded the same wherever it stands and every string survives the way there and back.

Runs in: anywhere; owns: nothing. Training uses one thread and is deterministic.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path

import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE

from .corpus import IM_END, IM_START

VOCAB_SIZE = 2048
UNK, BOS, EOS = "<unk>", "<s>", "</s>"
SPECIALS = (UNK, BOS, EOS, IM_START, IM_END)
BOS_ID, EOS_ID, IM_START_ID, IM_END_ID = 1, 2, 3, 4
SPACE = "▁"


def train_sentencepiece(texts: Iterable[str]) -> bytes:
    """The bytes of ``tokenizer.model``, learnt from plain texts without special tokens."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, model_type="bpe", vocab_size=VOCAB_SIZE,
        byte_fallback=True, character_coverage=1.0, split_digits=True, add_dummy_prefix=False,
        remove_extra_whitespaces=False, allow_whitespace_only_pieces=True, normalization_rule_name="identity",
        unk_id=0, bos_id=BOS_ID, eos_id=EOS_ID, pad_id=-1, control_symbols=[IM_START, IM_END],
        num_threads=1, max_sentence_length=16384, minloglevel=2,
    )  # fmt: skip
    return model.getvalue()


def equivalent_json(model: bytes) -> str:
    """The text of ``tokenizer.json``: the same pieces, and merges in the order sentencepiece applies them."""
    sp = sentencepiece.SentencePieceProcessor(model_proto=model)
    vocab = {sp.id_to_piece(i): i for i in range(sp.get_piece_size())}
    merges: list[tuple[int, int, int, str, str]] = []
    for piece, index in vocab.items():
        if len(piece) < 2 or sp.is_control(index) or sp.is_byte(index) or sp.is_unknown(index):
            continue
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocab and right in vocab:
                merges.append((index, vocab[left], vocab[right], left, right))
    merges.sort()  # a piece's id grows as its score falls
    pairs = [(left, right) for *_, left, right in merges]
    tokenizer = Tokenizer(BPE(vocab, pairs, unk_token=UNK, fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, BOS_ID)]
    )
    return str(tokenizer.to_str(pretty=True)) + "\n"


def write_tokenizer(model: bytes, folder: Path) -> None:
    """Both files into ``folder``."""
    (folder / "tokenizer.model").write_bytes(model)
    (folder / "tokenizer.json").write_text(equivalent_json(model), encoding="utf-8")
