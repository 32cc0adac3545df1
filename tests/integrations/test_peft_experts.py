"""LoRA on the experts of packed models whose float twins PEFT adapts as fused parameters."""

import re
import subprocess
import sys
from collections import Counter
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import save_float, tiny_deepseek_v3, tiny_ids, tiny_mixtral, tiny_qwen3_moe

peft = pytest.importorskip("peft")

from transformers import AutoModelForCausalLM  # noqa: E402  after the skip

import hf_onebit  # noqa: E402
from hf_onebit import MPQConfig  # noqa: E402
from hf_onebit.integrations.peft import install  # noqa: E402

MLP = ["gate_proj", "up_proj", "down_proj"]
MODELS = {
    "mixtral": (tiny_mixtral, ["w1", "w3", "w2"], 2),
    "qwen3-moe": (tiny_qwen3_moe, MLP, 2),
    "deepseek-v3": (tiny_deepseek_v3, MLP, 1),
}
EXPERTS = 4


class Base:
    """A packed model on disk, and what its experts' layers are called."""

    def __init__(self, name, folder):
        make, self.names, self.sparse = MODELS[name]
        self.name, self.float, self.packed = name, folder / "float", folder / "packed"
        save_float(make(), self.float)
        config = MPQConfig(bits=8, group_size=32)
        AutoModelForCausalLM.from_pretrained(self.float, quantization_config=config).save_pretrained(self.packed)

    def load(self):
        return AutoModelForCausalLM.from_pretrained(self.packed)

    def targets(self, how):
        any_layer = "|".join(self.names)
        return {
            "all-linear": "all-linear",
            "names": self.names,
            "one name": self.names[:1],
            "router too": ["gate", *self.names],
            "regex": rf".*\.layers\.1\.mlp\.experts\.\d\.({any_layer})",
            "regex with the router": rf".*\.layers\.1\.mlp\.(gate|experts\.2\.({any_layer}))",
        }[how]

    def expected(self, how):
        """{layer: number of adapters} on experts and routers."""
        experts = {f"experts.{name}": EXPERTS * self.sparse for name in self.names}
        last = {f"experts.{name}": EXPERTS for name in self.names}
        one = dict.fromkeys(last, 1)
        return {
            "all-linear": experts | {"gate": self.sparse},
            "names": experts,
            "one name": {f"experts.{self.names[0]}": EXPERTS * self.sparse},
            "router too": experts | {"gate": self.sparse},
            "regex": last,
            "regex with the router": one | {"gate": 1},
        }[how]


@pytest.fixture(scope="module", params=MODELS)
def base(request, tmp_path_factory):
    return Base(request.param, tmp_path_factory.mktemp(request.param))


def adapted(model, targets, native=False, **more):
    """LoRA that changes what the model computes."""
    config = peft.LoraConfig(r=4, target_modules=targets, **more)
    torch.manual_seed(0)
    if native:
        model.add_adapter(config)
    else:
        model = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model.eval()


def adapters(model):
    """{layer of an expert, or the router: how many have an adapter}."""
    names = (n for n, _ in model.named_parameters() if ".lora_A." in n)
    found = (re.search(r"\.mlp\.(?:(experts)\.\d+\.(\w+)|(gate))\.lora_A", name) for name in names)
    return Counter(".".join(filter(None, match.groups())) for match in found if match)


def logits(model):
    with torch.no_grad():
        for parameter in model.parameters():  # products of tensors that lie askew in memory may round otherwise
            if parameter.data_ptr() % 64:
                parameter.data = parameter.data.clone()
        return model(input_ids=tiny_ids()).logits


HOW = ["all-linear", "names", "one name", "router too", "regex", "regex with the router"]


@pytest.mark.parametrize("native", [False, True], ids=["get_peft_model", "add_adapter"])
@pytest.mark.parametrize("how", HOW)
def test_experts_are_adapted_and_load_again(how, native, base, tmp_path):
    model = adapted(base.load(), base.targets(how), native)
    assert adapters(model) == base.expected(how)
    expected = logits(model)
    assert not torch.equal(expected, logits(base.load()))
    model.save_pretrained(tmp_path)
    again = {"PeftModel.from_pretrained": peft.PeftModel.from_pretrained(base.load(), tmp_path)}
    again["load_adapter of Transformers"] = base.load()
    again["load_adapter of Transformers"].load_adapter(str(tmp_path))
    second = peft.get_peft_model(base.load(), peft.LoraConfig(r=2, target_modules=["o_proj"]))
    second.load_adapter(tmp_path, "other")
    second.set_adapter("other")
    again["load_adapter of PEFT"] = second
    if native:
        again["from_pretrained of the adapter"] = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert {way for way, loaded in again.items() if not torch.equal(logits(loaded), expected)} == set()


def test_the_router_is_adapted_as_on_the_float_model(base):
    def routers(model):
        return {n.replace("base_model.model.", ""): p.shape for n, p in model.named_parameters() if ".gate.lora" in n}

    on_float = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(base.float), peft.LoraConfig(r=4, target_modules="all-linear")
    )
    assert routers(adapted(base.load(), "all-linear")) == routers(on_float)
    assert "gate_up_proj" in on_float.peft_config["default"].target_parameters  # float models are PEFT's alone
    without = adapted(base.load(), "all-linear", exclude_modules=["gate"], lora_dropout=0.1)
    assert adapters(without) == {k: n for k, n in base.expected("all-linear").items() if k != "gate"}


def test_one_router_left_out_leaves_the_others(tmp_path):
    base = Base("qwen3-moe", tmp_path)
    model = adapted(base.load(), "all-linear", exclude_modules=r".*\.0\.mlp\.gate")
    assert {n for n, _ in model.named_parameters() if ".gate.lora_A" in n} == {
        "base_model.model.model.layers.1.mlp.gate.lora_A.default.weight"
    }


