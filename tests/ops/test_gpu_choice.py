"""What registers the GPU kernels and what happens where they fail: without triton and without a device."""

import contextlib
import subprocess
import sys
import warnings

import pytest
import torch

from hf_onebit import ops
from hf_onebit.algorithms.update import ROUNDINGS
from hf_onebit.formats.sign_layout import SignLayout
from hf_onebit.formats.weight_layout import WeightLayout
from hf_onebit.nn import MPQLinear, OneBitLinear, gpu_update, grouped_experts
from hf_onebit.nn.update_step import Rounding, Step
from hf_onebit.ops import gpu, gpu_examination, gpu_mbwq, gpu_mpq, gpu_onebit, gpu_packing, gpu_products, gpu_variants


def test_not_registered_on_a_cpu_build():
    if torch.version.cuda is not None or torch.version.hip is not None:
        pytest.skip("this torch knows GPUs")
    assert gpu.obstacle() == "this torch is built for the CPU only"
    assert ops.backends()["gpu"] == "not in use: this torch is built for the CPU only"


def test_why_not(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    assert "pip install triton" in gpu.obstacle()
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: object())
    assert gpu.obstacle() == ""
    monkeypatch.setenv("HF_ONEBIT_TRITON", "off")
    assert gpu.obstacle() == "HF_ONEBIT_TRITON=off"


