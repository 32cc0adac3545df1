"""Wrong input: one clear message that says what is wrong, where, what was expected, and what to do."""

import json
import math
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny import save_float, tiny_gpt2, tiny_ids, tiny_llama, tiny_llama_ragged, tiny_tokenizer
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import hf_onebit
from hf_onebit import MPQQuantizer, OneBitConfig, OneBitQuantizer, load_quantized_model
from hf_onebit.calibration import load_calibration
from hf_onebit.nn import (
    OneBitLinear,
    cache_dequantized,
    dequantize_layers,
    find_layers,
    fuse_projections,
    packed_layers,
    replace_layers,
    unfuse_projections,
)
from hf_onebit.storage.tensor_files import stored_tensors
from hf_onebit.storage.verification import verify

LAYER = "model.layers.0.self_attn.q_proj"
ENTRY = {"method": "onebit", "bits": 1, "planes": 1, "group_size": None}
MPQ = {"method": "mpq", "bits": 4, "group_size": 64, "symmetric": True}

# ----------------------------------------------------------------------------------------------------- configs

CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "planes 0": ({"planes": 0}, "planes is 0: expected a whole number from 1 to 2"),
    "planes 3": ({"planes": 3}, "planes is 3: expected a whole number from 1 to 2"),
    "planes huge": ({"planes": 10**30}, "planes is 1000000000000000000000000000000: expected"),
    "planes float": ({"planes": 1.0}, r"planes is 1\.0: expected a whole number"),
    "planes text": ({"planes": "1"}, "planes is '1': expected a whole number"),
    "planes bool": ({"planes": True}, "planes is True: expected a whole number"),
    "planes none": ({"planes": None}, "planes is None: expected a whole number"),
    "preset unknown": ({"preset": "quick"}, "preset is 'quick': expected one of 'closed'"),
    "preset unicode": ({"preset": "größe"}, "preset is 'größe': expected one of"),
    "preset type": ({"preset": ["closed"]}, r"preset is \['closed'\]: expected one of"),
    "iters negative": ({"iters": -1}, "iters is -1: expected a whole number >= 0"),
    "iters bool": ({"iters": False}, "iters is False: expected a whole number"),
    "iters nan": ({"iters": float("nan")}, "iters is nan: expected a whole number"),
    "balance_iters 0": (
        {"use_balancing": True, "balance_iters": 0},
        "balance_iters is 0: expected a whole number >= 1",
    ),
    "balance_alpha 0": (
        {"use_balancing": True, "balance_alpha": 0},
        "balance_alpha is 0: expected a finite number > 0",
    ),
    "balance_alpha nan": (
        {"use_balancing": True, "balance_alpha": float("nan")},
        "balance_alpha is nan: expected a finite",
    ),
    "balance_alpha inf": (
        {"use_balancing": True, "balance_alpha": float("inf")},
        "balance_alpha is inf: expected a finite",
    ),
    "balance_alpha bool": (
        {"use_balancing": True, "balance_alpha": True},
        "balance_alpha is True: expected a finite number",
    ),
    "balance_alpha text": (
        {"use_balancing": True, "balance_alpha": "1"},
        "balance_alpha is '1': expected a finite number",
    ),
    "balance_alpha overflows": (
        {"use_balancing": True, "balance_alpha": 10**400},
        "balance_alpha is 1000.*: expected a finite number",
    ),
    "use_balancing int": ({"use_balancing": 1}, "use_balancing is 1: expected True or False"),
    "use_importance text": ({"use_importance_scaling": "yes"}, "use_importance_scaling is 'yes': expected True"),
    "fuse text": ({"fuse_projections": "yes"}, "fuse_projections is 'yes': expected True or False"),
    "dequantize none": ({"dequantize": None}, "dequantize is None: expected True or False"),
    "tokens 0": ({"calibration_tokens": 0}, "calibration_tokens is 0: expected a whole number >= 1"),
    "context 1": ({"calibration_context": 1}, "calibration_context is 1: expected a whole number >= 2"),
    "seed negative": ({"seed": -3}, "seed is -3: expected a whole number >= 0"),
    "skips text": ({"modules_to_not_convert": "lm_head"}, "modules_to_not_convert is 'lm_head': expected None or a"),
    "skips holes": ({"modules_to_not_convert": ["a", ""]}, "modules_to_not_convert is .*: expected None or a list"),
    "skips mixed": ({"modules_to_not_convert": ["a", 3]}, "modules_to_not_convert is .*: expected None or a list"),
    "skips regex": ({"modules_to_not_convert": ["layers.(0"]}, r"'layers\.\(0', which is no valid regular expression"),
    "method": ({"quant_method": "gptq"}, "quant_method is 'gptq': expected 'onebit'"),
    "version newer": ({"format_version": 2}, r"format_version 2, and .* up to 1\. Update it: pip install -U"),
    "version 0": ({"format_version": 0}, "format_version is 0: expected a whole number from 1"),
    "version negative": ({"format_version": -1}, "format_version is -1: expected a whole number from 1"),
    "version text": ({"format_version": "1"}, "format_version is '1': expected a whole number from 1"),
    "version bool": ({"format_version": True}, "format_version is True: expected a whole number from 1"),
    "unknown key": ({"plane": 2}, "unknown keys:\n  - 'plane': did you mean 'planes'"),
    "unknown key, unlike any": ({"zzzz": 2}, "unknown keys:\n  - 'zzzz'\nKnown keys: balance_alpha"),
    "unknown key, unicode": ({"größe": 2}, "unknown keys:\n  - 'größe'"),
    "OneComp": ({"quantization_bits": 1}, r"written by OneComp, .*\(its config holds quantization_bits\)"),
    "OneComp layers": ({"quantized_layer_names": []}, "written by OneComp.*hf-onebit import SRC -o DIR"),
    "table type": ({"modules": [LAYER]}, r"modules is .*: expected None or a table \{module name: entry\}"),
    "entry type": ({"modules": {LAYER: 1}}, r"modules\['model.*q_proj'\] is 1: expected an entry like"),
    "entry method": (
        {"modules": {LAYER: ENTRY | {"method": "gptq"}}},
        r"\.method is 'gptq': expected 'onebit' or 'mpq'",
    ),
    "mpq entry lacks": ({"modules": {LAYER: {"method": "mpq", "bits": 4}}}, r"expected the keys group_size, symmetric"),
    "mpq entry bits": (
        {"modules": {"lm_head": MPQ | {"bits": 9}}},
        r"\.bits is 9: expected a whole number from 1 to 8",
    ),
    "mpq entry planes": ({"modules": {"lm_head": MPQ | {"planes": 1}}}, r"\.planes is 1: expected null for mpq"),
    "mpq entry group": (
        {"modules": {"lm_head": MPQ | {"group_size": 48}}},
        r"group_size is 48: expected a multiple of 32",
    ),
    "mpq entry symmetric": (
        {"modules": {"lm_head": MPQ | {"symmetric": 1}}},
        r"symmetric is 1: expected True or False",
    ),
    "mpq entry kind": ({"modules": {"lm_head": MPQ | {"kind": "conv"}}}, r"kind is 'conv': expected 'linear' or"),
    "mpq entry unknown": ({"modules": {"lm_head": MPQ | {"layout": 1}}}, r"\['layout'\]: expected no keys beside"),
    "mpq entry inputs": ({"modules": {"lm_head": MPQ | {"in_features": 0}}}, r"in_features is 0: expected a whole"),
    "mpq tied to nothing": ({"modules": {"lm_head": MPQ | {"tied_to": "x"}}}, r"tied_to is 'x': expected the name of"),
    "mpq tied to other bits": (
        {"modules": {"lm_head": MPQ | {"tied_to": "x"}, "x": MPQ | {"bits": 8}}},
        r"tied_to is 'x': expected a module with the same method, bits",
    ),
    "head bits": ({"lm_head_bits": 5}, r"lm_head_bits is 5: expected None \(floating point\) or one of 2, 3, 4, 8"),
    "head bits bool": ({"lm_head_bits": True}, r"lm_head_bits is True"),
    "embedding bits": ({"embedding_bits": "8"}, r"embedding_bits is '8': expected None"),
    "head group size": ({"head_group_size": 63}, r"head_group_size is 63: expected a multiple of 32, or -1"),
    "untied": ({"untied": 1}, r"untied is 1: expected True or False"),
    "entry bits": ({"modules": {LAYER: ENTRY | {"bits": 2}}}, r"\.bits is 2: expected a whole number from 1"),
    "entry planes": ({"modules": {LAYER: ENTRY | {"planes": 3}}}, r"\.planes is 3: expected a whole number from"),
    "entry group": ({"modules": {LAYER: ENTRY | {"group_size": 64}}}, r"\.group_size is 64: expected null"),
    "entry key": ({"modules": {LAYER: ENTRY | {"zero": 1}}}, r"is \['zero'\]: expected no keys beside method"),
    "entry lacks": ({"modules": {LAYER: {"method": "onebit"}}}, "expected the keys bits, planes as well"),
    "entry name": ({"modules": {"": ENTRY}}, "modules is '': expected names that are non-empty strings"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_wrong_configs(case: str) -> None:
    options, message = CONFIGS[case]
    with pytest.raises(ValueError, match=message):
        OneBitConfig(**options)


def test_one_message_lists_every_wrong_field() -> None:
    with pytest.raises(ValueError, match=r"(?s)preset is 'x'.*planes is 3.*seed is -1"):
        OneBitConfig(planes=3, preset="x", seed=-1)


def test_a_table_that_is_wrong_everywhere_is_told_in_a_few_lines() -> None:
    with pytest.raises(ValueError, match="is not valid") as caught:
        OneBitConfig(modules={f"layer.{i}": 3 for i in range(1000)})
    assert len(str(caught.value).splitlines()) <= 8


def test_long_values_are_shortened() -> None:
    with pytest.raises(ValueError, match="preset is") as caught:
        OneBitConfig(preset="x" * 100_000)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((OneBitConfig(),), {"planes": 2}, r"got a config and also \['planes'\]: put them into the config"),
        (({"planes": 1},), {}, r"got a dict: expected a OneBitConfig \(for a dict: from_dict\)"),
        ((), {"plane": 1}, "did you mean 'planes'"),
    ],
)
def test_wrong_quantizer_arguments(arguments: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OneBitQuantizer(*arguments, **options)


# -------------------------------------------------------------------------------------------- calibration data


def dataset_without_text() -> Any:
    return pytest.importorskip("datasets").Dataset.from_dict({"question": ["why?"]})


DATA: dict[str, tuple[Callable[[], Any], str]] = {
    "missing file": (lambda: "no/such/file.txt", "There is no file 'no/such/file.txt': pass the path of a local"),
    "folder": (lambda: os.curdir, r"'\.' is a folder: pass the path of a text file in it"),
    "empty list": (list, r"Cannot calibrate on list '\[\]': expected the path of a local text file"),
    "mixed list": (lambda: ["a", {"input_ids": [1]}], "Cannot calibrate on list .*: expected the path"),
    "number": (lambda: 3, "Cannot calibrate on int '3': expected the path"),
    "bytes": (lambda: b"text", "Cannot calibrate on bytes .*: expected the path"),
    "rows without ids": (lambda: [{"ids": [1]}], "Cannot calibrate on list .* a list of dicts that hold 'input_ids'"),
    "ids none": (lambda: [{"input_ids": None}], "row 0 has input_ids 'None': expected one list or tensor"),
    "ids text": (lambda: [{"input_ids": "abc"}], "row 0 has input_ids 'abc': expected one list or tensor"),
    "ids ragged": (lambda: [{"input_ids": [[1, 2], [3]]}], "row 0 has input_ids .*: expected one list or tensor"),
    "ids float": (lambda: [{"input_ids": [1.5]}], r"row 0 has input_ids of torch\.float32: expected whole numbers"),
    "ids empty": (lambda: [{"input_ids": []}], r"row 0 has input_ids of shape \(1, 0\): expected \(length,\)"),
    "ids scalar": (lambda: [{"input_ids": torch.tensor(3)}], r"row 0 has input_ids of shape \(\): expected"),
    "ids 3-D": (
        lambda: [{"input_ids": [1, 2]}, {"input_ids": torch.ones(1, 1, 3, dtype=torch.int64)}],
        r"row 1 has input_ids of shape \(1, 1, 3\): expected \(length,\) or \(rows, length\)",
    ),
    "mask shape": (
        lambda: [{"input_ids": [1, 2, 3], "attention_mask": [1]}],
        r"row 0 has an attention_mask of shape \(1, 1\) .*: expected the shape of its input_ids, \(1, 3\)",
    ),
    "mask of zeros": (
        lambda: [{"input_ids": [1, 2], "attention_mask": [0, 0]}],
        "attention_mask .* with 0 ones: expected .* a 1 for every token that is no padding",
    ),
    "no text column": (
        dataset_without_text,
        r"has the columns \['question'\]: expected 'text', 'messages' or 'input_ids'",
    ),
    "no tokenizer": (lambda: ["text"], r"Calibrating on text \(1 string\) needs a tokenizer: pass tokenizer="),
}


@pytest.mark.parametrize("case", DATA)
def test_wrong_calibration_data(case: str) -> None:
    make, message = DATA[case]
    with pytest.raises(ValueError, match=message):
        load_calibration(make())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"The calibration text \(text\.txt\) holds 0 tokens: pass a longer one"),
        (b"a", r"The calibration text \(text\.txt\) holds 1 token: pass a longer one"),
        (b"caf\xe9", r"text\.txt' is not UTF-8 text .*0xe9 in position 3"),
        (b"\xff\xfea\x00", "is not UTF-8 text"),
    ],
)
def test_wrong_calibration_files(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "text.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_calibration(tmp_path / "text.txt", tiny_tokenizer())


def test_an_object_that_is_no_tokenizer() -> None:
    with pytest.raises(ValueError, match="Cannot tokenize with a int: expected a tokenizer, or the name of one"):
        load_calibration(["text"], 3)


# ------------------------------------------------------------------------------------------------------ models


def with_weight(value: float, scale: float = 1.0) -> Any:
    """A tiny Llama one of whose weights is `value`, all of one matrix multiplied by `scale`."""
    model = tiny_llama()
    weight = model.get_submodule(LAYER).weight
    with torch.no_grad():
        weight.mul_(scale)
        if value:
            weight[3, 5] = value
    return model


def with_nan(name: str) -> Any:
    """A tiny Llama with biases, one of whose values is NaN."""
    model = tiny_llama(bias=True)
    with torch.no_grad():
        model.get_parameter(name).view(-1)[-1] = math.nan
    return model


def with_nan_buffer() -> Any:
    model = tiny_llama()
    model.model.register_buffer("seen", torch.tensor([1.0, math.nan, math.inf, math.nan]))
    return model


def offloaded() -> Any:
    model = tiny_llama()
    model.model.layers[1].mlp.up_proj.to("meta")
    return model


def packed_model() -> Any:
    return OneBitQuantizer().quantize_model(tiny_llama())


ROWS = [{"input_ids": list(range(5, 40))}]

MODELS: dict[str, tuple[Callable[[], Any], dict[str, Any], str]] = {
    "NaN": (lambda: with_weight(float("nan")), {}, rf"{LAYER}\.weight holds 1 NaN or inf value of 4096"),
    "NaN, calibrated": (lambda: with_weight(float("nan")), {"dataset": ROWS}, rf"{LAYER}\.weight holds 1 NaN"),
    "inf": (
        lambda: with_weight(float("-inf")),
        {},
        rf"{LAYER}\.weight holds 1 NaN or inf value of 4096: .* Download it again, or load it in float32",
    ),
    "inf, calibrated": (lambda: with_weight(float("inf")), {"dataset": ROWS}, rf"{LAYER}\.weight holds 1 NaN"),
    "NaN in a norm": (
        lambda: with_nan("model.norm.weight"),
        {},
        r"model\.norm\.weight holds 1 NaN or inf value of 64: the float checkpoint is damaged",
    ),
    "NaN in a bias": (
        lambda: with_nan(f"{LAYER}.bias"),
        {},
        rf"{LAYER}\.bias holds 1 NaN or inf value of 64",
    ),
    "NaN in the embedding": (
        lambda: with_nan("model.embed_tokens.weight"),
        {"dataset": ROWS},
        r"model\.embed_tokens\.weight holds 1 NaN or inf value of 18432",
    ),
    "NaN in the head": (
        lambda: with_nan("lm_head.weight"),
        {"preset": "fast", "dataset": ROWS},
        r"lm_head\.weight holds 1 NaN or inf value of 18432",
    ),
    "NaN in a layer left out": (
        lambda: with_weight(float("nan")),
        {"modules_to_not_convert": ["q_proj"]},
        rf"{LAYER}\.weight holds 1 NaN or inf value of 4096",
    ),
    "NaN in a buffer": (with_nan_buffer, {}, r"model\.seen holds 2 NaN values of 4"),
    "no fp16 scales": (
        lambda: with_weight(0, scale=1e12),
        {},
        rf"layer '{LAYER}': fp16 cannot hold the output scales a: they range .* add '{LAYER}' to modules_to_not",
    ),
    "offloaded": (
        offloaded,
        {},
        r"LlamaForCausalLM is offloaded in part \(1 parameter, the first is .*layers\.1\.mlp\.up_proj\.weight\): load",
    ),
    "no linear layers": (
        lambda: transformers.LlamaModel(tiny_llama(layers=0).config),
        {},
        "LlamaModel has no linear layers: there is nothing to quantize",
    ),
    "all skipped": (
        tiny_llama,
        {"modules_to_not_convert": ["model", "lm_head"]},
        "no layer to quantize: all 15 linear layers stay .*listed in .* Shorten modules_to_not_convert",
    ),
    "quantized already": (
        packed_model,
        {},
        r"quantized already \(14 packed layers\): load the float model, or call model\.dequantize\(\) first",
    ),
    "no Transformers model": (
        lambda: nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)),
        {},
        "Cannot quantize a Sequential: expected a Transformers model",
    ),
    "unknown token": (
        tiny_llama,
        {"dataset": [{"input_ids": [5, 900]}]},
        "sequence 0 holds the token id 900, and LlamaForCausalLM knows the ids 0 to 287: pass the tokenizer",
    ),
    "negative token": (tiny_llama, {"dataset": [{"input_ids": [-1, 5]}]}, "sequence 0 holds the token id -1"),
    "too long a row": (
        tiny_gpt2,
        {"dataset": [{"input_ids": [5] * 200}]},
        "sequence 0 has 200 tokens, and GPT2LMHeadModel takes 128",
    ),
    "no tokenizer": (tiny_llama, {"dataset": ["text"]}, "needs a tokenizer"),
}


