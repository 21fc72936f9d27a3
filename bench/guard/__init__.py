"""The trace player: recorded and made-up histories of a device's memory, played against the real server.

    python -m bench.guard bench/traces/*.json

`trace` is the file format, `truth` what a driver and a kernel would make of it, `server` the real server over the
simulated drivers, `clients` its load, `play` one whole run, `measure` the promises, `plot` and `report` what a person
sees of them.
"""
