"""How many bytes a model's weights will take, and how many of them a decode step reads: before loading, and exactly.

Runs in: anywhere (no torch, no numpy); owns: nothing.
"""

from math import prod

from edgekv.core.dtype_choice import DTYPE_BYTES, DtypeName
from edgekv.core.model_shape import WeightBytes
from edgekv.kernels.cpu.abi import Form
from edgekv.kernels.cpu.formats import activation_form
from edgekv.model.matrix_layout import EMBEDDING, PANEL, WeightForm, lay_out
from edgekv.model.spec import ModelSpec
from edgekv.model.weight_names import weight_names
from edgekv.model.weight_table import WeightTable


def native_bytes(table: WeightTable, spec: ModelSpec, form: WeightForm) -> WeightBytes:
    """Of a model in panels, for the native kernels. Raises ModelError where `form` does not suit the files."""
    kinds: dict[str, int] = {"f32": 0}
    unread = 0
    for asked in weight_names(spec):
        rows = [shape[0] for shape in asked.shapes]
        if asked.kind in ("norm", "bias"):
            is_gated = asked.names[0].endswith(".gate_proj.bias")
            kinds["f32"] += 4 * sum(-(-count // PANEL) * PANEL if is_gated else count for count in rows)
            continue
        encodings = [form.encoding(name, table.tensors[name]) for name in asked.names]
        for part in lay_out(asked.names, encodings, asked.shapes, gated=asked.kind == "gated"):
            kind = part.members[0].encoding.name
            kinds[kind] = kinds.get(kind, 0) + part.num_bytes
            if asked.names == (EMBEDDING,) and not spec.tie_word_embeddings:
                unread = part.num_bytes
    total = sum(kinds.values())
    return WeightBytes(total, total - unread, _sorted(kinds))


def native_inputs(table: WeightTable, spec: ModelSpec, form: WeightForm) -> dict[Form, int]:
    """The most columns of activations that the linear layers read, by the form in which their panels take them."""
    inputs: dict[Form, int] = {}
    for asked in weight_names(spec):
        if asked.kind in ("norm", "bias") or (asked.names == (EMBEDDING,) and not spec.tie_word_embeddings):
            continue
        encodings = [form.encoding(name, table.tensors[name]) for name in asked.names]
        for part in lay_out(asked.names, encodings, asked.shapes, gated=asked.kind == "gated"):
            taken = activation_form(part.format)
            inputs[taken] = max(inputs.get(taken, 0), part.cols)
    return inputs


def plain_bytes(spec: ModelSpec, dtype: DtypeName) -> WeightBytes:
    """Of a model of torch tensors in `dtype`; Gemma's norms are float32 in any."""
    item, norm = DTYPE_BYTES[dtype], 4 if spec.architecture.startswith("Gemma") else DTYPE_BYTES[dtype]
    kinds: dict[str, int] = {dtype: 0, "float32": 0}
    for asked in weight_names(spec):
        elements = sum(prod(shape) for shape in asked.shapes)
        if asked.kind == "norm" and norm != item:
            kinds["float32"] += norm * elements
        else:
            kinds[dtype] += item * elements
    total = sum(kinds.values())
    unread = 0 if spec.tie_word_embeddings else item * spec.vocab_size * spec.hidden_size
    return WeightBytes(total, total - unread, _sorted(kinds))


def _sorted(kinds: dict[str, int]) -> dict[str, int]:
    return {name: count for name, count in sorted(kinds.items(), key=lambda kind: -kind[1]) if count}
