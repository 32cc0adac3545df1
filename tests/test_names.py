"""Names and parts of names by which a config means modules: what is left out, and what is pointed out."""

from typing import Any

import pytest
from tiny import save_float, tiny_llama, tiny_mixtral, tiny_tokenizer
from transformers.quantizers.quantizers_utils import should_convert_module

from hf_onebit import MPQConfig, OneBitConfig
from hf_onebit.cli import main
from hf_onebit.nn.replace import find_layers
from hf_onebit.nn.roles import matches
from hf_onebit.progress import logger
from hf_onebit.quantization.planning import plan_layers

MLP = {f"model.layers.{i}.mlp.{part}_proj" for i in (0, 1) for part in ("gate", "up", "down")}
FIRST = {name for name in find_layers(tiny_llama()).selected if name.startswith("model.layers.0.")}


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("mlp", MLP),
        ("layers.0.mlp", MLP & FIRST),
        ("model.layers.0.mlp", MLP & FIRST),
        (".*mlp", MLP),
        ("layers.0", FIRST),
        ("mlp.down_proj", {name for name in MLP if "down" in name}),
        ("down_proj", {name for name in MLP if "down" in name}),
        ("model", set(find_layers(tiny_llama()).selected)),
        ("lm_head", {"lm_head"}),
        ("proj", set()),
        ("ml", set()),
        ("layers.00", set()),
        ("norm", set()),
    ],
)
def test_a_name_leaves_out_all_that_is_in_its_modules(pattern: str, expected: set[str]) -> None:
    model = tiny_llama()
    left_out = set(find_layers(model, [pattern]).skipped)
    assert left_out == expected
    if pattern != "proj":  # a part of a word: Transformers takes it at the end of a name
        theirs = {name for name in find_layers(model, []).selected if not should_convert_module(name, [pattern])}
        assert theirs <= left_out


def test_experts_are_left_out_together() -> None:
    plan = find_layers(tiny_mixtral(), ["experts"])
    assert not [name for name in plan.selected if "experts" in name]
    plan = plan_layers(tiny_mixtral(), OneBitConfig(modules_to_not_convert=["lm_head", "mlp"]))
    assert plan.selected
    assert not [name for name in plan.selected if "mlp" in name]


def test_planes_are_given_by_the_same_rule() -> None:
    plan = plan_layers(tiny_llama(), OneBitConfig(planes_per_layer={"layers.1.mlp": 1, "mlp": 2}))
    assert {name for name, planes in plan.planes.items() if planes == 2} == MLP & FIRST


def test_a_part_inside_of_a_list_of_the_model() -> None:
    assert matches("encoder.block.0.wo.weight", ("wo",))  # as Transformers' keep_in_fp32 has it
    assert not matches("encoder.block.0.wo_2", ("wo",))
    assert not matches("", ("wo",))


@pytest.mark.parametrize("make", [OneBitConfig, MPQConfig])
def test_only_a_name_of_no_layer_is_pointed_out(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(logger, "warning", said.append)
    plan_layers(tiny_llama(), make(modules_to_not_convert=["lm_head", "mlp", "embed_tokens", "layers.0"]))
    assert said == []
    plan_layers(tiny_llama(), make(modules_to_not_convert=["lm_head", "input_layernorm", "mpl"]))
    assert said == [
        "modules_to_not_convert (--skip) names no linear layer of LlamaForCausalLM by ['input_layernorm', 'mpl']: "
        "is it a typing error?"
    ]


@pytest.mark.parametrize("more", [(), ("--dry-run",)])
@pytest.mark.parametrize("calibrated", [False, True])
def test_the_command_says_it_once(more: Any, calibrated: bool, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(logger, "warning", said.append)
    folder, text = save_float(tiny_mixtral(), tmp_path / "float", tiny_tokenizer()), tmp_path / "text.txt"
    text.write_text("The little boat drifted down the river until the sun had set behind the hills. " * 20)
    data = ("--calibration", str(text)) if calibrated else ()
    arguments = ["--preset", "closed", *data, "--skip", "lm_head", "--skip", "mpl", "--skip", "mlp"]
    assert main(["quantize", str(folder), "-o", str(tmp_path / "packed"), *arguments, *more]) == 0
    assert [line for line in said if "typing error" in line] == [
        "modules_to_not_convert (--skip) names no linear layer of MixtralForCausalLM by ['mpl']: is it a typing error?"
    ]
