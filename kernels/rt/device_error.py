"""What a driver answers when something went wrong. Runs in: anywhere; owns: nothing.

CUDA and HIP number alike what matters here: CUresult of cuda.h (13.5), hipError_t of hip_runtime_api.h (6.3).
"""

_OUT_OF_MEMORY = 2
# After one of these every call of the process fails until it ends. cuda.h says so itself of most; where it says less,
# the reason is given here. HIP's runtime answers 700, 719 or 999 to everything once its device is in error.
_LOST = frozenset(
    (
        214,  # an uncorrectable ECC error: what memory held is wrong
        220,  # an uncorrectable error of NVLink, likewise
        226,  # a contained error of the device
        700,  # illegal address
        702,  # a kernel ran for longer than the display allows
        709,  # the context is destroyed
        710,  # an assertion in a kernel: the context must be destroyed
        714,  # hardware stack error
        715,  # illegal instruction
        716,  # misaligned address
        717,  # invalid address space
        718,  # invalid program counter
        719,  # launch failure
        721,  # a leak of tensor memory
        810,  # the multi-process server has ended this client
        999,  # unknown: also what CUDA answers after a suspend that its memory did not survive
    )
)
_REMEDIES = {
    3: "the driver is not initialised in this process: the device has to be set first, and not before a fork",
    34: "this libcuda is a stub for building; the driver's own has to be found before it",
    200: "the driver does not take this code: update the driver, or install the torch build that fits it",
    201: "no device is set in this thread",
    209: "the code is for another card than the one that is set",
    222: "the compiler is newer than the driver: update the driver, or install the torch build that fits it",
    701: "the kernel needs more registers or shared memory than this card has",
}


class DriverError(Exception):
    """A call of the driver failed, and nothing but that call."""

    def __init__(self, call: str, number: int, name: str, text: str = "") -> None:
        remedy = _REMEDIES.get(number, "")
        super().__init__("; ".join(filter(None, (f"{call}: {name} ({number})", text, remedy))))
        self.call, self.number, self.name = call, number, name


class OutOfDeviceMemory(DriverError):
    """The device has no memory left for this call."""


class DeviceLost(DriverError):
    """The device's state in this process is gone for good: memory, modules, graphs. Only a new process helps."""


def device_error(call: str, number: int, name: str, text: str = "") -> DriverError:
    """The error of its own kind."""
    if number == _OUT_OF_MEMORY:
        return OutOfDeviceMemory(call, number, name, text)
    return (DeviceLost if number in _LOST else DriverError)(call, number, name, text)
