"""sample_edit.h and sample.h: a step's tokens from its logits, without the host seeing either.

Runs in: engine thread; owns: the results' memory (SampleRoom) and the table of counts.

Steps are launched ahead of what the host has read: step N + 1 begins while the tokens of step N are on their way to it,
and a graph captured once is every step. So whatever changes from step to step changes on the device:

- A row stays a sequence's own for as long as it decodes. `SampleRoom.tokens`, where step N leaves a row's token, is
  where step N + 1 finds what to embed. Its settings are written once (SampleRows.write), as it begins; its first token
  is sampled into the same row (`first_row`).
- The sampler adds 1 to the row's counter, the place in its stream of random numbers, at every step, and with it come
  the end of `min_tokens`. The token is counted for the penalties where its row of counts is.
- What the host wants to read of step N (tokens, faults, log-probabilities) is copied behind it on the same stream, into
  pinned memory, before step N + 1 is launched, which writes to the same places; the host then waits for that copy's
  event and not for the stream. Two sets of pinned memory in turns are enough.
- Where step N turns out to have ended a sequence (an end token, a stop string, a fault), step N + 1 has sampled it once
  more: that token is not the host's to report. Row and row of counts may be given to another sequence at once, since
  what is written to them comes behind step N + 1.
- Settings written to a row that goes on decoding, or to another row for it, say as `counter` how many tokens its
  sequence has with those that the host has not read yet; so do counts filled for it, which need the tokens themselves,
  and therefore the host to have read them.
- A row that is nobody's is sampled too, and nothing is read of it: by zeros it takes the likeliest token.
"""

from collections.abc import Iterator, Sequence
from ctypes import Structure, c_int32, c_int64, c_uint64
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from edgekv.kernels.common.prepared import Prepared, blocks_of
from edgekv.kernels.fused.sample_rows import SampleRows
from edgekv.kernels.rt.registry import KernelSpec

CHUNK = 2048  # tokens that a thread block of sample_edit sees to
EDIT_THREADS = 256
THREADS, CANDIDATES = 1024, 2048
MOST_COUNTED = 0x7FFF  # of one token in an output; from there on the penalty does not grow
_IN_PROMPT = 0x8000


class EkSample(Structure):
    """The arguments of both kernels."""

    _fields_ = (
        ("logits", c_uint64),
        ("scores", c_uint64),
        ("rows", c_uint64),
        ("edit_ids", c_uint64),
        ("edit_values", c_uint64),
        ("counts", c_uint64),
        ("bests", c_uint64),
        ("raw_bests", c_uint64),
        ("tokens", c_uint64),
        ("faults", c_uint64),
        ("logprobs", c_uint64),
        ("top_ids", c_uint64),
        ("top_logprobs", c_uint64),
        ("logits_stride", c_int64),
        ("scores_stride", c_int64),
        ("counts_stride", c_int64),
        ("vocab", c_int32),
        ("chunks", c_int32),
        ("max_top", c_int32),
        ("edits_stride", c_int32),
    )


@dataclass(frozen=True, slots=True, eq=False)
class SampleRoom:
    """Memory on the device for so many rows: what is between the kernels, and what they answer."""

    scores: Tensor  # [rows, vocab] float32
    bests: Tensor  # [2, rows, chunks] int64
    tokens: Tensor  # [rows] int32
    faults: Tensor  # [rows] int32: 1 where no token can be chosen
    logprobs: Tensor  # [rows] float32, written where they are asked for
    top_ids: Tensor  # [rows, most] int32, -1 behind the last
    top_logprobs: Tensor  # [rows, most] float32


def room_bytes(num_rows: int, vocab_size: int, most_logprobs: int) -> int:
    """Bytes of `make_room`."""
    chunks = blocks_of(vocab_size, CHUNK)
    return num_rows * (4 * vocab_size + 16 * chunks + 12 + 8 * most_logprobs)


def make_room(num_rows: int, vocab_size: int, most_logprobs: int, device: torch.device) -> SampleRoom:
    """For steps of up to `num_rows` rows. Raises ValueError for more log-probabilities than can be sorted."""
    if most_logprobs > CANDIDATES:
        raise ValueError(f"{most_logprobs} log-probabilities of a row are more than {CANDIDATES}")
    chunks = blocks_of(vocab_size, CHUNK)
    return SampleRoom(
        torch.empty(num_rows, vocab_size, device=device),
        torch.empty(2, num_rows, chunks, dtype=torch.int64, device=device),
        torch.empty(num_rows, dtype=torch.int32, device=device),
        torch.empty(num_rows, dtype=torch.int32, device=device),
        torch.empty(num_rows, device=device),
        torch.empty(num_rows, most_logprobs, dtype=torch.int32, device=device),
        torch.empty(num_rows, most_logprobs, device=device),
    )


