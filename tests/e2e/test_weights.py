"""The files that people have, and the machines: a GGUF file alone, weights made smaller on load, no kernels at all."""

from pathlib import Path

import pytest

from edgekv.demo import target_path
from tests.e2e.real_server import RealServer, real_server
from tests.model.gguf_files import make_gguf

QUESTION = "How do I grow tomatoes?"


@pytest.fixture(scope="module")
def q8_0(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("gguf") / "garden.gguf"
    return make_gguf(target_path(), out, types={"*": "Q8_0"})


def answer(server: RealServer) -> str:
    response = server.chat(QUESTION, temperature=0, max_tokens=200)
    assert response.status_code == 200, response.text
    choice = response.json()["choices"][0]
    assert choice["finish_reason"] == "stop"
    return str(choice["message"]["content"])


def complaints(server: RealServer) -> list[str]:
    return [line for line in server.lines if "the native CPU kernels cannot run" in line]


def test_a_gguf_file_is_served_under_its_name_with_tokenizer_and_template(q8_0: Path) -> None:
    with real_server(str(q8_0)) as server:
        text = answer(server)
        assert server.get("/v1/models").json()["data"][0]["id"].startswith("garden")
        assert not complaints(server)
    assert "tomato" in text.lower()
    assert "<|" not in text


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_weights_are_made_smaller_on_load(kind: str, tmp_path: Path) -> None:
    config = tmp_path / "edgekv.yaml"
    config.write_text(f"version: 1\nmodels:\n  garden:\n    path: '{target_path()}'\n    weights: {kind}\n")
    with real_server(str(config)) as server:
        assert "tomato" in answer(server).lower()


def test_without_a_compiler_and_without_a_library_it_serves_the_same_and_says_so_once(
    q8_0: Path, tmp_path: Path
) -> None:
    bare = {"PATH": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path), "CXX": ""}
    with real_server(str(q8_0), variables=bare) as server:
        text = answer(server)
        assert answer(server) == text
        [line] = complaints(server)
    assert "no C++ compiler" in line
    assert "several times slower; install a C++ compiler" in line
    assert "tomato" in text.lower()