@pytest.mark.parametrize("case", MODELS)
def test_a_model_that_cannot_be_quantized_is_left_as_it_was(case: str) -> None:
    make, options, message = MODELS[case]
    model = make()
    before, kinds = dict(model.state_dict()), [type(module) for module in model.modules()]
    copies = {key: tensor.clone() for key, tensor in before.items()}
    with pytest.raises(ValueError, match=message):
        OneBitQuantizer(**options).quantize_model(model)
    assert [type(module) for module in model.modules()] == kinds
    after = model.state_dict()
    assert list(after) == list(copies)
    assert all(torch.equal(after[k].nan_to_num(), t.nan_to_num()) for k, t in copies.items() if not t.is_meta)
    if case != "quantized already":
        assert not packed_layers(model)
        assert getattr(getattr(model, "config", None), "quantization_config", None) is None


@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("dataset", [None, ROWS], ids=["data-free", "calibrated"])
@pytest.mark.parametrize(
    ("value", "scale", "message"),
    [
        (float("nan"), 1.0, rf"{LAYER}.*1 NaN"),
        (float("inf"), 1.0, rf"{LAYER}.*inf"),
        (0, 1e12, rf"layer '{LAYER}': fp16 cannot hold"),
    ],
)
def test_quantizing_while_loading_names_the_layer(
    float_dir: Callable[..., Path], planes: int, dataset: Any, value: float, scale: float, message: str
) -> None:
    folder = float_dir(with_weight(value, scale))
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=OneBitConfig(planes=planes, dataset=dataset))


