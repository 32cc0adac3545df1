"""The vLLM plug-in against a stand-in of vLLM's interface: real packed checkpoints through the registered methods."""

import json
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fake_vllm
import pytest
import tiny
import torch
from torch import Tensor, nn

from hf_onebit import MPQConfig, MPQQuantizer, OneBitConfig, OneBitQuantizer
from hf_onebit.formats.table import TableEntry
from hf_onebit.integrations import vllm as plugin
from hf_onebit.nn import packed_layers
from hf_onebit.storage.checkpoint import tensors_of

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

# Of vLLM, by importing the package and the plug-in: the stand-in comes later, and goes with its test.
IMPORTED = [name for name in sys.modules if name.split(".")[0] == "vllm"]
ROOT = Path(__file__).resolve().parents[2]
SIZES: dict[str, Any] = {"hidden": 64, "intermediate": 128, "layers": 1, "heads": 4, "kv_heads": 2, "bias": True}
HIDDEN, INTERMEDIATE, KV = 64, 128, 32
BLOCK = "model.layers.0."
FUSED = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.o_proj": ("self_attn.o_proj",),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down_proj": ("mlp.down_proj",),
}
CASES: dict[str, Any] = {
    "onebit": (OneBitQuantizer, OneBitConfig()),
    "planes": (OneBitQuantizer, OneBitConfig(planes=2)),
    "some-planes": (OneBitQuantizer, OneBitConfig(planes_per_layer={"v_proj": 2, "down_proj": 2})),
    "mpq": (MPQQuantizer, MPQConfig(bits=4, group_size=32, search="min-max")),
    "mpq-rows": (MPQQuantizer, MPQConfig(bits=3, group_size=-1, symmetric=False, search="min-max")),
    "double": (MPQQuantizer, MPQConfig(bits=2, group_size=32, symmetric=False, double_quant=True, search="min-max")),
}
CUT = ["onebit", "some-planes", "mpq", "mpq-rows", "double"]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, SimpleNamespace]:
    """Of each case: the packed model, its quantization config as JSON, its tensors as the file has them."""
    made = {}
    for name, (quantizer, config) in CASES.items():
        model, folder = tiny.tiny_llama(**SIZES), tmp_path_factory.mktemp(name)
        quantizer(config).quantize_model(model)
        model.save_pretrained(folder)
        tensors = dict(tensors_of(folder / "model.safetensors"))
        quantization = json.loads((folder / "config.json").read_text())["quantization_config"]
        made[name] = SimpleNamespace(layers=packed_layers(model), quantization=quantization, tensors=tensors)
    return made


def open_config(monkeypatch: pytest.MonkeyPatch, quantization: dict[str, Any], **install: Any) -> Any:
    """The registered config of a checkpoint, as vLLM makes it for a Llama."""
    found = fake_vllm.install(monkeypatch, **install)
    plugin.register()
    config = found.configs[quantization["quant_method"]].from_config(quantization)
    config.packed_modules_mapping = fake_vllm.MAPPING
    return config


def llama_layers(config: Any) -> dict[str, Any]:
    """The linear layers of a block, as vLLM makes them; biases are passed by the test."""
    return {
        f"{BLOCK}self_attn.qkv_proj": fake_vllm.column(
            config, f"{BLOCK}self_attn.qkv_proj", HIDDEN, [HIDDEN, KV, KV], kv_heads=2
        ),
        f"{BLOCK}self_attn.o_proj": fake_vllm.row(config, f"{BLOCK}self_attn.o_proj", HIDDEN, HIDDEN),
        f"{BLOCK}mlp.gate_up_proj": fake_vllm.column(
            config, f"{BLOCK}mlp.gate_up_proj", HIDDEN, [INTERMEDIATE, INTERMEDIATE]
        ),
        f"{BLOCK}mlp.down_proj": fake_vllm.row(config, f"{BLOCK}mlp.down_proj", INTERMEDIATE, HIDDEN),
    }


def packed_only(tensors: dict[str, Tensor]) -> list[tuple[str, Tensor]]:
    return [(name, tensor) for name, tensor in tensors.items() if not name.endswith("bias")]


def inputs(name: str, dtype: torch.dtype = torch.float32) -> Tensor:
    width = INTERMEDIATE if name.endswith("down_proj") else HIDDEN
    return torch.randn(3, 5, width, generator=torch.Generator().manual_seed(1)).to(dtype)


