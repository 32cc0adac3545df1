"""Runs interpreted_triton.py with Triton's interpreter, where triton is installed."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

# Seconds each: sizes and widths are for the long tier.
QUICK = "group_sizes or many_rows or strides or room or examinations or small_inputs or [1-1-dtype0] or [5-2-dtype1]"


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("which", [QUICK, pytest.param("", marks=pytest.mark.long)], ids=["quick", "all"])
def test_kernels_in_the_interpreter(which: str) -> None:
    file = Path(__file__).with_name("interpreted_triton.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", which, str(file)]
    run = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    assert " passed" in run.stdout or "takes no loop bounds" in run.stdout