NORM = "model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize("name", ["model.norm.weight", NORM, f"{LAYER}.bias", "lm_head.weight"])
@pytest.mark.parametrize("bits", [None, 8])
def test_quantizing_while_loading_names_what_is_not_packed(
    float_dir: Callable[..., Path], name: str, bits: int | None
) -> None:
    folder = float_dir(with_nan(name))
    with pytest.raises(ValueError, match=rf"{re.escape(name)} holds .*NaN or inf"):
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=OneBitConfig(lm_head_bits=bits))


@pytest.mark.parametrize(
    "options", [{}, {"dataset": ROWS}, {"preset": "fast", "dataset": ROWS}], ids=["data-free", "closed", "fast"]
)
@pytest.mark.parametrize("name", ["model.norm.weight", NORM, f"{LAYER}.bias", "lm_head.weight", f"{LAYER}.weight"])
def test_quantizing_block_by_block_names_them(
    float_dir: Callable[..., Path], tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    quantizer = OneBitQuantizer.from_pretrained(float_dir(with_nan(name)), low_memory=True, **options)
    with pytest.raises(ValueError, match=rf"{re.escape(name)} holds 1 NaN or inf value of \d+: "):
        quantizer.quantize(tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


def test_infinite_values_of_a_mask_are_no_damage() -> None:
    model = tiny_llama()
    model.model.register_buffer("mask", torch.full((4, 4), -math.inf).triu(1))
    own = torch.full((4,), math.nan)  # memory that the model has not written yet
    model.model.register_buffer("cache", own, persistent=False)
    assert packed_layers(OneBitQuantizer().quantize_model(model))


@pytest.mark.parametrize(
    ("options", "device_map", "message"),
    [
        ({}, {"model": "cpu", "lm_head": "disk"}, "cannot offload to disk .* load the packed checkpoint with this"),
        ({}, {"": "disk"}, "Quantizing while loading cannot offload to disk"),
        (
            {"dataset": ROWS},
            {"model": "cpu", "lm_head": "meta"},
            r"one device, got a device_map over \['cpu', 'meta'\]",
        ),
        ({"modules_to_not_convert": [".*"]}, None, "LlamaForCausalLM has no layer to quantize: all 15 linear"),
        ({"dequantize": True}, None, "dequantize is True.* expected False where a model is quantized"),
        ({"dequantize": True, "dataset": ROWS}, None, "dequantize is True.* expected False where a model is quantized"),
    ],
)
def test_quantizing_while_loading_refuses(
    llama_dir: Path, tmp_path: Path, options: dict[str, Any], device_map: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(
            llama_dir,
            quantization_config=OneBitConfig(**options),
            device_map=device_map,
            offload_folder=tmp_path / "offload",
        )


@pytest.mark.parametrize("quantizer", [OneBitQuantizer, MPQQuantizer])
def test_float_layers_are_not_what_quantization_makes(quantizer: type[OneBitQuantizer | MPQQuantizer]) -> None:
    model = tiny_llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"dequantize is True.* call model\.dequantize\(\) of the result"):
        quantizer(dequantize=True).quantize_model(model)
    assert not packed_layers(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    quantizer().quantize_model(model)
    model.dequantize()  # the remedy of the message
    assert not packed_layers(model)


def test_a_layer_that_the_float_checkpoint_lacks_is_not_left_random(llama_dir: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(llama_dir, tmp_path / "float"))
    edit_tensors(lambda tensors: tensors.pop(f"{LAYER}.weight"))(folder)
    with pytest.raises(ValueError, match=r"no weight for 1 layer .*q_proj.*modules_to_not_convert=\['model"):
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=OneBitConfig())
    kept = OneBitConfig(modules_to_not_convert=[LAYER, "lm_head"])  # the remedy of the message
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=kept)
    assert LAYER not in packed_layers(model)
    assert len(packed_layers(model)) == 13


def test_a_new_task_head_is_not_packed_by_default(llama_dir: Path) -> None:
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        llama_dir, quantization_config=OneBitConfig()
    )
    assert isinstance(model.score, nn.Linear)
    assert not isinstance(model.score, OneBitLinear)
    everything = OneBitConfig(modules_to_not_convert=[])
    with pytest.raises(ValueError, match=r"no weight for 1 layer .*score"):
        transformers.AutoModelForSequenceClassification.from_pretrained(llama_dir, quantization_config=everything)


