"""The configuration: YAML text with positions, what it means, and every fault in it at once.

`load_config` of `edgekv.config.load` is the way in. Runs in: anywhere; owns: nothing.
"""
