"""``hf-onebit bench --device cuda`` on a CUDA device: every figure is there, and small layers are right."""

import json
import math

import pytest
import torch

from hf_onebit import cli
from hf_onebit.ops import gpu

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def test_small_layers_are_timed(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_ONEBIT_AUTOTUNE", "0")
    assert gpu.obstacle() == ""
    file = tmp_path / "bench.json"
    options = ["--shape", "256x512", "--batch", "1", "64", "--against", "float", "--milliseconds", "2", "--profile"]
    assert cli.main(["bench", "--device", "cuda:0", *options, "--json", str(file)]) == 0
    result = json.loads(file.read_text(encoding="utf-8"))
    assert (result["device"], result["refused"]) == (torch.cuda.get_device_name(0), {})
    assert result["copy_gb_per_s"] > 0
    kinds = ["float", "onebit", "onebit2", "mpq4", "mpq2"]
    expected = [(dtype, kind, rows) for dtype in ("float16", "bfloat16") for kind in kinds for rows in (1, 64)]
    assert [(row["dtype"], row["kind"], row["rows"]) for row in result["results"]] == expected
    for row in result["results"]:
        assert all(0 < row[key] < math.inf for key in ("graph_us", "eager_us", "floor_us", "float_over_packed")), row
        assert row["kernels_us"]
    assert "256x512" in capsys.readouterr().out
