"""Simulated campaigns: how often the judge is right, measured on truths that are known because they were put there."""

from megatron_evolve.simulate.draw import Plan
from megatron_evolve.simulate.figures import simulate, table

__all__ = ["Plan", "simulate", "table"]
