"""The linear layers of AWQ and GPTQ checkpoints as matrices of encoding affine4.

Runs in: anywhere (no torch); owns: nothing.

Both keep a layer as `qweight`, `qzeros` and `scales` of I32, I32 and a float, [inputs, outputs] where the rest of the
world has [outputs, inputs]; 8 values share an int32, lowest bits first. With w = scale (q - zero):

          AWQ, version gemm                                   GPTQ
qweight   [in, out / 8]: values i are outputs _ORDER[i]       [in / 8, out]: values i are inputs i
qzeros    [groups, out / 8]: likewise                         [groups, out / 8]: values i are outputs i
scales    [groups, out]                                       [groups, out]
zero      as it is                                            1 less, modulo 16; as it is in checkpoint_format gptq_v2
                                                              g_idx [in]: the group of each input

From: awq/modules/linear/gemm.py of AutoAWQ, auto_gptq/nn_modules/qlinear/qlinear_cuda_old.py of AutoGPTQ, and
GPTQModel's conversion of one format to the other. A row of ours lies across all of qweight: strips of a few groups of
inputs are read and turned, never the whole.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgekv.errors import ModelError
from edgekv.kernels.quant.encodings import Encoding
from edgekv.model.quantised_config import GroupQuantisation
from edgekv.model.safetensors_tensor import SafetensorsTensor
from edgekv.model.stored import StoredTensor

_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_STRIP_BYTES = 512 << 10  # of qweight: what stays in the processor's cache while it is turned
_FLOATS = ("F16", "BF16", "F32")

Bytes = npt.NDArray[np.uint8]
Words = npt.NDArray[np.uint32]


def group_tensors(tensors: Mapping[str, SafetensorsTensor], quantisation: GroupQuantisation) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint, with `X.weight` instead of the parts of every X that was quantised.

    Raises ModelError for parts that are missing or do not fit together, and for inputs in an order of their own.
    """
    found: dict[str, StoredTensor] = dict(tensors)
    for name in tensors:
        if name.endswith(".qweight"):
            module = name.removesuffix(".qweight")
            made = _group_tensor(tensors, module, quantisation)
            for used in ("qweight", "qzeros", "scales", "g_idx"):
                found.pop(f"{module}.{used}", None)
            if found.setdefault(f"{module}.weight", made) is not made:
                raise made.qweight.fault("is there beside a weight that is not quantised")
    return found