@pytest.mark.parametrize("cached", [False, True])
def test_a_packed_layer_refuses_whole_numbers(cached: bool) -> None:
    layer = OneBitLinear(64, 32)
    layer.use_cache(cached)
    with pytest.raises((RuntimeError, ValueError), match=r"floating point.* got torch.int64|torch.int64.*floating"):
        layer(torch.ones(1, 64, dtype=torch.int64))


# ----------------------------------------------------------------------------------------- damaged checkpoints


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good checkpoints of a ragged tiny Llama, with one and with two planes; read only."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for planes in (1, 2):
        quantizer = OneBitQuantizer(planes=planes)
        model = quantizer.quantize_model(tiny_llama_ragged())
        quantizer.save(model, folder / f"planes-{planes}", tokenizer=tiny_tokenizer())
    return folder


Damage = Callable[[Path], object]


def cut(size: int) -> Damage:
    """Keep the first `size` bytes of the weights (or all but the last -size)."""

    def damage(folder: Path) -> None:
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:size])

    return damage


def edit_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    def damage(folder: Path) -> None:
        file = folder / "model.safetensors"
        tensors = {key: tensor.clone() for key, tensor in load_file(file).items()}
        change(tensors)
        save_file(tensors, file, metadata={"format": "pt"})

    return damage


