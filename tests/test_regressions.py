"""Cases over the whole package that once failed, or gave silent nonsense."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import save_float, tiny_ids, tiny_llama, tiny_tokenizer
from torch import nn
from transformers import AutoModelForCausalLM

import hf_onebit
from hf_onebit import Onebit, OneBitConfig, OneBitQuantizer
from hf_onebit.cli import main
from hf_onebit.nn import OneBitLinear
from hf_onebit.progress import logger
from hf_onebit.storage.verification import verify


def packed(folder: Path, **options: Any) -> Path:
    model = tiny_llama(**options)
    OneBitQuantizer(OneBitConfig()).quantize_model(model)
    hf_onebit.save(model, folder, tokenizer=tiny_tokenizer())
    (folder / "hf_onebit.json").unlink()  # what follows edits the files
    return folder


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


UP = "model.layers.0.mlp.up_proj"


# ------------------------------------------------------------------------------------------------ silent nonsense


def test_quantizing_a_loaded_model_leaves_the_global_random_state() -> None:
    model = tiny_llama(bias=True)
    before = torch.random.get_rng_state()
    OneBitQuantizer(OneBitConfig()).quantize_model(model)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_cached_layer_refuses_inputs_that_would_broadcast() -> None:
    layer = OneBitLinear(72, 40)
    layer.use_cache()
    for width in (1, 71):
        with pytest.raises(RuntimeError, match=f"x has {width} features in its last dimension, the layer expects 72"):
            layer(torch.randn(3, width))
    with pytest.raises(RuntimeError, match=r"got torch.int32.*modules_to_not_convert"):
        layer(torch.ones(3, 72, dtype=torch.int32))


def test_cache_made_in_inference_mode_serves_training() -> None:
    layer = OneBitLinear(72, 40)
    layer.use_cache()
    x = torch.randn(3, 72, requires_grad=True)
    with torch.inference_mode():
        layer(x)
    layer(x).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("door", [hf_onebit.load, AutoModelForCausalLM.from_pretrained])
def test_missing_bias_of_a_packed_layer_is_named(tmp_path: Path, door: Callable[..., Any]) -> None:
    folder = edit_tensors(packed(tmp_path / "packed", bias=True), lambda tensors: tensors.pop(f"{UP}.bias"))
    with pytest.raises(ValueError, match=rf"lacks 1 tensor of packed layers \(the first is {UP}.bias\)"):
        door(folder)


def test_missing_bias_in_a_float_checkpoint_is_named(tmp_path: Path) -> None:
    folder = save_float(tiny_llama(bias=True), tmp_path / "float")
    edit_tensors(folder, lambda tensors: tensors.pop(f"{UP}.bias"))
    with pytest.raises(ValueError, match=rf"has no bias for 1 layer \(the first is {UP}\)"):
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=OneBitConfig())


def test_bias_of_nan_is_named(tmp_path: Path) -> None:
    folder = packed(tmp_path / "packed", bias=True)
    edit_tensors(folder, lambda tensors: tensors[f"{UP}.bias"].fill_(math.nan))
    with pytest.raises(ValueError, match=rf"{UP}.bias holds NaN or inf"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("name", ["model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"])
def test_load_refuses_missing_float_tensors(tmp_path: Path, name: str) -> None:
    folder = edit_tensors(packed(tmp_path / "packed"), lambda tensors: tensors.pop(name))
    with pytest.raises(ValueError, match=f"lacks 1 tensor of LlamaForCausalLM .the first is {name}"):
        hf_onebit.load(folder)


def test_load_refuses_a_config_with_more_layers(tmp_path: Path) -> None:
    folder = packed(tmp_path / "packed")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(ValueError, match=r"model\.layers\.2"):
        hf_onebit.load(folder)


@pytest.mark.parametrize("tensor", ["weight_1", "a_1", "b_1"])
def test_each_surplus_tensor_of_a_second_plane_is_named(tmp_path: Path, tensor: str) -> None:
    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{UP}.{tensor}"] = tensors[f"{UP}.{tensor[:-2]}"].clone()

    folder = edit_tensors(packed(tmp_path / "packed"), add)
    assert f"{UP}.{tensor} is the second plane" in verify(folder)["problems"][0]
    with pytest.raises(ValueError, match=f"{tensor} is the second plane"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_bias_of_another_shape_is_named(tmp_path: Path) -> None:
    folder = packed(tmp_path / "packed", bias=True)
    edit_tensors(folder, lambda tensors: tensors.update({f"{UP}.bias": torch.ones(7)}))
    assert f"{UP}.bias in model.safetensors is F32 [7]: expected F32 [128]" in verify(folder)["problems"][0]


# -------------------------------------------------------------------------------------------------- lost models


def test_the_float_model_is_never_saved_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_float(tiny_llama(), tmp_path / "float", tiny_tokenizer())
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert main(["quantize", str(folder), "-o", str(folder)]) == 1
    assert "holds a float model" in capsys.readouterr().err
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_saving_over_the_current_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    OneBitQuantizer(OneBitConfig()).quantize_model(model)
    monkeypatch.chdir(tmp_path)
    for folder in (".", str(tmp_path), "./"):
        with pytest.raises(ValueError, match="the current folder is in it"):
            hf_onebit.save(model, folder)
    assert not list(tmp_path.iterdir())


def test_saving_through_a_link_keeps_the_link(tmp_path: Path) -> None:
    real, link = tmp_path / "disk" / "real", tmp_path / "link"
    packed(real)
    link.symlink_to(real)
    packed(link)
    assert link.is_symlink()
    assert [path.name for path in real.parent.iterdir()] == ["real"]
    assert hf_onebit.load(link) is not None


def test_scales_that_trained_in_float32_are_saved_in_float16(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(packed(tmp_path / "packed"))
    layer = model.get_submodule(UP)
    layer.a = nn.Parameter(layer.a.detach().float())
    model.save_pretrained(tmp_path / "again")
    assert layer.a.dtype == torch.float32
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert again.get_submodule(UP).a.dtype == torch.float16
    assert torch.equal(again(tiny_ids()).logits, model(tiny_ids()).logits)
    layer.a.data[0] = 1e6
    with pytest.raises(ValueError, match=f"{UP}.a holds values that float16 cannot"):
        model.save_pretrained(tmp_path / "broken")


# ------------------------------------------------------------------------------------------------ doors and messages


def test_load_takes_a_subfolder(tmp_path: Path) -> None:
    packed(tmp_path / "outer" / "inner")
    model = hf_onebit.load(tmp_path / "outer", subfolder="inner")
    assert isinstance(model.get_submodule(UP), OneBitLinear)


def test_load_keeps_the_path_as_it_was_given(tmp_path: Path) -> None:
    folder = str(packed(tmp_path / "outer" / "inner"))
    assert hf_onebit.load(folder).name_or_path == folder
    assert hf_onebit.load(tmp_path / "outer", subfolder="inner").config._name_or_path == folder


def test_load_gives_loading_info_when_asked(tmp_path: Path) -> None:
    _, info = hf_onebit.load(packed(tmp_path / "packed"), output_loading_info=True)
    assert not info["missing_keys"]


def test_load_quantized_model_passes_options_on(tmp_path: Path) -> None:
    model = hf_onebit.load_quantized_model(
        tiny_llama(), packed(tmp_path / "packed"), device_map="auto", max_memory={"cpu": "1GB"}, offload_folder=tmp_path
    )
    assert isinstance(model.get_submodule(UP), OneBitLinear)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eval", "{missing}", "--data", "{text}"], "There is no folder"),
        (["eval", "{float}", "--data", "{text}", "--against", "{missing}"], "There is no folder"),
        (["eval", "{missing}.gguf", "--data", "{text}"], "There is no file"),
        (["inspect", "{wrong}"], "config.json"),
        (["eval", "{wrong}", "--data", "{text}"], "does not fit its model"),
    ],
)
def test_command_line_says_what_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    (tmp_path / "text.txt").write_text("The little boat drifted down the river. " * 20)
    save_float(tiny_llama(), tmp_path / "float", tiny_tokenizer())
    wrong = packed(tmp_path / "wrong")
    config = json.loads((wrong / "config.json").read_text())
    (wrong / "config.json").write_text(json.dumps(config | {"hidden_size": "64"}))
    names = {"missing": tmp_path / "no" / "such", "text": tmp_path / "text.txt"}
    names |= {"float": tmp_path / "float", "wrong": wrong}
    assert main([word.format(**names) for word in arguments]) == 1
    assert message in capsys.readouterr().err


def test_onebit_names_what_it_cannot_take() -> None:
    with pytest.raises(ValueError, match="balance_alpha must be a finite number > 0"):
        Onebit(balance_alpha=10**400).validate_params()
    with pytest.raises(ValueError, match="the Hessian must be a tensor, got list"):
        Onebit().quantize_layer(nn.Linear(48, 40), hessian=[[1.0]])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="on the meta device"):
        Onebit().quantize_layer(nn.Linear(48, 40, device="meta"))


def test_a_pattern_that_names_nothing_is_pointed_out(monkeypatch):
    said = []
    monkeypatch.setattr(logger, "warning", said.append)
    OneBitQuantizer(modules_to_not_convert=["lm_haed", "down_proj"]).quantize_model(tiny_llama())
    assert any("['lm_haed']" in line for line in said)


def test_a_float_model_is_never_replaced(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "other")
    before = sorted(path.name for path in (tmp_path / "other").iterdir())
    quantizer = OneBitQuantizer.from_pretrained(tiny_llama(), config=OneBitConfig())
    with pytest.raises(ValueError, match="holds a float model, which would be lost"):
        quantizer.quantize(tmp_path / "other")
    assert sorted(path.name for path in (tmp_path / "other").iterdir()) == before


def test_a_config_changed_after_it_was_made_is_checked_again():
    config = OneBitConfig()
    config.planes = 5
    with pytest.raises(ValueError, match="planes is 5"):
        OneBitQuantizer(config)
