"""A server of a known pace under the real admission, without an engine: its clock moves as it works."""

from dataclasses import dataclass, field

from edgekv.actors.admission import Admission, AdmissionLimits, Claim
from edgekv.actors.pace import Cost
from edgekv.core.sequence import FinishReason
from edgekv.core.step import EngineStats, Finished, PoolStats, Sampled, Started, StepReport, TokenOut
from tests.actors.fakes import make_card

CARD = make_card(context_tokens=4096, pool_tokens=4096)
CHUNK_TOKENS = 128


@dataclass
class Job:
    """One sequence of the server: what is left of it."""

    claim: Claim
    prompt_left: int
    tokens_left: int


@dataclass
class Server:
    """`slots` run at a time; a step gives each a token, or computes a chunk of its prompt.

    `used` is the part of its max_tokens that a sequence really generates.
    """

    limits: AdmissionLimits
    slots: int
    cost: Cost
    used: float = 1.0
    now: float = 0.0
    waiting: list[Job] = field(default_factory=list)
    running: list[Job] = field(default_factory=list)
    prompt_tokens: int = 0
    generated_tokens: int = 0
    num_claims: int = 0

    def __post_init__(self) -> None:
        self.admission = Admission(self.limits, lambda: self.now)

    def ask(self, prompt_tokens: int, max_tokens: int, priority: int = 0) -> Job:
        """Open a sequence. Raises what admission raises."""
        claim = Claim(self.num_claims + 1, prompt_tokens, max_tokens, priority)
        self.admission.admit([claim], CARD, self.stats())
        self.num_claims += 1
        job = Job(claim, prompt_tokens, max(1, round(self.used * max_tokens)))
        self.waiting.append(job)
        return job

    def step(self) -> None:
        """Do one step, if there is anything to do."""
        self.waiting.sort(key=lambda job: (job.claim.priority, job.claim.sequence_id))
        started = []
        while self.waiting and len(self.running) < self.slots:
            job = self.waiting.pop(0)
            self.running.append(job)
            started.append(Started(job.claim.sequence_id, 0))
        prompt = generated = 0
        tokens, finished = [], []
        for job in list(self.running):
            if job.prompt_left:
                chunk = min(job.prompt_left, CHUNK_TOKENS)
                job.prompt_left -= chunk
                prompt += chunk
                continue
            generated += 1
            job.tokens_left -= 1
            tokens.append(TokenOut(job.claim.sequence_id, Sampled(1)))
            if not job.tokens_left:
                self.running.remove(job)
                finished.append(Finished(job.claim.sequence_id, FinishReason.LENGTH))
        self.now += prompt * self.cost.prompt_s + generated * self.cost.generated_s
        self.prompt_tokens += prompt
        self.generated_tokens += generated
        for start in started:
            self.admission.started(start.sequence_id)
        self.admission.observe(StepReport(self.stats(), tuple(started), tuple(tokens), tuple(finished)))
        for end in finished:
            self.admission.release(end.sequence_id)

    def work(self, seconds: float) -> None:
        """Steps, for so long or until there is nothing to do; an idle clock goes on."""
        until = self.now + seconds
        while self.now < until and (self.running or self.waiting):
            self.step()
        self.now = max(self.now, until)

    def work_off(self) -> None:
        """Steps, until there is nothing to do."""
        while self.running or self.waiting:
            self.step()

    def stats(self) -> EngineStats:
        """As an engine's."""
        pool = PoolStats(256, 10, 5, 241, 16)
        return EngineStats(
            pool,
            running=len(self.running),
            waiting=len(self.waiting),
            computed_prompt_tokens=self.prompt_tokens,
            generated_tokens=self.generated_tokens,
        )
