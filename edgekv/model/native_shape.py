"""Which models the native CPU kernels can run. Runs in: anywhere (no torch, no numpy); owns: nothing."""

from edgekv.model.spec import ModelSpec


def unsupported(spec: ModelSpec, block_size: int) -> str | None:
    """Why the kernels cannot run a model of this shape; None where they can."""
    if spec.head_dim % 16:
        return f"its head dim of {spec.head_dim} is no multiple of 16"
    if spec.head_dim > 256:
        return f"its head dim of {spec.head_dim} is above 256"
    if block_size % 16:
        return f"the KV block size of {block_size} is no multiple of 16"
    return None
