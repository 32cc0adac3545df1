"""GPTQ checkpoints come in with the very weights that their format's description gives."""

import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from foreign import linear_layers, pack_stream, unpack_stream, write_gptq
from safetensors.torch import load_file, save_file
from tiny import tiny_ids, tiny_llama, tiny_llama_ragged, tiny_tokenizer

import hf_onebit
from hf_onebit.interchange import importing
from hf_onebit.interchange.importing import import_checkpoint
from hf_onebit.interchange.source import ForeignFolder
from hf_onebit.nn.mbwq import MBWQLinear
from hf_onebit.nn.mpq import MPQLinear
from hf_onebit.storage.verification import verify


def weights(folder: Path) -> dict[str, np.ndarray]:
    """What a folder loads to, in float64."""
    model = hf_onebit.load(folder)
    found = {name: m for name, m in model.named_modules() if isinstance(m, (MPQLinear, MBWQLinear))}
    return {name: layer.dequantize(torch.float64).numpy() for name, layer in found.items()}


def test_the_writers_own_bits_are_those_of_the_description() -> None:
    assert pack_stream(np.arange(8)[:, None], 4)[0, 0] == 0x76543210
    codes = np.arange(32)[:, None] % 8
    words = pack_stream(codes, 3).view(np.uint32)[:, 0]
    assert [f"{word:08x}" for word in words] == ["88fac688", "c688fac6", "fac688fa"]
    assert (unpack_stream(pack_stream(codes, 3), 3, 32) == codes).all()


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_weights_are_the_described_ones(tmp_path: Path, bits: int, sym: bool, version: int) -> None:
    expected = write_gptq(tiny_llama(layers=1), tmp_path / "src", bits, sym=sym, version=version)
    report = import_checkpoint(tmp_path / "src", tmp_path / "out")
    found = weights(tmp_path / "out")
    assert set(found) == set(expected)
    for name, W in expected.items():
        if sym:
            assert np.array_equal(found[name], W), name
        else:  # scale times zero point, rounded to float16
            assert (
                np.abs(found[name] - W).max()
                <= report["layers"][name]["max_error"]
                <= 2**-11 * 2**bits * 0.075 / 2**bits
            )
    assert report["exact"] == (len(expected) if sym else report["exact"])
    assert report["max_error"] == (0.0 if sym else report["max_error"])
    assert verify(tmp_path / "out")["ok"]


def test_asymmetric_weights_differ_by_the_rounding_of_zeros_alone(tmp_path: Path) -> None:
    write_gptq(tiny_llama(layers=1), tmp_path / "src", 4)
    import_checkpoint(tmp_path / "src", tmp_path / "out")
    tensors, found = load_file(tmp_path / "src/model.safetensors"), weights(tmp_path / "out")
    for name, W in found.items():
        k = W.shape[1]
        q = unpack_stream(tensors[f"{name}.qweight"].numpy(), 4, k)
        stored = unpack_stream(tensors[f"{name}.qzeros"].numpy().T.copy(), 4, W.shape[0]).T
        s = tensors[f"{name}.scales"].numpy().astype(np.float64)
        z = (s * (stored + 1)).astype(np.float16).astype(np.float64)
        g = np.arange(k) // 32
        assert np.array_equal(W, (s[g] * q - z[g]).T), name


@pytest.mark.parametrize(("group_size", "hidden"), [(-1, 64), (64, 64), (32, 72), (128, 192)])
def test_group_sizes(tmp_path: Path, group_size: int, hidden: int) -> None:
    """72 inputs are no multiple of 32, and their last group is shorter; 192 in groups of 128 too."""
    model = tiny_llama(layers=1, hidden=hidden, intermediate=104)
    expected = write_gptq(model, tmp_path / "src", 8, group_size, sym=True)
    import_checkpoint(tmp_path / "src", tmp_path / "out")
    found = weights(tmp_path / "out")
    assert all(np.array_equal(found[name], W) for name, W in expected.items())


@pytest.mark.parametrize(("hidden", "kind"), [(64, "q_perm"), (72, "q_perm")])
def test_act_order_brings_groups_together(tmp_path: Path, hidden: int, kind: str) -> None:
    model = tiny_llama(layers=1, hidden=hidden, intermediate=104)
    expected = write_gptq(model, tmp_path / "src", 4, sym=True, desc_act=True)
    import_checkpoint(tmp_path / "src", tmp_path / "out")
    table = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["modules"]
    assert all(entry[kind] for entry in table.values())
    found = weights(tmp_path / "out")
    assert all(np.array_equal(found[name], W) for name, W in expected.items())


