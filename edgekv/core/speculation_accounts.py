"""What it may cost to find out whether speculation pays. Runs in: engine thread; owns: the accounts.

All amounts are steps without proposals. An account has a credit to begin with, and of each step that goes by a share,
up to that credit; what proposals gained may be lost again, up to MOST_CREDIT_STEPS. In debt nothing is tried.
"""

# Of the steps of one sequence. Of several sequences it is less, down to a quarter: there is less to be gained, and to
# think about it takes longer.
PROBING_SHARE = 0.01
_LEAST_PROBING = 4
CREDIT_STEPS = 8.0
# For another number of sequences only what its rows take is left to be found out: not how much is accepted.
LATER_CREDIT_STEPS = 1.0
# A credit without bounds would let it lose for hours what it once gained, and a debt without, pause for hours.
MOST_CREDIT_STEPS = 32.0
MOST_DEBT_STEPS = 2.0

READING_SHARE = 0.0025
MOST_READING_STEPS = 512.0
MOST_READING_DEBT_STEPS = 32.0


def probing_share(decodes: int) -> float:
    """Of the steps of so many sequences, what they may cost to find out whether proposals pay for as many."""
    return PROBING_SHARE / min(max(1, decodes), _LEAST_PROBING)


class ProbingAccounts:
    """By number of sequences: what proposals cost, and what they saved."""

    def __init__(self) -> None:
        self._left: dict[int, float] = {}

    def left(self, decodes: int) -> float:
        """What there is for as many sequences."""
        return self._left.get(decodes, LATER_CREDIT_STEPS if self._left else CREDIT_STEPS)

    def is_in_debt(self, decodes: int) -> bool:
        """Whether nothing is to be tried for as many sequences at present."""
        return self._left.get(decodes, 0.0) < 0

    def pay(self, decodes: int, steps: float) -> None:
        """So much was lost; below 0, gained."""
        left = self.left(decodes)
        self._left[decodes] = min(max(left - steps, -MOST_DEBT_STEPS), max(left, MOST_CREDIT_STEPS))

    def earn(self, decodes: int, steps: int) -> None:
        """So many steps went by."""
        left = self.left(decodes)
        self._left[decodes] = min(left + probing_share(decodes) * steps, max(left, CREDIT_STEPS))


class ReadingAccount:
    """What reading cost, for proposals to come, and what proposals gained."""

    def __init__(self) -> None:
        self.left = CREDIT_STEPS

    def pay(self, steps: float) -> None:
        """So much was lost; below 0, gained."""
        self.left = min(max(self.left - steps, -MOST_READING_DEBT_STEPS), MOST_READING_STEPS)

    def earn(self, steps: int) -> None:
        """So many steps went by."""
        self.pay(-READING_SHARE * steps)