def test_registered_where_torch_knows_gpus_and_triton_is_there():
    """In a process whose torch says that it is built for them: each operator of this package with a kernel there."""
    program = """
import importlib.util, torch
torch.version.cuda = "13.0"
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *given: object() if name == "triton" else find(name, *given)
from hf_onebit import ops
names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("hf_onebit::")]
has = torch._C._dispatch_has_kernel_for_dispatch_key
print(*sorted(name.split("::")[1] for name in names if has(name, "CUDA")))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [
        *("mbwq_linear", "mpq_embedding", "mpq_linear", "mpq_linear_backward", "mpq_linear_g_idx"),
        *("mpq_linear_g_idx_backward", "onebit_linear", "onebit_linear_backward", "pack", "unpack"),
    ]


@pytest.mark.parametrize("outcome", ["is off by 1.0e+00", RuntimeError("no such compiler\nmore")])
def test_a_kernel_that_disagrees_is_left_out_and_one_warning_says_so(monkeypatch, outcome):
    def examine(*_, **__):
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(gpu, "launch", lambda: None)
    monkeypatch.setattr(gpu, "_examined", {})
    monkeypatch.setattr(gpu_products, "_plans", {})
    monkeypatch.setattr(gpu, "_warned", False)
    monkeypatch.setitem(gpu_examination.EXAMINATIONS, "onebit", examine)
    layer = (torch.randint(-9, 9, (2, 5), dtype=torch.int32), torch.rand(5), torch.rand(40))
    x = torch.randn(3, 40)
    with pytest.warns(UserWarning, match="in plain torch, slowly: the Triton kernel for onebit") as seen:
        y = gpu_onebit.onebit_linear(x, *layer)
    assert len(seen) == 1
    text = "is off by 1.0e+00" if isinstance(outcome, str) else "fails (RuntimeError: no such compiler)"
    assert text in str(seen[0].message)
    torch.testing.assert_close(y, ops.reference.onebit_linear(x, *layer))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gpu_onebit.onebit_linear(x[:2], *layer)
        gpu_onebit.onebit_linear(x.bfloat16(), *layer)  # another kernel, examined too, but said once
    monkeypatch.setattr(gpu, "obstacle", lambda: "")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert gpu.status() == "not in use: there is no GPU"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert "except onebit dtype=torch.bfloat16 planes=1 on cpu: " + text in gpu.status()


def test_what_is_examined_apart_is_what_a_call_asks_for(monkeypatch):
    """A variant by its list has the name that a call gives it, so that no kernel is examined twice."""
    monkeypatch.setattr(gpu, "launch", lambda: None)
    monkeypatch.setattr(gpu, "_examined", {})
    monkeypatch.setattr(gpu_products, "_plans", {})
    for kind in tuple(gpu_examination.EXAMINATIONS):
        monkeypatch.setitem(gpu_examination.EXAMINATIONS, kind, lambda *_, **__: "was not compared")
        for variant in gpu_variants.variants(kind, every=True):
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # who asks is told, and needs no warning
                assert gpu.examine(torch.device("cpu"), kind, **variant) == "was not compared"
        few = gpu_variants.variants(kind)
        assert all(variant in gpu_variants.variants(kind, every=True) for variant in few)
        for name in few[0]:
            values = {variant[name] for variant in few}
            assert len(values) >= (2 if name in ("planes", "zeros", "method", "signs") else 3), (kind, name)
    known = set(gpu.examined())
    codes = (torch.zeros(6, 5, dtype=torch.int32), torch.rand(1, 5), torch.rand(1, 5))
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        x = torch.randn(2, 40).to(dtype)
        gpu_onebit.onebit_linear(x, torch.zeros(2, 5, dtype=torch.int32), torch.rand(5), torch.rand(40))
        gpu_mpq.mpq_linear(x, *codes, None, 3, -1)
        gpu_mbwq.mpq_linear_g_idx(x, *codes, None, torch.zeros(40, dtype=torch.int64), 3)
        gpu_mpq.mpq_embedding(torch.tensor([0]), *codes, 3, -1, 40, dtype)
        for layer in (OneBitLinear(40, 5), MPQLinear(40, 5, bits=3, symmetric=False), MPQLinear(40, 5, bits=8)):
            if isinstance(layer, OneBitLinear) or dtype != torch.float32:  # others have no kernel
                assert not gpu.agrees(x, "experts", **grouped_experts.variant(x, layer))
    gpu_packing.unpack(codes[0], 3, 40)
    monkeypatch.setattr(gpu, "serves", lambda _: True)
    one = torch.ones(1, 5)
    layouts = (
        (SignLayout(40, torch.rand(5), torch.rand(40)), ROUNDINGS),
        (WeightLayout(40, ((1, 40, 2),), torch.zeros(40, dtype=torch.int64), None, one, one, None, None), ROUNDINGS),
        (WeightLayout(40, ((4, 32, 4), (2, 8, 1)), torch.zeros(40, dtype=torch.int64), None, one, one, None, None),
         ROUNDINGS[:2]),
    )  # fmt: skip
    for layout, roundings in layouts:
        words = torch.zeros(5, 5, dtype=torch.int32)
        for rounding in roundings:
            step = Step(None, None, None, 0.1, 0.0, 0.9, 0.99, 1e-6, torch.float32, True, None, 0, Rounding(rounding))
            assert gpu_update.suits(words, layout, torch.zeros(40, 5), step)
            assert not gpu_update.takes(words, layout, torch.zeros(40, 5), step)
    assert set(gpu.examined()) == known
    with pytest.raises(ValueError, match="kind is 'softmax', expected one of onebit, "):
        gpu_variants.variants("softmax")


def test_wrong_sizes_are_refused_in_every_call(monkeypatch):
    """A signature that was fine lets no other one pass."""
    monkeypatch.setattr(gpu_products, "_plans", {})
    layer = (torch.zeros(2, 5, dtype=torch.int32), torch.rand(5), torch.rand(40))
    x = torch.randn(3, 40, dtype=torch.float64)
    for _ in range(2):
        gpu_onebit.onebit_linear(x, *layer)
        with pytest.raises(RuntimeError, match="x has 39 features"):
            gpu_onebit.onebit_linear(x[:, 1:], *layer)
        with pytest.raises(RuntimeError, match="bias has 4 entries"):
            gpu_onebit.onebit_linear(x, *layer, torch.rand(4))


def test_plans_do_not_pile_up(monkeypatch):
    plans: dict = {}
    monkeypatch.setattr(gpu_products, "_plans", plans)
    monkeypatch.setattr(gpu_products, "_MOST_PLANS", 5)
    layer = (torch.zeros(2, 5, dtype=torch.int32), torch.rand(5), torch.rand(40))
    for rows in range(1, 20):
        gpu_onebit.onebit_linear(torch.randn(rows, 40, dtype=torch.float64), *layer)
        assert len(plans) <= 5


class OnGpu:
    """What `gpu.on` asks of a tensor on the second GPU."""

    is_cuda = True
    device = torch.device("cuda", 1)

    def get_device(self):
        return 1


@pytest.mark.parametrize(("current", "entered"), [(0, [torch.device("cuda", 1)]), (1, [])])
@pytest.mark.parametrize("autocast", [True, False])
def test_launches_are_on_the_tensors_device(current, entered, autocast, monkeypatch):
    seen = []

    @contextlib.contextmanager
    def device(which):
        seen.append(which)
        yield

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: autocast)
    switched = []
    monkeypatch.setattr(torch, "autocast", lambda kind, enabled: switched.append((kind, enabled)) or device("autocast"))
    with gpu.on(OnGpu()):
        assert seen == ["autocast"] * autocast + entered
    assert switched == [("cuda", False)] * autocast


def test_plans_are_chosen_anew_when_determinism_is_asked_for(monkeypatch):
    """Those that a search found add up in an order of their own."""
    monkeypatch.setattr(gpu_products, "_plans", {})
    layer = (torch.zeros(2, 5, dtype=torch.int32), torch.rand(5), torch.rand(40))
    x = torch.randn(3, 40, dtype=torch.float64)
    gpu_onebit.onebit_linear(x, *layer)
    torch.use_deterministic_algorithms(True)
    try:
        gpu_onebit.onebit_linear(x, *layer)
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(gpu_products._plans) == 2


def test_plans_are_chosen_anew_when_processes_begin_to_compute_together(monkeypatch):
    """What one of them found before may not be what another one did."""
    monkeypatch.setattr(gpu_products, "_plans", {})
    layer = (torch.zeros(2, 5, dtype=torch.int32), torch.rand(5), torch.rand(40))
    x = torch.randn(3, 40, dtype=torch.float64)
    gpu_onebit.onebit_linear(x, *layer)
    for name, value in (("is_initialized", True), ("get_world_size", 2)):
        monkeypatch.setattr(torch.distributed, name, lambda value=value: value)
    gpu_onebit.onebit_linear(x, *layer)
    assert len(gpu_products._plans) == 2


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("Triton Error [CUDA]: out of memory")]
)
def test_memory_that_is_short_once_leaves_no_kernel_out(monkeypatch, error):
    """The caller hears of it, as of any of its own allocations; with memory again, kernels are examined."""
    outcomes = [error, ""]

    def examine(*_, **__):
        if isinstance(outcomes[0], Exception):
            raise outcomes.pop(0)
        return outcomes[0]

    monkeypatch.setattr(gpu, "launch", lambda: None)
    monkeypatch.setattr(gpu, "_examined", {})
    monkeypatch.setattr(gpu_products, "_plans", {})
    monkeypatch.setitem(gpu_examination.EXAMINATIONS, "onebit", examine)
    layer = (torch.randint(-9, 9, (2, 5), dtype=torch.int32), torch.rand(5), torch.rand(40))
    with pytest.raises(RuntimeError, match="out of memory"):
        gpu_onebit.onebit_linear(torch.randn(3, 40), *layer)
    assert not gpu.examined()
    assert not gpu_products._plans
    assert gpu.agrees(torch.randn(3, 40), "onebit", dtype=torch.float32, planes=1)