def test_groups_of_unlike_sizes_keep_their_list(tmp_path: Path) -> None:
    model = tiny_llama(layers=1)
    write_gptq(model, tmp_path / "src", 4, sym=True)
    file = tmp_path / "src/model.safetensors"
    tensors = load_file(file)
    for name in linear_layers(model):
        tensors[f"{name}.g_idx"][5] = 1  # group 0 has 31 inputs now, group 1 has 33
    save_file(tensors, str(file), metadata={"format": "pt"})
    import_checkpoint(tmp_path / "src", tmp_path / "out")
    for name, W in weights(tmp_path / "out").items():
        q = unpack_stream(tensors[f"{name}.qweight"].numpy(), 4, W.shape[1])
        s = tensors[f"{name}.scales"].numpy().astype(np.float64)[tensors[f"{name}.g_idx"].numpy()]
        assert np.array_equal(W, (s * (q - 8)).T)


def test_logits_are_those_of_the_described_weights(tmp_path: Path) -> None:
    model = tiny_llama(bias=True)
    expected = write_gptq(model, tmp_path / "src", 4, desc_act=True, version=2)
    packed = hf_onebit.load(tmp_path / "src", dtype=torch.float32)
    model = model.half().float()
    for name, W in expected.items():
        model.get_submodule(name).weight.data = torch.from_numpy(W).float()
    with torch.no_grad():
        a, b = packed(tiny_ids()).logits, model(tiny_ids()).logits
    assert (a - b).abs().max() < 2e-3 * b.abs().max()
    assert packed.config._name_or_path == str(tmp_path / "src")


def test_zero_points_of_zero(tmp_path: Path) -> None:
    """gptqmodel takes one off whole words: 0 borrows from its neighbour, and comes back."""
    expected = write_gptq(tiny_llama(layers=1), tmp_path / "src", 2, lowest_zero=0, quantizer="gptqmodel:7.7.0")
    assert import_checkpoint(tmp_path / "src", tmp_path / "out")["warnings"] == []
    found = weights(tmp_path / "out")
    assert all(np.abs(found[name] - W).max() < 1e-4 for name, W in expected.items())


def test_zero_points_of_zero_of_other_programs_are_told(tmp_path: Path) -> None:
    expected = write_gptq(tiny_llama(layers=1), tmp_path / "src", 3, lowest_zero=0)
    warnings = import_checkpoint(tmp_path / "src", tmp_path / "out")["warnings"]
    assert len(warnings) == len(expected)
    assert "stored as 7" in warnings[0]
    found = weights(tmp_path / "out")
    assert all(np.abs(found[name] - W).max() < 1e-4 for name, W in expected.items())


def test_a_packed_head_beside_a_tied_embedding(tmp_path: Path) -> None:
    model = tiny_llama(tied=True)
    layers: Any = linear_layers(model) | {"lm_head": model.lm_head}
    expected = write_gptq(model, tmp_path / "src", 4, sym=True, extra={"lm_head": True}, layers=layers)
    import_checkpoint(tmp_path / "src", tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["tie_word_embeddings"], config["quantization_config"]["untied"]) == (False, True)
    loaded = hf_onebit.load(tmp_path / "out", dtype=torch.float32)
    assert np.array_equal(loaded.lm_head.dequantize(torch.float64).numpy(), expected["lm_head"])
    assert torch.equal(loaded.model.embed_tokens.weight, model.model.embed_tokens.weight.half().float())


def test_widths_of_dynamic_rules(tmp_path: Path) -> None:
    model = tiny_llama(layers=1)
    layers = linear_layers(model)
    write_gptq(model, tmp_path / "a", 4, sym=True)
    wide = {name: m for name, m in layers.items() if "down_proj" in name}
    expected = write_gptq(model, tmp_path / "b", 8, 64, sym=True, layers=wide)
    tensors = load_file(tmp_path / "a/model.safetensors")
    others = load_file(tmp_path / "b/model.safetensors")
    tensors |= {key: value for key, value in others.items() if "down_proj" in key}
    save_file(tensors, str(tmp_path / "a/model.safetensors"), metadata={"format": "pt"})
    path = tmp_path / "a/config.json"
    config = json.loads(path.read_text())
    with pytest.raises(ValueError, match=r"down_proj.qweight has"):
        import_checkpoint(tmp_path / "a", tmp_path / "out")
    config["quantization_config"]["dynamic"] = {"+:.*down_proj": {"bits": 8, "group_size": 64}}
    path.write_text(json.dumps(config))
    import_checkpoint(tmp_path / "a", tmp_path / "out")
    found = weights(tmp_path / "out")
    assert all(np.array_equal(found[name], W) for name, W in expected.items())


