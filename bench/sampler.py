"""Time of `Sampler.sample` per call: 1 and 16 rows, a small and a large vocabulary. Run: python -m bench.sampler."""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from edgekv.core.sampling import SamplingParams
from edgekv.engine.sampler import Sampler, SampleRow

SETTINGS = {
    "greedy": SamplingParams(max_tokens=1, temperature=0.0),
    "temperature 0.8": SamplingParams(max_tokens=1, temperature=0.8),
    "top-p 0.9": SamplingParams(max_tokens=1, top_p=0.9),
    "top-p 0.9, hot (a flat tail)": SamplingParams(max_tokens=1, top_p=0.9, temperature=1.5),
    "top-k 40": SamplingParams(max_tokens=1, top_k=40),
    "top-k 40, penalties, 1k tokens": SamplingParams(
        max_tokens=1, top_k=40, repetition_penalty=1.1, presence_penalty=0.2, frequency_penalty=0.2
    ),
    "greedy, 5 logprobs": SamplingParams(max_tokens=1, temperature=0.0, logprobs=5),
}


def median_ms(call: Callable[[], object], device: torch.device, seconds: float) -> float:
    times: list[float] = []
    for _ in range(3):
        call()
    end = time.perf_counter() + seconds
    while len(times) < 10 or time.perf_counter() < end:
        begin = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return statistics.median(times) * 1e3


def language_like_logits(num_rows: int, vocab_size: int) -> torch.Tensor:
    """Zipf with an exponent at which nine tenths of the mass lie in 60 tokens, in another order of ids in each row."""
    generator = torch.Generator().manual_seed(0)
    by_rank = -1.5 * torch.arange(1.0, vocab_size + 1).log()
    return torch.stack([by_rank[torch.randperm(vocab_size, generator=generator)] for _ in range(num_rows)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=0.3, help="per cell")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)

    shapes = [(rows, vocab_size) for vocab_size in (2_048, 128_256) for rows in (1, 16)]
    print(f"ms per call, median; {device}, {arguments.threads} thread(s); p(rank r) ~ 1 / r^1.5, ids shuffled")
    print(f"{'':32}" + "".join(f"{f'{rows} x {vocab_size:,}':>14}" for rows, vocab_size in shapes))
    for name, settings in SETTINGS.items():
        cells = []
        for num_rows, vocab_size in shapes:
            logits = language_like_logits(num_rows, vocab_size).to(device)
            rows = [
                SampleRow(settings, [(7 * n + 31 * place) % 2_048 for place in range(1_000)], 500)
                for n in range(num_rows)
            ]
            sampler = Sampler(vocab_size, device)
            cells.append(
                median_ms(lambda s=sampler, x=logits, r=rows: s.sample(x, r), device, arguments.seconds)  # type: ignore[misc]
            )
        print(f"{name:32}" + "".join(f"{cell:14.3f}" for cell in cells))


if __name__ == "__main__":
    main()
