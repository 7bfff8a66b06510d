"""How a set of queries passes through the network: one file for each way, and the choice among them."""

from __future__ import annotations

from .cpu import CpuWalk
from .gpu import GpuWalk
from .operators import OperatorsWalk, PackedOperatorsWalk
from .walk import Settings, Walk

# The first that takes the settings is chosen; the last takes all.
WALKS: tuple[type[Walk], ...] = (CpuWalk, GpuWalk, PackedOperatorsWalk, OperatorsWalk)


def choose_walk(settings: Settings) -> type[Walk]:
    """Return the way for a set of queries."""
    return next(walk for walk in WALKS if walk.takes(settings))
