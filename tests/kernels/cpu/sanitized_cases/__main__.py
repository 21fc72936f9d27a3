"""python -m tests.kernels.cpu.sanitized_cases CASE FIRST_SEED SEEDS"""

import importlib
import sys

import numpy as np

name, first, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
case = importlib.import_module(f"tests.kernels.cpu.sanitized_cases.{name}")
for seed in range(first, first + count):
    print(f"{name} {seed}", flush=True)
    case.run(np.random.default_rng(seed))
