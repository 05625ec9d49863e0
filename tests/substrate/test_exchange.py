"""Checkpoints in and out: transformers' own files become a substrate and come back bit for bit; what is broken is
refused in one sentence and leaves no file."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from megatron_evolve.cli import app
from megatron_evolve.launch.rundir import LockHeld
from megatron_evolve.substrate import exchange
from megatron_evolve.substrate.build import NANO, build_substrate
from megatron_evolve.substrate.checkpoint_tokenizer import exported
from megatron_evolve.substrate.exchange import export_hf, import_hf
from megatron_evolve.substrate.manifest import read_manifest, verify
from megatron_evolve.substrate.model import build, huggingface, weights
from megatron_evolve.substrate.model.architecture import NANO_CPU, Architecture
from megatron_evolve.substrate.recipe import Adapter
from megatron_evolve.substrate.tokenizer import nano_tokenizer

INDEX = "model.safetensors.index.json"
K_PROJ = "backbone.layers.1.mixer.k_proj.weight"
ELSEWHERE = "backbone.layers.5.mixer.gate.weight"  # in another file
# largest difference of two float32 logits near 1; measured 2e-6
CLOSE = 1e-5


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


@pytest.fixture(scope="module")
def theirs():
    """transformers' model of the nano shapes, its matrices enlarged so that every layer matters."""
    from transformers import NemotronHConfig, NemotronHForCausalLM

    torch.manual_seed(0)
    model = NemotronHForCausalLM(NemotronHConfig(**huggingface.huggingface_config(NANO_CPU))).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(6 if parameter.dim() >= 2 and "conv" not in name else 1)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.uniform_(0, 0.4)
    return model


@pytest.fixture(scope="module")
def checkpoint(theirs, tmp_path_factory) -> Path:
    """As transformers saves it: hub names, one tensor per expert, four files with an index, router in float32."""
    folder = tmp_path_factory.mktemp("hub")
    theirs.save_pretrained(folder, max_shard_size="300KB")
    for file, document in exported(nano_tokenizer()).items():
        (folder / file).write_text(json.dumps(document))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


@pytest.fixture(scope="module")
def imported(checkpoint, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("imported")
    import_hf(checkpoint, folder)
    return folder


@pytest.fixture(scope="module")
def ours(imported):
    build.start(seed=0)
    substrate = verify(imported)
    model = build.build_model(Architecture.model_validate(substrate.architecture), seed=1)
    weights.load_part([model], substrate.weight_paths(imported))
    yield model.eval()
    build.stop()


def test_an_imported_checkpoint_computes_what_transformers_does(theirs, ours):
    tokens = torch.randint(0, NANO_CPU.vocab_size, (2, 100), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected, got = theirs(tokens).logits, ours(tokens, None, None)
    assert expected.std() > 0.5
    assert (got - expected).abs().max() < CLOSE


def test_there_and_back_is_the_identity(checkpoint, imported, tmp_path):
    files = export_hf(imported, tmp_path / "out")
    assert len(files) > 1 and len(read_manifest(imported).weight_paths(imported)) > 1
    assert same(tensors_of(checkpoint), tensors_of(tmp_path / "out"))
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index["weight_map"].keys() == json.loads((checkpoint / INDEX).read_text())["weight_map"].keys()
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "out" / name).read_text()) == json.loads((checkpoint / name).read_text())
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages }}"


@pytest.mark.parametrize("prefix", ["model", "backbone"])
@pytest.mark.parametrize("stacked", [False, True])
def test_every_naming_and_bfloat16_survive(theirs, checkpoint, ours, prefix, stacked, tmp_path):
    state = huggingface.to_huggingface(
        weights.state_of(ours), NANO_CPU, huggingface.Naming(prefix=prefix, stacked=stacked)
    )
    keeps = ("e_score_correction_bias", "A_log")  # as on the hub: these stay in float32
    state = {n: (t if n.endswith(keeps) else t.bfloat16()).contiguous() for n, t in state.items()}
    source = tmp_path / "source"
    source.mkdir()
    save_file(state, source / "model.safetensors")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(checkpoint / name, source / name)
    import_hf(source, tmp_path / "substrate")
    export_hf(tmp_path / "substrate", tmp_path / "out")
    assert same(state, tensors_of(tmp_path / "out"))
    model = build.build_model(NANO_CPU, seed=3)
    weights.load_part([model], [tmp_path / "substrate" / "weights.safetensors"])
    expected = weights.state_of(ours)
    for name, value in weights.state_of(model).items():
        # 2^-8: bfloat16 keeps eight significant bits
        assert torch.allclose(value, expected[name], rtol=2**-8, atol=0)


