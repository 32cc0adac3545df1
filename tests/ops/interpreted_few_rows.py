"""The kernel for few rows of signs in Triton's interpreter, against float64. Run by test_triton_interpreter.py.

The interpreter takes the kernel's plain half: inline assembly and shared memory are compiled in test_triton_aot.py and
run on a device in tests/gpu.
"""

import pytest
import torch
from interpreter import let_loops_run
from packed_layers import OneBit, check

from hf_onebit.ops import gpu_plans, triton_launch
from hf_onebit.ops.gpu_plans import Plan


@pytest.fixture(autouse=True)
def _loops_run():
    let_loops_run()


def run(layer, x, rows_a_program, warps=1):
    weight, a, b, bias, weight_1, a_1, b_1 = layer.args()
    operand = triton_launch.onebit_operand(weight, a, b, weight_1, a_1, b_1)
    return triton_launch.run(x, operand, bias, Plan(32, rows_a_program, 0, warps, 1))


@pytest.mark.parametrize(
    ("out", "in_", "planes", "rows", "rows_a_program", "warps", "dtype"),
    [(5, 33, 1, 1, 1, 1, torch.float16), (40, 100, 1, 1, 1, 2, torch.float32), (7, 600, 2, 1, 1, 1, torch.float16),
     (7, 600, 1, 3, 2, 1, torch.float32), (9, 70, 2, 2, 2, 1, torch.float32), (32, 64, 1, 4, 4, 1, torch.float16),
     (7, 600, 1, 3, 4, 1, torch.float16), (9, 70, 2, 5, 4, 2, torch.float16)],
)  # fmt: skip
def test_few_rows(out, in_, planes, rows, rows_a_program, warps, dtype):
    layer = OneBit(out, in_, planes, bias=out != 9)
    x = torch.randn(rows, in_, generator=torch.Generator().manual_seed(rows)).to(dtype)
    check(run(layer, x, rows_a_program, warps), layer.exact(x))


def test_digits_are_as_many_as_documented():
    """Of the largest of 512 inputs: 2^-21 with three digits, 2^-14 with two; one large input takes them all."""
    layer = OneBit(8, 64, bias=False, scale_dtype=torch.float32)
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(1))
    x[:, 5] = 1e3
    _, a, b, *_ = layer.args()
    bound = a.double().abs() * ((x.double() * b.double()).abs().amax(1, keepdim=True) * 64)
    for rows_a_program, digits in ((1, 21), (4, 14)):
        error = (run(layer, x[:rows_a_program], rows_a_program).double() - layer.exact(x[:rows_a_program])).abs()
        assert (error <= bound[:rows_a_program] * 2.0**-digits).all()
    assert error.max() > bound.max() * 2.0**-24  # two digits are no more than two


def test_large_small_and_missing_numbers():
    layer = OneBit(8, 40, bias=False)
    x = torch.randn(4, 40, generator=torch.Generator().manual_seed(1))
    x[0] *= 1e33
    x[1] *= 1e-25
    x[2] = 0
    x[3, 7] = float("inf")
    y, exact = run(layer, x, 2), layer.exact(x)
    check(y[0], exact[0])
    check(y[1], exact[1])
    assert (y[2] == 0).all()
    assert y[3].isnan().all()


def test_rows_that_lie_apart():
    layer = OneBit(8, 40)
    x = torch.randn(3, 80, generator=torch.Generator().manual_seed(1)).half()[:, 40:]
    check(run(layer, x, 2), layer.exact(x))


def test_who_takes_it(monkeypatch):
    """Signs on NVIDIA devices with its instructions; others, and more rows, have the split product."""
    weight, a, b, *_ = OneBit(64, 4096).args()
    operand = triton_launch.onebit_operand(weight, a, b, None, None, None)
    device = torch.device("cpu")
    assert gpu_plans.plan_for(1, 4096, operand, torch.float16, device).splits > 0
    monkeypatch.setattr(gpu_plans, "major", lambda _: 9)
    for dtype, rows, wanted in (
        (torch.float16, 1, (1, 8)), (torch.float16, 2, (2, 8)), (torch.bfloat16, 3, (4, 8)), (torch.float16, 9, (4, 4)),
        (torch.float32, 1, (1, 8)), (torch.float32, 8, (2, 4)),
    ):  # fmt: skip
        assert gpu_plans.plan_for(rows, 4096, operand, dtype, device) == Plan(32, wanted[0], 0, wanted[1], 1)
    assert gpu_plans.plan_for(1, 576, operand, torch.float16, device) == Plan(32, 1, 0, 2, 1)
    assert gpu_plans.plan_for(33, 4096, operand, torch.float16, device).splits > 0
    assert gpu_plans.plan_for(9, 4096, operand, torch.float32, device).splits > 0
