"""Adapters out: a trained run's low-rank matrices as a PEFT adapter, and as the challenge's submission.

Two layouts of the same matrices. `each` has two tensors per expert and projection, as vLLM's NemotronH and models with
one module per expert read them; it is what a submission needs. `stacked` is for transformers 5 with PEFT, which hold
the experts of a layer in one parameter: A as (experts x rank, in), B as (out, rank x experts) with the expert fastest.
Neither reader has prediction heads: what a run trained on them (target `mtp`) is in its checkpoint and in no export.

Query, key and value share one A here and have one each there: A is written three times, B is cut by rows.
"""

import math
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_evolve.launch.rundir import make_folder, publish, read_json, write_json
from megatron_evolve.substrate.manifest import Substrate, read_manifest
from megatron_evolve.substrate.merged import trained_checkpoint
from megatron_evolve.substrate.model.architecture import Architecture
from megatron_evolve.substrate.model.tensor_file import Entry, Outgoing, Range, read_header, write_tensors
from megatron_evolve.substrate.model.weight_map import Mapped, Naming, Piece, check_names, to_huggingface
from megatron_evolve.substrate.recipe import Adapter
from megatron_evolve.substrate.train.open import CHECKPOINT_FOLDER

CONFIG_FILE, TENSORS_FILE = "adapter_config.json", "adapter_model.safetensors"
ROOT = "base_model.model."  # what PEFT puts before a module's name
SUBMISSION_RANK = 32
SUBMISSION_BYTES = 3_600_000_000  # 3.5 GB have been accepted; an 880 M parameter adapter of rank 32 in float32 has 3.52
LAYOUTS = ("each", "stacked")

MODULES = {
    "attention": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "mamba": ["in_proj", "out_proj"],
    "shared": ["shared_experts.up_proj", "shared_experts.down_proj"],
    "output": ["lm_head"],
}
OURS = {  # the same targets as `lora.TARGETS` names them, without torch
    "attention": r"self_attention\.linear_(qkv|proj)",
    "mamba": r"mixer\.(in|out)_proj",
    "experts": r"experts\.linear_fc[12]",
    "shared": r"shared_experts\.linear_fc[12]",
    "output": r"output_layer",
}


