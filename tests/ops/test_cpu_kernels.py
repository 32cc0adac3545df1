"""The compiled CPU kernels, each instruction set of this machine, against float64 and against the reference."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

from hf_onebit import ops
from hf_onebit.formats.onebit import pack_signs
from hf_onebit.ops import cpu, reference
from tests.exact_products import CODES_FROM, product

pytestmark = pytest.mark.skipif(cpu.isa() is None, reason=f"no compiled CPU kernels: {cpu.status()}")

ROOT = Path(ops.__file__).parents[2]
ISAS = cpu.isas() or ("none",)
HALVES = (torch.float16, torch.bfloat16)
DTYPES = (*HALVES, torch.float32, torch.float64)
BATCHES = (0, 1, 2, 3, 4, 5, 6, 8, 9, 15, 16, 17, 33, 129)
UNITS = tuple(name for name in ISAS if name in CODES_FROM)
NAMES = ("x", "weight", "a", "b", "bias", "weight_1", "a_1", "b_1")


@pytest.fixture(params=ISAS)
def isa(request):
    before = cpu.isa()
    cpu.select_isa(request.param)
    yield request.param
    cpu.select_isa(before)


@pytest.fixture(params=cpu._ACTIVATIONS)
def activations(request):
    cpu.set_activations(request.param)
    yield request.param
    cpu.set_activations("exact")


@pytest.fixture
def poisoned():
    """torch.empty returns NaN, so that an output left unwritten shows."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = before


class Layer:
    """Arguments of onebit_linear, and the float64 result with its bound."""

    def __init__(self, rows, in_features, out_features, planes=1, bias=False, dtype=torch.float32,
                 scale_dtype=torch.float16, seed=0, values="normal", dirty=True):  # fmt: skip
        generator = torch.Generator().manual_seed(seed)

        def numbers(*shape: int) -> Tensor:
            if values == "constant":  # every rounding in one direction
                return torch.full(shape, 0.1 + seed % 7 / 9)
            drawn = torch.randn(shape, generator=generator)
            return drawn.abs() if values == "positive" else drawn

        self.args: dict[str, Tensor] = {"x": numbers(rows, in_features).to(dtype)}
        self.signs = []
        for suffix in ("", "_1")[:planes]:
            drawn = torch.rand(out_features, in_features, generator=generator)
            signs = drawn >= 0 if values == "constant" else drawn < 0.5
            self.signs.append(signs)
            words = pack_signs(signs)
            if dirty and in_features % 32:
                words[-1] |= torch.tensor(-1 << in_features % 32, dtype=torch.int32)
            self.args[f"weight{suffix}"] = words
            self.args[f"a{suffix}"] = numbers(out_features).to(scale_dtype)
            self.args[f"b{suffix}"] = numbers(in_features).to(scale_dtype)
        if bias:
            self.args["bias"] = numbers(out_features).to(scale_dtype)

    def exact(self) -> tuple[Tensor, Tensor]:
        """y and Σ |a b x| (+ |bias|), in float64."""
        args = {name: tensor.double() for name, tensor in self.args.items()}
        y = args.get("bias", torch.zeros((), dtype=torch.float64))
        bound = y.abs()
        for suffix, signs in zip(("", "_1"), self.signs, strict=False):
            ab = args[f"a{suffix}"][:, None] * args[f"b{suffix}"]
            y = y + product(args["x"], (ab * torch.where(signs, 1.0, -1.0)).T)
            bound = bound + product(args["x"].abs(), ab.abs().T)
        return y, bound

    def int8_bound(self) -> Tensor:
        """Half a code for each input, the code being 1/127 of the row's largest input (its blocks' are no larger)."""
        bound = torch.zeros((), dtype=torch.float64)
        for suffix in ("", "_1")[: len(self.signs)]:
            u = (self.args["x"].double() * self.args[f"b{suffix}"].double()).abs()
            most = u.amax(-1, keepdim=True) if u.numel() else u.sum(-1, keepdim=True)
            bound = bound + u.shape[-1] * most / 253.9 * self.args[f"a{suffix}"].double().abs()
        return bound

    def tuple(self) -> tuple[Tensor | None, ...]:
        return tuple(self.args.get(name) for name in NAMES)

    def check(self, **changes: Tensor) -> Tensor:
        args = {**self.args, **changes}
        y = ops.onebit_linear(**args)
        exact, bound = self.exact()
        assert (y.shape, y.dtype) == (exact.shape, args["x"].dtype)
        assert y.is_contiguous()
        allowed = (1e-14 if y.dtype == torch.float64 else 1e-6) * bound
        if y.dtype in HALVES:  # the result is rounded once more, to a number that may be subnormal
            rows = args["x"].shape[:-1].numel()
            if rows >= CODES_FROM.get(cpu.isa(), math.inf) or cpu.activations() == "int8":  # see docs/kernels.md
                allowed = 2e-4 * bound
            allowed = allowed + 0.501 * torch.finfo(y.dtype).eps * exact.abs() + torch.finfo(y.dtype).smallest_normal
        if cpu.activations() == "int8" and cpu.isa() in UNITS and y.dtype != torch.float64:
            allowed = allowed + self.int8_bound()
        error = (y.double() - exact).abs()
        assert (error <= allowed).all(), (error / bound).max()
        return y