@torch.no_grad()
def own_output(case: SimpleNamespace, fused: str, x: Tensor) -> Tensor:
    """What the modules of this package give, side by side, with their biases."""
    return torch.cat([case.layers[BLOCK + name](x) for name in FUSED[fused]], dim=-1)


def bias_of(case: SimpleNamespace, fused: str) -> Tensor:
    return torch.cat([case.layers[BLOCK + name].bias.detach() for name in FUSED[fused]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_layers_give_what_our_modules_give(
    name: str, dtype: torch.dtype, checkpoints: dict[str, SimpleNamespace], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = checkpoints[name]
    layers = llama_layers(open_config(monkeypatch, case.quantization))
    fake_vllm.load(layers, packed_only(case.tensors))
    for fused in FUSED:
        x, layer = inputs(fused, dtype), layers[BLOCK + fused]
        expected = own_output(case, fused, x)
        with torch.no_grad():
            y = layer.quant_method.apply(layer, x, bias_of(case, fused))
        assert y.dtype == dtype
        # Matrices that lie side by side are summed in another order at the most.
        torch.testing.assert_close(y, expected, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-5)


def test_parts_of_one_kind_are_one_matrix(
    checkpoints: dict[str, SimpleNamespace], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = {name: llama_layers(open_config(monkeypatch, checkpoints[name].quantization)) for name in ("mpq", "onebit")}
    qkv = {name: layers[f"{BLOCK}self_attn.qkv_proj"] for name, layers in made.items()}
    assert len(qkv["mpq"].hf_onebit.matrices) == 1
    assert qkv["mpq"].weight.shape == (HIDDEN // 32 * 4, HIDDEN + 2 * KV)
    assert len(qkv["onebit"].hf_onebit.matrices) == 3  # each has scales of the inputs of its own
    assert {key: p.dtype for key, p in qkv["onebit"].named_parameters()} == {
        "weight": torch.int32,
        "a": torch.float16,
        "b": torch.float16,
    }


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", CUT)
def test_ranks_together_give_the_whole_layer(
    name: str, ranks: int, checkpoints: dict[str, SimpleNamespace], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = checkpoints[name]
    found: dict[str, list[Tensor]] = {fused: [] for fused in FUSED}
    monkeypatch.setattr(fake_vllm.LinearBase, "tells_rank", ranks == 2)
    for rank in range(ranks):
        config = open_config(monkeypatch, case.quantization, rank=rank, ranks=ranks)
        layers = llama_layers(config) if ranks == 2 else llama_columns(config)
        fake_vllm.load(layers, packed_only(case.tensors))
        for fused in FUSED:
            if BLOCK + fused not in layers:
                continue
            layer, x = layers[BLOCK + fused], inputs(fused)
            share = x.shape[-1] // ranks
            mine = x[..., rank * share : (rank + 1) * share] if len(FUSED[fused]) == 1 else x
            with torch.no_grad():
                found[fused].append(layer.quant_method.apply(layer, mine, None))
    for fused, parts in found.items():
        if not parts:
            continue
        expected = own_output(case, fused, inputs(fused)) - bias_of(case, fused)
        together = sum(parts) if len(FUSED[fused]) == 1 else joined(parts, len(FUSED[fused]), ranks)
        torch.testing.assert_close(together, expected, rtol=1e-4, atol=1e-4)


def llama_columns(config: Any) -> dict[str, Any]:
    """The layers cut by outputs; 64 inputs hold no four whole words."""
    return {
        f"{BLOCK}self_attn.qkv_proj": fake_vllm.column(
            config, f"{BLOCK}self_attn.qkv_proj", HIDDEN, [HIDDEN, KV, KV], kv_heads=2
        ),
        f"{BLOCK}mlp.gate_up_proj": fake_vllm.column(
            config, f"{BLOCK}mlp.gate_up_proj", HIDDEN, [INTERMEDIATE, INTERMEDIATE]
        ),
    }


def joined(parts: list[Tensor], count: int, ranks: int) -> Tensor:
    """Outputs of the ranks in the order of the whole layer: k and v are on as many ranks as there are heads of them."""
    if count == 2:
        halves = [part.chunk(2, dim=-1) for part in parts]
        return torch.cat([half[i] for i in range(2) for half in halves], dim=-1)
    shares = min(ranks, 2)
    sizes = [HIDDEN // ranks, KV // shares, KV // shares]
    pieces = [part.split(sizes, dim=-1) for part in parts]
    step = ranks // shares
    chosen = [pieces, pieces[::step], pieces[::step]]
    for first in range(0, ranks, step):  # neighbours hold the same heads
        assert all(torch.equal(pieces[first][i], pieces[first + j][i]) for i in (1, 2) for j in range(step))
    return torch.cat([piece[i] for i in range(3) for piece in chosen[i]], dim=-1)


def random_layer(entry: TableEntry, inputs: int, outputs: int, seed: int = 0) -> dict[str, Tensor]:
    """Tensors of a packed layer as a file has them."""
    from hf_onebit.nn.replace import replace_layers

    torch.manual_seed(seed)
    holder = nn.ModuleDict({"layer": nn.Linear(inputs, outputs, bias=False)})
    replace_layers(holder, {"layer": entry})
    module: Any = holder["layer"].to_empty(device="cpu")
    module.reset_parameters()
    if module._parameters.get("q_perm") is not None:
        module.q_perm.data.copy_(torch.randperm(inputs))
    if module._parameters.get("g_idx") is not None:
        module.g_idx.data.copy_(module.g_idx[torch.randperm(inputs)])
    return {"module": module, **{k: p.detach() for k, p in module.named_parameters()}}


MIXED = {
    "q_proj": TableEntry(method="mpq", bits=4, group_size=32, in_features=64),
    "k_proj": TableEntry(),
    "v_proj": TableEntry(method="mpq", bits=4, group_size=32, in_features=64, q_perm=True,
                         blocks=((4, 32, 32), (2, 32, 32))),
}  # fmt: skip


@pytest.mark.parametrize("dense", [False, True])
def test_methods_and_orders_may_differ_within_a_fused_layer(dense: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(plugin.VARIABLE, "dense" if dense else "")
    made = {name: random_layer(entry, 64, 48, seed) for seed, (name, entry) in enumerate(MIXED.items())}
    extra = {"o_proj": TableEntry(method="mpq", bits=3, group_size=32, in_features=64, g_idx=True),
             "down_proj": TableEntry(method="mpq", bits=3, group_size=32, in_features=64, q_perm=True)}  # fmt: skip
    made |= {name: random_layer(entry, 64, 48, 7) for name, entry in extra.items()}
    config = MPQConfig(modules={name: entry.to_dict() for name, entry in (MIXED | extra).items()}).to_dict()
    opened = open_config(monkeypatch, config)
    layers = {"qkv_proj": fake_vllm.column(opened, "qkv_proj", 64, [48, 48, 48])}
    layers |= {name: fake_vllm.row(opened, name, 64, 48) for name in extra}
    stacked = {name: ("qkv_proj", name[0]) for name in MIXED}
    tensors = [(f"{name}.{key}", t) for name, all_ in made.items() for key, t in all_.items() if key != "module"]
    for name, tensor in tensors:  # as `load` does, of names without a parent
        module, key = name.split(".")
        layer = layers[stacked[module][0] if module in stacked else module]
        parameter = getattr(layer, key)
        parameter.weight_loader(parameter, tensor, *([stacked[module][1]] if module in stacked else []))
    fake_vllm.load(layers, [])
    x = inputs("qkv_proj")
    with torch.no_grad():
        expected = torch.cat([made[name]["module"](x) for name in MIXED], dim=-1)
        torch.testing.assert_close(layers["qkv_proj"](x), expected, rtol=1e-4, atol=1e-4)
        for name in extra:
            torch.testing.assert_close(layers[name](x), made[name]["module"](x), rtol=1e-4, atol=1e-4)
    floats = {p.dtype for layer in layers.values() for p in layer.parameters()} == {torch.float32}
    assert floats == dense


def test_a_layer_that_is_fused_in_the_file_is_cut_partition_by_partition(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = TableEntry(method="mpq", bits=4, group_size=32, in_features=64)
    made = random_layer(entry, 64, 96)
    config = MPQConfig(modules={"m.qkv_proj": entry.to_dict()}).to_dict()
    parts = []
    for rank in range(2):
        opened = open_config(monkeypatch, config, rank=rank, ranks=2)
        layers = {"m.qkv_proj": fake_vllm.column(opened, "m.qkv_proj", 64, [48, 24, 24])}
        assert layers["m.qkv_proj"].weight.output_dim == 1  # for models that bring interleaved outputs into order
        fake_vllm.load(layers, [(f"m.qkv_proj.{k}", t) for k, t in made.items() if k != "module"])
        parts.append(layers["m.qkv_proj"](inputs("qkv")).split([24, 12, 12], dim=-1))
    together = torch.cat([part[i] for i in range(3) for part in parts], dim=-1)
    torch.testing.assert_close(together, made["module"](inputs("qkv")), rtol=1e-5, atol=1e-5)


# --- the config -----------------------------------------------------------------------------------------------------


def test_registering_twice_is_registering_once(monkeypatch: pytest.MonkeyPatch) -> None:
    found = fake_vllm.install(monkeypatch)
    plugin.register()
    plugin.register()
    assert sorted(found.configs) == ["mpq", "onebit"]
    assert found.platform.supported_quantization == ["awq", "onebit", "mpq"]
    for name, cls in found.configs.items():
        config = cls({})
        assert config.get_name() == name
        assert torch.bfloat16 in config.get_supported_act_dtypes()
        assert (cls.get_min_capability(), cls.get_config_filenames()) == (70, [])


def test_the_entry_point_names_the_function() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    ((name, value),) = project["entry-points"]["vllm.general_plugins"].items()
    assert EntryPoint(name, value, "vllm.general_plugins").load() is plugin.register


def test_layers_that_are_not_in_the_table_stay_float(
    checkpoints: dict[str, SimpleNamespace], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = open_config(monkeypatch, checkpoints["onebit"].quantization)
    layer = fake_vllm.row(config, "model.layers.0.router", 64, 8)
    assert isinstance(layer.quant_method, fake_vllm.UnquantizedLinearMethod)
    assert config.get_quant_method(fake_vllm.VocabParallelEmbedding(), "lm_head") is None
    assert config.get_quant_method(nn.Identity(), "model.layers.0.self_attn.attn") is None


class Mapper:
    """As vLLM's WeightsMapper: renames whole lists of tensors, and may leave some out."""

    def get_unstacked_mapper(self) -> "Mapper":
        return self

    def apply_list(self, names: list[str]) -> list[str]:
        kept = [name for name in names if not name.startswith("visual.")]
        return [name.replace(".fc1.", ".mlp.fc1.").replace("model.", "language_model.model.", 1) for name in kept]


def test_the_table_follows_vllms_names() -> None:
    table = {name: TableEntry() for name in ("model.layers.0.fc1", "model.layers.0.o_proj", "visual.proj")}
    assert set(plugin.renamed(table, Mapper())) == {
        "language_model.model.layers.0.mlp.fc1",
        "language_model.model.layers.0.o_proj",
    }


# --- what is refused ------------------------------------------------------------------------------------------------


def table_config(**entries: TableEntry) -> dict[str, Any]:
    names = {name.replace("__", "."): entry.to_dict() for name, entry in entries.items()}
    return MPQConfig(modules=names).to_dict()


def test_refusals_of_configs(monkeypatch: pytest.MonkeyPatch) -> None:
    embedding = TableEntry(method="mpq", bits=8, group_size=32, in_features=64, kind="embedding")
    with pytest.raises(ValueError, match=r"embed_tokens is packed.*no packed heads or embeddings"):
        open_config(monkeypatch, table_config(model__embed_tokens=embedding))
    with pytest.raises(ValueError, match=r"names no packed modules.*hf-onebit quantize"):
        open_config(monkeypatch, OneBitConfig().to_dict())
    with pytest.raises(ValueError, match=r"OneComp|quantization_bits"):
        open_config(monkeypatch, {"quant_method": "onebit", "quantization_bits": 1})
    config = open_config(monkeypatch, table_config(lm_head=TableEntry(), m__experts__0__up_proj=TableEntry()))
    with pytest.raises(ValueError, match="lm_head is packed"):
        config.get_quant_method(fake_vllm.VocabParallelEmbedding(), "lm_head")
    with pytest.raises(ValueError, match=r"experts\.0\.up_proj is packed.*Identity"):
        config.get_quant_method(nn.Identity(), "m.experts")


def test_refusals_of_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    config = open_config(monkeypatch, table_config(a__q_proj=TableEntry(), a__k_proj=TableEntry(), o=TableEntry()))
    with pytest.raises(ValueError, match=r"of which a\.v_proj stayed float"):
        fake_vllm.column(config, "a.qkv_proj", 64, [32, 32, 32])
    entry = TableEntry(method="mpq", bits=4, group_size=64, in_features=192)
    ordered = TableEntry(method="mpq", bits=4, group_size=32, in_features=64, g_idx=True)
    config = open_config(monkeypatch, table_config(o=entry, g=ordered, w=TableEntry()), ranks=2)
    with pytest.raises(ValueError, match=r"o has 192 inputs, and a rank would hold 96.*multiple of 64"):
        fake_vllm.row(config, "o", 192, 8)
    with pytest.raises(ValueError, match="inputs of g have an order of their own"):
        fake_vllm.row(config, "g", 64, 8)
    with pytest.raises(ValueError, match="w has 96 inputs, and a rank would hold 48"):
        fake_vllm.row(config, "w", 96, 8)
    with pytest.raises(ValueError, match="o has 192 inputs by the table, and 64 in vLLM"):
        fake_vllm.column(config, "o", 64, [8])


def test_refusals_of_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    config = open_config(monkeypatch, table_config(o=TableEntry()))
    made = {k: t for k, t in random_layer(TableEntry(), 64, 48).items() if k != "module"}

    def fresh() -> Any:
        return fake_vllm.row(config, "o", 64, 48)

    layer = fresh()
    with pytest.raises(ValueError, match=r"o\.weight is torch\.float32"):
        layer.weight.weight_loader(layer.weight, torch.zeros(48, 64))
    with pytest.raises(ValueError, match=r"o\.weight has shape \(3, 48\), expected \(2, 48\)"):
        layer.weight.weight_loader(layer.weight, torch.zeros(3, 48, dtype=torch.int32))
    with pytest.raises(ValueError, match="for part 'k' of a layer made of"):
        layer.weight.weight_loader(layer.weight, made["weight"], "k")
    layer = fresh()
    with pytest.raises(ValueError, match="o: vLLM loaded no b"):
        fake_vllm.load({"o": layer}, [(f"o.{k}", t) for k, t in made.items() if k != "b"])
    layer = fresh()
    broken = made | {"a": made["a"].clone().fill_(float("nan"))}
    with pytest.raises(ValueError, match="'a' has 48 values that are inf or nan"):
        fake_vllm.load({"o": layer}, [(f"o.{k}", t) for k, t in broken.items()])
    layer = fresh()
    with pytest.raises(ValueError, match=r"o has 40 outputs, and a rank of 1 would hold 48 of them"):
        layer.a.weight_loader(layer.a, made["a"][:40])
    config = open_config(monkeypatch, table_config(o=TableEntry()), ranks=2)
    layer = fake_vllm.column(config, "o", 64, [48])
    layer.a.weight_loader(layer.a, made["a"])
    with pytest.raises(ValueError, match=r"o\.weight has 24 outputs, and other tensors of its layer 48"):
        layer.weight.weight_loader(layer.weight, made["weight"][:, :24])


def test_a_wrong_variable_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(plugin.VARIABLE, "fast")
    with pytest.raises(ValueError, match="expected 'packed'"):
        plugin.dense_dtype(torch.float16)


# --- vLLM absent, or another version --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["LinearMethodBase", "get_tensor_model_parallel_rank"])
def test_a_version_that_lacks_something_says_so(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = fake_vllm.install(monkeypatch, without=name)
    with pytest.warns(RuntimeWarning, match=f"0.0.stand-in, which lacks .*{name}"):
        plugin.register()
    with pytest.raises(ImportError, match=f"which lacks .*{name}"):
        found.configs["onebit"].from_config({"quant_method": "onebit"})


def test_a_version_without_a_registry_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    found = fake_vllm.install(monkeypatch, without="register_quantization_config")
    with pytest.warns(RuntimeWarning, match="register_quantization_config"):
        plugin.register()
    assert not found.configs


def test_without_vllm_nothing_is_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ImportError, match="vLLM is not installed"):
        plugin.register()


def test_the_package_imports_no_vllm() -> None:
    assert not IMPORTED
