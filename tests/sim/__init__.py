from tests.sim.card import CardState, SimulatedCard

__all__ = ["CardState", "SimulatedCard"]