def make_counts(num_rows: int, vocab_size: int, device: torch.device) -> Tensor:
    """A table of counts, [rows, vocab] int16, for sequences with penalties."""
    return torch.zeros(num_rows, vocab_size, dtype=torch.int16, device=device)


def fill_counts(row: Tensor, prompt: Sequence[int], output: Sequence[int]) -> None:
    """Make a row of the table that of a sequence which begins, or goes on after it was preempted.

    Behind what torch's stream has to do already; does not wait for it.
    """
    vocab_size = len(row)
    counts = np.bincount(np.fromiter(output, np.int64, len(output)), minlength=vocab_size)
    words = counts.clip(max=MOST_COUNTED).astype(np.uint16)
    words[np.fromiter(prompt, np.int64, len(prompt))] |= _IN_PROMPT
    row.copy_(torch.from_numpy(words.view(np.int16)), non_blocking=True)  # of pageable memory a copy is made first


def edit_spec() -> KernelSpec:
    """The first kernel."""
    return KernelSpec("fused/sample_edit.h", "ek_sample_edit", EDIT_THREADS, EkSample)


def spec(threads: int = THREADS, candidates: int = CANDIDATES) -> KernelSpec:
    """The second; its answers are the same for any number of threads and candidates (powers of two)."""
    defines = {"EK_SAMPLE_THREADS": threads, "EK_CANDIDATES": candidates}
    return KernelSpec("fused/sample.h", "ek_sample", threads, EkSample, defines)


def variants() -> Iterator[KernelSpec]:
    """Those that stand for all in the compile matrix: both kernels."""
    yield edit_spec()
    yield spec()


def prepare(
    logits: Tensor,
    rows: SampleRows,
    room: SampleRoom,
    counts: Tensor,
    *,
    first_row: int = 0,
    threads: int = THREADS,
    candidates: int = CANDIDATES,
) -> list[Prepared]:
    """Choose a token for each row: two launches, one after the other. Raises ValueError for what does not fit.

    Args:
        logits: [rows, vocab] float32, dense in the last dimension; left as they are.
        rows: as many settings or more, on the device.
        room: for as many rows or more, with the answers.
        counts: the table; what is drawn for rows with penalties is counted in it.
        first_row: whose settings and answers those of the first row of logits are.
        threads: as of `spec`.
        candidates: as of `spec`.
    """
    num_rows, vocab_size = logits.shape
    if logits.dtype != torch.float32 or logits.stride(1) != 1:
        raise ValueError(f"logits are float32 and dense, not {logits.dtype} with strides {logits.stride()}")
    most = min(len(room.tokens), len(rows.settings))
    if not 0 <= first_row <= most - num_rows or room.scores.shape[1] != vocab_size:
        raise ValueError(
            f"{most} rows of {room.scores.shape[1]} tokens have no room for logits {list(logits.shape)}"
            f" from row {first_row} on"
        )
    if counts.dtype != torch.int16 or counts.shape[1] != vocab_size or counts.stride(1) != 1:
        raise ValueError(f"a table of {counts.dtype} {list(counts.shape)} counts no vocabulary of {vocab_size}")
    chunks = room.bests.shape[2]
    args = EkSample(
        logits.data_ptr(),
        room.scores[first_row].data_ptr(),
        rows.settings[first_row].data_ptr(),
        rows.edit_ids[first_row].data_ptr(),
        rows.edit_values[first_row].data_ptr(),
        counts.data_ptr(),
        room.bests[0, first_row].data_ptr(),
        room.bests[1, first_row].data_ptr(),
        room.tokens[first_row:].data_ptr(),
        room.faults[first_row:].data_ptr(),
        room.logprobs[first_row:].data_ptr(),
        room.top_ids[first_row].data_ptr(),
        room.top_logprobs[first_row].data_ptr(),
        logits.stride(0),
        room.scores.stride(0),
        counts.stride(0),
        vocab_size,
        chunks,
        room.top_ids.shape[1],
        rows.edit_ids.shape[1],
    )
    return [
        Prepared(edit_spec(), (chunks, num_rows, 1), args),
        Prepared(spec(threads, candidates), (num_rows, 1, 1), args),
    ]
