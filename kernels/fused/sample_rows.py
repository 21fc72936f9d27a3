"""How each row's token is chosen, as the sampler's kernels read it: at addresses that stay, so that graphs may too.

Runs in: engine thread; owns: the settings' memory on the device (SampleRows).
"""

import math
from collections.abc import Sequence
from ctypes import Structure, c_float, c_int32, c_uint64
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_EDITED, _COUNTED, _LOGPROBS = 1, 2, 4
_SMALLEST, _LARGEST = 2.0**-126, 3e38  # normal float32
_MOST_TOKENS = 2**31 - 1


class EkSampleRow(Structure):
    """One row's settings. All zeros: the likeliest token is taken."""

    _fields_ = (
        ("seed", c_uint64),
        ("counter", c_uint64),
        ("top_p", c_uint64),
        ("top_k", c_int32),
        ("scale", c_float),
        ("min_p", c_float),
        ("repetition", c_float),
        ("frequency", c_float),
        ("presence", c_float),
        ("counts_row", c_int32),
        ("num_edits", c_int32),
        ("num_banned", c_int32),
        ("least_tokens", c_int32),
        ("flags", c_int32),
        ("num_top", c_int32),
    )


@dataclass(frozen=True, slots=True)
class RowSettings:
    """How a row's token is chosen; the defaults leave the model's distribution as it is.

    `counter` is the number of tokens generated so far, and with `seed` makes the random number. `edits` are added to
    the logits of single tokens before anything else. The tokens `banned` may not come before there are `min_tokens`.
    Penalties need `counts_row`, the row's place in the table of counts. `logprobs` N asks for the token's
    log-probability and the N likeliest tokens.
    """

    seed: int = 0
    counter: int = 0
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    edits: Sequence[tuple[int, float]] = ()
    banned: Sequence[int] = ()
    min_tokens: int = 0
    counts_row: int | None = None
    logprobs: int | None = None

    @property
    def is_penalised(self) -> bool:
        """Whether what was said before matters."""
        return self.repetition_penalty != 1.0 or bool(self.presence_penalty or self.frequency_penalty)


@dataclass(frozen=True, slots=True, eq=False)
class PackedRows:
    """Rows in main memory as they lie on the device; there are as many edits for each as the one with most has."""

    settings: Tensor  # [rows, 72] uint8
    edit_ids: Tensor  # [rows, edits] int32
    edit_values: Tensor  # [rows, edits] float32


@dataclass(frozen=True, slots=True, eq=False)
class SampleRows:
    """The settings of rows on the device, where steps find them and count on."""

    settings: Tensor  # [rows, 72] uint8
    edit_ids: Tensor  # [rows, most edits] int32
    edit_values: Tensor  # [rows, most edits] float32

    def write(self, packed: PackedRows, first_row: int = 0) -> None:
        """Put them there, from a row on, behind what torch's stream has to do already.

        Does not wait: where they are pinned, they stay as they are until the stream has come past. Raises ValueError
        where there is no room for so many rows, or for so many edits of one.
        """
        num_rows, num_edits = packed.edit_ids.shape
        if not 0 <= first_row <= len(self.settings) - num_rows or num_edits > self.edit_ids.shape[1]:
            room = f"{len(self.settings)} rows with {self.edit_ids.shape[1]} edits each"
            raise ValueError(f"{num_rows} rows from {first_row} on with up to {num_edits} edits do not fit in {room}")
        rows = slice(first_row, first_row + num_rows)
        self.settings[rows].copy_(packed.settings, non_blocking=True)
        if num_edits:
            self.edit_ids[rows, :num_edits].copy_(packed.edit_ids, non_blocking=True)
            self.edit_values[rows, :num_edits].copy_(packed.edit_values, non_blocking=True)


def rows_bytes(num_rows: int, most_edits: int) -> int:
    """Bytes of `make_rows`."""
    return num_rows * (np.dtype(EkSampleRow).itemsize + 8 * most_edits)


def make_rows(num_rows: int, most_edits: int, device: torch.device) -> SampleRows:
    """For so many rows, each with up to so many edited and banned tokens; all take the likeliest token so far."""
    return SampleRows(
        torch.zeros(num_rows, np.dtype(EkSampleRow).itemsize, dtype=torch.uint8, device=device),
        torch.zeros(num_rows, most_edits, dtype=torch.int32, device=device),
        torch.zeros(num_rows, most_edits, device=device),
    )


def pack_rows(rows: Sequence[RowSettings], vocab_size: int) -> PackedRows:
    """The rows' settings in main memory. Raises ValueError for penalties without a row of counts."""
    packed = np.zeros(len(rows), dtype=np.dtype(EkSampleRow))
    edits = [_added(row) for row in rows]
    banned = [dict.fromkeys(row.banned) if row.min_tokens > row.counter else {} for row in rows]
    most = max((len(own) + len(never) for own, never in zip(edits, banned, strict=True)), default=0)
    ids, values = np.zeros((len(rows), most), np.int32), np.zeros((len(rows), most), np.float32)
    for index, row in enumerate(rows):
        own, never = edits[index], banned[index]
        into = packed[index]
        into["num_edits"], into["num_banned"] = len(own), len(never)
        into["least_tokens"] = min(row.min_tokens, _MOST_TOKENS)
        ids[index, : len(own) + len(never)] = (*own, *never)
        values[index, : len(own)] = tuple(own.values())
        _pack_row(into, row, vocab_size)
    settings = torch.from_numpy(packed.view(np.uint8).reshape(len(rows), packed.itemsize))
    return PackedRows(settings, torch.from_numpy(ids), torch.from_numpy(values))


def _added(row: RowSettings) -> dict[int, float]:
    """Each id once."""
    added: dict[int, float] = {}
    for token_id, value in row.edits:
        added[token_id] = added.get(token_id, 0.0) + value
    return added


def _pack_row(into: "np.void", row: RowSettings, vocab_size: int) -> None:
    into["seed"], into["counter"] = row.seed % 2**64, row.counter
    into["top_p"] = top_p_share(row.top_p)
    into["top_k"] = 0 if row.top_k is None or row.top_k >= vocab_size else row.top_k
    into["scale"] = 0.0 if row.temperature == 0 else min(max(math.log2(math.e) / row.temperature, _SMALLEST), _LARGEST)
    into["min_p"] = row.min_p
    into["repetition"] = row.repetition_penalty
    into["frequency"], into["presence"] = row.frequency_penalty, row.presence_penalty
    flags = 0
    if row.edits or row.is_penalised:
        flags |= _EDITED
    if row.is_penalised:
        if row.counts_row is None:
            raise ValueError("penalties need a row in the table of counts")
        flags |= _COUNTED
        into["counts_row"] = row.counts_row
    if row.logprobs is not None:
        flags |= _LOGPROBS
        into["num_top"] = row.logprobs
    into["flags"] = flags


def top_p_share(top_p: float) -> int:
    """top_p as a share of 2^64, 0 for no limit.

    Rounded down to a multiple of 2^-40, so that ten equals and top_p 0.7 are seven, whose share is not below 0.7 but
    for what decimal fractions lose in binary.
    """
    return 0 if top_p >= 1.0 else max(int(top_p * 2**40), 1) << 24