def test_the_old_names_of_files(tmp_path: Path) -> None:
    """auto-gptq: quantize_config.json beside a config.json that says nothing, and a name with the bits."""
    expected = write_gptq(tiny_llama(layers=1), tmp_path / "src", sym=True)
    path = tmp_path / "src/config.json"
    config = json.loads(path.read_text())
    said = config.pop("quantization_config")
    path.write_text(json.dumps(config))
    (tmp_path / "src/quantize_config.json").write_text(json.dumps({k: said[k] for k in ("bits", "group_size", "sym")}))
    (tmp_path / "src/model.safetensors").rename(tmp_path / "src/gptq_model-4bit-32g.safetensors")
    import_checkpoint(tmp_path / "src", tmp_path / "out")
    assert all(np.array_equal(weights(tmp_path / "out")[name], W) for name, W in expected.items())
    assert not (tmp_path / "out/quantize_config.json").exists()


def test_shards_and_what_goes_along(tmp_path: Path) -> None:
    model = tiny_llama()
    expected = write_gptq(model, tmp_path / "src", sym=True)
    tiny_tokenizer().save_pretrained(tmp_path / "src")
    report = import_checkpoint(tmp_path / "src", tmp_path / "out", max_shard_size="30kB")
    files = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3
    assert not list((tmp_path / "out").glob(".*"))
    assert (tmp_path / "out/tokenizer.json").is_file()
    assert report["file_bytes"] == sum((tmp_path / "out" / name).stat().st_size for name in files)
    found = weights(tmp_path / "out")
    assert all(np.array_equal(found[name], W) for name, W in expected.items())
    assert verify(tmp_path / "out") == {**verify(tmp_path / "out"), "ok": True, "checksums": "match"}


