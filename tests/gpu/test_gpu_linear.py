"""The operators on a CUDA device against float64: every path, width and dtype, ragged sizes."""

import warnings

import pytest
import torch
from packed_layers import Groups, MixedRows, OneBit, check
from torch.library import opcheck

from hf_onebit import ops
from hf_onebit.formats import mpq
from hf_onebit.ops import gpu, gpu_plans

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
DEVICE = torch.device("cuda")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
ROWS = (1, 2, 3, 8, 9, 16, 17, 33, 64, 95, 96, 200)


@pytest.fixture(autouse=True)
def _kernels_answer():
    """No warning of a fallback, and nothing refused afterwards: or these tests would examine the reference."""
    assert ops.backends()["gpu"].startswith("in use"), ops.backends()["gpu"]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="hf_onebit")
        yield
    refused = {key: why for key, why in gpu._examined.items() if why}
    assert not refused, refused


def rows_of(rows: int, layer: OneBit, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    x = torch.randn(rows, layer.in_features, generator=torch.Generator().manual_seed(seed))
    return x.to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize(("out", "in_"), [(1, 33), (7, 64), (70, 1100), (256, 576), (513, 4096)])
def test_onebit_forward(out, in_, planes, dtype):
    layer = OneBit(out, in_, planes)
    for rows in ROWS:
        x = rows_of(rows, layer, dtype, rows)
        check(layer.linear(x), layer.exact(x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("warps", [1, 2, 4, 8])
def test_few_rows_by_every_plan(warps, planes, dtype):
    """Of odd sizes, and of sizes that each warp has several turns for; the same bits every time."""
    from hf_onebit.ops import triton_launch  # needs triton, which this file must not to be collected

    for out, in_ in ((33, 70), (130, 5000)):
        layer = OneBit(out, in_, planes)
        weight, a, b, bias, weight_1, a_1, b_1 = layer.args(DEVICE)
        operand = triton_launch.onebit_operand(weight, a, b, weight_1, a_1, b_1)
        for rows, rows_a_program in ((1, 1), (2, 2), (3, 2), (3, 4), (4, 4), (9, 4), (33, 4)):
            if dtype == torch.float32 and rows_a_program == 4:  # of 14 bits, for 16-bit x alone
                continue
            x = rows_of(rows, layer, dtype, rows)
            plan = gpu_plans.Plan(32, rows_a_program, 0, warps, 1)
            y = triton_launch.run(x, operand, bias, plan)
            check(y, layer.exact(x))
            assert torch.equal(y, triton_launch.run(x, operand, bias, plan))


def test_few_rows_are_one_launch():
    layer = OneBit(64, 4096)
    arguments, x = layer.args(DEVICE), rows_of(1, layer, torch.float16)
    ops.onebit_linear(x, *arguments)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        ops.onebit_linear(x, *arguments)
        torch.cuda.synchronize()
    kernels = [event.key for event in profile.key_averages() if event.self_device_time_total > 0]
    assert kernels == ["few_rows"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(1, 9))
def test_mpq_forward(bits, symmetric, dtype):
    for out, in_, group_size in ((1, 33, 32), (70, 1100, 64), (256, 576, -1), (130, 2048, 128)):
        layer = Groups(out, in_, bits, group_size, symmetric)
        for rows in (1, 3, 16, 17, 63, 64, 130):
            x = rows_of(rows, layer, dtype, rows)
            check(layer.linear(x), layer.exact(x))


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_scales_of_other_dtypes(scale_dtype):
    for layer in (OneBit(70, 300, 2, scale_dtype=scale_dtype), Groups(70, 300, 3, scale_dtype=scale_dtype)):
        for rows in (1, 40, 200):
            x = rows_of(rows, layer, torch.float16)
            check(layer.linear(x), layer.exact(x))


def test_large_and_small_inputs_keep_their_digits():
    layer = OneBit(64, 512, bias=False)
    x = rows_of(4, layer, torch.float32)
    x[0] *= 1e30
    x[1] *= 1e-25
    x[2, ::7] *= 1e4
    x[3] = 0
    y, exact = layer.linear(x), layer.exact(x)
    for row in range(3):
        check(y[row], exact[row])
    assert (y[3] == 0).all()


def test_strides_and_shapes():
    layer = OneBit(40, 96)
    x = rows_of(12, layer, torch.float16)
    exact = layer.exact(x)
    check(layer.linear(x.view(3, 4, 96)), exact.view(3, 4, 40))
    check(layer.linear(x[5]), exact[5])
    check(layer.linear(x.T.contiguous().T), exact)
    check(layer.linear(torch.cat([x, x], 1)[:, 96:]), exact)
    assert layer.linear(x[:0]).shape == (0, 40)


def test_float64_is_computed_in_float64():
    layer = OneBit(40, 96)
    x = rows_of(3, layer, torch.float64)
    assert float((layer.linear(x).cpu() - layer.exact(x)).abs().max()) < 1e-11


def test_same_bits_every_time():
    layer = OneBit(300, 2048, 2)
    for rows in (1, 16, 40, 200):
        x = rows_of(rows, layer, torch.float16)
        first = layer.linear(x)
        assert all(torch.equal(first, layer.linear(x)) for _ in range(5))


def test_offsets_beyond_31_bits(monkeypatch):
    """More than 2^31 elements of y and of partial sums: 32-bit offsets would wrap."""
    if torch.cuda.mem_get_info()[0] < 32 << 30:
        pytest.skip("needs 32 GiB of free memory")
    monkeypatch.setenv("HF_ONEBIT_EXPAND_ROWS", "100000")
    layer = OneBit(65536, 64, bias=False)
    x = rows_of(1, layer, torch.float16).expand(34000, 64)
    y = layer.linear(x)
    check(y[-1], layer.exact(x[-1:])[0])
    check(y[0], layer.exact(x[:1])[0])


@pytest.mark.parametrize("rows", [1, 5, 100])
@pytest.mark.parametrize("layer", [OneBit(96, 128, 2), Groups(96, 128, 4)], ids=["onebit", "mpq"])
def test_graph_capture_and_replay(layer, rows):
    arguments = layer.args(DEVICE)
    op = ops.mpq_linear if isinstance(layer, Groups) else ops.onebit_linear
    x = rows_of(rows, layer, torch.float16)
    op(x, *arguments)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = op(x, *arguments)
    for seed in (1, 2):
        x.copy_(rows_of(rows, layer, torch.float16, seed))
        graph.replay()
        torch.cuda.synchronize()
        check(y, layer.exact(x))


def test_no_synchronisation():
    """Neither a forward nor a backward waits for the device."""
    layers = [OneBit(96, 128, 2), Groups(96, 128, 4)]
    given = [(layer, layer.args(DEVICE), rows_of(rows, layer, torch.float16).requires_grad_())
             for layer in layers for rows in (1, 100)]  # fmt: skip
    mixed = MixedRows([(4, 96, 32), (2, 104, 32)], 96, True, False, torch.float16)
    blocks, x_mixed = mixed.args(DEVICE), rows_of(3, mixed, torch.float16).requires_grad_()
    weight, scales, zeros, bias, *_ = layers[1].args(DEVICE)
    g_idx, ids = torch.arange(128, device=DEVICE) % scales.shape[0], torch.arange(5, device=DEVICE)
    learning = scales.float().requires_grad_()

    def all_of_them():
        for layer, arguments, x in given:
            op = ops.mpq_linear if isinstance(layer, Groups) else ops.onebit_linear
            op(x, *arguments).backward(torch.ones_like(x[:, :96]))
            if isinstance(layer, Groups):
                ops.mpq_linear_g_idx(x, weight, scales, zeros, bias, g_idx, 4).backward(torch.ones_like(x[:, :96]))
        ops.mbwq_linear(x_mixed, *blocks).backward(torch.ones_like(x_mixed[:, :96]))
        rows = ops.mpq_embedding(ids, weight, learning, zeros, 4, 64, 128, torch.float16)
        rows.backward(torch.ones_like(rows))

    all_of_them()
    torch.cuda.set_sync_debug_mode("error")
    try:
        all_of_them()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("planes", [1, 2])
def test_onebit_backward(planes, dtype):
    layer = OneBit(70, 300, planes, scale_dtype=torch.float32)
    x, arguments = rows_of(37, layer, dtype).requires_grad_(), layer.args(DEVICE)
    floats = [t.requires_grad_() for t in arguments if t is not None and t.is_floating_point()]
    y = ops.onebit_linear(x, *arguments)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(DEVICE, dtype)
    got = torch.autograd.grad(y, [x, *floats], grad)
    doubles = [None if t is None else t.detach().cpu() for t in arguments]
    doubles = [t.double().requires_grad_() if t is not None and t.is_floating_point() else t for t in doubles]
    x64 = x.detach().cpu().double().requires_grad_()
    y64 = ops.onebit_linear(x64, *doubles)
    wanted = [t for t in doubles if t is not None and t.is_floating_point()]
    exact = torch.autograd.grad(y64, [x64, *wanted], grad.cpu().double())
    factor = 1.0 if dtype != torch.float32 else 5.0
    for mine, theirs in zip(got, exact, strict=True):
        relative = float((mine.cpu().double() - theirs).norm() / theirs.norm())
        assert relative <= {torch.float16: 2e-3, torch.bfloat16: 1e-2, torch.float32: 3e-6}[dtype] * factor
    # Frozen scales: another formula for x alone.
    frozen = [None if t is None else t.detach() for t in arguments]
    (alone,) = torch.autograd.grad(ops.onebit_linear(x, *frozen), [x], grad)
    check(alone, exact[0], factor)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "group_size", "symmetric"), [(1, 32, True), (2, 64, False), (3, -1, True),
                                                              (4, 128, False), (8, 96, True)])  # fmt: skip
def test_mpq_backward(bits, group_size, symmetric, dtype):
    layer = Groups(70, 300, bits, group_size, symmetric, scale_dtype=torch.float32)
    x, arguments = rows_of(37, layer, dtype).requires_grad_(), layer.args(DEVICE)
    floats = [t.requires_grad_() for t in arguments[:4] if t is not None and t.is_floating_point()]
    y = ops.mpq_linear(x, *arguments)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(DEVICE, dtype)
    got = torch.autograd.grad(y, [x, *floats], grad)
    doubles = [t.detach().cpu() if isinstance(t, torch.Tensor) else t for t in arguments]
    wanted = [t for t in doubles[:4] if t is not None and t.is_floating_point()]
    for i, t in enumerate(doubles[:4]):
        if t is not None and t.is_floating_point():
            doubles[i] = t.double().requires_grad_()
    wanted = [t for t in doubles[:4] if t is not None and t.is_floating_point()]
    x64 = x.detach().cpu().double().requires_grad_()
    exact = torch.autograd.grad(ops.mpq_linear(x64, *doubles), [x64, *wanted], grad.cpu().double())
    for mine, theirs in zip(got, exact, strict=True):
        relative = float((mine.cpu().double() - theirs).norm() / theirs.norm())
        assert relative <= {torch.float16: 2e-3, torch.bfloat16: 1e-2, torch.float32: 2e-5}[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("ordered", [True, False])
def test_mixed_rows(ordered, symmetric, dtype):
    """Blocks of 4, 3 and 2 bits, and a block alone; few rows and many; gradients of x, scales and zeros."""
    needs = [True, True, not symmetric]
    bound = {torch.float16: 2e-3, torch.bfloat16: 1e-2, torch.float32: 2e-5}[dtype]
    for widths in ([(4, 96, 32), (3, 64, 64), (2, 104, 32)], [(4, 96, 32)]):
        layer = MixedRows(widths, 70, ordered, symmetric, torch.float16 if len(widths) == 1 else torch.float32)
        for rows in (1, 17, 100):
            x = rows_of(rows, layer, dtype)
            check(ops.mbwq_linear(x, *layer.args(DEVICE)), layer.exact(x))
            exact = layer.exact_gradients(x, needs)
            for mine, theirs in zip(layer.gradients(x, needs), exact, strict=True):
                assert mine.shape == theirs.shape
                assert not theirs.numel() or float((mine.cpu().double() - theirs).norm() / theirs.norm()) <= bound


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", range(1, 9))
def test_g_idx(bits, dtype):
    layer = Groups(50, 136, bits, 32, bits % 2 == 0)
    weight, scales, zeros, bias, *_ = layer.args(DEVICE)
    g_idx = torch.randint(0, scales.shape[0], (136,), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    W = mpq.dequantize(*(None if t is None else t.cpu() for t in (weight, scales, zeros)), 136, bits, 32, torch.float64,
                       g_idx.cpu())  # fmt: skip
    x = rows_of(9, layer, dtype).requires_grad_()
    y = ops.mpq_linear_g_idx(x, weight, scales, zeros, bias, g_idx, bits)
    check(y, x.detach().cpu().double() @ W.T + bias.cpu().double())
    (grad_x,) = torch.autograd.grad(y.sum(), [x])
    check(grad_x, torch.ones(9, 50).double() @ W)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", range(1, 9))
def test_embedding(bits, dtype):
    for symmetric in (True, False):
        layer = Groups(50, 136, bits, 32, symmetric)
        weight, scales, zeros, *_ = layer.args(DEVICE)
        ids = torch.randint(0, 50, (3, 7), device=DEVICE)
        for indices in (ids, ids.int(), ids[:0]):
            rows = ops.mpq_embedding(indices, weight, scales, zeros, bits, 32, 136, dtype)
            exact = layer.W[indices.cpu().long()]
            assert rows.shape == exact.shape
            eps = torch.finfo(dtype).eps
            assert ((rows.cpu().double() - exact).abs() <= eps * exact.abs() + 1e-6).all()


def test_ids_and_biases_that_are_no_neighbours():
    layer = Groups(50, 136, 4, 32)
    weight, scales, zeros, *_ = layer.args(DEVICE)
    every = torch.arange(40, device=DEVICE)
    for ids in (every.view(8, 5)[:, -1:], every[::3], every[7:8].expand(5)):
        rows = ops.mpq_embedding(ids, weight, scales, zeros, 4, 32, 136, torch.float32)
        torch.testing.assert_close(rows.cpu().double(), layer.W[ids.cpu()], rtol=1e-6, atol=1e-6)
    arguments = list(layer.args(DEVICE))
    arguments[3] = torch.randn(100, device=DEVICE)[::2]
    x = rows_of(1, layer, torch.float16)
    exact = layer.exact(x) - layer.bias.double() + arguments[3].cpu().double()
    check(ops.mpq_linear(x, *arguments), exact)


def test_what_the_process_has_set_changes_no_examination(monkeypatch):
    """TF32, autocast, another default device: kernels are right all the same, and random numbers go on as they were."""
    monkeypatch.setattr(gpu, "_examined", {})
    precision, before = torch.get_float32_matmul_precision(), torch.get_rng_state()
    torch.set_float32_matmul_precision("high")
    try:
        device = torch.empty(0, device=DEVICE).device
        with torch.device("cuda"), torch.autocast("cuda", torch.bfloat16):
            for dtype in DTYPES:
                assert gpu.examine(device, "onebit", dtype=dtype, planes=1) == ""
                assert gpu.examine(device, "mpq", dtype=dtype, bits=8, zeros=True) == ""
                assert gpu.examine(device, "experts", dtype=dtype, method="onebit", bits=1, zeros=False) == ""
    finally:
        torch.set_float32_matmul_precision(precision)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
@pytest.mark.parametrize("rows", [1, 100])
def test_layers_on_a_device_that_is_not_the_current_one(rows):
    other = torch.device("cuda", 1)
    with torch.cuda.device(0):
        for layer in (OneBit(70, 300, 2), Groups(70, 300, 4)):
            x = rows_of(rows, layer, torch.float16).to(other).requires_grad_()
            y = layer.linear(x)
            assert y.device == other
            check(y, layer.exact(x.detach()))
            y.sum().backward()
            check(x.grad, torch.ones(rows, 70).double() @ layer.W)
        weight, scales, zeros, *_ = layer.args(other)
        ids = torch.arange(5, device=other)
        rows_of_it = ops.mpq_embedding(ids, weight, scales, zeros, 4, 64, 300, torch.float32)
        torch.testing.assert_close(rows_of_it.cpu().double(), layer.W[:5], rtol=1e-6, atol=1e-6)
        assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("bits", range(1, 9))
def test_pack_and_unpack(bits):
    for shape in ((21, 70), (2, 5, 33), (64, 64)):
        codes = torch.randint(0, 1 << bits, shape, dtype=torch.uint8)
        words = ops.pack(codes.to(DEVICE), bits)
        assert torch.equal(words.cpu(), ops.pack(codes, bits))
        assert torch.equal(ops.unpack(words, bits, shape[-1]).cpu(), codes)


@pytest.mark.parametrize("rows", [2, 100])
def test_opcheck(rows):
    for layer in (OneBit(40, 96, 2), Groups(40, 96, 3)):
        name = "mpq_linear" if isinstance(layer, Groups) else "onebit_linear"
        x = rows_of(rows, layer, torch.float32).requires_grad_()
        opcheck(getattr(torch.ops.hf_onebit, name).default, (x, *layer.args(DEVICE)))
    layer = Groups(40, 96, 4, 32)
    weight, scales, zeros, *_ = layer.args(DEVICE)
    ids = torch.randint(0, 40, (5,), device=DEVICE)
    opcheck(torch.ops.hf_onebit.mpq_embedding.default, (ids, weight, scales, zeros, 4, 32, 96, torch.float16))
    opcheck(torch.ops.hf_onebit.unpack.default, (weight, 4, 96))


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compile(mode):
    layer = OneBit(96, 128, 2)
    arguments = layer.args(DEVICE)
    compiled = torch.compile(
        lambda x: torch.relu(ops.onebit_linear(x, *arguments)) * 2, fullgraph=True, mode=mode, dynamic=False
    )
    x = rows_of(4, layer, torch.float16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the compiler's own
        for seed in range(3):
            x = rows_of(4, layer, torch.float16, seed)
            check(compiled(x), torch.relu(layer.exact(x)) * 2)


def test_memory_of_few_rows_and_of_many():
    """Few rows never see a float weight; many rows see one for the time of the call."""
    N = K = 4096
    layer = torch.randint(-(2**31), 2**31, (K // 32, N), dtype=torch.int32, device=DEVICE)
    a, b = (torch.rand(n, device=DEVICE).half() for n in (N, K))
    for rows, most in ((1, 4 << 20), (16, 32 << 20), (512, 64 << 20)):
        x = torch.randn(rows, K, device=DEVICE).half()
        ops.onebit_linear(x, layer, a, b)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        y = ops.onebit_linear(x, layer, a, b)
        torch.cuda.synchronize()
        assert torch.cuda.max_memory_allocated() - before - y.nbytes <= most
        assert torch.cuda.memory_allocated() - before <= y.nbytes + 512
