"""A card that torch itself has no code for is refused when it is opened, by name."""

from types import SimpleNamespace

import pytest
import torch

from edgekv.engine.card_torch import WrongTorch, check_torch

DEVICE = torch.device("cuda:0")


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """Say what torch finds, and what it was built for."""

    def put(name: str, built_for: str, **properties: object) -> None:
        monkeypatch.setattr(torch.version, "hip", "7.2" if "gcnArchName" in properties else None)
        found = SimpleNamespace(name=name, **properties)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: built_for.split())

    return put


def test_a_card_that_torch_has_code_for_is_taken(card) -> None:  # type: ignore[no-untyped-def]
    card("RTX 4090", "sm_80 sm_86", major=8, minor=9)
    check_torch(DEVICE)
    card("Radeon RX 7900 XTX", "gfx1030 gfx1100", gcnArchName="gfx1100")
    check_torch(DEVICE)
    card("MI210", "gfx90a", gcnArchName="gfx90a:sramecc+:xnack-")
    check_torch(DEVICE)
    card("whatever", "", major=3, minor=7)
    check_torch(DEVICE)


def test_one_that_it_has_none_for_is_named_with_a_way_out(card) -> None:  # type: ignore[no-untyped-def]
    card("GTX 1080", "sm_75 sm_80", major=6, minor=1)
    with pytest.raises(WrongTorch) as refused:
        check_torch(DEVICE)
    assert str(refused.value) == (
        f"GTX 1080: torch {torch.__version__} has code for sm_75, sm_80 and none for sm_61; CUDA 12.6 is the last with "
        "it: pip install 'torch<2.15' --index-url https://download.pytorch.org/whl/cu126"
    )
    card("Radeon 780M", "gfx1100 gfx1101", gcnArchName="gfx1103")
    with pytest.raises(WrongTorch, match=r"none for gfx1103; AMD builds it for this card: pip install 'torch\[device-"):
        check_torch(DEVICE)
