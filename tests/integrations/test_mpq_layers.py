"""Group-quantized linear layers of every layout inside of Transformers: saved, loaded, offloaded, copied, trained."""

import copy
import pickle

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_ids, tiny_llama
from transformers import AutoModelForCausalLM

from hf_onebit import MPQWeightParameter, OneBitConfig
from hf_onebit.formats import mbwq
from hf_onebit.formats.packing import pack
from hf_onebit.formats.table import TableEntry
from hf_onebit.nn import MBWQLinear, MPQLinear, packed_layers
from hf_onebit.nn.replace import entry_of, module_shape, set_packed
from hf_onebit.quantization.planning import attach

BLOCKS = ((6, 32, 32), (3, 32, 32))


def entry(name: str, in_features: int) -> TableEntry:
    """A layout of its own for each of a block's layers."""
    about = {"method": "mpq", "bits": 4, "group_size": 32, "in_features": in_features}
    kind = name.rpartition(".")[2]
    if kind == "q_proj":
        return TableEntry(**about, g_idx=True)
    if kind == "k_proj":
        return TableEntry(**about, q_perm=True, symmetric=False)
    if kind == "o_proj" and in_features == 64:
        return TableEntry(**about | {"bits": 6}, q_perm=True, symmetric=False, blocks=BLOCKS)
    return TableEntry(**about, symmetric=kind != "up_proj")


def random_tensors(entry: TableEntry, in_features: int, out_features: int) -> dict:
    tensors = {}
    for name, (shape, dtype) in entry.tensor_specs(in_features, out_features).items():
        if name == "g_idx":
            tensors[name] = torch.randint(0, in_features // 32, shape, dtype=dtype)
        elif name == "q_perm":
            tensors[name] = torch.randperm(in_features).to(dtype)
        elif name == "weight":
            blocks = entry.row_blocks(in_features)
            widths = torch.tensor([bits for bits, rows, _ in blocks for _ in range(rows)])
            codes = (torch.rand(out_features, in_features) * (1 << widths)).to(torch.uint8)
            tensors[name] = mbwq.pack_blocks(codes, blocks) if entry.in_blocks else pack(codes, entry.bits)
        else:
            tensors[name] = (torch.rand(shape) * 0.02).to(dtype)
    return tensors


@pytest.fixture(scope="module")
def model():
    """A model whose layers have random codes in all layouts."""
    torch.manual_seed(0)
    model = tiny_llama()
    table = {}
    for name, module in list(model.model.named_modules(prefix="model")):
        if type(module) is torch.nn.Linear:
            shape = module_shape(module)
            about = entry(name, shape.in_features)
            set_packed(model, name, random_tensors(about, shape.in_features, shape.out_features), about)
            table[name] = about.to_dict()
    attach(model, OneBitConfig(modules=table))
    kinds = {type(layer) for layer in packed_layers(model).values()}
    assert kinds == {MPQLinear, MBWQLinear}
    return model


@torch.no_grad()
def logits(model):
    return model(input_ids=tiny_ids()).logits


def check(model, expected, learns=False) -> None:
    layers = packed_layers(model)
    assert len(layers) == 14
    for layer in layers.values():
        weight = layer._parameters["weight"]
        assert type(weight) is MPQWeightParameter
        assert weight.requires_grad is learns
        assert weight.scales is layer.scales
        for name in ("zeros", "g_idx", "q_perm"):
            assert getattr(weight, name) is getattr(layer, name, None)
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_saved_and_loaded(model, dtype, tmp_path):
    model.save_pretrained(tmp_path / "packed")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=dtype)
    expected = logits(again)
    check(again, expected)
    torch.testing.assert_close(expected.float(), logits(model), rtol=0.1, atol=0.02 if dtype != torch.float32 else 0)
    for name, layer in packed_layers(model).items():
        assert torch.equal(again.get_submodule(name).dequantize(), layer.dequantize())
    assert {name: entry_of(layer) for name, layer in packed_layers(again).items()} == {
        name: entry_of(layer) for name, layer in packed_layers(model).items()
    }
    again.save_pretrained(tmp_path / "again")
    first, second = (load_file(tmp_path / folder / "model.safetensors") for folder in ("packed", "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[n], second[n]) for n in first if first[n].dtype in (torch.int32, torch.float16))
    for other in (copy.deepcopy(again), pickle.loads(pickle.dumps(again))):
        check(other, expected)
    check(AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=dtype), expected)
    names = {f"{name}.weight" for name in packed_layers(again)}
    assert names <= set(again._ddp_params_and_buffers_to_ignore)


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_offloaded(model, place, tmp_path):
    expected = logits(model)
    model.save_pretrained(tmp_path / "packed")
    device_map = {"model.embed_tokens": "cpu", "model.layers.0": place, "model.layers.1": "cpu", "model.norm": "cpu"}
    device_map |= {"model.rotary_emb": "cpu", "lm_head": "cpu"}
    offloaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "packed", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    for _ in range(2):
        assert torch.equal(logits(offloaded), expected)
        for layer in packed_layers(offloaded).values():
            assert type(layer.weight) is MPQWeightParameter
            assert layer.weight.scales is layer.scales
    assert offloaded.model.layers[0].mlp.up_proj.weight.is_meta == (place == "disk")
    offloaded.save_pretrained(tmp_path / "again")
    check(AutoModelForCausalLM.from_pretrained(tmp_path / "again"), expected)


def test_dequantized(model, tmp_path):
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    again.dequantize()
    assert not packed_layers(again)
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-3, atol=1e-3)


def test_words_learn(model):
    """Gradients in place of a float weight's, codes moved by them, a lower loss, and a file of the codes."""
    model = copy.deepcopy(model)
    for layer in packed_layers(model).values():
        layer.weight.requires_grad_(True)
    losses = []
    for _ in range(4):
        model.zero_grad()
        loss = model(input_ids=tiny_ids(), labels=tiny_ids()).loss
        loss.backward()
        losses.append(loss.item())
        for layer in packed_layers(model).values():
            assert layer.weight.grad.shape == (layer.in_features, layer.out_features)
            MPQWeightParameter.update(layer.weight, lr=0.6 * float(layer.scales.float().mean()))
    assert losses[-1] < losses[0]
    check(model, logits(model), learns=True)


def test_generates_compiled(model):
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(logits(compiled), logits(model), rtol=1e-4, atol=1e-4)
