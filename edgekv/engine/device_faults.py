"""What the kernels' own driver calls say, as the engine knows it: out of memory, or a device that is lost.

Runs in: engine thread; owns: nothing.
"""

from collections.abc import Callable
from typing import TypeVar

from edgekv.engine.driver import DeviceLost
from edgekv.kernels.rt import device_error

T = TypeVar("T")


class OutOfCardMemory(MemoryError):
    """The driver had no memory left for a call of ours."""


def told_as_torch(call: Callable[[], T]) -> T:
    """What `call` answers. Raises MemoryError or `engine.driver.DeviceLost` for the driver's errors of that kind."""
    try:
        return call()
    except device_error.OutOfDeviceMemory as error:
        raise OutOfCardMemory(str(error)) from error
    except device_error.DeviceLost as error:
        raise DeviceLost(str(error)) from error
