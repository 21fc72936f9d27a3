"""What test_sanitized.py runs against a library with sanitizers, each module's `run` with many random generators.

A case checks nothing itself: it gives the kernels guarded memory of just the size they may use, in shapes that are as
ragged as they get. It runs in a process of its own, which has no torch.
"""