@pytest.mark.parametrize("option", [{"lora_dropout": 0.1}, {"use_dora": True}, {"lora_bias": True}], ids=str)
def test_what_a_router_cannot_have_is_refused_with_nothing_changed(option, base):
    model = base.load()
    before = [name for name, _ in model.named_modules()]
    with pytest.raises(
        ValueError, match=rf"{next(iter(option))}=.* router model\.layers\..*exclude_modules=\['gate'\]"
    ):
        peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear", **option))
    assert [name for name, _ in model.named_modules()] == before
    assert adapters(adapted(base.load(), base.names, **option)) == base.expected("names")


@pytest.mark.parametrize("load", [peft.PeftModel.from_pretrained, lambda model, at: model.load_adapter(str(at))])
def test_an_adapter_of_fused_experts_is_refused(load, base, tmp_path):
    adapted(AutoModelForCausalLM.from_pretrained(base.float), base.names).save_pretrained(tmp_path)
    model = base.load()
    with pytest.raises(ValueError, match=r"target_parameters=\['down_proj', 'gate_up_proj'\] .* and model\.layers\."):
        load(model, tmp_path)
    assert not any("lora" in name for name, _ in model.named_parameters())


def test_an_adapter_goes_onto_fused_experts_whole_or_not_silently(base, tmp_path, caplog):
    """PEFT fuses the experts' adapters itself; layers that only have their names it leaves out."""
    float_twin = base.load().dequantize()
    float_twin.save_pretrained(tmp_path / "float")

    def twin():
        return AutoModelForCausalLM.from_pretrained(tmp_path / "float")

    model = adapted(base.load(), "all-linear")
    model.save_pretrained(tmp_path / "adapter")
    with caplog.at_level("WARNING"):
        loaded = peft.PeftModel.from_pretrained(twin(), tmp_path / "adapter")
    difference = (logits(loaded) - logits(model)).abs().max()
    if base.name == "deepseek-v3":
        assert difference > 0.01
        assert "PEFT drops a part of this adapter on DeepseekV3ForCausalLM: 6 layers" in caplog.text
        caplog.clear()
        with caplog.at_level("WARNING"):
            peft.PeftModel.from_pretrained(base.load(), tmp_path / "adapter")
    else:
        assert difference < 1e-5
    assert "PEFT drops" not in caplog.text
    adapted(base.load(), base.names[:1]).save_pretrained(tmp_path / "a part")
    with pytest.raises(ValueError, match="Cannot convert PEFT target"):
        peft.PeftModel.from_pretrained(twin(), tmp_path / "a part")


def test_an_adapter_by_the_names_of_old_files_is_read(tmp_path):
    """Adapters that were trained with Transformers 4, where experts were layers in memory too."""
    base = Base("mixtral", tmp_path)
    model = adapted(base.load(), base.targets("router too"))
    model.save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({key.replace(".mlp.", ".block_sparse_moe."): t for key, t in tensors.items()}, file, {"format": "pt"})
    again = peft.PeftModel.from_pretrained(base.load(), tmp_path / "adapter")
    assert adapters(again) == base.expected("router too")
    assert torch.equal(logits(again), logits(model))


PEFT_BY = ["transformers.integrations.peft", "transformers.trainer"]


@pytest.mark.parametrize("imports", ["peft, hf_onebit", "hf_onebit, peft", *(f"hf_onebit, {name}" for name in PEFT_BY)])
def test_in_whatever_order_libraries_are_imported(imports, base):
    """PEFT imports what names experts at its first use only, and not while it is imported itself."""
    script = (
        f"import {imports}\nimport peft\nfrom transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(base.packed)!r})\n"
        "model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules='all-linear'))\n"
        "print(sum('.experts.' in name and 'lora_A' in name for name, _ in model.named_parameters()))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(done.stdout) == len(base.names) * EXPERTS * base.sparse


@pytest.mark.parametrize("gone", ["module", "functions"])
def test_a_version_of_peft_that_rewrites_nothing_needs_nothing(gone, monkeypatch):
    name = "peft.utils.transformers_weight_conversion"
    empty = {"module": None, "functions": ModuleType(name)}[gone]
    monkeypatch.setitem(sys.modules, name, empty)
    install()
    assert empty is None or "convert_peft_config_for_transformers" not in vars(empty)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_adapters_of_experts_learn(checkpointing, base):
    model = base.load()
    if checkpointing:
        model = hf_onebit.prepare_model_for_training(model)
        assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    model = adapted(model, "all-linear").train()
    assert adapters(model) == base.expected("all-linear")
    learning = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in learning)
    optimizer, ids = torch.optim.AdamW(learning.values(), lr=1e-3), tiny_ids()
    losses = []
    for _ in range(5):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        assert [n for n, p in learning.items() if p.grad is None or not p.grad.any()] == []
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05


@pytest.mark.parametrize("native", [False, True], ids=["get_peft_model", "add_adapter"])
def test_adapters_of_experts_merge(native, base, tmp_path):
    model = adapted(base.load(), "all-linear", native)
    expected, plain = logits(model), logits(base.load())
    merged = hf_onebit.merge_and_dequantize(model)
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-5)
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(again), expected, rtol=1e-4, atol=1e-5)
    assert any(name.endswith("experts.down_proj") for name, _ in again.named_parameters())  # fused once more

    packed, report = hf_onebit.merge_and_requantize(adapted(base.load(), "all-linear", native))
    assert sum(".experts." in name for name in report) == len(base.names) * EXPERTS * base.sparse
    assert (logits(packed) - expected).norm() < 0.3 * (plain - expected).norm()
    packed.save_pretrained(tmp_path / "packed")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "packed")), logits(packed))
