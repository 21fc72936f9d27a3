"""A model whose token ids mean something else than those of the one that it was copied from."""

import json
import shutil
from pathlib import Path


def copy_with_other_tokens(model: Path, folder: Path) -> Path:
    """Copy a model folder; two of its tokens have changed places."""
    shutil.copytree(model, folder)
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    one, two = list(vocabulary)[300:302]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    file.write_text(json.dumps(tokenizer), encoding="utf-8")
    return folder
