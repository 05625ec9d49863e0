"""Hugging Face checkpoints in and out: a NemotronH folder becomes a frozen substrate, and a substrate such a folder.

Tensors go from file to file as byte ranges (`tensor_file`), so memory does not grow with the model and a tensor keeps
its bits and its dtype. Everything is checked before the first byte is written: the config, the index, every header,
every name and shape. What an imported checkpoint brought beside its weights (config, tokenizer, chat template) is
frozen with it and handed on unchanged.
"""

import json
import math
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

from megatron_evolve.launch.rundir import Lock, make_folder, read_json, write_json, write_whole
from megatron_evolve.substrate.checkpoint_tokenizer import (
    SETTINGS_FILE,
    TOKENIZER_FILE,
    CheckpointTokenizer,
    exported,
)
from megatron_evolve.substrate.manifest import (
    MANIFEST,
    Construction,
    SourceFile,
    Substrate,
    check_start,
    describe_file,
    samples_of,
    sealed,
    trainer_sources,
    verify,
    write_manifest,
)
from megatron_evolve.substrate.merged import DTYPES, trained_entries
from megatron_evolve.substrate.mix import Mix
from megatron_evolve.substrate.model.architecture import Architecture
from megatron_evolve.substrate.model.huggingface import architecture_of, huggingface_config, with_clamp
from megatron_evolve.substrate.model.tensor_file import Entry, Outgoing, read_header, write_shards
from megatron_evolve.substrate.model.weight_map import (
    HUB,
    Mapped,
    Naming,
    check_names,
    to_huggingface,
    to_megatron,
)
from megatron_evolve.substrate.model.weights import EMBEDDING, check_computable
from megatron_evolve.substrate.puzzles import families
from megatron_evolve.substrate.puzzles.row import ANSWER_STYLE
from megatron_evolve.substrate.recipe import Adapter, Recipe
from megatron_evolve.substrate.settings import Settings
from megatron_evolve.substrate.tokenizer import PieceTokenizer

CONFIG_FILE = "config.json"
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
UNFINISHED = ".unfinished"  # in a folder until all of it is written: the same command may start again there
GENERATION_FILE = "generation_config.json"
COMPANIONS = (GENERATION_FILE, SETTINGS_FILE, "special_tokens_map.json", "chat_template.jinja")
SHARD_BYTES = 5_000_000_000  # files of the hub's usual size where no source sets one
DIFFICULTY = "challenge"

# The plain recipe on which public solutions of the reasoning challenge agree: rank 32, batch 32, one epoch of 7,800
# rows (240 steps), a linear decay from 2e-4.
ADAPTER = Adapter(rank=32, alpha=32.0)
RECIPE = Recipe(adapter=ADAPTER, lr=2e-4, beta2=0.95, schedule="linear", batch_size=32, steps=240, sequence_length=8192)


def import_hf(source: Path, folder: Path, *, name: str | None = None, dt_min: float | None = None) -> Substrate:
    """Freeze the checkpoint in `source` as a substrate in `folder`, over the challenge's pool of rows.

    `dt_min` replaces the clamp of the Mamba step, which otherwise is the config's `time_step_limit`, as the published
    weights were trained; transformers 5 takes `time_step_min` for it (`Architecture` tells why not). Raises ValueError
    in one sentence, before anything is written, for a checkpoint that is not whole or is of another architecture.
    """
    _require_new(folder)
    config = _config(source)
    architecture = architecture_of(config, name or source.resolve().name)
    if dt_min is not None:
        if not 0 <= dt_min < math.inf:
            raise ValueError(
                f"the clamp of the Mamba step must be a number from 0 on; got {dt_min}: give another dt_min"
            )
        architecture = architecture.model_copy(update={"dt_min": dt_min})
    tokens = CheckpointTokenizer.read(source).vocab_size
    if tokens > architecture.vocab_size:
        raise ValueError(
            f"the tokenizer in {source} has {tokens} tokens, the model {architecture.vocab_size}: give the tokenizer "
            "that belongs to the weights"
        )
    stored = _stored(source)
    naming = Naming.of(stored)
    _check_whole(stored, to_huggingface(architecture, naming), f"the checkpoint in {source}")
    outgoing = _converted(stored, to_megatron(architecture, naming))
    check_computable(
        next(tensor.dtype for tensor in outgoing if tensor.name == EMBEDDING), f"the checkpoint in {source}"
    )
    with _filled(folder):
        shards = write_shards(folder, "weights", outgoing, max(path.stat().st_size for path in _paths(stored)))
        files = {file: described for file, (described, _) in shards.items()}
        for file in (CONFIG_FILE, TOKENIZER_FILE, *COMPANIONS):
            if (source / file).is_file():
                write_whole(folder / file, (source / file).read_bytes())
                files[file] = describe_file(folder / file)
        return _frozen(folder, architecture, naming, files)


