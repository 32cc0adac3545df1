"""Frozen packed bases with adapters under FSDP2: two gloo processes against one on the joint batch."""

import copy
import json
import pickle
import re
from pathlib import Path

import pytest
import torch
from processes import run_ranks
from safetensors.torch import load_file

pytest.importorskip("peft")

from peft import PeftModel
from sharded_training import MODELS, RANKS, ROWS, Parts, logged, train, trainer_of, with_adapter
from transformers import AutoModelForCausalLM

import hf_onebit
from hf_onebit import MPQConfig
from hf_onebit.nn import prepare_for_fsdp

DOCS = Path(__file__).parents[2] / "docs" / "peft.md"
PATIENCE = (400, 300)  # seconds: imports alone take a minute where the machine is busy

SCRIPT = """
import copy, json
from pathlib import Path
from sharded_training import *
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from transformers import AutoModelForCausalLM
import hf_onebit
from hf_onebit.nn import full_state_dict, prepare_for_fsdp

folder, mine = Path(os.environ["STORE"]).parent, ROWS[2 * rank : 2 * rank + 2]
half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
said = {}

def shard(model, **how):
    for block in blocks_of(model):
        fully_shard(block, **how)
    fully_shard(model, **how)
    if hasattr(model, "set_reduce_scatter_unused_params"):
        model.set_reduce_scatter_unused_params(True)  # no rank knows which experts the others' tokens come to
    return model

def refusal(call):
    try:
        call()
    except (RuntimeError, ValueError) as error:
        return str(error)

# Each kind, in float32: what one process computes, from half of the bytes.
for name, make in {**MODELS, "parts": Parts}.items():
    model = with_adapter(make())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert name != "experts" or any(".experts." in key and "lora" in key for key in before)
    whole = bytes_of(packed_tensors(prepare_for_fsdp(model)).values())
    assert prepare_for_fsdp(model) is model
    held = live_bytes({torch.int32, torch.uint8})
    shard(model)
    figures = train(model, mine, mean)
    part = bytes_of(packed_tensors(model).values())
    state = full_state_dict(model)
    if rank == 0:
        base = [key for key in before if "lora" not in key]
        assert state.keys() == before.keys()
        assert all(torch.equal(state[key], before[key]) and state[key].dtype == before[key].dtype for key in base)
        if name == "onebit":
            model.save_pretrained(folder / "adapter", state_dict=state)
    del state, before
    said[name] = {"figures": figures, "whole": whole, "part": part, "held": held,
                  "live": live_bytes({torch.int32, torch.uint8})}
    del model

# Mixed precision and offloading: words and scales within forward are the very ones that were there.
offload = CPUOffloadPolicy(pin_memory=False)
for name, how in (("onebit", {"mp_policy": half}), ("mpq", {"mp_policy": half, "offload_policy": offload})):
    model = with_adapter(MODELS[name]())
    layers = {n: m for n, m in model.named_modules() if hasattr(m, "scale_names")}
    exact = {n: {k: getattr(m, k).detach().clone() for k in ("weight", *m.scale_names)} for n, m in layers.items()}
    seen = []
    def look(layer, inputs, found):
        assert inputs[0].dtype == torch.bfloat16
        seen.extend(torch.equal(getattr(layer, k), v) and getattr(layer, k).dtype == v.dtype for k, v in found.items())
    for n, layer in layers.items():
        layer.register_forward_pre_hook(lambda layer, inputs, found=exact[n]: look(layer, inputs, found))
    shard(prepare_for_fsdp(model), **how)
    said["half " + name] = train(model, mine, mean)
    assert len(seen) >= 7 * 3 * STEPS and all(seen)

# Without adapters: norms and scales learn; every rank saves, or the first one what it was given.
model = MODELS["head"]()
model.requires_grad_(False)
learning = hf_onebit.train_scales(model, ["scales"])
shard(prepare_for_fsdp(model))
said["scales"] = train(model, mine, mean)
model.save_pretrained(folder / "saved")
state = full_state_dict(model)
if rank == 0:
    model.save_pretrained(folder / "given", state_dict=state, is_main_process=True)
torch.distributed.barrier()

# What cannot be, and is said on every rank alike.
model = MODELS["mpq"]()
said["unprepared"] = refusal(lambda: train(shard(with_adapter(model), mp_policy=half), mine))
model = MODELS["mpq"]()
shard(model)
said["late"] = refusal(lambda: prepare_for_fsdp(model))
said["saving"] = refusal(lambda: model.save_pretrained(folder / "never"))
said["thawed"] = refusal(lambda: model.requires_grad_(True))
model = MODELS["mpq"]()
model.model.layers[0].mlp.up_proj.weight.requires_grad_(True)
said["learning"] = [refusal(lambda: prepare_for_fsdp(model)), refusal(lambda: fully_shard(model.model.layers[0]))]

# Transformers' own loading in shards.
from transformers.distributed import DistributedConfig
os.environ["LOCAL_RANK"] = os.environ["RANK"]
model = AutoModelForCausalLM.from_pretrained(folder / "packed", distributed_config=DistributedConfig(fsdp_size=2))
assert bytes_of(packed_tensors(model).values()) < 0.6 * said["mpq"]["whole"]
with torch.no_grad():
    logits = model(ROWS).logits
said["native"] = bool(torch.equal(logits, AutoModelForCausalLM.from_pretrained(folder / "packed")(ROWS).logits))
model.save_pretrained(folder / "native")
how = {"distributed_config": DistributedConfig(fsdp_size=2, fsdp_mixed_precision=True)}
said["native half"] = refusal(lambda: AutoModelForCausalLM.from_pretrained(folder / "packed", **how))

os.chdir(folder)
exec(open("shown.py").read(), {})

# The Trainer, over Accelerate.
os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}  # as torchrun does; there is a group already
adapted = prepare_for_fsdp(with_adapter(MODELS["onebit"]()))
trainer = trainer_of(adapted, "runs", 2, {})
trainer.train()
said["trainer"] = logged(trainer)
adapted = prepare_for_fsdp(with_adapter(MODELS["onebit"]()))
trainer = trainer_of(adapted, "runs", 2, {"cpu_ram_efficient_loading": True})
trainer.train(resume_from_checkpoint=str(folder / "runs" / "checkpoint-2"))
said["resumed"] = logged(trainer)
model = MODELS["onebit"]()
for name, p in model.named_parameters():
    p.requires_grad_("norm" in name)
trainer = trainer_of(prepare_for_fsdp(model), "norms", 2, {}, bf16=True)
trainer.train()
trainer.save_model(folder / "norms")
norms = {name: value for name, value in full_state_dict(trainer.model).items() if "norm" in name}
if rank == 0:
    saved = AutoModelForCausalLM.from_pretrained(folder / "norms").state_dict()
    said["norms"] = all(torch.equal(saved[name], value) for name, value in norms.items()), len(norms)
model.requires_grad_(False)
model = MODELS["onebit"]()
model.model.layers[0].mlp.up_proj.weight.requires_grad_(True)
said["trainer learning"] = refusal(trainer_of(model, "never", 2, {}, bf16=True).train)
print("SAID", json.dumps(said))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What two ranks wrote and said."""
    made = tmp_path_factory.mktemp("sharded")
    MODELS["mpq"]().save_pretrained(made / "packed")
    MODELS["onebit"]().save_pretrained(made / "model-onebit")
    (made / "shown.py").write_text(shown())
    texts = run_ranks(SCRIPT, RANKS, made, *PATIENCE)
    said = [json.loads(line[5:]) for text in texts for line in text.splitlines() if line.startswith("SAID")]
    for rank, words in enumerate(said):
        (made / f"said-{rank}.json").write_text(json.dumps(words))
    return made