@pytest.fixture
def alone():
    """Outside the module's process group, which is joined again afterwards: builds and runs have their own."""
    if torch.distributed.is_initialized():
        build.stop()
    yield
    build.start(seed=0)


def test_a_substrate_built_here_and_a_run_of_it_load_in_transformers(alone, tmp_path):
    """Not imported: hub names, and a config and tokenizer of our own making. The run's adapter comes merged."""
    from transformers import NemotronHForCausalLM

    from megatron_evolve.substrate.train import run
    from megatron_evolve.substrate.train.open import open_trained

    folder, tuned = tmp_path / "substrate", tmp_path / "run"
    pretraining = NANO.pretraining.replace(steps=3, warmup_steps=1, batch_size=8)
    substrate = build_substrate(dataclasses.replace(NANO, pretraining=pretraining), folder, seed=1)
    adapter = Adapter(rank=4, alpha=8.0)
    recipe = substrate.default.recipe.replace(steps=4, warmup_steps=1, batch_size=8, lr=0.1, adapter=adapter)
    settings = substrate.default.replace(recipe=recipe).model_dump(mode="json")
    (tmp_path / "c.json").write_text(json.dumps({"id": "x", "substrate": substrate.digest, "settings": settings}))
    paths = ["--substrate", str(folder), "--candidate", str(tmp_path / "c.json"), "--out", str(tuned)]
    assert run.main([*paths, "--seed", "1"]) == 0
    export_hf(folder, tmp_path / "plain")
    export_hf(folder, tmp_path / "merged", run=tuned)
    tokens = torch.randint(0, 90, (2, 70), generator=torch.Generator().manual_seed(2))
    got, expected = {}, {}
    with torch.no_grad():
        for name, trained in (("plain", folder), ("merged", tuned)):
            model = NemotronHForCausalLM.from_pretrained(tmp_path / name, attn_implementation="eager").eval()
            got[name] = model(tokens).logits
            expected[name] = open_trained(folder, substrate, trained)(tokens, None, None)
            assert model.config.eos_token_id == nano_tokenizer().eos_id
    build.stop()
    for name, logits in got.items():
        assert (logits - expected[name]).abs().max() < CLOSE
    assert (got["plain"] - got["merged"]).abs().max() > 0.1  # the adapter does matter
    with pytest.raises(ValueError, match="holds a checkpoint already"):
        export_hf(folder, tmp_path / "plain")


def test_the_commands(checkpoint, tmp_path):
    runner = CliRunner()
    folder, out = str(tmp_path / "substrate"), str(tmp_path / "out")
    done = runner.invoke(app, ["substrate", "import-hf", str(checkpoint), "--out", folder, "--name", "x", "--json"])
    assert json.loads(done.stdout)["digest"] == verify(tmp_path / "substrate").digest
    assert read_manifest(tmp_path / "substrate").name == "x"
    done = runner.invoke(app, ["substrate", "export-hf", folder, "--out", out])
    assert done.exit_code == 0 and same(tensors_of(checkpoint), tensors_of(tmp_path / "out"))
    argv = ["substrate", "export-adapter", str(tmp_path), "--substrate", folder, "--out", out + "2", "--experts", "3d"]
    done = runner.invoke(app, argv)
    assert done.exit_code == 1
    assert done.stderr == "megatron-evolve: the layout of experts must be each or stacked; got '3d': choose one\n"


@pytest.mark.parametrize("limit", [None, [0.0, float("inf")], [1e-2, float("inf")]], ids=["none", "open", "clamped"])
@pytest.mark.parametrize("dt_min", [None, 0.0, 1e-3])
def test_the_clamp_is_the_limit_or_replaced_and_an_export_tells_every_reader(limit, dt_min, checkpoint, tmp_path):
    """As on the hub, `time_step_min` is 1e-3 and clamps nothing; transformers 5 clamps at it, so an export moves it."""
    from transformers import NemotronHConfig

    source, folder, out = (tmp_path / name for name in ("source", "substrate", "out"))
    shutil.copytree(checkpoint, source)
    published = json.loads((source / "config.json").read_text()) | {"time_step_min": 1e-3, "time_step_limit": limit}
    kept = {name: value for name, value in published.items() if name != "time_step_limit" or limit}
    (source / "config.json").write_text(json.dumps(kept))
    substrate = import_hf(source, folder, dt_min=dt_min)
    wanted = dt_min if dt_min is not None else limit[0] if limit else 0.0
    assert substrate.architecture["dt_min"] == wanted
    export_hf(folder, out)
    theirs = NemotronHConfig.from_pretrained(out)
    assert theirs.time_step_min == (wanted or huggingface.NEVER_CLAMPS)
    assert list(theirs.time_step_limit) == [wanted, float("inf")]
    assert import_hf(out, tmp_path / "again", name=substrate.name).architecture == substrate.architecture
    changed = {"time_step_min", "time_step_limit"}
    before, after = (json.loads((at / "config.json").read_text()) for at in (source, out))
    assert {n: v for n, v in before.items() if n not in changed} == {n: v for n, v in after.items() if n not in changed}


