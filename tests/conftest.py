"""Triton's interpreter stands in for the compiler where there is no GPU.

Triton reads the choice when a function is decorated, its own library's functions included, so it must stand before
anything imports triton: here, where pytest comes first. Megatron imports triton too and launches none of it on a CPU.
"""

import os
from pathlib import Path

if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")