def shown():
    """The page's script for sharded training."""
    (code,) = re.findall(r"^```py\n(.*?)^```$", DOCS.read_text(encoding="utf-8"), re.M | re.S)
    return code


@pytest.fixture
def said(folder):
    return [json.loads((folder / f"said-{rank}.json").read_text()) for rank in range(RANKS)]


@pytest.mark.parametrize("name", [*MODELS, "parts"])
def test_two_ranks_compute_what_one_process_does_with_half_of_the_bytes(said, name):
    alone = train(with_adapter({**MODELS, "parts": Parts}[name]()), ROWS)
    assert alone[2] < alone[0]
    for words in said:
        assert words[name]["figures"] == pytest.approx(alone, rel=1e-4)
    parts = [words[name]["part"] for words in said]
    whole = said[0][name]["whole"]
    assert sum(parts) == whole
    assert max(parts) < 0.6 * whole
    for words in said:  # nothing keeps the rest alive; the last shard is padded
        assert words[name]["held"] >= whole
        assert words[name]["live"] <= max(parts) + words[name]["held"] - whole


def test_the_adapter_is_whole(folder):
    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
    alone = with_adapter(MODELS["onebit"]())
    train(alone, ROWS)
    learned = {key.replace(".default", ""): p for key, p in alone.state_dict().items() if "lora" in key}
    assert tensors.keys() == learned.keys()
    for key, tensor in tensors.items():
        torch.testing.assert_close(tensor, learned[key], rtol=1e-3, atol=1e-4)
    base = AutoModelForCausalLM.from_pretrained(folder / "model-onebit")
    model = PeftModel.from_pretrained(base, folder / "adapter")
    torch.testing.assert_close(model(ROWS).logits, alone(ROWS).logits, rtol=1e-2, atol=1e-2)