def with_value(key: str, value: float) -> Damage:
    return edit_tensors(lambda tensors: tensors[key].view(-1)[:1].fill_(value))


def with_tensor(key: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Damage:
    return edit_tensors(lambda tensors: tensors.__setitem__(key, change(tensors[key]).clone()))


def edit_config(change: Callable[[dict[str, Any]], object]) -> Damage:
    def damage(folder: Path) -> None:
        file = folder / "config.json"
        config = json.loads(file.read_text())
        change(config)
        file.write_text(json.dumps(config))

    return damage


def edit_quantization(change: Callable[[dict[str, Any]], object]) -> Damage:
    return edit_config(lambda config: change(config["quantization_config"]))


def write(name: str, content: bytes) -> Damage:
    return lambda folder: (folder / name).write_bytes(content)


def delete(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


def index_of(file: str) -> Damage:
    def damage(folder: Path) -> None:
        weight_map = dict.fromkeys(load_file(folder / "model.safetensors"), file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")

    return damage


def all_planes(planes: int) -> Damage:
    return edit_quantization(lambda q: [entry.update(planes=planes) for entry in q["modules"].values()])


TRUNCATED = r"model\.safetensors is truncated or damaged \(\d+ bytes on disk; .*copy or download it again"
EVERY_DOOR = ("auto", "load", "verify")
OURS = ("load", "verify")  # Transformers itself stops on the way to us, with its own words

DAMAGES: dict[str, tuple[Damage, str, tuple[str, ...]]] = {
    "no bytes": (cut(0), TRUNCATED, EVERY_DOOR),
    "cut in the header's size": (cut(4), TRUNCATED, EVERY_DOOR),
    "cut in the header": (cut(100), TRUNCATED, EVERY_DOOR),
    "cut in the tensors": (cut(-5000), TRUNCATED, EVERY_DOOR),
    "one byte short": (cut(-1), TRUNCATED, EVERY_DOOR),
    "no signs": (
        edit_tensors(lambda t: t.pop(f"{LAYER}.weight")),
        rf"{LAYER}\.weight is missing: expected I32 \[3, 72\]",
        EVERY_DOOR,
    ),
    "no a": (edit_tensors(lambda t: t.pop(f"{LAYER}.a")), rf"{LAYER}\.a( is missing| and)", EVERY_DOOR),
    "no b": (edit_tensors(lambda t: t.pop(f"{LAYER}.b")), rf"{LAYER}\.b( is missing| for it)", EVERY_DOOR),
    "layer not in the table": (
        edit_quantization(lambda q: q["modules"].pop(LAYER)),
        rf"{LAYER}\.weight in model\.safetensors is a packed weight of a layer that the config's table",
        EVERY_DOOR,
    ),
    "no such layer": (
        edit_quantization(lambda q: q["modules"].update({"model.layers.7.mlp.up_proj": ENTRY})),
        r"model\.layers\.7\.mlp\.up_proj.*(edited or is another model's|hold no scales)",
        EVERY_DOOR,
    ),
    "a in float32": (
        with_tensor(f"{LAYER}.a", torch.Tensor.float),
        rf"{LAYER}\.a in model\.safetensors is F32 \[72\]: expected F16 \[72\]",
        EVERY_DOOR,
    ),
    "signs in int64": (
        with_tensor(f"{LAYER}.weight", torch.Tensor.long),
        rf"{LAYER}\.weight in model\.safetensors is I64 \[3, 72\]: expected I32 \[3, 72\]",
        EVERY_DOOR,
    ),
    "signs too few": (
        with_tensor(f"{LAYER}.weight", lambda t: t[:-1]),
        rf"{LAYER}\.weight in model\.safetensors is I32 \[2, 72\]: expected I32 \[3, 72\]",
        EVERY_DOOR,
    ),
    "a too short": (
        with_tensor(f"{LAYER}.a", lambda t: t[:-1]),
        rf"{LAYER}\.(a|weight) in model\.safetensors is .*: expected .*7[12]\]",
        EVERY_DOOR,
    ),
    "NaN in a": (with_value(f"{LAYER}.a", float("nan")), rf"{LAYER}.*a.*(NaN or inf|inf or nan)", EVERY_DOOR),
    "inf in a": (with_value(f"{LAYER}.a", float("inf")), rf"{LAYER}.*a.*(NaN or inf|inf or nan)", EVERY_DOOR),
    "NaN in b": (with_value(f"{LAYER}.b", float("nan")), rf"{LAYER}.*b.*(NaN or inf|inf or nan)", EVERY_DOOR),
    "NaN in a norm": (with_value("model.norm.weight", float("nan")), r"model\.norm\.weight.*NaN or inf", ("verify",)),
    "dirty padding": (
        edit_tensors(lambda t: t[f"{LAYER}.weight"][-1, :2].bitwise_or_(1 << 20)),
        rf"{LAYER}: 'weight' has padding bits set in 2 columns, expected zeros in bits 8\.\.31",
        ("verify",),
    ),
    "no weights": (delete("model.safetensors"), r"holds no model\.safetensors: copy or download", OURS),
    "index leads outside": (
        index_of("../other.safetensors"),
        r"(names the file '\.\./other\.safetensors', which is outside|\.\./other\.safetensors is not there)",
        EVERY_DOOR,
    ),
    "index leads nowhere": (
        index_of("absent.safetensors"),
        r"absent\.safetensors('.*which is not there| is not there.*index names it)",
        EVERY_DOOR,
    ),
    "config no JSON": (write("config.json", b'{"a":'), r"config\.json is not readable JSON .*: copy or", OURS),
    "config a list": (write("config.json", b"[]"), r"config\.json holds list: expected a JSON object", OURS),
    "config no text": (write("config.json", b"\xff\xfe\x00"), r"config\.json is not readable JSON", OURS),
    "config gone": (delete("config.json"), r"holds no config\.json: expected the folder of a saved model", OURS),
    "not quantized": (
        edit_config(lambda c: c.pop("quantization_config")),
        "has no quantization_config: this is a float model. Quantize it: hf-onebit quantize",
        OURS,
    ),
    "other method": (
        edit_quantization(lambda q: q.update(quant_method="awq")),
        "has quant_method 'awq': hf_onebit .* reads 'onebit'",
        OURS,
    ),
    "unknown key": (edit_quantization(lambda q: q.update(plane=2)), "'plane': did you mean 'planes'", EVERY_DOOR),
    "newer format": (
        edit_quantization(lambda q: q.update(format_version=2)),
        r"format_version 2, and .* Update it: pip install -U hf_onebit",
        EVERY_DOOR,
    ),
    "no table": (edit_quantization(lambda q: q.pop("modules")), "no table of packed modules", EVERY_DOOR),
    "empty table": (edit_quantization(lambda q: q.update(modules={})), "no table of packed modules", EVERY_DOOR),
    "2 planes said, 1 stored": (all_planes(2), r"\.weight_1 is missing: expected I32", EVERY_DOOR),
    "other sizes": (
        edit_config(lambda c: c.update(intermediate_size=128)),
        r"up_proj\.weight in model\.safetensors is I32 \[3, 104\]: expected I32 \[3, 128\]",
        ("auto", "load"),
    ),
    "fewer layers": (
        edit_config(lambda c: c.update(num_hidden_layers=1)),
        r"names 7 packed modules that LlamaForCausalLM does not have \(the first is 'model\.layers\.1",
        ("auto", "load"),
    ),
}


def open_door(door: str, folder: Path) -> str:
    """What a user is told who loads or verifies this checkpoint."""
    if door == "verify":
        result = verify(folder)
        assert result["ok"] is False
        return "\n".join(result["problems"])
    load = AutoModelForCausalLM.from_pretrained if door == "auto" else hf_onebit.load
    with pytest.raises(ValueError, match=r".+") as caught:  # Transformers' own errors are of other types
        load(folder)
    return str(caught.value)


@pytest.mark.parametrize(("case", "door"), [(case, door) for case, (_, _, doors) in DAMAGES.items() for door in doors])
def test_damaged_checkpoints(case: str, door: str, checkpoints: Path, tmp_path: Path) -> None:
    damage, message, _ = DAMAGES[case]
    folder = Path(shutil.copytree(checkpoints / "planes-1", tmp_path / "damaged"))
    assert verify(folder)["ok"]
    (folder / "hf_onebit.json").unlink()  # found without its checksums, as in a checkpoint saved by save_pretrained
    damage(folder)
    told = open_door(door, folder)
    match = pytest.raises(ValueError, match=f"(?s){message}")
    with match:
        raise ValueError(told)


@pytest.mark.parametrize("door", EVERY_DOOR)
def test_one_plane_said_and_two_stored(door: str, checkpoints: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoints / "planes-2", tmp_path / "damaged"))
    all_planes(1)(folder)
    assert "weight_1 is the second plane of a layer whose entry in the config says planes=1" in open_door(door, folder)


@pytest.mark.parametrize("door", EVERY_DOOR)
def test_a_lost_shard(door: str, tmp_path: Path) -> None:
    quantizer = OneBitQuantizer()
    model = quantizer.quantize_model(tiny_llama())
    quantizer.save(model, tmp_path / "sharded", max_shard_size="60KB")
    shards = sorted((tmp_path / "sharded").glob("model-*.safetensors"))
    assert len(shards) > 2
    shards[1].unlink()
    told = open_door(door, tmp_path / "sharded")
    assert shards[1].name in told
    assert "copy or download" in told


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (write("hf_onebit.json", b"{"), r"hf_onebit\.json is not readable JSON .*: copy or download it again"),
        (write("hf_onebit.json", b"[1]"), r"hf_onebit\.json holds list: expected a JSON object"),
        (write("hf_onebit.json", b'{"files": [1]}'), r"hf_onebit\.json holds no usable checksums"),
        (write("hf_onebit.json", b'{"files": {"config.json": 3}}'), "no usable checksum of config.json"),
        (write("hf_onebit.json", b'{"files": {"config.json": {}}}'), "no usable checksum of config.json"),
        *(
            (write("hf_onebit.json", json.dumps({"files": {name: {"bytes": 1, "sha256": ""}}}).encode()), message)
            for name, message in (
                ("../config.json", r"names the file '\.\./config\.json', which is outside .*: do not trust it"),
                ("a/../../config.json", r"names the file 'a/\.\./.*', which is outside"),
                ("/etc/passwd", "names the file '/etc/passwd', which is outside"),
                ("C:\\config.json", "which is outside"),
                ("..\\config.json", "which is outside"),
                ("inner/config.json", "inner/config.json is missing: it was saved with 1 bytes"),
            )
        ),
        (delete("README.md"), r"README\.md is missing: it was saved with \d+ bytes"),
        (edit_config(lambda c: c.update(rms_norm_eps=1e-3)), r"config\.json has \d+ bytes: it was saved with \d+"),
    ],
)
def test_verify_compares_with_what_was_saved(damage: Damage, message: str, checkpoints: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoints / "planes-1", tmp_path / "damaged"))
    damage(folder)
    with pytest.raises(ValueError, match=message):
        raise ValueError(open_door("verify", folder))


