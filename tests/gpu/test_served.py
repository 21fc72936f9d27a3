"""The bundled model served on the card says what it says on the processor, with nothing installed but the wheels."""

from pathlib import Path

import pytest

from tests.gpu.bed import Bed

servers = pytest.importorskip("tests.gpu.servers", exc_type=ImportError)


def _said(folder: Path, device: str, variables: dict[str, str] | None = None) -> tuple[list[str], str]:
    server = servers.start_server(folder, device=device, variables=variables)
    try:
        said = servers.answers(server)
        assert server.stop() == 0, server.output
        return said, server.output
    finally:
        server.kill()


@pytest.fixture(scope="module")
def on_the_processor(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return _said(tmp_path_factory.mktemp("cpu-server"), "cpu")[0]


def test_answers_are_the_processors(on_the_processor: list[str], bed: Bed, tmp_path: Path) -> None:
    said, output = _said(tmp_path, "auto")
    if bed.is_real:
        assert "the card's kernels" in output
    assert said == on_the_processor


def test_a_machine_without_a_toolkit_will_do(on_the_processor: list[str], real: Bed, tmp_path: Path) -> None:
    bare = {"PATH": "", "CUDA_HOME": "", "CUDA_PATH": "", "ROCM_PATH": "", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    said, output = _said(tmp_path, "auto", bare)
    assert "the card's kernels" in output, output
    assert said == on_the_processor
