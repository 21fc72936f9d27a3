"""Fixtures of the tests of kernels/rt."""

from pathlib import Path

import pytest

from tests.kernels.rt.fakes import Calls


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Calls:
    """The calls of all fake libraries from now on, those in processes that the test starts among them."""
    path = tmp_path / "calls"
    monkeypatch.setenv("FAKE_LOG", str(path))
    monkeypatch.delenv("FAKE_FAIL", raising=False)
    return Calls(path)
