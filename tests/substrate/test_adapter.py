"""Adapters out: the real PEFT computes on transformers' model what the run computes here; the zip holds what the
challenge's engine reads, and every known packaging trap is refused."""

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from megatron_evolve.substrate import adapter as exporting
from megatron_evolve.substrate.adapter import CONFIG_FILE, TENSORS_FILE, check_submission, export_adapter
from megatron_evolve.substrate.checkpoint_tokenizer import exported
from megatron_evolve.substrate.exchange import export_hf, import_hf
from megatron_evolve.substrate.manifest import MANIFEST, Substrate
from megatron_evolve.substrate.model import build, huggingface, weights
from megatron_evolve.substrate.model.architecture import NANO_CPU, Architecture
from megatron_evolve.substrate.tokenizer import nano_tokenizer
from megatron_evolve.substrate.train.checkpoint import save_checkpoint

ALL = ("attention", "mamba", "experts", "shared", "output")
HEADED = Architecture.model_validate(NANO_CPU.model_dump() | {"mtp_pattern": "*E", "mtp_depths": 2})
TOKENS = torch.randint(0, NANO_CPU.vocab_size, (2, 60), generator=torch.Generator().manual_seed(2))
# largest difference of two float32 logits near 1; measured 2e-6
CLOSE = 2e-4


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> tuple[Path, Substrate, Path]:
    """(substrate's folder, substrate, transformers checkpoint) with matrices so large that every layer matters."""
    folder = tmp_path_factory.mktemp("base")
    build.start(seed=0)
    model = build.build_model(NANO_CPU, seed=0)
    with torch.no_grad():
        for value in weights.state_of(model).values():
            value.mul_(6 if value.dim() == 2 else 1)
    (folder / "source").mkdir()
    state = huggingface.to_huggingface(weights.state_of(model), NANO_CPU, huggingface.Naming("model", stacked=True))
    save_file({name: value.contiguous() for name, value in state.items()}, folder / "source" / "model.safetensors")
    (folder / "source" / "config.json").write_text(json.dumps(huggingface.huggingface_config(NANO_CPU)))
    for file, document in exported(nano_tokenizer()).items():
        (folder / "source" / file).write_text(json.dumps(document))
    substrate = import_hf(folder / "source", folder / "substrate", name="nano")
    export_hf(folder / "substrate", folder / "hf")
    yield folder / "substrate", substrate, folder / "hf"
    build.stop()


def trained(
    base, folder: Path, *, rank: int = 3, targets: tuple[str, ...] = ALL, architecture: Architecture = NANO_CPU
) -> torch.Tensor:
    """A run's folder with a trained-looking adapter, and the logits of its model."""
    from megatron_evolve.substrate.model.lora import adapter_state, add_lora

    substrate_folder, substrate, *_ = base
    model = build.build_model(architecture, seed=1).eval()
    weights.load_part([model], substrate.weight_paths(substrate_folder))
    add_lora(model, rank=rank, alpha=2.0 * rank, targets=targets, seed=5)
    rng = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.copy_(torch.randn(parameter.shape, generator=rng) * 0.1)
        logits = model(TOKENS, None, None)
    settings = {"rank": rank, "alpha": 2.0 * rank, "targets": list(targets)}
    save_checkpoint(
        folder / "checkpoint",
        kind="adapter",
        step=1,
        run="r",
        tensors={"adapter": adapter_state(model)},
        state={"substrate": substrate.digest, "adapter": settings},
    )
    return logits


@pytest.fixture(scope="module")
def run(base, tmp_path_factory) -> tuple[Path, torch.Tensor]:
    """A run with an adapter on every target, and its logits."""
    folder = tmp_path_factory.mktemp("run")
    return folder, trained(base, folder)


@pytest.fixture(scope="module")
def each(base, run, tmp_path_factory) -> Path:
    """From the manifest alone: no weight of the base is read."""
    folder, alone = tmp_path_factory.mktemp("each") / "adapter", tmp_path_factory.mktemp("alone")
    shutil.copy(base[0] / MANIFEST, alone)
    export_adapter(run[0], alone, folder)
    return folder