@dataclass(frozen=True, slots=True)
class GroupTensor:
    """A quantised linear layer's weight, [outputs, inputs] of affine4; a `StoredTensor`."""

    quantisation: GroupQuantisation
    encoding: Encoding
    shape: tuple[int, int]
    qweight: SafetensorsTensor
    scales: SafetensorsTensor
    qzeros: SafetensorsTensor | None

    @property
    def path(self) -> Path:
        """The file of the quantised values."""
        return self.qweight.path

    @property
    def name(self) -> str:
        """That of the quantised values."""
        return self.qweight.name

    @property
    def num_bytes(self) -> int:
        """Of all rows in affine4."""
        return self.shape[0] * self.encoding.row_bytes(self.shape[1])

    def read_rows(self, first: int, target: memoryview) -> None:
        """Rows from `first` on, put together from strips; raises ModelError where a file ends."""
        row_bytes = self.encoding.row_bytes(self.shape[1])
        stop = first + len(target) // row_bytes
        rows = np.frombuffer(target, np.uint8).reshape(stop - first, -1, self.encoding.block_bytes)
        # int32s hold 8 outputs.
        whole_first, whole_stop = first // 8 * 8, -(-stop // 8) * 8
        if (whole_first, whole_stop) == (first, stop):
            self._read(first, rows)
            return
        whole = np.empty((whole_stop - whole_first, *rows.shape[1:]), np.uint8)
        self._read(whole_first, whole)
        rows[:] = whole[first - whole_first : stop - whole_first]

    def _read(self, first: int, rows: Bytes) -> None:
        """Fill `rows` [outputs, groups, block bytes]; `first` and their number are multiples of 8."""
        stop, cols, group = first + len(rows), self.shape[1], self.encoding.group
        file_group = self.quantisation.group or cols
        of_group = np.arange(cols // group) * group // file_group  # the file's group for each of ours
        rows[:, :, 0:2] = self._scales(first, stop)[of_group].T[..., None].copy().view(np.uint8)
        rows[:, :, 2] = self._zeros(first, stop)[of_group].T
        rows[:, :, 3] = 0
        turned = _turned_awq if self.quantisation.method == "awq" else _turned_gptq
        bits = 4 * len(rows)  # of one input
        groups = max(1, _STRIP_BYTES * 8 // (bits * group))
        for start in range(0, cols // group, groups):
            count = min(groups, cols // group - start)
            values = turned(self._strip(start * group, (start + count) * group, first, stop))
            rows[:, start : start + count, 4:] = values.reshape(len(rows), count, -1)

    def _strip(self, first_col: int, stop_col: int, first: int, stop: int) -> Words:
        """The int32s of qweight that hold these inputs and outputs."""
        if self.quantisation.method == "awq":
            return _part(self.qweight, slice(first_col, stop_col), slice(first // 8, stop // 8)).view(np.uint32)
        return _part(self.qweight, slice(first_col // 8, stop_col // 8), slice(first, stop)).view(np.uint32)

    def _scales(self, first: int, stop: int) -> npt.NDArray[np.float16]:
        """[the file's groups, outputs]; raises ModelError for scales that float16 has no number for."""
        raw = _part(self.scales, slice(0, self.scales.shape[0]), slice(first, stop))
        if self.scales.entry.dtype == "F16":
            scales = raw.view(np.float16)
        else:
            exact = raw.view(np.float32)
            if self.scales.entry.dtype == "BF16":
                exact = (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
            with np.errstate(over="ignore"):
                scales = exact.astype(np.float16)
        if not np.isfinite(scales).all():
            raise self.scales.fault("holds infinities, NaN or values too large for float16")
        return scales

    def _zeros(self, first: int, stop: int) -> Bytes:
        """[the file's groups, outputs]."""
        groups = self.scales.shape[0]
        if self.qzeros is None:
            return np.full((groups, stop - first), self.quantisation.zero, np.uint8)
        words = _part(self.qzeros, slice(0, groups), slice(first // 8, stop // 8)).view(np.uint32)
        order = _ORDER if self.quantisation.method == "awq" else tuple(range(8))
        zeros = np.empty((*words.shape, 8), np.uint8)
        for value, output in enumerate(order):
            zeros[..., output] = (words >> 4 * value) & 15
        return (zeros.reshape(groups, -1) + np.uint8(self.quantisation.zero_offset)) & np.uint8(15)


def _turned_awq(words: Words) -> Bytes:
    """Strips [inputs, outputs / 8] to the bytes of affine4, [outputs, inputs / 2]."""
    inputs, eighths = words.shape
    by_output = np.ascontiguousarray(words.T)  # [outputs / 8, inputs]
    turned = np.empty((eighths, 8, inputs // 32, 16), np.uint8)
    for value, output in enumerate(_ORDER):
        q = ((by_output >> np.uint32(4 * value)) & np.uint32(15)).astype(np.uint8).reshape(eighths, -1, 2, 16)
        np.bitwise_or(q[:, :, 0], q[:, :, 1] << np.uint8(4), out=turned[:, output])
    return turned.reshape(eighths * 8, -1)


def _turned_gptq(words: Words) -> Bytes:
    """Strips [inputs / 8, outputs] to the bytes of affine4, [outputs, inputs / 2]."""
    # Of each 4 int32s, 32 inputs, the first two are the low halves of 16 bytes and the others the high ones.
    q = words.reshape(-1, 2, 2, words.shape[1])
    turned = _spread(q[:, 0]) | _spread(q[:, 1]) << np.uint64(4)  # [inputs / 32, 2, outputs]
    return np.ascontiguousarray(turned.transpose(2, 0, 1)).view(np.uint8).reshape(words.shape[1], -1)


def _spread(words: Words) -> npt.NDArray[np.uint64]:
    """The 8 values of an int32 as the low halves of 8 bytes."""
    spread = words.astype(np.uint64)
    for bits, mask in ((16, 0x0000FFFF0000FFFF), (8, 0x00FF00FF00FF00FF), (4, 0x0F0F0F0F0F0F0F0F)):
        spread = (spread | spread << np.uint64(bits)) & np.uint64(mask)
    return spread


def _part(tensor: SafetensorsTensor, rows: slice, cols: slice) -> Bytes:
    """The bytes of some rows and columns of a matrix, [rows, bytes]."""
    height, width = tensor.shape
    item = tensor.entry.num_bytes // (height * width)
    row_bytes, start, wanted = width * item, cols.start * item, (cols.stop - cols.start) * item
    part = np.empty((rows.stop - rows.start, wanted), np.uint8)
    if wanted == row_bytes:
        tensor.read_bytes(rows.start * row_bytes, part.reshape(-1).data)
    else:
        for row, line in enumerate(part, rows.start):
            tensor.read_bytes(row * row_bytes + start, line.data)
    return part


def _group_tensor(
    tensors: Mapping[str, SafetensorsTensor], module: str, quantisation: GroupQuantisation
) -> GroupTensor:
    qweight = tensors[f"{module}.qweight"]

    def part(name: str, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> SafetensorsTensor:
        tensor = tensors.get(f"{module}.{name}")
        if tensor is None:
            raise ModelError(f"{qweight.path}: tensor '{module}.{name}': is missing, though there is a qweight")
        if tensor.shape != shape or tensor.entry.dtype not in dtypes:
            raise tensor.fault(
                f"is {tensor.entry.dtype} {list(tensor.shape)}, but beside a qweight of {list(qweight.shape)} and in "
                f"{quantisation.title}, it has to be {' or '.join(dtypes)} {list(shape)}"
            )
        return tensor

    if qweight.entry.dtype != "I32" or len(qweight.shape) != 2 or not all(qweight.shape):
        raise qweight.fault(f"is {qweight.entry.dtype} {list(qweight.shape)}, not a matrix of I32")
    height, width = qweight.shape
    rows, cols = (width * 8, height) if quantisation.method == "awq" else (width, height * 8)
    encoding = quantisation.encoding(cols)
    if encoding is None or rows % 8:
        raise qweight.fault(
            f"its {rows:,} outputs of {cols:,} inputs are no whole number of int32s and groups ({quantisation.title})"
        )
    groups = cols // (quantisation.group or cols)
    scales = part("scales", (groups, rows), _FLOATS)
    qzeros = None
    if quantisation.zero is None:
        qzeros = part("qzeros", (groups, rows // 8), ("I32",))
    if f"{module}.g_idx" in tensors:
        _refuse_own_order(part("g_idx", (cols,), ("I32",)), quantisation.group or cols)
    return GroupTensor(quantisation, encoding, (rows, cols), qweight, scales, qzeros)


def _refuse_own_order(g_idx: SafetensorsTensor, group: int) -> None:
    found = np.empty(g_idx.shape, np.int32)
    g_idx.read_bytes(0, found.view(np.uint8).data)
    if not np.array_equal(found, np.arange(len(found)) // group):
        raise g_idx.fault(
            "the inputs are in the order of their activations (desc_act), which is not supported: take a checkpoint "
            "made with desc_act: false, one in AWQ or GGUF, or the unquantised one with weights: int4"
        )
