"""The tiny ground of the loop's tests, which the real jobs run on; it is made once a test session."""

from tests.megatron_evolve.conftest import ground

__all__ = ["ground"]
