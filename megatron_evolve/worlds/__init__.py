"""Worlds: real campaigns over a grid of planted and unplanted shifts, and whether what they said was true."""

from megatron_evolve.worlds.run import run_worlds

__all__ = ["run_worlds"]
