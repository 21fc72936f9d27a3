"""Where there is no card, one test of this folder is skipped, with a line that says so, and the others are left out."""

import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from edgekv.kernels.rt.compiler import CompileFailed
from edgekv.kernels.rt.registry import KernelSpec, KernelUnavailable
from tests.gpu.bed import ONCE, Bed, open_bed, why_no_card

HERE = Path(__file__).parent
if why_no_card() is not None:
    collect_ignore = [path.name for path in HERE.glob("test_*.py") if path.name != "test_card.py"]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    own = [item for item in items if HERE in item.path.parents]
    for item in own:
        item.add_marker(pytest.mark.gpu)
    if ONCE:
        first = {item.nodeid.partition("[")[0]: item for item in reversed(own)}
        left_out = [item for item in own if first[item.nodeid.partition("[")[0]] is not item]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture(scope="session")
def opened(request: pytest.FixtureRequest) -> Bed:
    if (reason := why_no_card()) is not None:
        pytest.skip(reason)
    bed = open_bed()
    if bed.is_real:
        _compile(bed, request.session.items)
    return bed


@pytest.fixture
def bed(opened: Bed, request: pytest.FixtureRequest) -> Iterator[Bed]:
    """The card, as long as it has not been lost: then nothing that comes after tells anything."""
    if opened.lost is not None:
        pytest.skip(opened.lost)
    yield opened
    try:
        opened.wait()
    except RuntimeError as error:
        opened.lost = f"the card was lost in {request.node.name}: {str(error).splitlines()[0]}"


@pytest.fixture
def real(bed: Bed) -> Bed:
    """A card that is one."""
    if not bed.is_real:
        pytest.skip("main memory is no card's")
    return bed


def _compile(bed: Bed, items: list[pytest.Item]) -> None:
    """All kernels that modules say they want (`specs`), on all cores: one after the other takes minutes."""
    modules = {getattr(item, "module", None) for item in items if HERE in item.path.parents}
    specs: list[KernelSpec] = [spec for module in modules for spec in getattr(module, "specs", lambda bed: ())(bed)]
    begun = time.perf_counter()
    # One that does not compile fails the tests that want it, and no others.
    with suppress(CompileFailed, KernelUnavailable):
        bed.card.compile(tuple(dict.fromkeys(specs)), lambda done, total: None)
    print(f"\n{len(set(specs))} kernels compiled or found in {time.perf_counter() - begun:.1f} s")
