"""Packed weights under DistributedDataParallel: two gloo processes against one on the joint batch."""

import json

import pytest
import torch
from parallel_training import NEAREST, RANKS, Parts, train, trainer_of, words
from processes import run_ranks
from safetensors.torch import load_file
from tiny import tiny_llama
from transformers import AutoModelForCausalLM

from hf_onebit import DiodeMix, MPQConfig, MPQQuantizer, OneBitConfig, OneBitQuantizer

PATIENCE = (400, 300)  # seconds: imports alone take a minute where the machine is busy
METHODS = {
    "mpq": lambda: MPQQuantizer(MPQConfig(bits=4, group_size=32)).quantize_model(tiny_llama()),
    "onebit": lambda: OneBitQuantizer(OneBitConfig()).quantize_model(tiny_llama()),
}

# All in one start of the two processes: their imports take longer than what they do.
SCRIPT = """
import json
from pathlib import Path
from safetensors.torch import save_file
from hf_onebit import DiodeMix
from parallel_training import DRAWN, NEAREST, Parts, train, trainer_of, words

folder, said = Path(os.environ["STORE"]).parent, {}
for name, options, reentrant in (("nearest", NEAREST, False), ("reentrant", NEAREST, True), ("drawn", DRAWN, False)):
    model = Parts(seed=rank)  # every rank gets what rank 0 has
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    said[name] = train(wrapped, [rank], DiodeMix(wrapped.parameters(), **options), reentrant, wrapped.no_sync)
    save_file(words(model), folder / f"{name}-{rank}.safetensors")
wrapped = torch.nn.parallel.DistributedDataParallel(Parts(seed=0))
DiodeMix(wrapped.parameters(), fused=True)
try:
    wrapped(torch.randn(4, 32), True).backward()
except ValueError as error:
    said["fused"] = str(error)

os.environ |= {"LOCAL_RANK": os.environ["RANK"], "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}  # as torchrun
for method in ("mpq", "onebit"):
    at = folder / method
    for part in ("whole", "resumed"):
        trainer = trainer_of(at / "packed", at / "runs", batch=2)
        assert trainer.args.world_size == 2
        trainer.train(resume_from_checkpoint=str(at / "runs" / "checkpoint-2") if part == "resumed" else None)
        save_file(words(trainer.model), at / f"{part}-{rank}.safetensors")
        said[f"{method} {part}"] = [e["grad_norm"] for e in trainer.state.log_history if "grad_norm" in e]
    trainer.save_model(at / "saved")
print("SAID", json.dumps(said))
"""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """The folder that two ranks wrote to, and what each of them said."""
    folder = tmp_path_factory.mktemp("ranks")
    for method, make in METHODS.items():
        make().save_pretrained(folder / method / "packed")
    texts = run_ranks(SCRIPT, RANKS, folder, *PATIENCE)
    said = [json.loads(line[5:]) for text in texts for line in text.splitlines() if line.startswith("SAID")]
    assert len(said) == RANKS
    return folder, said


def test_two_ranks_step_as_one_process_does(ranks):
    folder, said = ranks
    assert said[0] == said[1]
    assert "fused=False" in said[0]["fused"]
    for name in ("nearest", "reentrant", "drawn"):
        first, second = (load_file(folder / f"{name}-{rank}.safetensors") for rank in range(RANKS))
        assert all(torch.equal(first[key], second[key]) for key in first)
    model = Parts(seed=0)
    before = words(model)
    norms = train(model, range(RANKS), DiodeMix(model.parameters(), **NEAREST))
    after = words(model)
    assert [key for key in after if torch.equal(before[key], after[key])] == ["unused.weight"]
    for name in ("nearest", "reentrant"):
        assert said[0][name] == pytest.approx(norms, rel=1e-4)
        found = load_file(folder / f"{name}-0.safetensors")
        assert all(torch.equal(found[key], after[key]) for key in after)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_the_trainer_on_two_ranks(ranks, method, tmp_path):
    folder, said = ranks[0] / method, ranks[1]
    found = {
        (part, rank): load_file(folder / f"{part}-{rank}.safetensors")
        for part in ("whole", "resumed")
        for rank in range(RANKS)
    }
    whole = found["whole", 0]
    for other in found.values():
        assert all(torch.equal(whole[key], other[key]) for key in whole)
    alone = trainer_of(folder / "packed", tmp_path / "alone", batch=4)
    before = words(alone.model)
    alone.train()
    norms = [entry["grad_norm"] for entry in alone.state.log_history if "grad_norm" in entry]
    assert said[0][f"{method} whole"] == pytest.approx(norms, rel=1e-3)
    after = words(alone.model)
    assert any(not torch.equal(before[key], after[key]) for key in after)
    # The ranks sum in another order, which a weight between two levels may feel.
    different = sum(int((whole[key] != after[key]).sum()) for key in after)
    assert different <= 1e-3 * sum(value.numel() for value in after.values())
    assert sorted(path.name for path in (folder / "runs").iterdir()) == ["checkpoint-2", "checkpoint-3"]
    for saved in (folder / "saved", folder / "runs" / "checkpoint-3"):
        again = words(AutoModelForCausalLM.from_pretrained(saved))
        assert all(torch.equal(again[key], whole[key]) for key in whole)