def test_verify_lists_what_is_wrong_beside_a_damaged_header(checkpoints: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoints / "planes-1", tmp_path / "damaged"))
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[8 + content[8:].index(b'"dtype"')] = ord("x")
    file.write_bytes(content)
    (folder / "generation_config.json").unlink()
    result = verify(folder)
    assert (result["ok"], result["checksums"]) == (False, "mismatch")
    missing, changed, *others = result["problems"]
    assert missing.startswith("generation_config.json is missing")
    assert re.search(r"model\.safetensors was changed after it was saved: .* is truncated or damaged", changed)
    assert len(others) == 1
    assert re.search(TRUNCATED, others[0])


def test_verify_looks_further_than_an_unreadable_side_file(checkpoints: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoints / "planes-1", tmp_path / "damaged"))
    (folder / "hf_onebit.json").write_bytes(b"{")
    with_value("model.norm.weight", float("nan"))(folder)
    problems = verify(folder)["problems"]
    assert len(problems) == 2
    assert "hf_onebit.json is not readable JSON" in problems[0]
    assert problems[1] == "model.norm.weight in model.safetensors holds NaN or inf"


@pytest.mark.parametrize("header", [b"[]", b'{"x":[1]}', b'{"x":{"dtype":"F32","shape":[-1,-1],"data_offsets":[0,4]}}'])
def test_headers_of_another_form_are_told(tmp_path: Path, header: bytes) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4)
    with pytest.raises(
        ValueError, match=r"model\.safetensors is truncated or damaged \(.+\): copy or download it again"
    ):
        stored_tensors([file])