@pytest.mark.parametrize("dt_min", [float("inf"), float("nan"), -1e-3])
def test_a_clamp_that_is_no_step_is_refused(dt_min, checkpoint, tmp_path):
    with pytest.raises(ValueError, match="the clamp of the Mamba step must be a number from 0 on; got"):
        import_hf(checkpoint, tmp_path / "out", dt_min=dt_min)
    assert not (tmp_path / "out").exists()


def _config(**fields: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | fields))

    return change


def _index(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        change(index["weight_map"])
        (folder / INDEX).write_text(json.dumps(index))

    return edit


def _shard(change: Callable[[dict[str, torch.Tensor]], object], indexed: bool = True) -> Callable[[Path], None]:
    """Edit the tensors of the file that holds K_PROJ, and the index with them."""

    def edit(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        file = index["weight_map"][K_PROJ]
        state = load_file(folder / file)
        before = set(state)
        change(state)
        save_file(state, folder / file)
        if indexed:
            for name in before - set(state):
                del index["weight_map"][name]
            index["weight_map"] |= dict.fromkeys(set(state) - before, file)
        (folder / INDEX).write_text(json.dumps(index))

    return edit


def _half(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        save_file({name: tensor.half() for name, tensor in load_file(path).items()}, path)


def _tokens(count: int) -> Callable[[Path], None]:
    """Tokens added to the vocabulary, up to `count`."""

    def edit(folder: Path) -> None:
        tokenizer = json.loads((folder / "tokenizer.json").read_text())
        vocabulary = tokenizer["model"]["vocab"]
        vocabulary |= {f"<more-{n}>": n for n in range(len(vocabulary), count)}
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))

    return edit


def _truncate(folder: Path) -> None:
    path = folder / "model-00003-of-00005.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def _add(name: str, tensor: torch.Tensor) -> Callable[[dict], None]:
    return lambda state: state.__setitem__(name, tensor)


BROKEN = {
    "another model": (_config(model_type="llama"), "expected model_type nemotron_h; got 'llama'"),
    "another form": (_config(mlp_hidden_act="silu"), "expected mlp_hidden_act='relu2'; got 'silu'"),
    "quantised": (_config(quantization_config={"bits": 4}), "expected quantization_config=None"),
    "dense layers": (_config(layers_block_type=["mlp"] * 6), "expected layers of Mamba, attention or experts; got mlp"),
    "unknown field": (_config(rope_scaling_2={}), "fields of unknown meaning: rope_scaling_2"),
    "shapes of another": (_config(n_groups=3), "mamba_num_heads must be a multiple of mamba_num_groups"),
    "layer count": (_config(num_hidden_layers=5), "num_hidden_layers=5 does not fit the pattern"),
    "disagreeing": (_config(hybrid_override_pattern="M*EM*M"), "hybrid_override_pattern disagree"),
    "layers a number": (_config(layers_block_type=5), "expected layers_block_type as a list of words; got 5"),
    "layers numbers": (
        _config(layers_block_type=[1, 2]),
        r"expected layers_block_type as a list of words; got \[1, 2\]",
    ),
    "step a word": (_config(time_step_min="a"), "expected time_step_min as a number from 0 on; got 'a'"),
    "limit a word": (
        _config(time_step_limit="a"),
        "expected time_step_limit as a number from 0 on and Infinity; got 'a'",
    ),
    "upper limit": (_config(time_step_limit=[0, 0.1]), r"got \[0, 0\.1\]: this model has no upper clamp"),
    "infinite": (_config(layer_norm_epsilon=float("inf")), "norm_eps: Input should be a finite number"),
    "wider": (_config(moe_intermediate_size=64), "does not have the shapes of its config: .*for \\(64, 64\\)"),
    "latent": (_config(moe_latent_size=32), r"missing: .*fc1_latent_proj\.weight"),
    "prediction head": (_config(num_nextn_predict_layers=1), r"missing: mtp\.layers\.0\.eh_proj\.weight"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "it has no config.json"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "expected tokenizer.json beside the weights"),
    "foreign tokenizer": (
        lambda folder: (folder / "tokenizer.json").write_text("{}"),
        "must be a tokenizer of the tokenizers library",
    ),
    "no end of text": (
        lambda folder: (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}'),
        "expected an eos_token that tokenizer.json knows; got '</s>'",
    ),
    "too many tokens": (_tokens(97), "has 97 tokens, the model 96"),
    "no weights": (lambda folder: (folder / INDEX).unlink(), "pickles are not read"),
    "missing shard": (lambda f: (f / "model-00003-of-00005.safetensors").unlink(), "00003-of-00005.*it is missing"),
    "truncated": (_truncate, "00003-of-00005.safetensors must be a whole safetensors file"),
    "index too long": (_index(lambda m: m.update(odd="model-00002-of-00005.safetensors")), "does not hold it"),
    "index too short": (_index(lambda m: m.pop(K_PROJ)), f"does not name {K_PROJ}"),
    "index elsewhere": (_index(lambda m: m.update({K_PROJ: "../x.safetensors"})), "expected a weight_map"),
    "left over": (_shard(_add("backbone.odd", torch.ones(2))), r"missing: none; left over: backbone\.odd"),
    "missing": (_shard(lambda s: s.pop(K_PROJ)), f"missing: {K_PROJ}; left over: none"),
    "in two files": (_shard(_add(ELSEWHERE, torch.ones(2)), indexed=False), f"{ELSEWHERE} stands in"),
    "mixed dtypes": (_shard(lambda s: s.update({K_PROJ: s[K_PROJ].half()})), "must have one dtype; got F16, F32"),
    "half precision": (
        _shard(lambda s: s.update({n: t.half() for n, t in s.items()})),
        "bfloat16; got F16, whose range",
    ),
    "integers": (_shard(lambda s: s.update({K_PROJ: s[K_PROJ].to(torch.int8)})), f"{K_PROJ} has I8: give the unquant"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_checkpoint_is_refused_and_nothing_is_written(case, checkpoint, tmp_path):
    change, sentence = BROKEN[case]
    source = tmp_path / "source"
    shutil.copytree(checkpoint, source)
    change(source)
    with pytest.raises(ValueError, match=sentence) as refusal:
        import_hf(source, tmp_path / "out")
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "out").exists()


def test_an_imported_substrate_has_siblings(imported, tmp_path):
    from megatron_evolve.substrate.build import refreeze

    old = read_manifest(imported)
    sibling = refreeze(imported, tmp_path / "s", construction=old.construction.replace(cue_rate={"cipher": 0.9}))
    assert sibling.files == verify(tmp_path / "s").files == old.files and sibling.digest != old.digest


def test_a_substrate_is_not_overwritten(checkpoint, imported):
    before = {path.name: path.read_bytes() for path in imported.iterdir()}
    assert ".unfinished" not in before
    for write in (lambda: import_hf(checkpoint, imported), lambda: export_hf(imported, imported)):
        with pytest.raises(ValueError, match="holds a frozen substrate already"):
            write()
    assert before == {path.name: path.read_bytes() for path in imported.iterdir()}


def test_no_file_of_another_is_written_over_or_left_beside(checkpoint, imported, tmp_path):
    """A built substrate has no config.json, and its tokenizer.json is no checkpoint's."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "tokenizer.json").write_text("mine")
    for write in (import_hf, export_hf):
        with pytest.raises(ValueError, match=r"must be new or empty; it holds tokenizer\.json already"):
            write(checkpoint if write is import_hf else imported, tmp_path / "out")
    assert [path.read_text() for path in (tmp_path / "out").iterdir()] == ["mine"]


def test_a_killed_attempt_is_written_over(checkpoint, imported, tmp_path, monkeypatch):
    def killed(*_):
        with pytest.raises(LockHeld, match="to be free; it is in use by"):  # by this one, which still writes
            write(source, out)
        raise KeyboardInterrupt

    for write, source, last in ((import_hf, checkpoint, "sealed"), (export_hf, imported, "_beside")):
        out = tmp_path / write.__name__
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(exchange, last, killed)
            write(source, out)
        (out / "model-00009-of-00009.safetensors").write_bytes(b"cut otherwise")
        write(source, out)
        assert not [*out.glob("*00009*"), *out.glob(".*")]
    assert same(tensors_of(checkpoint), tensors_of(tmp_path / "export_hf"))
    assert read_manifest(tmp_path / "import_hf").files == read_manifest(imported).files


def test_a_changed_substrate_is_not_exported(imported, tmp_path):
    shutil.copytree(imported, tmp_path / "copy")
    path = read_manifest(imported).weight_paths(tmp_path / "copy")[1]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="was changed: expected sha256"):
        export_hf(tmp_path / "copy", tmp_path / "out")
    assert not (tmp_path / "out").exists()
