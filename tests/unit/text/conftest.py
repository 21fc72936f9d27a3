import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgekv.text.tokenizer import Tokenizer, load_tokenizer
from tests.unit.text import tiny_tokenizers


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Model folders by the kind of their tokenizer."""
    root = tmp_path_factory.mktemp("tokenizers")
    write = tiny_tokenizers.write_sentencepiece
    return {
        "sentencepiece": write(root / "sentencepiece"),
        "sentencepiece-legacy": write(root / "legacy", legacy=True),
        "llama-json": write(root / "llama-json", with_json=True),
        "llama-json-legacy": write(root / "llama-json-legacy", with_json=True, legacy=True),
        "llama-2-json": write(root / "llama-2-json", with_json=True, tokenizer_class="PreTrainedTokenizerFast"),
        "byte-level": tiny_tokenizers.write_byte_bpe(root / "byte-level"),
    }


@pytest.fixture(scope="session")
def tokenizers(folders: dict[str, Path]) -> dict[str, Tokenizer]:
    return {kind: load_tokenizer(folder) for kind, folder in folders.items()}


@pytest.fixture(scope="session")
def oracle() -> Callable[[Path], Any]:
    """transformers' tokenizer of a folder."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import AutoTokenizer
    known: dict[Path, Any] = {}

    def load(folder: Path) -> Any:
        if folder not in known:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                known[folder] = AutoTokenizer.from_pretrained(folder)
        return known[folder]

    return load
