"""An imported checkpoint is trained like any substrate, in the chat format, and what comes of it goes back out."""

import json
import zipfile

import pytest
import torch

from megatron_evolve.substrate.adapter import export_adapter
from megatron_evolve.substrate.exchange import export_hf, import_hf
from megatron_evolve.substrate.model import build
from megatron_evolve.substrate.model.architecture import NANO_CPU
from megatron_evolve.substrate.model.huggingface import huggingface_config
from megatron_evolve.substrate.recipe import Adapter
from megatron_evolve.substrate.train import run
from megatron_evolve.substrate.train.open import open_trained
from tests.substrate.chat_tokenizer import VOCAB_SIZE, write_chat_tokenizer

SHAPES = NANO_CPU.model_copy(update={"vocab_size": VOCAB_SIZE, "max_sequence_length": 1024})


@pytest.mark.slow
def test_from_a_checkpoint_to_a_trained_one(tmp_path):
    from transformers import NemotronHConfig, NemotronHForCausalLM

    torch.manual_seed(0)
    source, folder, tuned = tmp_path / "hub", tmp_path / "substrate", tmp_path / "run"
    NemotronHForCausalLM(NemotronHConfig(**huggingface_config(SHAPES))).save_pretrained(source, max_shard_size="500KB")
    write_chat_tokenizer(source)
    substrate = import_hf(source, folder)
    assert len(substrate.weight_paths(folder)) > 1
    assert substrate.default.recipe.sequence_length == 1024
    changes = {"steps": 3, "warmup_steps": 1, "batch_size": 6, "lr": 0.05, "adapter": Adapter(rank=4, alpha=8.0)}
    settings = substrate.default.replace(recipe=substrate.default.recipe.replace(**changes)).model_dump(mode="json")
    (tmp_path / "c.json").write_text(json.dumps({"id": "x", "substrate": substrate.digest, "settings": settings}))
    paths = ["--substrate", str(folder), "--candidate", str(tmp_path / "c.json"), "--out", str(tuned)]
    assert run.main([*paths, "--seed", "1"]) == 0
    assert json.loads((tuned / "result.json").read_text())["ending"] == "trained"
    export_adapter(tuned, folder, tmp_path / "adapter", zip_file=tmp_path / "submission.zip")
    with zipfile.ZipFile(tmp_path / "submission.zip") as archive:
        assert len(archive.namelist()) == 2
    export_hf(folder, tmp_path / "out", run=tuned)
    tokens = torch.randint(0, VOCAB_SIZE, (2, 80), generator=torch.Generator().manual_seed(2))
    logits = []
    with torch.no_grad():
        for place in (source, tmp_path / "out"):
            model = NemotronHForCausalLM.from_pretrained(place, attn_implementation="eager").eval()
            logits.append(model(tokens).logits)
        expected = open_trained(folder, substrate, tuned)(tokens, None, None)
    build.stop()
    assert (logits[1] - expected).abs().max() < 1e-5  # float32 sums in another order, logits near 1
    assert (logits[1] - logits[0]).abs().max() > 0.01  # the run did change the model
