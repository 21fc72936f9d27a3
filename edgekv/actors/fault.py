"""What an engine's death means for those who wait and for the process. Runs in: anywhere; owns: nothing."""

from dataclasses import dataclass

from edgekv.actors.stream import Failed
from edgekv.engine.driver import DeviceLost
from edgekv.engine.memory_errors import is_out_of_memory
from edgekv.errors import EdgeKVError

# torch.AcceleratorError by its name, because nothing here needs torch for anything else.
_DEVICE_ERROR_TYPE = "AcceleratorError"
_DEVICE_ERROR_PREFIXES = ("CUDA error:", "CUDA driver error:", "HIP error:")

RESTARTING = Failed("engine_restarting", "The engine crashed and is being restarted; please send the request again.")
DRAINING = Failed("draining", "The server is shutting down.")
DEVICE_LOST = Failed("device_lost", "The device stopped working; the server has to be started again.")
NOT_LOADED = Failed("engine_failed", "The model could not be loaded; the server's log says why.")
GAVE_UP = Failed("engine_failed", "The engine kept crashing and is not restarted any more; the server's log says why.")


@dataclass(frozen=True, slots=True)
class Verdict:
    """One death: whether another life would be in vain, and what the open streams are told."""

    fatal: bool
    told: Failed


def is_device_error(error: BaseException) -> bool:
    """Whether the device is lost to this process: such errors are sticky and come back with every call."""
    if is_out_of_memory(error):
        return False  # torch says it in the words of a lost device where its own allocator was not asked
    if isinstance(error, DeviceLost) or any(kind.__name__ == _DEVICE_ERROR_TYPE for kind in type(error).__mro__):
        return True
    return isinstance(error, RuntimeError) and str(error).startswith(_DEVICE_ERROR_PREFIXES)


def judge(error: BaseException, *, loading: bool) -> Verdict:
    """What `error` means; `loading` says that it came up before the core was made.

    A lost device needs a new process. An error that is a person's to put right (a file that is not there, a model that
    cannot be read, a budget that does not hold it) would come up again with the next loading. Everything else is a bug:
    restart.
    """
    if is_device_error(error):
        return Verdict(True, DEVICE_LOST)
    if loading and isinstance(error, EdgeKVError | OSError):
        return Verdict(True, NOT_LOADED)
    return Verdict(False, RESTARTING)