@pytest.fixture
def peft(monkeypatch):
    """PEFT, with its guard on out_proj lifted: it protects CUDA kernels that go round the module."""
    package = pytest.importorskip("peft", reason="peft is not installed")
    from peft.tuners import tuners_utils

    monkeypatch.setattr(tuners_utils, "_check_lora_target_modules_mamba", lambda *_: None)
    return package


@pytest.fixture(scope="module")
def headed(base, tmp_path_factory) -> tuple[Path, Substrate]:
    """A substrate whose model also predicts two further tokens."""
    folder = tmp_path_factory.mktemp("headed")
    state = huggingface.to_huggingface(weights.state_of(build.build_model(HEADED, seed=0)), HEADED)
    (folder / "source").mkdir()
    save_file({name: value.contiguous() for name, value in state.items()}, folder / "source" / "model.safetensors")
    (folder / "source" / "config.json").write_text(json.dumps(huggingface.huggingface_config(HEADED)))
    for file, document in exported(nano_tokenizer()).items():
        (folder / "source" / file).write_text(json.dumps(document))
    return folder / "substrate", import_hf(folder / "source", folder / "substrate", name="headed")


def their_model(base):
    from transformers import NemotronHForCausalLM

    return NemotronHForCausalLM.from_pretrained(base[2], attn_implementation="eager", experts_implementation="eager")


def by_expert(model):
    """transformers' model with one module per expert, as the hub's own code builds it: under another type name, for
    transformers 5 would stack an adapter's experts on the way in, and of this model only `down_proj`'s."""
    model.config.model_type = "nemotron_h_by_expert"
    for layer, letter in zip(model.model.layers, NANO_CPU.pattern, strict=True):
        if letter == "E":
            layer.mixer.experts = OneByOne(layer.mixer.experts)
    return model


def logits_of(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS).logits


