"""Runs a state machine until it fails: a planted fault is to be found, whichever examples come first.

Which these are depends on more than the seed: hypothesis takes constants from the modules that happen to be imported.
"""

from hypothesis import Phase, seed, settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test

ATTEMPTS = 12


def hunt(machine: type[RuleBasedStateMachine], limits: settings) -> None:
    """Raise what the machine raises, in the first of several runs that fails."""
    for number in range(ATTEMPTS):
        seed(number)(machine)  # type: ignore[arg-type]
        run = settings(limits, derandomize=False, database=None, phases=(Phase.generate,))
        run_state_machine_as_test(machine, settings=run)
