"""Whether the installed torch has code for a card at all.

Runs in: engine thread; owns: nothing. `edgekv doctor` and the choice of a device say the same of torch's files.
"""

import torch

from edgekv.engine.card_device import target_of
from edgekv.errors import EdgeKVError
from edgekv.smi.torch_code import why_no_code


class WrongTorch(EdgeKVError):
    """The installed torch was built for other cards."""


def check_torch(device: torch.device) -> None:
    """Raises WrongTorch naming the card, what torch was built for, and which build to install."""
    properties = torch.cuda.get_device_properties(device)
    lacking = why_no_code(target_of(properties), torch.cuda.get_arch_list())
    if lacking is not None:
        raise WrongTorch(f"{properties.name}: torch {torch.__version__} {lacking.reason}; {lacking.remedy}")