class OneByOne(nn.Module):
    """The experts of a layer as modules of their own, as the hub's code has them and vLLM's names say."""

    def __init__(self, stacked: nn.Module) -> None:
        super().__init__()
        for e, (up, down) in enumerate(zip(stacked.up_proj, stacked.down_proj, strict=True)):
            expert = nn.Module()
            for name, matrix in (("up_proj", up), ("down_proj", down)):
                linear = nn.Linear(matrix.size(1), matrix.size(0), bias=False)
                linear.weight = nn.Parameter(matrix.detach().clone())
                expert.add_module(name, linear)
            self.add_module(str(e), expert)

    def forward(self, x_TH: torch.Tensor, chosen_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(x_TH)
        for name, expert in self.named_children():
            share = (weights_TK * (chosen_TK == int(name))).sum(-1, keepdim=True)
            out += share * expert.down_proj(torch.relu(expert.up_proj(x_TH)) ** 2)
        return out


def test_peft_computes_the_run_with_one_tensor_per_expert(base, run, each, peft):
    model = by_expert(their_model(base))
    plain = logits_of(model)
    got = logits_of(peft.PeftModel.from_pretrained(model, each))
    assert (got - run[1]).abs().max() < CLOSE
    assert (plain - run[1]).abs().max() > 0.1  # the adapter does matter here


def test_peft_and_transformers_compute_the_run_on_stacked_experts(base, run, peft, tmp_path):
    export_adapter(run[0], base[0], tmp_path / "adapter", layout="stacked")
    got = logits_of(peft.PeftModel.from_pretrained(their_model(base), tmp_path / "adapter"))
    assert (got - run[1]).abs().max() < CLOSE
    model = their_model(base)
    model.load_adapter(str(tmp_path / "adapter"))
    assert (logits_of(model) - run[1]).abs().max() < CLOSE


def test_the_packing_of_lora_b_matters(base, run, peft, tmp_path):
    """B with the rank fastest in place of the expert loads without a word and computes something else."""
    export_adapter(run[0], base[0], tmp_path / "adapter", layout="stacked")
    path = tmp_path / "adapter" / TENSORS_FILE
    state = load_file(path)
    for name, value in state.items():
        if ".experts." in name and "lora_B" in name:
            packed = value.view(len(value), -1, NANO_CPU.num_experts).transpose(1, 2)
            state[name] = packed.reshape(value.shape).contiguous()
    save_file(state, path)
    got = logits_of(peft.PeftModel.from_pretrained(their_model(base), tmp_path / "adapter"))
    assert (got - run[1]).abs().max() > 0.1


def test_peft_itself_refuses_the_mamba_output(base, run, tmp_path):
    """Known limit: PEFT leaves out_proj alone in this model type, so an adapter on it is for vLLM, or is merged."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    export_adapter(run[0], base[0], tmp_path / "adapter", layout="stacked")
    with pytest.raises(ValueError, match="'out_proj' is incompatible"):
        peft.PeftModel.from_pretrained(their_model(base), tmp_path / "adapter")


def test_single_experts_do_not_load_on_stacked_ones(base, peft, tmp_path):
    """Known limit: PEFT finds no module of that name in transformers 5's model, and says so."""
    trained(base, tmp_path / "run", targets=("experts",))
    export_adapter(tmp_path / "run", base[0], tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"Target modules .* not found"):
        peft.PeftModel.from_pretrained(their_model(base), tmp_path / "adapter")


@pytest.mark.parametrize("layout", ["each", "stacked"])
@pytest.mark.parametrize("target", ALL)
def test_each_target_alone_adapts_nothing_else(base, target, layout, peft, tmp_path):
    logits = trained(base, tmp_path / "run", targets=(target,))
    export_adapter(tmp_path / "run", base[0], tmp_path / "adapter", layout=layout)
    model = by_expert(their_model(base)) if layout == "each" else their_model(base)
    adapted = peft.PeftModel.from_pretrained(model, tmp_path / "adapter")
    assert (logits_of(adapted) - logits).abs().max() < CLOSE
    loaded = {name for name in adapted.state_dict() if ".lora_" in name}
    assert len(loaded) == len(load_file(tmp_path / "adapter" / TENSORS_FILE))  # no module got an untrained adapter


def test_a_merged_export_computes_the_run(base, run, tmp_path):
    """Every target, Mamba's output projection too, without PEFT."""
    from transformers import NemotronHForCausalLM

    export_hf(base[0], tmp_path / "hf", run=run[0])
    model = NemotronHForCausalLM.from_pretrained(tmp_path / "hf", attn_implementation="eager")
    assert (logits_of(model) - run[1]).abs().max() < CLOSE
    names = {name for name, value in load_file(tmp_path / "hf" / "model.safetensors").items() if value.dim() == 3}
    assert {name.rsplit(".", 1)[-1] for name in names} == {"weight", "up_proj", "down_proj"}  # the names it came with


def test_a_fully_trained_run_is_exported_as_it_is(base, tmp_path):
    folder, substrate, _ = base
    model = build.build_model(NANO_CPU, seed=9).eval()
    state = {name: value.detach().clone() for name, value in weights.state_of(model).items()}
    save_checkpoint(
        tmp_path / "run" / "checkpoint",
        kind="weights",
        step=1,
        run="r",
        tensors={"weights": state},
        state={"substrate": substrate.digest},
    )
    export_hf(folder, tmp_path / "hf", run=tmp_path / "run")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == "float32"
    back = huggingface.from_huggingface(load_file(tmp_path / "hf" / "model.safetensors"), NANO_CPU)
    assert all(torch.equal(back[name], value) for name, value in state.items())


def test_the_keys_are_those_of_vllm(each):
    """After `base_model.model.`: vLLM's module path with `model.`, one A and one B of two axes per expert."""
    state = load_file(each / TENSORS_FILE)
    assert state["base_model.model.model.layers.2.mixer.experts.3.down_proj.lora_A.weight"].shape == (3, 128)
    assert state["base_model.model.model.layers.2.mixer.experts.3.down_proj.lora_B.weight"].shape == (64, 3)
    assert "base_model.model.lm_head.lora_A.weight" in state
    modules = {"M": 2, "*": 4, "E": 2 + 2 * NANO_CPU.num_experts}
    assert len(state) == 2 * (sum(modules[letter] for letter in NANO_CPU.pattern) + 1)
    config = json.loads((each / CONFIG_FILE).read_text())
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (3, 6, "LORA")
    assert set(config["target_modules"]) == {name.split(".")[-3] for name in state}


@pytest.mark.parametrize("layout", ["each", "stacked"])
def test_prediction_heads_are_in_no_export(base, headed, layout, tmp_path):
    """Whether the heads were adapted or not, the files are those of the same run on a model without heads."""
    trained(base, tmp_path / "plain")
    export_adapter(tmp_path / "plain", base[0], tmp_path / "expected", layout=layout)
    expected = load_file(tmp_path / "expected" / TENSORS_FILE)
    for name, targets in (("without", ALL), ("with", (*ALL, "mtp"))):
        trained(headed, tmp_path / name, targets=targets, architecture=HEADED)
        stored = load_file(tmp_path / name / "checkpoint" / "adapter.safetensors")
        assert any(key.startswith("mtp.") for key in stored) == (name == "with")
        export_adapter(tmp_path / name, headed[0], tmp_path / f"{name} out", layout=layout)
        assert load_file(tmp_path / f"{name} out" / TENSORS_FILE).keys() == expected.keys()
        if layout == "each":
            check_submission(tmp_path / f"{name} out", HEADED)


def test_an_adapter_on_heads_alone_has_nothing_to_export(headed, tmp_path):
    trained(headed, tmp_path / "run", targets=("mtp",), architecture=HEADED)
    with pytest.raises(ValueError, match="on prediction heads alone, which no export carries"):
        export_adapter(tmp_path / "run", headed[0], tmp_path / "adapter")


def test_a_merged_export_carries_the_heads_adapters(headed, tmp_path):
    trained(headed, tmp_path / "run", targets=("mtp",), architecture=HEADED)
    export_hf(headed[0], tmp_path / "hf", run=tmp_path / "run")
    before = load_file(headed[0].parent / "source" / "model.safetensors")
    after = load_file(tmp_path / "hf" / "model.safetensors")
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed and all(name.startswith("mtp.") for name in changed)


def test_the_submission_holds_both_files_at_its_root(base, run, tmp_path):
    export_adapter(run[0], base[0], tmp_path / "adapter", zip_file=tmp_path / "submission.zip")
    with zipfile.ZipFile(tmp_path / "submission.zip") as archive:
        assert sorted(archive.namelist()) == [CONFIG_FILE, TENSORS_FILE]
        assert archive.testzip() is None
        assert archive.read(TENSORS_FILE) == (tmp_path / "adapter" / TENSORS_FILE).read_bytes()
    export_adapter(run[0], base[0], tmp_path / "again", zip_file=tmp_path / "again.zip")
    assert (tmp_path / "again.zip").read_bytes() == (tmp_path / "submission.zip").read_bytes()


def test_rank_33_is_refused_before_anything_is_written(base, tmp_path):
    trained(base, tmp_path / "run", rank=33, targets=("mamba",))
    with pytest.raises(ValueError, match="a submission's rank must be at most 32; the run's is 33"):
        export_adapter(tmp_path / "run", base[0], tmp_path / "adapter", zip_file=tmp_path / "s.zip")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def _config(**fields: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / CONFIG_FILE).read_text())
        (folder / CONFIG_FILE).write_text(json.dumps(config | fields))

    return change