def imported_default(architecture: Architecture) -> Settings:
    """The default settings of an imported checkpoint: equal shares, answers only, the plain recipe."""
    mix = Mix(
        weight=dict.fromkeys(families.FAMILIES, 1.0),
        style=dict.fromkeys(families.FAMILIES, ANSWER_STYLE),
        difficulty=DIFFICULTY,
    )
    length = min(RECIPE.sequence_length, architecture.max_sequence_length)
    return Settings(mix=mix, recipe=RECIPE.replace(sequence_length=length))


def _frozen(folder: Path, architecture: Architecture, naming: Naming, files: dict[str, SourceFile]) -> Substrate:
    styles = {family: families.styles_of(family, DIFFICULTY) for family in families.FAMILIES}
    substrate = sealed(
        {
            "name": architecture.name,
            "architecture": architecture.model_dump(mode="json"),
            "construction": Construction(families=tuple(families.FAMILIES), difficulty=DIFFICULTY, styles=styles),
            "default": imported_default(architecture),
            "build": {"imported": {"prefix": naming.prefix, "stacked": naming.stacked}},
            "trainer": trainer_sources(),
            "files": files,
            "samples": samples_of(folder, files),
        }
    )
    write_manifest(folder, substrate)
    return substrate


def export_hf(folder: Path, out: Path, *, run: Path | None = None, sampled: bool = False) -> list[str]:
    """Write the substrate in `folder`, or what `run` trained from it, as a Hugging Face checkpoint; gives the names of
    its weight files. An adapter is added into the matrices.

    Every byte of the substrate is hashed first; `sampled` leaves that to the campaign whose scoring job this is.

    An imported substrate keeps the names, the config and the companions that it came with; any other is written with
    the hub's names, as transformers 5 itself writes them. Raises ValueError in one sentence before anything is written.
    """
    _require_new(out)
    substrate = (check_start if sampled else verify)(folder, trainer=False)
    architecture = Architecture.model_validate(substrate.architecture)
    imported = substrate.build.get("imported")
    naming = Naming(**imported) if imported else HUB
    paths = substrate.weight_paths(folder)
    stored = _united(map(read_header, paths))
    if run is not None:
        stored = trained_entries(stored, run, substrate)
    _check_whole(stored, to_megatron(architecture, naming), f"the substrate in {folder}")
    outgoing = _converted(stored, to_huggingface(architecture, naming))
    limit = max(path.stat().st_size for path in paths) if imported else SHARD_BYTES
    with _filled(out):
        shards = write_shards(out, "model", outgoing, limit)
        if len(shards) > 1:
            placed = {tensor.name: file for file, (_, tensors) in shards.items() for tensor in tensors}
            total = sum(tensor.num_bytes for _, tensors in shards.values() for tensor in tensors)
            write_json(out / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": placed})
        config = _beside(folder, substrate, architecture, out)
        if run is not None or not imported:
            config.pop("torch_dtype", None)  # the older name of the same
            config["dtype"] = DTYPES[stored["output_layer.weight"].dtype]
        # As Python and the hub write it, where a limit of the Mamba step may be Infinity.
        write_whole(out / CONFIG_FILE, json.dumps(config, indent=2, sort_keys=True) + "\n")
    return list(shards)


def _beside(folder: Path, substrate: Substrate, architecture: Architecture, out: Path) -> dict[str, Any]:
    """Writes what stands beside the weights, tokenizer and templates; gives the config, which is written last."""
    if "imported" in substrate.build:
        for file in (TOKENIZER_FILE, *COMPANIONS):
            if file in substrate.files:
                shutil.copyfile(folder / file, out / file)
        return _kept_config(folder, architecture)
    tokenizer = PieceTokenizer.from_json((folder / TOKENIZER_FILE).read_text(encoding="utf-8"))
    for file, document in exported(tokenizer).items():
        write_json(out / file, document)
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    write_json(out / GENERATION_FILE, {**ids, "do_sample": False})
    return huggingface_config(architecture) | ids


def _kept_config(folder: Path, architecture: Architecture) -> dict[str, Any]:
    """The config that was imported, its clamp of the Mamba step so that each reader computes what is trained here."""
    return with_clamp(_config(folder), architecture.dt_min)


def _require_new(folder: Path) -> None:
    """Raises ValueError where `folder` holds anything but what a killed attempt left: substrates and checkpoints have
    names in common, and a shard or a tokenizer of another model would be read with this one's."""
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if names and UNFINISHED not in names:
        held = "a frozen substrate" if MANIFEST in names else "a checkpoint" if CONFIG_FILE in names else names[0]
        raise ValueError(f"{folder} must be new or empty; it holds {held} already: choose another folder or remove it")


@contextmanager
def _filled(folder: Path) -> Iterator[None]:
    """Marks `folder` as unfinished until the block has written all of it. Raises LockHeld while another fills it."""
    make_folder(folder)
    _require_new(folder)  # another may have filled it since it was looked at
    with Lock(folder / UNFINISHED):
        for left in folder.glob("*.safetensors*"):  # of an attempt that may have cut other shards
            left.unlink()
        yield
        (folder / UNFINISHED).unlink()


def _config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise ValueError(f"expected a Hugging Face checkpoint in {folder}; it has no {CONFIG_FILE}: give its folder")
    config = read_json(path)
    if not isinstance(config, dict):
        raise ValueError(f"{path}: expected a JSON object; got something else: download it again")
    return config


def _stored(source: Path) -> dict[str, Entry]:
    """Every tensor of a checkpoint by name, after its files and its index were held against each other."""
    if not (source / INDEX_FILE).is_file():
        if not (source / SINGLE_FILE).is_file():
            raise ValueError(
                f"expected {SINGLE_FILE} or {INDEX_FILE} in {source}; neither is there: convert the weights to "
                "safetensors (pickles are not read)"
            )
        return read_header(source / SINGLE_FILE)
    index = read_json(source / INDEX_FILE)
    placed = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(placed, dict) or not all(isinstance(f, str) and f == Path(f).name for f in placed.values()):
        raise ValueError(f"{source / INDEX_FILE}: expected a weight_map of tensor to file name: download it again")
    stored = _united(read_header(source / file) for file in sorted(set(placed.values())))
    for name, file in placed.items():
        if name not in stored or stored[name].path.name != file:
            raise ValueError(f"{INDEX_FILE} names {name} in {file}, which does not hold it: download both again")
    unnamed = sorted(stored.keys() - placed.keys())
    if unnamed:
        raise ValueError(f"{INDEX_FILE} does not name {unnamed[0]} and {len(unnamed) - 1} more: download it again")
    return stored


def _united(headers: Iterable[dict[str, Entry]]) -> dict[str, Entry]:
    united: dict[str, Entry] = {}
    for name, entry in chain.from_iterable(header.items() for header in headers):
        if name in united:
            raise ValueError(f"{name} stands in {united[name].path.name} and in {entry.path.name}: keep one of them")
        united[name] = entry
    return united


def _paths(stored: dict[str, Entry]) -> set[Path]:
    return {entry.path for entry in stored.values()}


def _check_whole(stored: dict[str, Entry], expected: Iterable[Mapped], what: str) -> None:
    """Raises ValueError unless `stored` has exactly the expected names and shapes."""
    shapes = {tensor.name: tensor.shape for tensor in expected}
    check_names(stored, shapes, what)
    wrong = [
        f"{name} {stored[name].shape} for {shape}" for name, shape in shapes.items() if stored[name].shape != shape
    ]
    if wrong:
        raise ValueError(
            f"{what} does not have the shapes of its config: {', '.join(wrong[:4])} ({len(wrong)} in all): give the "
            "config that belongs to the weights"
        )


def _converted(stored: dict[str, Entry], mapped: Iterable[Mapped]) -> list[Outgoing]:
    """The other side's tensors, in the order in which their first rows stand in the files: each file is read once."""
    outgoing = []
    for tensor in mapped:
        dtypes = {stored[piece.source].dtype for piece in tensor.pieces}
        if len(dtypes) > 1:
            names = ", ".join(sorted({piece.source for piece in tensor.pieces}))
            raise ValueError(f"{names} must have one dtype; got {', '.join(sorted(dtypes))}: convert them to one")
        ranges = [stored[piece.source].rows(piece.start, piece.stop) for piece in tensor.pieces]
        first = (ranges[0].path.name, ranges[0].start)
        chunks = lambda ranges=ranges: chain.from_iterable(part.read() for part in ranges)  # noqa: E731
        outgoing.append((first, Outgoing(tensor.name, dtypes.pop(), tensor.shape, chunks)))
    return [tensor for _, tensor in sorted(outgoing, key=lambda pair: pair[0])]
