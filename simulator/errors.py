"""What the simulator refuses to do, said so that a person can act on it."""


class SimulationError(Exception):
    """A workload, engine configuration or accelerator model that cannot be simulated as asked."""


class NeverFitsError(SimulationError):
    """A request needs more KV blocks than the whole cache has: a real engine would never finish it."""


class StuckError(SimulationError):
    """Requests are left, nothing is in flight and the scheduler admits none of them."""
