"""Rows of a checkpoint as they are to be kept: read in chunks, converted or quantised on the way.

Runs in: the thread that loads; owns: one chunk of staging. No value that is kept as it is stored changes.
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch

from edgekv.errors import ModelError
from edgekv.kernels.quant.dequantise import dequantise
from edgekv.kernels.quant.encodings import Encoding
from edgekv.kernels.quant.quantise import quantise
from edgekv.model.stored import StoredTensor
from edgekv.model.weights import FLOATS, Progress

Bytes = npt.NDArray[np.uint8]

_CHUNK_BYTES = 16 << 20


class RowReader:
    """Reads one tensor after the other; `progress` hears of every chunk of `total_bytes`."""

    def __init__(self, *, total_bytes: int, progress: Progress) -> None:
        self._done_bytes, self._total_bytes, self._progress = 0, total_bytes, progress
        self._staging = np.empty(_CHUNK_BYTES, np.uint8)

    def chunks(self, tensor: StoredTensor, kept: Encoding) -> Iterator[tuple[int, Bytes]]:
        """Each chunk's first row, and its rows in `kept`, [rows, row bytes], valid until the next chunk is asked for.

        Raises ModelError where a file fails.
        """
        rows, cols = tensor.shape
        stored = tensor.encoding
        row_bytes = stored.row_bytes(cols)
        # A chunk is counted in the larger of what is read and what that becomes.
        widest = max(row_bytes, kept.row_bytes(cols), 0 if stored.is_float else 4 * cols * (stored != kept))
        chunk = max(1, _CHUNK_BYTES // widest)
        for first in range(0, rows, chunk):
            read = self._read(tensor, first, min(chunk, rows - first), row_bytes)
            yield first, read if stored == kept else _converted(tensor, read, cols, kept)

    def vector(self, tensor: StoredTensor) -> npt.NDArray[np.float32]:
        """A vector, in float32."""
        raw = self._read(tensor, 0, tensor.shape[0], tensor.encoding.row_bytes(1))
        return np.array(torch.from_numpy(raw.reshape(-1)).view(FLOATS[tensor.encoding]).float().numpy())

    def _read(self, tensor: StoredTensor, first: int, count: int, row_bytes: int) -> Bytes:
        """Some rows, [rows, row bytes], until the next are read."""
        num_bytes = count * row_bytes
        if num_bytes > len(self._staging):  # a single row of that length
            self._staging = np.empty(num_bytes, np.uint8)
        rows = self._staging[:num_bytes]
        tensor.read_rows(first, rows.data)
        self._done_bytes += num_bytes
        self._progress(self._done_bytes, self._total_bytes, "reading weights")
        return rows.reshape(count, row_bytes)


def _converted(tensor: StoredTensor, rows: Bytes, cols: int, kept: Encoding) -> Bytes:
    """Rows of the tensor in another encoding: rounded to another float, or quantised."""
    raw = torch.from_numpy(rows)
    plain = raw.view(FLOATS[tensor.encoding]) if tensor.encoding.is_float else dequantise(tensor.encoding, raw, cols)
    if kept in FLOATS:
        made = plain.to(FLOATS[kept]).view(torch.uint8)
    else:
        try:
            made = quantise(kept, plain)
        except ValueError as error:
            raise ModelError(f"{tensor.path}: tensor '{tensor.name}': {error}") from None
    return np.asarray(made.numpy())
