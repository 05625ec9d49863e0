"""An autonomous post-training loop for Nemotron mixture-of-experts models on Megatron-Core.

The owner keeps `kernels/`, `substrate/`, `launch/` and `eval/` at the top of the repository; they are imported as
`megatron_evolve.kernels` and so on. Installed, setup.py maps them. In a checkout this line finds them beside this
folder.
"""

from pathlib import Path as _Path

__version__ = "0.1.0"

_checkout = _Path(__file__).resolve().parent.parent
if (_checkout / "setup.py").is_file() and (_checkout / "substrate").is_dir():
    __path__.append(str(_checkout))
