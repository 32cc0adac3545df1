"""OneComp and bitorch checkpoints come in with the very weights that their formats' descriptions give."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from foreign import write_bitorch, write_gptq, write_onecomp
from safetensors.torch import load_file, save_file
from tiny import tiny_ids, tiny_llama, tiny_llama_ragged
from transformers import AutoModelForCausalLM

import hf_onebit
from hf_onebit.cli import main
from hf_onebit.interchange.importing import import_checkpoint
from hf_onebit.interchange.onecomp import unpack_flat
from hf_onebit.nn.replace import packed_layers
from hf_onebit.storage.verification import verify

GOLDEN = Path(__file__).parents[1] / "golden" / "gptqmodel"
KINDS = ("statistics", "plain", "packed-zeros", "layer-mix", "channel-mix")


def weights(folder: Path) -> dict[str, np.ndarray]:
    model = hf_onebit.load(folder)
    return {name: layer.dequantize(torch.float64).numpy() for name, layer in packed_layers(model).items()}


# ------------------------------------------------------------------------------------------------------------- OneComp


def test_flat_bits_begin_with_the_highest_of_a_byte() -> None:
    assert unpack_flat(torch.tensor([0b10000001, 0b01111111], dtype=torch.uint8), 9).tolist() == [
        *(True, False, False, False, False, False, False, True),
        False,
    ]


@pytest.mark.parametrize("model", [tiny_llama, tiny_llama_ragged], ids=["even", "ragged"])
def test_onecomp_weights_are_the_described_ones(tmp_path: Path, model: Any) -> None:
    """72 and 104 inputs: rows of signs begin inside of bytes, and words of ours end in padding."""
    expected = write_onecomp(model(bias=True), tmp_path / "src")
    report = import_checkpoint(tmp_path / "src", tmp_path / "out")
    assert (report["method"], report["exact"], report["warnings"]) == ("onebit", len(expected), [])
    found = weights(tmp_path / "out")
    assert set(found) == set(expected)
    assert all(np.array_equal(found[name], W) for name, W in expected.items())
    assert verify(tmp_path / "out")["ok"]


def test_onecomp_logits(tmp_path: Path) -> None:
    model = tiny_llama(bias=True)
    expected = write_onecomp(model, tmp_path / "src")
    packed = hf_onebit.load(tmp_path / "src", dtype=torch.float32)
    model = model.half().float()
    for name, W in expected.items():
        model.get_submodule(name).weight.data = torch.from_numpy(W).float()
    with torch.no_grad():
        a, b = packed(tiny_ids()).logits, model(tiny_ids()).logits
    assert (a - b).abs().max() < 1e-4 * b.abs().max()


def test_balanced_scales_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_onecomp(tiny_llama(layers=1), tmp_path / "src", balanced=True)
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        report = import_checkpoint(tmp_path / "src", tmp_path / "out")
    finally:
        logger.removeHandler(caplog.handler)
    assert "saved with balancing on" in report["warnings"][0]
    assert "use_balancing=False" in caplog.text
    assert "balancing on" in json.loads((tmp_path / "out/hf_onebit.json").read_text())["report"]["warnings"][0]


def test_layers_of_few_inputs_become_float(tmp_path: Path) -> None:
    model = tiny_llama(layers=1, hidden=64, intermediate=24)
    expected = write_onecomp(model, tmp_path / "src")
    report = import_checkpoint(tmp_path / "src", tmp_path / "out")
    assert report["kept_float"] == ["model.layers.0.mlp.down_proj"]
    loaded = hf_onebit.load(tmp_path / "out", dtype=torch.float32)
    W = loaded.model.layers[0].mlp.down_proj.weight
    assert torch.allclose(W.double(), torch.from_numpy(expected["model.layers.0.mlp.down_proj"]), rtol=1e-3)


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({"rotated": True}, "rotated=True: expected False"),
        ({"fp32_had": True}, "fp32_had=True"),
        ({"quantization_bits": [{"mlp.up_proj": {"bits": 4, "method": "gptq"}}]}, "layers of the method 'gptq'"),
    ],
)
def test_what_onecomp_adds_is_refused(tmp_path: Path, extra: dict[str, Any], said: str) -> None:
    write_onecomp(tiny_llama(layers=1), tmp_path / "src", extra=extra)
    with pytest.raises(ValueError, match="hf-onebit quantize") as refused:
        import_checkpoint(tmp_path / "src", tmp_path / "out")
    assert said in str(refused.value)


def test_truncated_signs_are_refused(tmp_path: Path) -> None:
    write_onecomp(tiny_llama(layers=1), tmp_path / "src")
    file = tmp_path / "src/model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.mlp.up_proj.sign_packed"] = tensors["model.layers.0.mlp.up_proj.sign_packed"][:-1].clone()
    save_file(tensors, str(file), metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"sign_packed is torch.uint8 with 1023 bytes: expected torch.uint8 with 1024"):
        import_checkpoint(tmp_path / "src", tmp_path / "out")


def test_from_pretrained_says_how_to_read_onecomp(tmp_path: Path) -> None:
    write_onecomp(tiny_llama(layers=1), tmp_path / "src")
    with pytest.raises(ValueError, match="hf-onebit import"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "src")


# ------------------------------------------------------------------------------------------------------------- bitorch


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [2, 4])
def test_bitorch_weights_are_the_described_ones(tmp_path: Path, kind: str, bits: int) -> None:
    expected = write_bitorch(tiny_llama(layers=1), tmp_path / "src", kind, bits)
    report = import_checkpoint(tmp_path / "src", tmp_path / "out")
    found = weights(tmp_path / "out")
    assert set(found) == set(expected)
    for name, W in expected.items():
        if kind == "packed-zeros":  # scale times zero point, rounded to float16
            scale = np.abs(W).max()
            assert np.abs(found[name] - W).max() <= report["layers"][name]["max_error"] <= 2**-10 * scale
        else:
            assert np.array_equal(found[name], W), name
    assert verify(tmp_path / "out")["ok"]


@pytest.mark.parametrize("bits", [1, 8])
def test_other_widths_of_bitorch(tmp_path: Path, bits: int) -> None:
    expected = write_bitorch(tiny_llama(layers=1), tmp_path / "src", "statistics", bits, 64)
    import_checkpoint(tmp_path / "src", tmp_path / "out")
    assert all(np.array_equal(weights(tmp_path / "out")[name], W) for name, W in expected.items())


def test_a_permutation_of_zeros_means_none(tmp_path: Path) -> None:
    write_bitorch(tiny_llama(layers=1), tmp_path / "src", "layer-mix")
    file = tmp_path / "src/model.safetensors"
    tensors = {key: value.zero_() if key.endswith("q_perm") else value for key, value in load_file(file).items()}
    save_file(tensors, str(file), metadata={"format": "pt"})
    import_checkpoint(tmp_path / "src", tmp_path / "out")
    table = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["modules"]
    assert not any("q_perm" in entry for entry in table.values())


def test_scales_of_channels_are_refused_unless_they_are_one(tmp_path: Path) -> None:
    write_bitorch(tiny_llama(layers=1), tmp_path / "src", "layer-mix")
    file = tmp_path / "src/model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.mlp.up_proj.channel_scale"][0, 0, 3] = 0.5
    save_file(tensors, str(file), metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"up_proj.channel_scale multiplies .* 0.5 to 1: expected ones"):
        import_checkpoint(tmp_path / "src", tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t, n: t.pop(f"{n}.zeros"), "up_proj has no tensor 'zeros'"),
        (lambda t, n: t[f"{n}.q_groups"].fill_(3), "q_groups"),
        (lambda t, n: t.update({f"{n}.qweight": t[f"{n}.qweight"][:-1].clone()}), "q_groups"),
        (lambda t, n: t[f"{n}.q_perm"].fill_(7), "is no permutation"),
    ],
)
def test_damage_of_bitorch_files_is_named(tmp_path: Path, change: Any, said: str) -> None:
    write_bitorch(tiny_llama(layers=1), tmp_path / "src", "channel-mix")
    file = tmp_path / "src/model.safetensors"
    tensors = load_file(file)
    change(tensors, "model.layers.0.mlp.up_proj")
    save_file(tensors, str(file), metadata={"format": "pt"})
    with pytest.raises(ValueError) as refused:
        import_checkpoint(tmp_path / "src", tmp_path / "out")
    assert said in str(refused.value)


def test_load_reads_bitorch(tmp_path: Path) -> None:
    model = tiny_llama()
    expected = write_bitorch(model, tmp_path / "src", "channel-mix")
    packed = hf_onebit.load(tmp_path / "src", dtype=torch.float32)
    model = model.half().float()
    for name, W in expected.items():
        model.get_submodule(name).weight.data = torch.from_numpy(W).float()
    with torch.no_grad():
        a, b = packed(tiny_ids()).logits, model(tiny_ids()).logits
    assert (a - b).abs().max() < 1e-4 * b.abs().max()


# ----------------------------------------------------------------------------------------------------------- gptqmodel


@pytest.mark.parametrize("kind", ["act_order", "v2"])
def test_files_of_gptqmodel_itself(tmp_path: Path, kind: str) -> None:
    """Its layer computes in float16, so what it restores is rounded to that."""
    import_checkpoint(GOLDEN / kind, tmp_path / "out")
    found = weights(tmp_path / "out")
    assert len(found) == 7
    for name, W in load_file(GOLDEN / kind / "expected.safetensors").items():
        ours, theirs = found[f"model.layers.0.{name}"], W.double().numpy()
        assert np.abs(ours - theirs).max() <= 2**-10 * np.abs(theirs).max(), name
        assert np.abs(theirs).max() > 0.01
    logits = hf_onebit.load(GOLDEN / kind)(tiny_ids()).logits
    assert bool(torch.isfinite(logits).all())


# ---------------------------------------------------------------------------------------------------------------- doors


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_gptq(tiny_llama(layers=1), tmp_path / "src", sym=True)
    assert main(["import", str(tmp_path / "src"), "-o", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "7 of 7 layers exactly" in said
    assert "hf-onebit eval" in said
    card = (tmp_path / "out/README.md").read_text()
    assert "Another program chose the codes" in card
    assert "No calibration" not in card
    assert main(["inspect", str(tmp_path / "out")]) == 0
    assert main(["import", str(tmp_path / "out"), "-o", str(tmp_path / "again")]) == 1
    assert "packed by hf_onebit already" in capsys.readouterr().err


def test_offloading_an_imported_model_says_to_import_it_first(tmp_path: Path) -> None:
    write_gptq(tiny_llama(), tmp_path / "src")
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
    places |= {"model.rotary_emb": "cpu", "lm_head": "cpu"}
    with pytest.raises(ValueError, match="hf-onebit import"):
        hf_onebit.load(tmp_path / "src", device_map=places, offload_folder=str(tmp_path / "offload"))