# --- values -------------------------------------------------------------------------------------------------

SHAPES = {
    "rows": st.sampled_from(BATCHES),
    "in_features": st.one_of(st.integers(0, 100), st.sampled_from((255, 256, 257, 511, 513, 576, 1023))),
    "out_features": st.one_of(st.integers(0, 70), st.sampled_from((127, 1023, 1025, 1536))),
    "planes": st.sampled_from((1, 2)),
    "bias": st.booleans(),
    "dtype": st.sampled_from(DTYPES),
    "scale_dtype": st.sampled_from(DTYPES),
    "seed": st.integers(0, 1 << 16),
    "values": st.sampled_from(("normal", "positive", "constant")),
}
CAMPAIGN = int(os.environ.get("HF_ONEBIT_EXAMPLES", "250"))


@pytest.mark.parametrize("name", ISAS)
def test_against_float64(name, activations, poisoned):
    if activations == "int8" and name not in UNITS:
        pytest.skip("the same as exact")
    cpu.select_isa(name)

    @settings(max_examples=CAMPAIGN, deadline=None, derandomize=True, database=None)
    @given(**SHAPES)
    @example(1, 1, 1, 1, False, torch.float32, torch.float16, 0, "normal")
    @example(129, 33, 1, 2, True, torch.bfloat16, torch.float16, 1, "normal")
    @example(0, 64, 3, 1, True, torch.float32, torch.float32, 2, "normal")
    @example(17, 0, 5, 2, True, torch.float16, torch.float16, 3, "normal")
    def check(rows, in_features, out_features, planes, bias, dtype, scale_dtype, seed, values):
        Layer(rows, in_features, out_features, planes, bias, dtype, scale_dtype, seed, values).check()

    try:
        check()
    finally:
        cpu.select_isa(ISAS[-1])


@pytest.mark.parametrize("values", ["normal", "positive", "constant"])
@pytest.mark.parametrize(("rows", "dtype"), [(1, torch.float32), (5, torch.float32), (5, torch.bfloat16),
                                             (40, torch.bfloat16), (40, torch.float16)])  # fmt: skip
