"""A large layer's signs are refined in less than 4 GB, all of the process counted."""

import json
import subprocess
import sys
import textwrap

import pytest

FIT = """
    import json, sys
    import torch
    from hf_onebit.algorithms import heldout_choices, signs
    from hf_onebit.algorithms.curvature import Curvature

    out, inputs, heldout = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "heldout"
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(out, inputs, generator=generator)

    def hessian():
        X = torch.randn(64, inputs, generator=generator)
        H = X.T @ X
        H.diagonal().add_(8)
        return H

    H = hessian()
    if heldout:
        curvature, errors = heldout_choices.choose_shrinkage(W, H, hessian(), candidates=(0.05, 0.3))
        losses = list(errors.values())
    else:
        losses = signs.fit_signs(W, Curvature(H, 0.15), rounds=1).losses
    with open("/proc/self/status") as status:
        peak = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    print(json.dumps({"peak": peak, "losses": losses}))
"""


@pytest.mark.long
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
@pytest.mark.parametrize(
    ("out", "inputs", "what"), [(4096, 11008, "fit"), (11008, 4096, "fit"), (4096, 11008, "heldout")]
)
def test_a_large_layer_fits_in_4_gb(out, inputs, what):
    command = [sys.executable, "-c", textwrap.dedent(FIT), str(out), str(inputs), what]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["peak"] < 4e9, result
    if what == "fit":
        assert result["losses"][-1] < 0.5 * result["losses"][0]
