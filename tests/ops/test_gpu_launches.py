"""Which tiles are launched, on devices that are made up: kernels note what they are given, and compute nothing."""

import pytest
import torch
from compiled_kernels import require_triton

from hf_onebit.nn import MPQLinear, OneBitLinear, grouped_experts
from hf_onebit.ops import gpu_plans

require_triton()

from hf_onebit.ops import triton_experts, triton_experts_launch, triton_indexed, triton_kernels, triton_launch  # noqa: E402

HALF = torch.float16


class Kernel:
    """In the place of a kernel: keeps the constants and options of its launches."""

    def __init__(self):
        self.launches = []

    def __getitem__(self, grid):
        return lambda *_, **given: self.launches.append(given)


@pytest.fixture
def launches(monkeypatch):
    """{kernel: its launches}."""
    kernels = {}
    modules = {triton_kernels: ("prepare", "multiply", "reduce", "expand"), triton_indexed: ("multiply_indexed",),
               triton_experts: ("prepare_experts", "multiply_experts", "reduce_experts")}  # fmt: skip
    for module, names in modules.items():
        for name in names:
            kernel = Kernel()
            monkeypatch.setattr(module, name, kernel)
            kernels[name] = kernel.launches
    return kernels


def launch_all(x):
    """A product of each kind with x; its plan is the usual one."""
    layer = MPQLinear(256, 64, bias=False, bits=4, group_size=64)
    operand = triton_launch.mpq_operand(layer.weight, layer.scales, None, 4, 64)
    triton_launch.run(x, operand, None, gpu_plans.plan_for(len(x), 256, operand, HALF, x.device))
    triton_launch.run_by_index(x, operand, torch.arange(256) // 64, None)
    for make in (MPQLinear, OneBitLinear):
        experts = [make(256, 64, bias=False) for _ in range(4)]
        rows = triton_experts_launch.sort_rows(torch.zeros(len(x), 1, dtype=torch.int64), 4)
        triton_experts_launch.product(x, rows, grouped_experts.grouped(experts))


@pytest.mark.parametrize(("hip", "columns"), [(None, 8), ("6.4", 16)])
def test_the_least_tile_has_the_columns_of_the_vendors_matrix_instructions(monkeypatch, launches, hip, columns):
    monkeypatch.setattr(torch.version, "hip", hip)
    launch_all(torch.randn(1, 256).half())
    found = {name: {given["BLOCK_C"] for given in launches[name]} for name in launches if name.startswith("multiply")}
    assert found == {name: {columns} for name in ("multiply", "multiply_indexed", "multiply_experts")}
    launch_all(torch.randn(16, 256).half())
    assert launches["multiply"][-1]["BLOCK_C"] == launches["multiply_indexed"][-1]["BLOCK_C"] == 16


def test_devices_without_tensor_cores_for_tiles_expand_instead(monkeypatch, launches):
    """Compute capability 7.5: the float matrix is torch's to multiply, and experts are called one by one."""
    x, index = torch.randn(1, 256).half(), torch.zeros(1, 1, dtype=torch.int64)
    roles = [[OneBitLinear(256, 64, bias=False) for _ in range(4)]]
    assert grouped_experts.suits(x, index, roles)
    monkeypatch.setattr(gpu_plans, "major", lambda _: 7)
    assert not grouped_experts.suits(x, index, roles)
    layer = MPQLinear(256, 64, bias=False, bits=4, group_size=64)
    operand = triton_launch.mpq_operand(layer.weight, layer.scales, None, 4, 64)
    triton_launch.run_by_index(x, operand, torch.arange(256) // 64, None)
    assert len(launches["expand"]) == 1
    assert grouped_experts.examine(x.device, HALF, "onebit", 1, False) == ""  # nothing that would be called
    assert not any(found for name, found in launches.items() if name != "expand")


@pytest.mark.parametrize(("kilobytes", "stages"), [(99, 2), (227, 2), (8, 1)])
def test_two_stages_are_launched_where_they_fit(monkeypatch, launches, kilobytes, stages):
    monkeypatch.setattr(gpu_plans, "shared_memory", lambda _: kilobytes << 10)
    launch_all(torch.randn(16, 256).half())
    assert [given["num_stages"] for given in launches["multiply"]] == [stages]
    assert [given["num_stages"] for given in launches["multiply_experts"]] == [stages, stages]
    assert gpu_plans.stages_of(64, 64, 8, 4, 99 << 10) == 1  # 100 KiB: x 64, words 32, scales and zeros 4
    assert gpu_plans.stages_of(64, 64, 8, 2, 99 << 10) == 2
