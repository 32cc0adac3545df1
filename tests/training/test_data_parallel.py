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

SCRIPT = """
import json
from safetensors.torch import save_file
from hf_onebit import DiodeMix
from parallel_training import DRAWN, NEAREST, Parts, train, words

for name, options, reentrant in (("nearest", NEAREST, False), ("reentrant", NEAREST, True), ("drawn", DRAWN, False)):
    model = Parts(seed=rank)  # every rank gets what rank 0 has
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    norms = train(wrapped, [rank], DiodeMix(wrapped.parameters(), **options), reentrant, wrapped.no_sync)
    save_file(words(model), f"{os.environ['STORE']}-{name}-{rank}.safetensors")
    print(json.dumps(norms))
wrapped = torch.nn.parallel.DistributedDataParallel(Parts(seed=0))
DiodeMix(wrapped.parameters(), fused=True)
try:
    wrapped(torch.randn(4, 32), True).backward()
except ValueError as error:
    print(json.dumps(str(error)))
"""


def test_two_ranks_step_as_one_process_does(tmp_path):
    said = [[json.loads(line) for line in text.splitlines()] for text in run_ranks(SCRIPT, RANKS, tmp_path, *PATIENCE)]
    assert said[0] == said[1]
    nearest, reentrant, _, refusal = said[0]
    assert "fused=False" in refusal
    for name in ("nearest", "reentrant", "drawn"):
        first, second = (load_file(tmp_path / f"store-{name}-{rank}.safetensors") for rank in range(RANKS))
        assert all(torch.equal(first[key], second[key]) for key in first)
    model = Parts(seed=0)
    before = words(model)
    norms = train(model, range(RANKS), DiodeMix(model.parameters(), **NEAREST))
    assert nearest == pytest.approx(norms, rel=1e-4)
    assert reentrant == pytest.approx(norms, rel=1e-4)
    after = words(model)
    assert [key for key in after if torch.equal(before[key], after[key])] == ["unused.weight"]
    for name in ("nearest", "reentrant"):
        found = load_file(tmp_path / f"store-{name}-0.safetensors")
        assert all(torch.equal(found[key], after[key]) for key in after)


TRAINER = """
import json
from pathlib import Path
os.environ |= {"LOCAL_RANK": os.environ["RANK"], "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}  # as torchrun
from parallel_training import trainer_of, words
from safetensors.torch import save_file

folder = Path(os.environ["STORE"]).parent
for part in ("whole", "resumed"):
    trainer = trainer_of(folder / "packed", folder / "runs", batch=2)
    assert trainer.args.world_size == 2
    trainer.train(resume_from_checkpoint=str(folder / "runs" / "checkpoint-2") if part == "resumed" else None)
    save_file(words(trainer.model), folder / f"{part}-{rank}.safetensors")
    print("SAID", json.dumps([entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]))
trainer.save_model(folder / "saved")
"""


@pytest.mark.parametrize("method", ["mpq", "onebit"])
def test_the_trainer_on_two_ranks(tmp_path, method):
    if method == "mpq":
        model = MPQQuantizer(MPQConfig(bits=4, group_size=32)).quantize_model(tiny_llama())
    else:
        model = OneBitQuantizer(OneBitConfig()).quantize_model(tiny_llama())
    model.save_pretrained(tmp_path / "packed")
    texts = run_ranks(TRAINER, RANKS, tmp_path, *PATIENCE)
    said = [[json.loads(line[5:]) for line in text.splitlines() if line.startswith("SAID")] for text in texts]
    found = {
        (part, rank): load_file(tmp_path / f"{part}-{rank}.safetensors")
        for part in ("whole", "resumed")
        for rank in range(RANKS)
    }
    whole = found["whole", 0]
    for other in found.values():
        assert all(torch.equal(whole[key], other[key]) for key in whole)
    alone = trainer_of(tmp_path / "packed", tmp_path / "alone", batch=4)
    before = words(alone.model)
    alone.train()
    norms = [entry["grad_norm"] for entry in alone.state.log_history if "grad_norm" in entry]
    assert said[0][0] == pytest.approx(norms, rel=1e-3)
    after = words(alone.model)
    assert any(not torch.equal(before[key], after[key]) for key in after)
    # The ranks sum in another order, which a weight between two levels may feel.
    different = sum(int((whole[key] != after[key]).sum()) for key in after)
    assert different <= 1e-3 * sum(value.numel() for value in after.values())
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["checkpoint-2", "checkpoint-3"]
    for saved in (tmp_path / "saved", tmp_path / "runs" / "checkpoint-3"):
        again = words(AutoModelForCausalLM.from_pretrained(saved))
        assert all(torch.equal(again[key], whole[key]) for key in whole)