def export_adapter(run: Path, folder: Path, out: Path, *, layout: str = "each", zip_file: Path | None = None) -> None:
    """Write the adapter of `run`, which was trained from the substrate in `folder`, to `out`, and zip it if asked.

    Raises ValueError in one sentence, before anything is written, for a run without an adapter, of another substrate,
    or, with `zip_file`, of a form that the challenge does not take.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"the layout of experts must be {' or '.join(LAYOUTS)}; got {layout!r}: choose one")
    if (out / CONFIG_FILE).exists():
        raise ValueError(f"{out} holds an adapter already: choose another folder or remove it")
    substrate = read_manifest(folder)  # its shapes and its name: no byte of the base goes into an adapter
    adapter, stored = _trained(run, substrate)
    architecture = Architecture.model_validate(substrate.architecture)
    tensors = list(adapter_map(architecture, adapter))
    check_names(stored, {piece.source for tensor in tensors for piece in tensor.pieces}, f"the adapter of {run}")
    left = r"\.mtp\." if layout == "each" else r"\.(mtp|experts)\."
    kept = [tensor for tensor in tensors if not re.search(left, tensor.name)]
    outgoing = [_copied(stored, tensor) for tensor in kept]
    if layout == "stacked" and "experts" in adapter.targets:
        outgoing += _stacked(stored, architecture)
    if not outgoing:
        raise ValueError(f"the adapter of {run} is on prediction heads alone, which no export carries: train others")
    if zip_file is not None:
        _check_zip(zip_file, adapter.rank, layout, sum(tensor.num_bytes for tensor in outgoing))
    make_folder(out)
    write_tensors(out / TENSORS_FILE, outgoing)
    write_json(out / CONFIG_FILE, peft_config(substrate.name, architecture, adapter, layout))
    if zip_file is not None:
        write_submission(out, zip_file, architecture)


def peft_config(base: str, architecture: Architecture, adapter: Adapter, layout: str) -> dict[str, Any]:
    """The content of `adapter_config.json`. Target modules are a list of name endings that fit adapted modules only."""
    targets = set(adapter.targets)
    modules = [name for target in MODULES if target in targets for name in MODULES[target]]
    if layout == "each" and "experts" in targets:
        names = ["up_proj", "down_proj"]
        if "shared" in targets:
            modules = [name for name in modules if name not in MODULES["shared"]] + names
        else:
            modules += [f"experts.{e}.{name}" for e in range(architecture.num_experts) for name in names]
    stacked = ["experts.up_proj", "experts.down_proj"] if layout == "stacked" and "experts" in targets else None
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": adapter.rank,
        "lora_alpha": int(adapter.alpha) if adapter.alpha.is_integer() else adapter.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "target_modules": modules,
        "target_parameters": stacked,
    }


def adapter_map(architecture: Architecture, adapter: Adapter) -> Iterator[Mapped]:
    """Every tensor of the `each` layout as rows of the run's adapter: A (rank, in) and B (out, rank) of each module."""
    main, heads = (
        re.compile("|".join(f"(?:.*\\.)?{OURS[target]}" for target in targets if target in OURS) or "(?!)")
        for targets in (adapter.targets, adapter.in_heads)
    )
    for tensor in to_huggingface(architecture, Naming("model", stacked=False)):
        source = re.fullmatch(r"(.+)\.weight(\d*)", tensor.pieces[0].source)
        if source is None or not (heads if source[1].startswith("mtp.") else main).fullmatch(source[1]):
            continue
        module, rank = source[1], adapter.rank
        A, B = (rank, tensor.shape[1]), (tensor.shape[0], rank)
        if source[2]:
            e = int(source[2])
            pieces = (Piece(f"{module}.lora_A", e, e + 1),), (Piece(f"{module}.lora_B", e, e + 1),)
        else:
            rows = tuple(Piece(f"{module}.lora_B", piece.start, piece.stop) for piece in tensor.pieces)
            pieces = (Piece(f"{module}.lora_A", 0, rank),), rows
        for name, shape, parts in zip("AB", (A, B), pieces, strict=True):
            yield Mapped(f"{ROOT}{tensor.name.removesuffix('.weight')}.lora_{name}.weight", shape, parts)


def _trained(run: Path, substrate: Substrate) -> tuple[Adapter, dict[str, Entry]]:
    folder = run / CHECKPOINT_FOLDER
    checkpoint = trained_checkpoint(run, substrate)
    if checkpoint.kind != "adapter":
        raise ValueError(f"{folder} holds {checkpoint.kind}, no adapter; give a run whose recipe has an adapter")
    adapter = Adapter.parse(checkpoint.state["adapter"], where=str(folder))
    return adapter, read_header(folder / "adapter.safetensors")


def _copied(stored: dict[str, Entry], tensor: Mapped) -> Outgoing:
    ranges = [stored[piece.source].rows(piece.start, piece.stop) for piece in tensor.pieces]
    dtype = stored[tensor.pieces[0].source].dtype
    return Outgoing(tensor.name, dtype, tensor.shape, lambda: (data for part in ranges for data in part.read()))


def _stacked(stored: dict[str, Entry], architecture: Architecture) -> Iterator[Outgoing]:
    """The experts as PEFT holds them for transformers 5: two nested wrappers of one module, `down_proj` outside."""
    for name, entry in stored.items():
        found = re.fullmatch(r"decoder\.layers\.(\d+)\.mlp\.experts\.linear_fc([12])\.lora_([AB])", name)
        if found is None:
            continue
        layer, fc, letter = found.groups()
        module = f"{ROOT}model.layers.{layer}.mixer.experts" + (".base_layer" if fc == "1" else "")
        experts, rows, columns = entry.shape
        shape = (experts * rows, columns) if letter == "A" else (rows, columns * experts)
        chunks = Range(entry.path, entry.start, entry.stop).read if letter == "A" else _expert_fastest(entry)
        yield Outgoing(f"{module}.lora_{letter}.weight", entry.dtype, shape, chunks)