def test_mixed_precision_rounds_no_scales_and_offloading_changes_nothing(said):
    for name in ("onebit", "mpq"):
        exact = train(with_adapter(MODELS[name]()), ROWS)
        for words in said:
            assert words[f"half {name}"] == pytest.approx(exact, rel=0.05)


@pytest.mark.parametrize("saved", ["saved", "given"])
def test_a_saved_model_is_whole(folder, said, saved):
    """Tied head and embedding, and scales that were trained, in float16 as files have them."""
    alone = MODELS["head"]()
    alone.requires_grad_(False)
    hf_onebit.train_scales(alone, ["scales"])
    figures = train(alone, ROWS)
    for words in said:
        assert words["scales"] == pytest.approx(figures, rel=1e-4)
    names = load_file(folder / saved / "model.safetensors")
    assert not [name for name in names if name.endswith("_bytes") or name.startswith("lm_head")]
    model = AutoModelForCausalLM.from_pretrained(folder / saved)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    hf_onebit.freeze_scales(alone)
    others = alone.state_dict()
    for key, tensor in model.state_dict().items():
        if key.endswith("weight"):
            assert torch.equal(tensor, others[key])
        else:
            torch.testing.assert_close(tensor, others[key], rtol=2e-3, atol=1e-4)


def test_refusals(said):
    for words in said:
        assert "prepare_for_fsdp(model) before fully_shard" in words["unprepared"]
        assert "sharded already" in words["late"]
        assert "this rank's part" in words["saving"]
        assert "floating point" in words["thawed"]
        first, second = words["learning"]
        assert first.startswith("model.layers.0.mlp.up_proj.weight learns (1 such weights)")
        assert "DistributedDataParallel" in first
        assert "DistributedDataParallel" in second
        assert "bfloat16" in words["native half"]


def test_loading_in_shards(folder, said):
    assert all(words["native"] for words in said)
    model, again = (AutoModelForCausalLM.from_pretrained(folder / name) for name in ("packed", "native"))
    assert torch.equal(model(ROWS).logits, again(ROWS).logits)