def test_one_layer_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was read for one layer is gone before the next but one is read."""
    write_gptq(tiny_llama(layers=3), tmp_path / "src")
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0
    read = ForeignFolder.read

    def watched(self: ForeignFolder, name: str) -> torch.Tensor:
        nonlocal most
        tensor = read(self, name)
        alive.append(weakref.ref(tensor))
        most = max(most, sum(ref() is not None for ref in alive))
        return tensor

    monkeypatch.setattr(ForeignFolder, "read", watched)
    import_checkpoint(tmp_path / "src", tmp_path / "out")
    assert len(alive) > 80
    assert most <= 10


def test_nothing_is_left_of_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gptq(tiny_llama(layers=1), tmp_path / "src")

    def fail(*args: object) -> None:
        raise RuntimeError("no more disk")

    monkeypatch.setattr(importing, "_check_written", fail)
    with pytest.raises(RuntimeError, match="no more disk"):
        import_checkpoint(tmp_path / "src", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= changes
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"bits": 5}, "bits=5: expected one of 2, 3, 4, 8"),
        ({"bits": True}, "bits=True"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format 'marlin': expected 'gptq' or 'gptq_v2'"),
        ({"is_marlin_format": True}, "is_marlin_format=True"),
        ({"pack_dtype": "int16"}, "pack_dtype='int16': expected None or 'int32'"),
        ({"adapter": {"path": "x"}}, "adapter="),
        ({"rotation": "hadamard"}, "rotation='hadamard'"),
        ({"quant_method": "awq"}, "quant_method 'awq': expected a checkpoint of OneComp, bitorch, GPTQ"),
        ({"bits": 8}, "qweight has 16 word rows: expected 32 for 128 inputs of 8 bits"),
    ],
)
def test_what_is_not_read_is_refused_with_a_remedy(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    write_gptq(tiny_llama(layers=1), tmp_path / "src")
    edit(tmp_path / "src", **changes)
    with pytest.raises(ValueError, match=r"hf-onebit quantize|again") as refused:
        import_checkpoint(tmp_path / "src", tmp_path / "out")
    assert said in str(refused.value)
    assert not (tmp_path / "out").exists()


def damage(tmp_path: Path, change: Any) -> None:
    write_gptq(tiny_llama(layers=1), tmp_path / "src")
    file = tmp_path / "src/model.safetensors"
    tensors = load_file(file)
    change(tensors, "model.layers.0.mlp.up_proj")
    save_file(tensors, str(file), metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t, n: t.pop(f"{n}.scales"), "up_proj has no tensor 'scales'"),
        (lambda t, n: t.update({f"{n}.qzeros": t[f"{n}.qzeros"][:1].clone()}), "qzeros has 1 groups: expected 2"),
        (lambda t, n: t.update({f"{n}.qzeros": t[f"{n}.qzeros"][:, :3].clone()}), "qzeros is torch.int32 (2, 3)"),
        (lambda t, n: t[f"{n}.g_idx"].fill_(7), "g_idx has values from 7 to 7, expected 0..1"),
        (lambda t, n: t[f"{n}.scales"].fill_(float("inf")), "scales has 256 values that are inf or nan"),
        (lambda t, n: t[f"{n}.bias"].fill_(1), "bias holds values up to 1, and the model of config.json has no bias"),
        (lambda t, n: t.update({f"{n}.g_idx": t[f"{n}.g_idx"][:-1].clone()}), "tells different numbers of inputs"),
        (lambda t, n: t.update({f"{n}x.qweight": t[f"{n}.qweight"].clone()}), "does not have as modules of their own"),
    ],
)
def test_damage_is_named(tmp_path: Path, change: Any, said: str) -> None:
    damage(tmp_path, change)
    with pytest.raises(ValueError) as refused:
        import_checkpoint(tmp_path / "src", tmp_path / "out")
    assert said in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_small_groups_are_refused(tmp_path: Path) -> None:
    write_gptq(tiny_llama(layers=1), tmp_path / "src", 4, 16)
    with pytest.raises(ValueError, match="groups of 16 inputs: expected a multiple of 32"):
        import_checkpoint(tmp_path / "src", tmp_path / "out")


def test_pickles_are_refused_unread(tmp_path: Path) -> None:
    write_gptq(tiny_llama(layers=1), tmp_path / "src")
    (tmp_path / "src/model.safetensors").rename(tmp_path / "src/pytorch_model.bin")
    for read in (hf_onebit.load, lambda folder: import_checkpoint(folder, tmp_path / "out")):
        with pytest.raises(ValueError, match=r"pytorch_model.bin, a pickle.*safe_serialization=True"):
            read(tmp_path / "src")


def test_folders_that_are_none(tmp_path: Path) -> None:
    tiny_llama(layers=1).save_pretrained(tmp_path / "float")
    with pytest.raises(ValueError, match="is a float model"):
        import_checkpoint(tmp_path / "float", tmp_path / "out")
    with pytest.raises(ValueError, match="There is no folder"):
        import_checkpoint(tmp_path / "nowhere", tmp_path / "out")
    write_gptq(tiny_llama(layers=1), tmp_path / "src", sym=True)
    import_checkpoint(tmp_path / "src", tmp_path / "out")
    with pytest.raises(ValueError, match="packed by hf_onebit already"):
        import_checkpoint(tmp_path / "out", tmp_path / "again")
    with pytest.raises(ValueError, match="holds what is read"):
        import_checkpoint(tmp_path / "src", tmp_path / "src")
    shutil.copy(tmp_path / "src/model.safetensors", tmp_path / "src/gptq_model-4bit.safetensors")
    (tmp_path / "src/model.safetensors").rename(tmp_path / "src/second.safetensors")
    with pytest.raises(ValueError, match="no index that says which belong together"):
        import_checkpoint(tmp_path / "src", tmp_path / "again")


def test_an_imported_model_is_saved_and_trained_like_any_other(tmp_path: Path) -> None:
    write_gptq(tiny_llama_ragged(), tmp_path / "src", desc_act=True)
    model = hf_onebit.load(tmp_path / "src", dtype=torch.float32)
    hf_onebit.save(model, tmp_path / "saved")
    again = hf_onebit.load(tmp_path / "saved", dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(model(tiny_ids()).logits, again(tiny_ids()).logits)
