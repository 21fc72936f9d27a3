"""The real server on the card, with the bundled model. Fails to be imported where what serves is not installed."""

from collections.abc import Mapping
from pathlib import Path

from edgekv.demo import target_path
from tests.e2e.real_server import RealServer

QUESTIONS = ("How do I grow tomatoes?", "What should I plant in the shade?", "When do I prune roses?")


def start_server(
    folder: Path, *, device: str, module: str = "edgekv", variables: Mapping[str, str] | None = None
) -> RealServer:
    """In float32; `device` as in a configuration: auto is the card."""
    config = folder / f"{device}.yaml"
    model = f"path: '{target_path()}', dtype: float32, device: {device}"
    config.write_text(f"version: 1\nmodels:\n  garden: {{{model}}}\n")
    return RealServer(str(config), variables=variables, module=module)


def answers(server: RealServer) -> list[str]:
    """Greedy, one after the other, then all questions in one conversation."""
    texts = []
    for question in (*QUESTIONS, " ".join(QUESTIONS)):
        response = server.chat(question, temperature=0, max_tokens=120)
        assert response.status_code == 200, response.text
        texts.append(str(response.json()["choices"][0]["message"]["content"]))
    return texts