def test_the_trainer(folder, said, tmp_path):
    alone = trainer_of(with_adapter(MODELS["onebit"]()), tmp_path / "alone", 4)
    alone.train()
    figures = logged(alone)
    assert len(figures) == 2 * 3
    for words in said:
        assert words["trainer"] == pytest.approx(figures, rel=1e-3)
        assert words["resumed"] == pytest.approx(figures, rel=1e-3)
        assert "FSDP2 cannot shard packed words that learn" in words["trainer learning"]
    assert said[0]["norms"] == [True, 3]
    assert (folder / "runs" / "checkpoint-3" / "adapter_model.safetensors").is_file()
    base = AutoModelForCausalLM.from_pretrained(folder / "model-onebit")
    PeftModel.from_pretrained(base, folder / "runs" / "checkpoint-3")


def test_what_the_page_shows(folder):
    base = AutoModelForCausalLM.from_pretrained(folder / "model-onebit")
    before = base(ROWS).logits
    model = PeftModel.from_pretrained(base, folder / "adapter-sharded")
    assert not torch.equal(model(ROWS).logits, before)


def test_a_prepared_model_alone():
    """Without any process group it is the model that it was, but for the names of its scales."""
    model = MODELS["head"]().eval()
    wanted, state = model(ROWS).logits, model.state_dict()
    prepare_for_fsdp(model)
    assert torch.equal(model(ROWS).logits, wanted)
    assert model.lm_head.scales_bytes is model.model.embed_tokens.scales_bytes
    model.tie_weights()
    assert torch.equal(model.to(torch.bfloat16).lm_head.scales, state["lm_head.scales"])
    copied = MODELS["head"]()
    with pytest.raises(RuntimeError, match="scales_bytes"):  # neither state can be mistaken for the other
        copied.load_state_dict(model.state_dict())
    with pytest.raises(ValueError, match=r"before nn\.prepare_for_fsdp"):
        hf_onebit.train_scales(model)
    layer = model.model.layers[0].mlp.up_proj
    with pytest.raises(AttributeError, match="zeros_of_none"):
        _ = layer.zeros_of_none
    assert torch.equal(layer.dequantize(), copied.model.layers[0].mlp.up_proj.dequantize())


def test_a_prepared_model_is_saved_by_its_own_names(tmp_path):
    model = MODELS["head"]().eval()
    wanted = model(ROWS).logits
    prepare_for_fsdp(model).save_pretrained(tmp_path / "saved")
    torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")(ROWS).logits, wanted)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_a_copy_of_a_prepared_model_saves_itself(copied, tmp_path):
    model = prepare_for_fsdp(MODELS["head"]().eval())
    other = copied(model)
    with torch.no_grad():
        model.model.norm.weight.zero_()
    other.save_pretrained(tmp_path / "saved", state_dict=other.state_dict())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(again(ROWS).logits, MODELS["head"]().eval()(ROWS).logits)
    names = load_file(tmp_path / "saved" / "model.safetensors")
    assert not [name for name in names if name.endswith("_bytes")]


def test_models_that_cannot_be_prepared():
    with pytest.raises(ValueError, match="without packed layers"):
        prepare_for_fsdp(torch.nn.Linear(4, 4))


def test_native_loading_takes_packed_checkpoints_only():
    from transformers.distributed import DistributedConfig

    from hf_onebit.integrations.load_checks import check_sharding

    config, sharded = MPQConfig(bits=4), DistributedConfig(fsdp_size=2)
    with pytest.raises(ValueError, match="takes packed checkpoints"):
        check_sharding(sharded, config, pre_quantized=False)
    check_sharding(DistributedConfig(fsdp_size=1), config, pre_quantized=False)
    check_sharding(None, config, pre_quantized=False)
    check_sharding(sharded, config, pre_quantized=True)
    config.modules = {"layer": {"double_quant": True}}
    with pytest.raises(ValueError, match="cannot be loaded in shards"):
        check_sharding(sharded, config, pre_quantized=True)
