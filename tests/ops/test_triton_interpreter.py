"""Runs interpreted_*.py with Triton's interpreter, where triton is installed."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from compiled_kernels import triton_required

# Seconds each: sizes and widths are for the long tier.
QUICK = "group_sizes or many_rows or strides or examinations or small_inputs or [1-1-dtype0] or [5-2-dtype1] "
QUICK += "or test_g_idx and 3 or test_mpq and 4 or embedding_and_codes and 3 or mixed_rows and True-False "
QUICK += "or large_layer or packing and 3 or no_neighbours or the_process or autocast"


QUICK_STEPS = "width and 3 or nearest or flips and signs-both or examination"
RUNS = {"kernels": ("interpreted_triton.py", QUICK), "update": ("interpreted_update.py", QUICK_STEPS),
        "few_rows": ("interpreted_few_rows.py", "5-33 or 32-64 or 40-100 or who or missing"),
        "experts": ("interpreted_experts.py", "numbers and -5 or alike")}  # fmt: skip


@pytest.mark.parametrize("long", [False, pytest.param(True, marks=pytest.mark.long)], ids=["quick", "all"])
@pytest.mark.parametrize("run", RUNS)
def test_kernels_in_the_interpreter(run: str, long: bool) -> None:
    if find_spec("triton") is None:
        assert not triton_required(), "triton is not installed, and HF_ONEBIT_REQUIRE_TRITON is set"
        pytest.skip("triton is not installed")
    name, quick = RUNS[run]
    file = Path(__file__).with_name(name)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "" if long else quick, str(file)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "HF_ONEBIT_AUTOTUNE": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=3000)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert " skipped" not in done.stdout
