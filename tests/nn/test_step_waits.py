"""How often a step of packed weights asks for a number of the device: what docs/kernels.md says of CUDA graphs."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hf_onebit.nn import MPQLinear, MPQWeightParameter, OneBitLinear, gpu_update

_ATEN = torch.ops.aten
_WAITING = (_ATEN._local_scalar_dense.default, _ATEN.equal.default, _ATEN.nonzero.default)


class Waits(TorchDispatchMode):
    """Counts the operators whose result the host waits for."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in _WAITING
        return func(*args, **(kwargs or {}))


@pytest.fixture
def launches(monkeypatch):
    """The kernels' launches, which take the step here without doing anything."""
    made = []
    monkeypatch.setattr(gpu_update, "takes", lambda *_: True)
    monkeypatch.setattr(gpu_update, "run", lambda *given: made.append(given))
    return made


@pytest.mark.parametrize(
    ("make", "rounding"),
    [(lambda: MPQLinear(64, 32, bits=4, group_size=32), "stochastic"),
     (lambda: MPQLinear(64, 32, bits=2, group_size=32, symmetric=False), "nearest"),
     (lambda: MPQLinear(64, 32, bits=1, group_size=32), "inertia"), (lambda: OneBitLinear(64, 32), "inertia")],
    ids=["codes", "zeros", "flips", "signs"],
)  # fmt: skip
def test_a_step_waits_once(launches, make, rounding):
    weight = make().weight
    weight.rounding = rounding
    gradient = torch.randn(64, 32)
    with Waits() as waits:
        MPQWeightParameter.update(weight, lr=0.1, grad=gradient)
    assert waits.count == 1
    assert len(launches) == 1
    gradient[3, 4] = float("nan")
    with pytest.raises(ValueError, match="inf or nan; nothing was changed"):
        MPQWeightParameter.update(weight, lr=0.1, grad=gradient)
    assert len(launches) == 1


def test_groups_that_are_given_are_looked_at(launches):
    weight = MPQLinear(64, 32, bits=4, group_size=32, g_idx=True).weight
    with Waits() as waits:
        MPQWeightParameter.update(weight, lr=0.1, grad=torch.randn(64, 32))
    assert waits.count > 1
    weight.g_idx[5] = 2
    with pytest.raises(ValueError, match=r"g_idx has values from 0 to 2, expected 0\.\.1"):
        MPQWeightParameter.update(weight, lr=0.1, grad=torch.randn(64, 32))
