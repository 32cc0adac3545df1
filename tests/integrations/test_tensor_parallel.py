"""Packed layers cut over two processes: the unsharded model's logits, and what is refused before anything waits."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import save_file

from hf_onebit import MPQConfig, MPQQuantizer, OneBitConfig, OneBitQuantizer
from hf_onebit.integrations.tensor_parallel import check_cut, parameter_styles
from hf_onebit.nn import MPQLinear, OneBitLinear
from hf_onebit.nn.mbwq import MBWQLinear
from hf_onebit.nn.mpq import MPQEmbedding

RANKS = Path(__file__).resolve().parents[1] / "ranks.py"
SECONDS = 400  # for everything; ten are enough on an idle machine
LLAMA: dict[str, Any] = {"hidden": 64, "intermediate": 128, "bias": True}
CASES: dict[str, Any] = {
    "onebit": (OneBitQuantizer, OneBitConfig(planes=2), LLAMA),
    "mpq": (MPQQuantizer, MPQConfig(bits=3, group_size=32), LLAMA),
    "mpq-head": (MPQQuantizer, MPQConfig(bits=4, group_size=-1, lm_head_bits=8), LLAMA),
    "words": (OneBitQuantizer, OneBitConfig(), LLAMA | {"intermediate": 160}),  # 5 words cannot be shared by 2
    "groups": (MPQQuantizer, MPQConfig(bits=4, group_size=64), LLAMA | {"intermediate": 192}),  # nor 3 groups
    "embedding": (OneBitQuantizer, OneBitConfig(embedding_bits=8), LLAMA),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What both processes say of each case."""
    base, ids = tmp_path_factory.mktemp("parallel"), tiny.tiny_ids()
    for name, (quantizer, config, sizes) in CASES.items():
        model = tiny.tiny_llama(**sizes)
        quantizer(config).quantize_model(model)
        model.save_pretrained(base / name)
        with torch.no_grad():
            save_file({"ids": ids, "logits": model(ids).logits}, base / name / "expected.safetensors")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "2"}
    environment["PYTHONPATH"] = os.pathsep.join([str(RANKS.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, str(RANKS)]
    folders = [str(base / name) for name in CASES]
    processes = [
        subprocess.Popen(
            [*command, str(rank), "2", str(base / "store"), *folders],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=SECONDS) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in CASES}
    for process, (out, err) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, err[-3000:]
        for line in out.splitlines():
            if line.startswith("RESULT "):
                entry = json.loads(line.removeprefix("RESULT "))
                found[Path(entry["folder"]).name].append(entry)
    return found


@pytest.mark.parametrize("name", ["onebit", "mpq", "mpq-head"])
def test_two_ranks_give_the_unsharded_logits(results: dict[str, list[dict[str, Any]]], name: str) -> None:
    assert len(results[name]) == 2
    for result in results[name]:
        assert "refused" not in result, result
        assert result["difference"] <= 1e-5 * result["scale"]
        assert result["difference_with_gradients"] <= 1e-5 * result["scale"]


def test_parts_are_cut_where_the_plan_says(results: dict[str, list[dict[str, Any]]]) -> None:
    mlp = "model.layers.1.mlp"
    for result in results["onebit"]:
        shapes = result["shapes"]
        for plane in ("", "_1"):
            assert shapes[f"{mlp}.up_proj.weight{plane}"] == [2, 64]
            assert shapes[f"{mlp}.up_proj.a{plane}"] == [64]
            assert shapes[f"{mlp}.up_proj.b{plane}"] == [64]
            assert shapes[f"{mlp}.down_proj.weight{plane}"] == [2, 64]
            assert shapes[f"{mlp}.down_proj.a{plane}"] == [64]
            assert shapes[f"{mlp}.down_proj.b{plane}"] == [64]
        assert shapes[f"{mlp}.up_proj.bias"] == [64]
        assert shapes[f"{mlp}.down_proj.bias"] == [64]
    for result in results["mpq"]:
        shapes = result["shapes"]
        assert shapes[f"{mlp}.up_proj.weight"] == [6, 64]
        assert shapes[f"{mlp}.up_proj.scales"] == shapes[f"{mlp}.up_proj.zeros"] == [2, 64]
        assert shapes[f"{mlp}.down_proj.weight"] == [6, 64]
        assert shapes[f"{mlp}.down_proj.scales"] == [2, 64]
    for result in results["mpq-head"]:
        assert result["shapes"]["lm_head.weight"] == [16, tiny.VOCABULARY // 2]
        assert result["shapes"][f"{mlp}.down_proj.scales"] == [1, 64]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("words", "down_proj has 160 inputs, which cannot be shared by 2 ranks: each part must be a multiple of 32"),
        ("groups", "each part must be a multiple of 64 (a word holds 32 inputs, a group 64)"),
        ("embedding", "style 'embedding_rowwise' knows float weights only"),
    ],
)
def test_both_ranks_refuse_what_cannot_be_cut(results: dict[str, list[dict[str, Any]]], name: str, said: str) -> None:
    assert len(results[name]) == 2
    for result in results[name]:
        assert said in result["refused"]
        assert "device_map='auto'" in result["refused"]


def test_styles_of_parameters() -> None:
    one, group = OneBitLinear(64, 32, planes=2), MPQLinear(64, 32, bits=2, group_size=32, symmetric=False)
    outputs = {name: "replicate" if name.startswith("b") else "rowwise" for name, _ in one.named_parameters()}
    assert parameter_styles(one, "colwise") == {k: v for k, v in outputs.items() if k != "bias"}
    assert parameter_styles(one, "rowwise") == {
        **dict.fromkeys(("weight", "weight_1"), "colwise"),
        **dict.fromkeys(("a", "a_1"), "replicate"),
        **dict.fromkeys(("b", "b_1"), "rowwise"),
    }
    assert parameter_styles(group, "rowwise") == dict.fromkeys(("weight", "scales", "zeros"), "colwise")
    assert parameter_styles(group, "colwise_gather_output") == dict.fromkeys(("weight", "scales", "zeros"), "rowwise")


@pytest.mark.parametrize(
    ("module", "style", "said"),
    [
        (OneBitLinear(96, 32), "rowwise", "96 inputs, which cannot be shared by 2 ranks"),
        (OneBitLinear(64, 33), "colwise", "33 outputs"),
        (MPQLinear(192, 32, bits=4, group_size=64), "rowwise", "multiple of 64 (a word holds 32 inputs, a group 64)"),
        (MPQLinear(128, 32, bits=4, group_size=32, g_idx=True), "rowwise", "order of their own"),
        (MBWQLinear(128, 32, blocks=((4, 128, 32),)), "rowwise", "order of their own"),
        (MPQEmbedding(64, 32, bits=8, group_size=32), "embedding_rowwise", "float weights only"),
        (OneBitLinear(64, 32), "packed_colwise", "float weights only"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_cuts_through_words_and_groups_are_refused(module: Any, style: str, said: str) -> None:
    with pytest.raises(ValueError, match=f"{re.escape(said)}.*device_map='auto'"):
        check_cut("model.layer", module, style, 2)


def test_cuts_between_them_are_not() -> None:
    check_cut("x", OneBitLinear(128, 32), "rowwise", 4)
    check_cut("x", MPQLinear(256, 32, bits=4, group_size=128), "rowwise", 2)
    check_cut("x", MPQLinear(128, 32, bits=4, group_size=-1), "rowwise", 4)
    check_cut("x", MBWQLinear(128, 32, blocks=((4, 128, 32),), q_perm=True), "colwise", 4)