def _state(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        save_file(change(load_file(folder / TENSORS_FILE)), folder / TENSORS_FILE)

    return edit


EXPERT = "base_model.model.model.layers.2.mixer.experts.1.up_proj"
PREFIX = "base_model.model."
TRAPS = {
    "rank 33": (_config(r=33), "rank must be at most 32; got 33"),
    "DoRA": (_config(use_dora=True), "needs use_dora=False"),
    "rank-stabilised scale": (_config(use_rslora=True), "needs use_rslora=False"),
    "whole modules": (_config(modules_to_save=["lm_head"]), "needs modules_to_save=None"),
    "biases": (_config(bias="all"), "needs bias='none'"),
    "ranks by pattern": (_config(rank_pattern={"up_proj": 2}), "needs rank_pattern={}"),
    "backbone prefix": (
        _state(lambda s: {name.replace(f"{PREFIX}model.", f"{PREFIX}backbone."): t for name, t in s.items()}),
        "expected keys such as base_model.model.*; got base_model.model.backbone.layers.0",
    ),
    "no PEFT prefix": (_state(lambda s: {n.removeprefix(PREFIX): t for n, t in s.items()}), "expected keys such as"),
    "tensors of routing": (
        _state(lambda s: s | {f"{PREFIX}model.layers.2.mixer.gate.lora_A.weight": torch.ones(3, 64)}),
        "mixer.gate.lora_A.weight and 0 more",
    ),
    "mixed expert rank": (
        _state(lambda s: s | {f"{EXPERT}.lora_A.weight": s[f"{EXPERT}.lora_A.weight"][:2].contiguous()}),
        r"experts.1.up_proj.lora_A.weight must be \(3, 64\) at rank 3; got \(2, 64\): pad its rank",
    ),
    "A without B": (
        _state(lambda s: {n: t for n, t in s.items() if n != f"{EXPERT}.lora_B.weight"}),
        "experts.1.up_proj.lora_A.weight and its lora_B must stand together",
    ),
    "truncated": (lambda f: (f / TENSORS_FILE).write_bytes((f / TENSORS_FILE).read_bytes()[:-1]), "must be a whole"),
}


@pytest.mark.parametrize("trap", TRAPS)
def test_a_packaging_trap_is_refused(trap, each, tmp_path):
    for name in (CONFIG_FILE, TENSORS_FILE):
        (tmp_path / name).write_bytes((each / name).read_bytes())
    check_submission(tmp_path, NANO_CPU)
    change, sentence = TRAPS[trap]
    change(tmp_path)
    with pytest.raises(ValueError, match=sentence):
        exporting.write_submission(tmp_path, tmp_path / "s.zip", NANO_CPU)
    assert not (tmp_path / "s.zip").exists()


def test_stacked_experts_are_no_submission(base, run, tmp_path):
    with pytest.raises(ValueError, match="needs one tensor per expert; got the stacked layout"):
        export_adapter(run[0], base[0], tmp_path / "a", layout="stacked", zip_file=tmp_path / "s.zip")
    export_adapter(run[0], base[0], tmp_path / "b", layout="stacked")
    with pytest.raises(ValueError, match=r"got base_model.*experts\.base_layer\.lora_A\.weight and"):
        check_submission(tmp_path / "b", NANO_CPU)


def test_too_many_bytes(base, run, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "SUBMISSION_BYTES", 1000)
    with pytest.raises(ValueError, match=r"a submission may have 1,000 bytes; got \d+"):
        export_adapter(run[0], base[0], tmp_path / "a", zip_file=tmp_path / "s.zip")
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_does_not_fit_is_refused(base, run, tmp_path):
    folder, substrate, _ = base
    with pytest.raises(ValueError, match="expected a checkpoint in"):
        export_adapter(tmp_path / "none", folder, tmp_path / "a")
    for name, kind, digest, sentence in (
        ("full", "weights", substrate.digest, "holds weights, no adapter"),
        ("other", "adapter", "0" * 64, "was trained from substrate 000000000000"),
    ):
        state = {"substrate": digest, "adapter": None}
        save_checkpoint(tmp_path / name / "checkpoint", kind=kind, step=1, run="r", tensors={}, state=state)
        with pytest.raises(ValueError, match=sentence):
            export_adapter(tmp_path / name, folder, tmp_path / "a")
    assert not (tmp_path / "a").exists()