def test_verify_names_the_tensor_with_a_changed_byte(checkpoints: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoints / "planes-1", tmp_path / "damaged"))
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    offset, header = 8 + int.from_bytes(content[:8], "little"), json.loads(content[8:].split(b"}}")[0] + b"}}")
    content[offset + header[f"{LAYER}.weight"]["data_offsets"][0]] ^= 1
    file.write_bytes(content)
    result = verify(folder)
    assert result["checksums"] == "mismatch"
    assert result["problems"] == [f"model.safetensors was changed after it was saved: tensors {LAYER}.weight"]


# ------------------------------------------------------------------------------------------ saving and the rest


def test_saving_to_a_file(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("mine")
    with pytest.raises(ValueError, match=r"Cannot save to '.*target': it is a file\. Pass a folder"):
        hf_onebit.save(packed_model(), tmp_path / "target")
    assert (tmp_path / "target").read_text() == "mine"
    assert os.listdir(tmp_path) == ["target"]


def test_saving_to_a_folder_of_other_things(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match=r"it holds files that are no checkpoint .* Pass an empty or a new folder"):
        hf_onebit.save(packed_model(), tmp_path / "target")
    assert os.listdir(tmp_path / "target") == ["thesis.tex"]
    assert os.listdir(tmp_path) == ["target"]


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("save", lambda folder: hf_onebit.save("model", folder)),  # type: ignore[arg-type]
        ("cache_dequantized", lambda _: cache_dequantized("model")),  # type: ignore[arg-type]
        ("fuse_projections", lambda _: fuse_projections("model")),  # type: ignore[arg-type]
        ("dequantize_layers", lambda _: dequantize_layers("model", torch.float32)),  # type: ignore[arg-type]
        ("unfuse_projections", lambda _: unfuse_projections("model")),  # type: ignore[arg-type]
        ("find_layers", lambda _: find_layers("model")),  # type: ignore[arg-type]
        ("packed_layers", lambda _: packed_layers("model")),  # type: ignore[arg-type]
        ("replace_layers", lambda _: replace_layers("model", {})),  # type: ignore[arg-type]
    ],
)
def test_a_path_in_place_of_a_model(name: str, call: Callable[[Path], object], tmp_path: Path) -> None:
    with pytest.raises(
        TypeError, match=f"{name} got model='model', expected a torch module: give the model that from_"
    ):
        call(tmp_path / "target")


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("save got save_dir=3, expected the path of a folder", lambda: hf_onebit.save(packed_model(), 3)),  # type: ignore[arg-type]
        ("load got path=3, expected the path of a folder", lambda: hf_onebit.load(3)),  # type: ignore[arg-type]
        ("OneBitQuantizer.from_pretrained got model_or_path=3", lambda: OneBitQuantizer.from_pretrained(3)),
        ("save got report=3, expected a dict", lambda: hf_onebit.save(packed_model(), "x", report=3)),  # type: ignore[arg-type]
        ("save got provenance=3, expected a dict", lambda: hf_onebit.save(packed_model(), "x", provenance=3)),  # type: ignore[arg-type]
    ],
)
def test_a_number_in_place_of_a_path_or_a_dict(message: str, call: Callable[[], object]) -> None:
    with pytest.raises(TypeError, match=re.escape(message)):
        call()


