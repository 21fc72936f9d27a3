"""First steps for nobody. Runs in: engine thread; owns: nothing."""

from edgekv.core.block_pool import BlockPool
from edgekv.core.sampling import SamplingParams
from edgekv.core.sequence import Sequence, SequenceSpec
from edgekv.core.step import Chunk, StepPlan
from edgekv.engine.protocols import Pipeline
from edgekv.engine.sample_row import SampleRow


def warm_up(pipeline: Pipeline, blocks: BlockPool) -> None:
    """Run a short prompt and one decode, so that what torch sets up on first use is no client's to wait for."""
    [block] = blocks.allocate(1)
    # Of a length that fits any step and, with the decoded token, any block.
    prompt = (0,) * min(blocks.block_size - 1, 15)
    spec = SequenceSpec(id=0, prompt=prompt, sampling=SamplingParams(max_tokens=1))
    sequence = Sequence.from_spec(spec, arrival=0)
    for start, token_ids in ((0, spec.prompt), (len(spec.prompt), (0,))):
        plan = StepPlan(copies=(), chunks=(Chunk(sequence, start, token_ids, (block,), sampled=1),))
        pipeline.begin(plan, [SampleRow(spec.sampling, sequence.tokens, sequence.num_prompt)], None).result()
    blocks.release(block, keep=False)