def _expert_fastest(entry: Entry) -> Any:
    """B (experts, out, rank) as (out, rank, experts): the one place where elements move, not rows."""

    def chunks() -> Iterator[bytes]:
        import numpy as np

        data = b"".join(Range(entry.path, entry.start, entry.stop).read())
        items = np.frombuffer(data, dtype=f"u{len(data) // math.prod(entry.shape)}")
        yield items.reshape(entry.shape).transpose(1, 2, 0).tobytes()

    return chunks


def write_submission(folder: Path, path: Path, architecture: Architecture) -> None:
    """Zip the adapter in `folder` as the challenge wants it: both files at the root, nothing else.

    Raises ValueError in one sentence for what its engine would refuse or silently leave out.
    """
    check_submission(folder, architecture)
    partial = path.with_name(f".{path.name}.tmp")
    try:
        with zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:  # trained numbers do not compress
            for name in (CONFIG_FILE, TENSORS_FILE):
                info = zipfile.ZipInfo(name)  # dated 1980: one adapter, one zip
                with archive.open(info, "w", force_zip64=True) as target, open(folder / name, "rb") as source:
                    while data := source.read(8 << 20):
                        target.write(data)
        publish(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def check_submission(folder: Path, architecture: Architecture) -> None:
    """Raises ValueError in one sentence unless the adapter in `folder` is one that the challenge's engine (vLLM with
    rank at most 32) reads whole."""
    config = read_json(folder / CONFIG_FILE)
    rank = config.get("r")
    if not isinstance(rank, int) or not 1 <= rank <= SUBMISSION_RANK:
        raise ValueError(f"{folder}: a submission's rank must be at most {SUBMISSION_RANK}; got {rank}: train it anew")
    plain = {"peft_type": "LORA", "bias": "none", "use_dora": False, "use_rslora": False, "modules_to_save": None}
    for field, value in (plain | {"rank_pattern": {}, "alpha_pattern": {}}).items():
        if config.get(field, value) not in (value, None):
            raise ValueError(f"{folder}: a submission needs {field}={value!r}; got {config[field]!r}: export it anew")
    stored = read_header(folder / TENSORS_FILE)
    every = Adapter(rank=rank, alpha=1.0, targets=tuple(OURS))
    shapes = {tensor.name: tensor.shape for tensor in adapter_map(architecture, every)}
    strange = sorted(stored.keys() - shapes.keys())
    if strange:
        raise ValueError(
            f"{folder}: expected keys such as {next(iter(shapes))}; got {strange[0]} and {len(strange) - 1} more that "
            "the engine leaves out: export with one tensor per expert"
        )
    for name, entry in stored.items():
        if entry.shape != shapes[name]:
            raise ValueError(f"{folder}: {name} must be {shapes[name]} at rank {rank}; got {entry.shape}: pad its rank")
    A, B = ({name.replace(".lora_B.", ".lora_A.") for name in stored if f".lora_{c}." in name} for c in "AB")
    if A != B:
        alone = min(A ^ B)
        raise ValueError(f"{folder}: {alone} and its lora_B must stand together; one is missing: export it anew")
    _check_size(sum((folder / name).stat().st_size for name in (CONFIG_FILE, TENSORS_FILE)))


def _check_size(num_bytes: int) -> None:
    if num_bytes > SUBMISSION_BYTES:
        raise ValueError(f"a submission may have {SUBMISSION_BYTES:,} bytes; got {num_bytes:,}: adapt fewer modules")


def _check_zip(path: Path, rank: int, layout: str, num_bytes: int) -> None:
    if rank > SUBMISSION_RANK:
        raise ValueError(f"a submission's rank must be at most {SUBMISSION_RANK}; the run's is {rank}: train it anew")
    if layout != "each":
        raise ValueError("a submission needs one tensor per expert; got the stacked layout: leave the layout out")
    if path.exists():
        raise ValueError(f"{path} exists already: choose another name or remove it")
    if not path.parent.is_dir():
        raise ValueError(f"expected the folder {path.parent} for the zip; it is missing: create it first")
    _check_size(num_bytes)