def test_a_name_in_place_of_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(
        TypeError,
        match=r"save got tokenizer='someone/tiny', expected .*: AutoTokenizer\.from_pretrained\('someone/tiny'\)",
    ):
        hf_onebit.save(packed_model(), tmp_path / "target", tokenizer="someone/tiny")
    with pytest.raises(TypeError, match=r"save got tokenizer=3, expected a tokenizer of Transformers, or None$"):
        hf_onebit.save(packed_model(), tmp_path / "target", tokenizer=3)
    assert not os.listdir(tmp_path)


def test_saving_a_float_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds 0 packed layers .* Quantize it first: OneBitQuantizer"):
        hf_onebit.save(tiny_llama(), tmp_path / "target")
    assert not os.listdir(tmp_path)


def test_a_float_model_made_from_a_packed_config(checkpoints: Path, tmp_path: Path) -> None:
    # from_config ignores quantization_config but keeps it: what is saved calls itself packed and is not.
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(checkpoints / "planes-1"))
    with pytest.raises(ValueError, match="holds 0 packed layers"):
        hf_onebit.save(model, tmp_path / "ours")
    model.save_pretrained(tmp_path / "theirs")
    for door in EVERY_DOOR:
        told = open_door(door, tmp_path / "theirs")
        assert "is F32" in told or "hold no scales" in told


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (tiny_gpt2, r"GPT2LMHeadModel has no module 'model\.layers.*build the model from the checkpoint's own config"),
        (lambda: tiny_llama_ragged(layers=1), "LlamaForCausalLM has no module .*7 of 14 packed layers"),
        (tiny_llama, r"is \d+x\d+ in this LlamaForCausalLM and \d+x\d+ in .*: build the model from the checkpoint's"),
    ],
)
def test_loading_into_another_model(make: Callable[[], Any], message: str, checkpoints: Path) -> None:
    with pytest.raises(ValueError, match=message):
        load_quantized_model(make(), checkpoints / "planes-1")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path / "none", "There is no folder '.*none'"),
        (lambda path: save_float(tiny_llama(), path / "float"), "this is a float model. Quantize it: hf-onebit"),
        (lambda path: path, r"holds no config\.json: expected the folder of a saved model"),
    ],
)
def test_loading_what_is_no_packed_checkpoint(make: Callable[[Path], Path], message: str, tmp_path: Path) -> None:
    folder = make(tmp_path)
    with pytest.raises(ValueError, match=message):
        hf_onebit.load(folder)
    with pytest.raises(ValueError, match=message):
        load_quantized_model(tiny_llama(), folder)


def test_quantizing_a_packed_checkpoint_again(checkpoints: Path, tmp_path: Path) -> None:
    quantizer = OneBitQuantizer.from_pretrained(checkpoints / "planes-1")
    with pytest.raises(ValueError, match=r"is quantized already \(quant_method 'onebit'\): expected a float model"):
        quantizer.quantize(tmp_path / "again")
    assert not os.listdir(tmp_path)


def test_wrong_calls_of_quantize(llama_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="file_prefix is 'x': expected None"):
        OneBitQuantizer.from_pretrained(llama_dir).quantize(tmp_path / "out", file_prefix="x")
    with pytest.raises(ValueError, match=r"bound to no model: make it with OneBitQuantizer\.from_pretrained\(MODEL\)"):
        OneBitQuantizer().quantize(tmp_path / "out")
    assert not os.listdir(tmp_path)


def test_resizing_embeddings_with_a_packed_head() -> None:
    model = OneBitQuantizer(OneBitConfig(modules_to_not_convert=[])).quantize_model(tiny_llama())
    assert isinstance(model.lm_head, OneBitLinear)
    with pytest.raises(ValueError, match=r"Cannot resize .* to 300: the output head is packed.*dequantize\(\) first"):
        model.resize_token_embeddings(300)
    assert model.config.vocab_size == 288
    assert model.get_input_embeddings().weight.shape == (288, 64)
    assert model.resize_token_embeddings() is model.get_input_embeddings()
    model.dequantize()
    model.resize_token_embeddings(300)
    assert model(tiny_ids()).logits.shape[-1] == model.config.vocab_size == 300


def test_resizing_embeddings_with_a_reloaded_packed_head(tmp_path: Path) -> None:
    quantizer = OneBitQuantizer(OneBitConfig(modules_to_not_convert=[]))
    quantizer.save(quantizer.quantize_model(tiny_llama()), tmp_path / "packed")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    with pytest.raises(ValueError, match="the output head is packed"):
        model.resize_token_embeddings(300)
    assert model.get_input_embeddings().weight.shape == (288, 64)


@pytest.mark.parametrize("dtype", ["foo", "nn", torch.int8, 3, "int8"])
def test_dequantizing_into_what_is_no_float_dtype(dtype: object) -> None:
    model = packed_model()
    with pytest.raises(ValueError, match="dequantize got dtype="):
        model.dequantize(dtype)
    assert packed_layers(model)


def test_resizing_embeddings_with_a_float_head() -> None:
    model = packed_model()
    model.resize_token_embeddings(300, mean_resizing=False)
    written = model.generate(tiny_ids(1, 4), max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0)
    assert written.shape == (1, 7)
    assert model.config.vocab_size == 300
