"""Sample answers through Hugging Face transformers, the way a stranger would load the folder.

Runs in: the training process, after the export; owns: nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPTS = (
    "Hello!", "Who are you?", "What can you do?", "How do I grow carrots?", "When should I sow tomatoes?",
    "Give me a tip for watering.", "Write a short story about a hedgehog.", "Why should I water in the morning?",
    "List three herbs.", "What should I do in the garden in October?", "Tell me about bumblebees.",
    "Slugs are eating my lettuce. What should I do?", "What is the capital of France?",
    "Write a short poem about autumn.", "Describe basil as JSON.", "Thank you!",
)  # fmt: skip


def answers(
    folder: Path, prompts: tuple[str, ...] = PROMPTS, *, temperature: float | None = None, seed: int = 0
) -> list[tuple[str, str, bool]]:
    """(prompt, answer, whether it ended by itself) for each prompt; greedy without a temperature."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    out = []
    for prompt in prompts:
        torch.manual_seed(seed)
        chat = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        how: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None}
        if temperature is not None:
            how = {"do_sample": True, "temperature": temperature, "top_p": 0.95}
        ids = model.generate(**inputs, max_new_tokens=400, **how)[0][inputs["input_ids"].shape[1] :].tolist()
        ended = ids[-1] in model.generation_config.eos_token_id
        out.append((prompt, tokenizer.decode(ids, skip_special_tokens=True).strip(), ended))
    return out