def test_long_sums_stay_exact(isa, rows, dtype, values):
    """A float32 sum over 16384 inputs in a row would be off by far more than 1e-6 with these."""
    for seed in range(3):
        Layer(rows, 16384 + 31, 19, 2, True, dtype, torch.float32, seed, values).check()


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
def test_every_half_converts_as_in_torch(isa, dtype):
    """One input, b = 1: the kernel then only converts. All 65536 bit patterns in, and values on ties out."""
    bits = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16)
    one = {"weight": torch.ones(1, 1, dtype=torch.int32), "a": torch.ones(1), "b": torch.ones(1)}
    for source in HALVES:
        values = bits.view(source)
        x = values.float()
        ties = x * (1 + 2.0**-12) if dtype == torch.float16 else x * (1 + 2.0**-9)
        for scale in (x, ties):
            wide = {"weight": torch.ones(1, 65536, dtype=torch.int32), "a": scale, "b": torch.ones(1)}
            y = ops.onebit_linear(torch.ones(1, 1, dtype=dtype), **wide)
            torch.testing.assert_close(y[0], scale.to(dtype), rtol=0, atol=0, equal_nan=True)
        if dtype == source:
            y = ops.onebit_linear(values[:, None], **one)
            # 0 + (-0) is +0, which is equal.
            torch.testing.assert_close(y[:, 0], values, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("rows", [3, 40])
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
def test_infinities_and_nans_stay_where_they_are(isa, activations, dtype, rows):
    layer = Layer(rows, 300, 40, dtype=dtype)
    x = layer.args["x"]
    clean = ops.onebit_linear(**layer.args)
    x[1, 257] = float("inf")
    x[2, 3] = float("nan")
    y = ops.onebit_linear(**layer.args)
    assert torch.equal(y[0], clean[0])
    assert y[1].isinf().all()
    assert y[2].isnan().all()
    assert torch.equal(y[1].sign(), reference.onebit_linear(**layer.args)[1].sign())


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
@pytest.mark.parametrize("rows", [7, 40, 300])
def test_massive_activations(isa, activations, dtype, rows):
    """A few inputs thousands of times the others: where 16 bits do not reach down to those, a second term does."""
    layer = Layer(rows, 2100, 70, 2, True, dtype, torch.float32)
    for name in ("a", "a_1"):
        layer.args[name] *= 1e-4  # for float16 to hold the results
    x = layer.args["x"]
    x[0] = 0
    x[1:, 5] *= 3e3
    x[2, 1500:1510] = 1e4
    x[3, ::2] = 0
    x[4] = 0
    x[4, 2099] = 1
    x[5] *= 1e-4
    y = layer.check()
    assert torch.equal(y[0], layer.args["bias"].to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("scale", [1e-38, 1e-33, 1e-20, 1e20, 1e33])
def test_numbers_far_from_one(isa, activations, dtype, scale):
    layer = Layer(20, 150, 40, dtype=dtype, scale_dtype=torch.float32)
    layer.args["x"][::2] *= scale
    y = layer.check()
    assert y.isfinite().all()
    assert (y[::2] != 0).any()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_codes_lose_less_than_the_rounding_of_the_result(isa, dtype):
    for outlier in (1, 100):
        layer = Layer(64, 4096, 64, dtype=dtype)
        layer.args["x"][:, 7] *= outlier
        exact, _ = layer.exact()
        exact_rounded = (exact.to(dtype).double() - exact).square().mean().sqrt()
        lost = (ops.onebit_linear(**layer.args).double() - exact).square().mean().sqrt()
        assert lost < 1.1 * exact_rounded


@pytest.mark.parametrize("rows", [31, 32, 176, 177, 192, 193, 255, 256, 257, 511, 513])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_borders_of_chunks(isa, activations, dtype, rows):
    Layer(rows, 1030, 33, 2, True, dtype).check()
    Layer(rows, 4096, 2, 1, False, dtype).check()


# --- memory -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [2, 40])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides(isa, dtype, rows, poisoned):
    layer = Layer(rows, 70, 37, 2, True, dtype, dtype)
    expected = layer.check()

    def spread(tensor: Tensor) -> Tensor:
        filler = float("nan") if tensor.is_floating_point() else -1
        view = tensor.new_full([3 * n + 1 for n in tensor.shape], filler)[
            tuple(slice(1, None, 3) for _ in tensor.shape)
        ]
        return view.copy_(tensor)

    assert torch.equal(ops.onebit_linear(**{name: spread(tensor) for name, tensor in layer.args.items()}), expected)
    # Columns of a wider matrix are taken where they lie, as tensor parallelism slices them.
    wide = torch.full((3, 99), -1, dtype=torch.int32)
    wide[:, 20:57] = layer.args["weight"]
    assert torch.equal(ops.onebit_linear(**{**layer.args, "weight": wide[:, 20:57]}), expected)
    x = layer.args["x"]
    rest = {name: tensor for name, tensor in layer.args.items() if name != "x"}
    assert torch.equal(ops.onebit_linear(x.T.contiguous().T, **rest), expected)
    assert torch.equal(ops.onebit_linear(x[:1].expand(rows, -1), **rest), expected[:1].expand(rows, -1))
    assert torch.equal(ops.onebit_linear(x.flip(0), **rest), expected.flip(0))
    cube = torch.stack((x, x)).transpose(0, 1)
    assert torch.equal(ops.onebit_linear(cube, **rest), torch.stack((expected, expected)).transpose(0, 1))
    if rows == 2:
        assert torch.equal(ops.onebit_linear(x[0], **rest), expected[0])


def test_weights_changed_in_place_are_seen(isa):
    layer = Layer(2, 64, 33)
    before = layer.check()
    layer.args["weight"].bitwise_not_()
    assert torch.equal(ops.onebit_linear(**layer.args), -before)
    layer.args["a"].mul_(2)
    assert torch.equal(ops.onebit_linear(**layer.args), -2 * before)


def test_no_memory_beside_the_output(isa):
    """Torch's allocator gives the output and nothing else; the workspace is the thread's own."""
    layer = Layer(4, 512, 256)
    ops.onebit_linear(**layer.args)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        ops.onebit_linear(**layer.args)
    assert sum(max(event.self_cpu_memory_usage, 0) for event in profile.key_averages()) == 4 * 256 * 4


# --- threads and rows ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "in_features", "out_features"), [(1, 1500, 2500), (70, 300, 1100), (17, 2048, 77)])
def test_threads_do_not_change_a_bit(isa, activations, rows, in_features, out_features, dtype):
    layer = Layer(rows, in_features, out_features, 2, True, dtype)
    results = []
    for threads in (1, 2, 8):
        torch.set_num_threads(threads)
        results.append(ops.onebit_linear(**layer.args))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_row_does_not_depend_on_the_others(isa, activations, dtype):
    """The tables and the matrix units each give a row the bits that it has alone, or in any other batch."""
    layer = Layer(130, 600, 50, 2, True, dtype)
    layer.args["x"][64, 3] = 1e4  # with a second term
    together = ops.onebit_linear(**layer.args)
    rest = {name: tensor for name, tensor in layer.args.items() if name != "x"}
    for rows in (slice(0, 16), slice(60, 73), slice(114, 130)):
        if isa in ("avx2", "avx512vnni") and activations == "exact":
            continue  # so few rows take the tables there
        assert torch.equal(ops.onebit_linear(layer.args["x"][rows], **rest), together[rows])
    if isa not in UNITS:
        for row in (0, 1, 63, 64, 127, 128, 129):
            assert torch.equal(ops.onebit_linear(layer.args["x"][row], **rest), together[row])


def test_calls_from_several_threads(isa):
    import threading

    layers = [Layer(9, 700 + 32 * i, 300, seed=i) for i in range(4)]
    expected = [ops.onebit_linear(**layer.args) for layer in layers]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(20):
            if not torch.equal(ops.onebit_linear(**layers[i].args), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# --- dispatcher ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(isa, dtype):
    layer = Layer(3, 70, 21, 2, True, dtype)
    for name in ("x", "a", "b", "bias", "a_1", "b_1"):
        layer.args[name].requires_grad_()
    result = opcheck(torch.ops.hf_onebit.onebit_linear.default, layer.tuple(), atol=1e-2, rtol=1e-2)
    assert set(result.values()) == {"SUCCESS"}


def test_compiles_whole(isa):
    layer = Layer(3, 70, 21, 2, True)
    rest = layer.tuple()[1:]

    def model(x: Tensor) -> Tensor:
        return torch.relu(torch.ops.hf_onebit.onebit_linear.default(x, *rest)) + 1

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(layer.args["x"]), model(layer.args["x"]))


def test_gradients_are_the_references(isa):
    layer = Layer(6, 70, 21, 2, True, scale_dtype=torch.float32)
    trained = ("x", "a", "b", "bias", "a_1", "b_1")
    for name in trained:
        layer.args[name].requires_grad_()
    inputs = [layer.args[name] for name in trained]
    grads = torch.autograd.grad(ops.onebit_linear(**layer.args).sum(), inputs)
    wanted = torch.autograd.grad(reference.onebit_linear(**layer.args).sum(), inputs)
    for grad, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, want)
    # With frozen scales, backward gets a stand-in for x that has no memory of its own.
    frozen = {name: tensor.detach() for name, tensor in layer.args.items()}
    x = frozen["x"].requires_grad_()
    (grad,) = torch.autograd.grad(ops.onebit_linear(**frozen).sum(), [x])
    torch.testing.assert_close(grad, wanted[0])


# --- choice and refusals ------------------------------------------------------------------------------------


def doctor(**environment: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    code = "import hf_onebit.ops as o; print(o.backends()['cpu'], '|', o.cpu.isa())"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)


def test_the_environment_forces_one():
    assert "AVX" not in doctor(HF_ONEBIT_ISA="scalar").stdout
    assert doctor(HF_ONEBIT_ISA="scalar").stdout.strip().endswith("| scalar")
    assert doctor(HF_ONEBIT_ISA="off").stdout == "not in use: HF_ONEBIT_ISA=off | None\n"
    wrong = doctor(HF_ONEBIT_ISA="vax")
    assert wrong.returncode == 1
    assert "HF_ONEBIT_ISA=vax, but this machine runs scalar" in wrong.stderr


def test_selecting_what_is_not_there_is_refused():
    with pytest.raises(ValueError, match=r"this CPU runs scalar.*, asked for vax"):
        cpu.select_isa("vax")


def test_int8_activations_are_asked_for():
    code = "import hf_onebit.ops as o; print(o.activations())"

    def run(**environment: str) -> subprocess.CompletedProcess:
        env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)

    assert run().stdout == "exact\n"
    assert run(HF_ONEBIT_ACTIVATIONS="int8").stdout == "int8\n"
    assert "HF_ONEBIT_ACTIVATIONS=int4, expected exact or int8" in run(HF_ONEBIT_ACTIVATIONS="int4").stderr
    with pytest.raises(ValueError, match=r'activations are "exact" or "int8", got .int4.'):
        ops.set_activations("int4")


def test_int8_activations_need_the_kernels(monkeypatch):
    monkeypatch.setattr(cpu, "_library", None)
    monkeypatch.setattr(cpu, "_refused", cpu._why_not_built())
    ops.set_activations("exact")
    with pytest.raises(ValueError, match=r"int8 activations need the compiled kernels, .*hf-onebit doctor --build"):
        ops.set_activations("int8")


@pytest.mark.skipif(not UNITS, reason="no units for 8-bit numbers")
def test_int8_activations_change_results_until_exact_is_back():
    layer = Layer(64, 600, 50, dtype=torch.bfloat16)
    before = layer.check()
    ops.set_activations("int8")
    try:
        assert not torch.equal(layer.check(), before)
    finally:
        ops.set_activations("exact")
    assert torch.equal(layer.check(), before)
