"""Package map only: the owner's top-level folders are installed under one import root, `megatron_evolve`.

`kernels/` is imported as `megatron_evolve.kernels`, and so on. A flat `kernels` package would overwrite or shadow the
well-known PyPI package of that name, which transformers probes for. Everything else stands in pyproject.toml.
"""

from setuptools import setup

FOLDERS = ("kernels", "launch", "substrate", "eval")
SUBFOLDERS = (
    "kernels/bench",
    "substrate/model",
    "substrate/plan",
    "substrate/puzzles",
    "substrate/train",
    "eval/engines",
    "megatron_evolve/contest",
    "megatron_evolve/report",
    "megatron_evolve/simulate",
    "megatron_evolve/workers",
    "megatron_evolve/worlds",
)

package_dir = {"megatron_evolve": "megatron_evolve"}
package_dir |= {f"megatron_evolve.{folder}": folder for folder in FOLDERS}
package_dir["megatron_evolve.slurm"] = "slurm"  # no code: the scripts' templates, beside launch/ as in the checkout
for folder in SUBFOLDERS:
    root = "" if folder.startswith("megatron_evolve/") else "megatron_evolve."
    package_dir[root + folder.replace("/", ".")] = folder

setup(
    packages=sorted(package_dir),
    package_dir=package_dir,
    package_data={
        "megatron_evolve": ["campaigns/*.yaml", "sites/*.yaml", "worlds/*.yaml", "simulate/*.yaml"],
        "megatron_evolve.kernels": ["tile_table.json"],
        "megatron_evolve.slurm": ["*.sbatch"],
    },
)
