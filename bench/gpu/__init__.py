"""What a card does with edgekv's kernels and engine, against its own bandwidth and the peers: `python -m bench.gpu`."""
