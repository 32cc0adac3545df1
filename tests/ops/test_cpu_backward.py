"""The compiled backward of onebit_linear, each instruction set of this machine, against float64 and the reference."""

import itertools
import math
import os

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

ISAS = cpu.isas() or ("none",)
HALVES = (torch.float16, torch.bfloat16)
DTYPES = (*HALVES, torch.float32, torch.float64)
OUTPUTS = ("x", "a", "b", "a_1", "b_1")


@pytest.fixture(params=ISAS)
def isa(request):
    before = cpu.isa()
    cpu.select_isa(request.param)
    yield request.param
    cpu.select_isa(before)


@pytest.fixture
def poisoned():
    """torch.empty returns NaN, so that an output left unwritten shows."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = before


def backward(*args) -> tuple[Tensor, ...]:
    return torch.ops.hf_onebit.onebit_linear_backward.default(*args)


class Case:
    """Arguments of onebit_linear_backward, and the float64 gradients with their bounds."""

    def __init__(self, rows, in_features, out_features, planes=1, dtype=torch.float32, scale_dtype=torch.float32,
                 seed=0, values="normal", needs=None):  # fmt: skip
        generator = torch.Generator().manual_seed(seed)

        def numbers(*shape: int) -> Tensor:
            if values == "constant":  # every rounding in one direction
                return torch.full(shape, 0.1 + seed % 7 / 9)
            drawn = torch.randn(shape, generator=generator)
            return drawn.abs() if values == "positive" else drawn

        self.args: dict[str, Tensor | None] = dict.fromkeys(("grad", "x", "weight", "a", "b", "weight_1", "a_1", "b_1"))
        self.args["grad"] = numbers(rows, out_features).to(dtype)
        self.args["x"] = numbers(rows, in_features).to(dtype)
        self.signs = {}
        for suffix in ("", "_1")[:planes]:
            drawn = torch.rand(out_features, in_features, generator=generator)
            signs = drawn >= 0 if values == "constant" else drawn < 0.5
            self.signs[suffix] = torch.where(signs, 1.0, -1.0).double()
            words = pack_signs(signs)
            if in_features % 32:  # padding bits set, which must not matter
                words[-1] |= torch.tensor(-1 << in_features % 32, dtype=torch.int32)
            self.args[f"weight{suffix}"] = words
            self.args[f"a{suffix}"] = numbers(out_features).to(scale_dtype)
            self.args[f"b{suffix}"] = numbers(in_features).to(scale_dtype)
        self.needs = list(needs) if needs is not None else [True] * 3 + [planes == 2] * 2

    def arguments(self) -> list:
        return [*self.args.values(), self.needs]

    def exact(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Gradients, and the sums of the sizes of their terms, both in float64."""
        args = {name: tensor.double() for name, tensor in self.args.items() if tensor is not None}
        g, x = args["grad"], args["x"]
        found: dict[str, tuple[Tensor, Tensor]] = {}
        grad_x, size_x = torch.zeros_like(x), torch.zeros_like(x)
        for suffix, S in self.signs.items():
            a, b = args[f"a{suffix}"], args[f"b{suffix}"]
            z, size_z = product(x * b, S.T), product((x * b).abs(), S.T.abs())
            d, size_d = product(g * a, S), product((g * a).abs(), S.abs())
            found[f"a{suffix}"] = (g * z).sum(0), (g.abs() * size_z).sum(0)
            found[f"b{suffix}"] = (d * x).sum(0), (size_d * x.abs()).sum(0)
            grad_x, size_x = grad_x + d * b, size_x + size_d * b.abs()
        return {"x": (grad_x, size_x), **found}

    def check(self) -> tuple[Tensor, ...]:
        results = backward(*self.arguments())
        exact = self.exact()
        rows, dtype = self.args["x"].shape[0], self.args["x"].dtype
        for name, need, result in zip(OUTPUTS, self.needs, results, strict=True):
            if not need:
                assert result.shape == (0,)
                continue
            want, bound = exact[name]
            assert result.dtype == self.args[name].dtype
            assert result.is_contiguous()
            assert result.shape == want.shape, name
            allowed = (1e-14 if dtype == torch.float64 else 1e-6) * bound
            if dtype in HALVES and rows >= CODES_FROM.get(cpu.isa(), math.inf):  # by codes: see docs/kernels.md
                allowed = 2e-4 * bound
            if result.dtype != torch.float64:  # rounded once more, to a number that may be subnormal
                info = torch.finfo(result.dtype)
                allowed = allowed + (0.501 * info.eps * want.abs() + info.smallest_normal)
            error = (result.double() - want).abs()
            assert (error <= allowed).all(), (name, (error / bound).max())
        return results


# --- values -------------------------------------------------------------------------------------------------

SHAPES = {
    "rows": st.sampled_from((0, 1, 2, 3, 5, 15, 16, 17, 129, 257)),
    "in_features": st.one_of(st.integers(0, 100), st.sampled_from((255, 256, 257, 511, 513, 576, 1025))),
    "out_features": st.one_of(st.integers(0, 70), st.sampled_from((127, 255, 257, 576, 1023))),
    "planes": st.sampled_from((1, 2)),
    "dtype": st.sampled_from(DTYPES),
    "scale_dtype": st.sampled_from(DTYPES),
    "seed": st.integers(0, 1 << 16),
    "values": st.sampled_from(("normal", "positive", "constant")),
    "needs": st.lists(st.booleans(), min_size=5, max_size=5),
}
CAMPAIGN = int(os.environ.get("HF_ONEBIT_EXAMPLES", "250"))


@pytest.mark.parametrize("name", ISAS)
def test_against_float64(name, poisoned):
    cpu.select_isa(name)

    @settings(max_examples=CAMPAIGN, deadline=None, derandomize=True, database=None)
    @given(**SHAPES)
    @example(1, 1, 1, 1, torch.float32, torch.float16, 0, "normal", [True] * 5)
    @example(129, 33, 65, 2, torch.bfloat16, torch.float16, 1, "normal", [True] * 5)
    @example(0, 64, 3, 2, torch.float32, torch.float32, 2, "normal", [True] * 5)
    @example(17, 0, 5, 2, torch.float16, torch.float16, 3, "normal", [True] * 5)
    @example(15, 1, 1, 1, torch.bfloat16, torch.float32, 160, "constant", [False, False, True, False, False])
    @example(17, 5, 0, 2, torch.float16, torch.float16, 4, "normal", [True] * 5)
    def check(rows, in_features, out_features, planes, dtype, scale_dtype, seed, values, needs):
        if planes == 1:
            needs[3:] = [False, False]
        Case(rows, in_features, out_features, planes, dtype, scale_dtype, seed, values, needs).check()

    try:
        check()
    finally:
        cpu.select_isa(ISAS[-1])


@pytest.mark.parametrize("values", ["normal", "positive", "constant"])
@pytest.mark.parametrize(
    ("rows", "dtype"),
    [(1, torch.float32), (5, torch.float32), (5, torch.bfloat16), (40, torch.bfloat16), (40, torch.float16)],
)
def test_long_sums_stay_exact(isa, rows, dtype, values):
    """A float32 sum over 16384 terms in a row would be off by far more than 1e-6 with these."""
    for shape in ((19, 16384 + 31), (16384 + 31, 19)):
        for needs in ((True, False, False, False, False), (True,) * 5):
            Case(rows, *shape, 2, dtype, torch.float32, rows, values, needs).check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_rows_are_summed_exactly(isa, dtype):
    """More rows than are kept at once; a float32 sum over these would lose digits too."""
    for values in ("constant", "normal"):
        Case(3001, 40, 35, 2, dtype, torch.float32, 1, values).check()


def test_every_bit_of_a_square_lands_in_its_place(isa):
    """One sign at a time, in a matrix of more than one 32 x 32 square each way, with ragged edges."""
    in_features, out_features = 70, 300
    words = torch.zeros(3, out_features, dtype=torch.int32)
    one_in, one_out = torch.ones(in_features), torch.ones(out_features)
    grad, x = torch.eye(out_features), torch.zeros(out_features, in_features)
    needs = [True, False, False, False, False]
    for k, n in itertools.product((0, 1, 5, 18, 31, 32, 47, 63, 64, 69), (0, 1, 7, 15, 16, 31, 33, 255, 256, 287, 299)):
        words.zero_()
        words[k // 32, n] = torch.tensor(1 << k % 32).to(torch.int32)
        expected = torch.full((out_features, in_features), -1.0)
        expected[n, k] = 1.0
        assert torch.equal(backward(grad, x, words, one_out, one_in, None, None, None, needs)[0], expected)


def test_infinities_and_nans_stay_where_they_are(isa):
    for rows, dtype in itertools.product((3, 40), (torch.float16, torch.float32)):
        case = Case(rows, 300, 40, dtype=dtype, needs=(True, False, False, False, False))
        clean = backward(*case.arguments())[0]
        case.args["grad"][1, 37] = float("inf")
        case.args["grad"][2, 3] = float("nan")
        grad_x = backward(*case.arguments())[0]
        assert torch.equal(grad_x[0], clean[0])
        assert grad_x[1].isinf().all()
        assert grad_x[2].isnan().all()
        assert torch.equal(grad_x[1].sign(), reference.onebit_linear_backward(*case.arguments())[0][1].sign())


@pytest.mark.parametrize("planes", [1, 2])
def test_every_combination_of_needs(isa, planes, poisoned):
    """What is asked for besides changes a gradient by no more than the last bit, and only grad x."""
    everything = Case(20, 70, 45, planes, torch.float64).check()
    for needs in itertools.product((False, True), repeat=5):
        if planes == 1 and (needs[3] or needs[4]):
            continue
        some = Case(20, 70, 45, planes, torch.float64, needs=needs).check()
        for need, result, full in zip(needs, some, everything, strict=True):
            if need:
                torch.testing.assert_close(result, full, rtol=1e-14, atol=1e-13)


# --- memory -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [2, 12])  # tables, and codes where there are some
def test_strides(isa, dtype, rows, poisoned):
    case = Case(rows, 70, 37, 2, dtype, dtype)
    expected = case.check()

    def spread(tensor: Tensor) -> Tensor:
        filler = float("nan") if tensor.is_floating_point() else -1
        view = tensor.new_full([3 * n + 1 for n in tensor.shape], filler)[
            tuple(slice(1, None, 3) for _ in tensor.shape)
        ]
        return view.copy_(tensor)

    def same(changes: dict[str, Tensor], wanted: tuple[Tensor, ...] = expected) -> None:
        results = backward(*{**case.args, **changes}.values(), case.needs)
        for result, want in zip(results, wanted, strict=True):
            assert torch.equal(result, want)

    same({name: spread(tensor) for name, tensor in case.args.items()})
    wide = torch.full((3, 99), -1, dtype=torch.int32)
    wide[:, 20:57] = case.args["weight"]
    same({"weight": wide[:, 20:57]})  # columns of a wider matrix, as tensor parallelism slices them
    grad, x = case.args["grad"], case.args["x"]
    same({"grad": grad.T.contiguous().T, "x": x.T.contiguous().T})
    same({"grad": torch.cat((grad, grad), 1)[:, :37], "x": torch.cat((x, x), 1)[:, :70]})
    # One row for all, as the gradient of a sum comes.
    one_row = {"grad": grad[:1].expand(rows, -1), "x": x[:1].expand(rows, -1)}
    same(one_row, backward(*{**case.args, **{k: t.contiguous() for k, t in one_row.items()}}.values(), case.needs))
    cube = {name: torch.stack((t, t), 1).transpose(0, 1) for name, t in (("grad", grad), ("x", x))}
    assert torch.equal(backward(*{**case.args, **cube}.values(), case.needs)[0], torch.stack((expected[0],) * 2))
    if rows == 2:  # one row takes the same kernel
        single = backward(*{**case.args, "grad": grad[0], "x": x[0]}.values(), case.needs)
        assert torch.equal(single[0], expected[0][0])


def allocated(call) -> int:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    return sum(max(event.self_cpu_memory_usage, 0) for event in profile.key_averages())


def test_no_memory_beside_the_outputs(isa):
    """Torch's allocator gives the outputs and nothing else; the workspaces are the thread's own."""
    case = Case(4, 512, 256, 2, needs=(True, True, True, True, True))
    backward(*case.arguments())
    assert allocated(lambda: backward(*case.arguments())) == 4 * (4 * 512 + 2 * (256 + 512))
    case.needs = [True, False, False, False, False]
    assert allocated(lambda: backward(*case.arguments())) == 4 * 4 * 512


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="resident memory is read from /proc")
def test_no_dense_weight_anywhere(isa):
    """The process itself grows by about the packed bytes, not by 16 or 32 times as many."""
    import subprocess
    import sys
    from pathlib import Path

    code = f"""
import resource, torch
from hf_onebit.ops import cpu
cpu.select_isa({isa!r})
torch.set_num_threads(1)
def call(n, needs):
    words = torch.randint(-2**31, 2**31 - 1, (n // 32, n), dtype=torch.int32)
    a = torch.ones(n); x = torch.ones(16, n, dtype=torch.bfloat16)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    torch.ops.hf_onebit.onebit_linear_backward(x, x, words, a, a, None, None, None, needs)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
call(512, [True] * 3 + [False] * 2)
print(call(8192, [True] + [False] * 4), call(8192, [True] * 3 + [False] * 2))
"""
    env = {**os.environ, "PYTHONPATH": str(Path(ops.__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    packed = 8192 * 8192 // 8 // 1024  # KiB; a bfloat16 copy would take 16 times as many
    assert all(int(grown) < 2.5 * packed for grown in done.stdout.split()), done.stdout


# --- threads and rows ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "in_features", "out_features"), [(1, 2500, 1500), (300, 1100, 300), (17, 77, 2048)])
def test_threads_do_not_change_a_bit(isa, rows, in_features, out_features, dtype):
    for needs in ((True,) * 5, (True, False, False, False, False)):
        case = Case(rows, in_features, out_features, 2, dtype, needs=needs)
        results = []
        for threads in (1, 2, 8):
            torch.set_num_threads(threads)
            results.append(backward(*case.arguments()))
        torch.set_num_threads(1)
        for one, two, eight in zip(*results, strict=True):
            assert torch.equal(one, two)
            assert torch.equal(one, eight)


def test_calls_from_several_threads(isa):
    import threading

    cases = [Case(9, 700 + 32 * i, 300, 2, seed=i) for i in range(4)]
    expected = [backward(*case.arguments()) for case in cases]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(10):
            results = backward(*cases[i].arguments())
            if not all(torch.equal(result, want) for result, want in zip(results, expected[i], strict=True)):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# --- dispatcher and autograd --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(isa, dtype):
    for needs in ((True,) * 5, (True, False, False, False, False), (False, True, False, False, True)):
        case = Case(3, 70, 21, 2, dtype, dtype, needs=needs)
        operator = torch.ops.hf_onebit.onebit_linear_backward.default
        result = opcheck(operator, tuple(case.arguments()), atol=1e-2, rtol=1e-2)
        assert set(result.values()) == {"SUCCESS"}


@pytest.mark.parametrize("planes", [1, 2])
def test_gradcheck(isa, planes):
    case = Case(3, 37, 5, planes, torch.float64, torch.float64)
    names = [name for name in OUTPUTS if case.args[name] is not None]
    rest = {name: tensor for name, tensor in case.args.items() if name.startswith("weight") and tensor is not None}
    inputs = [case.args[name].requires_grad_() for name in names]
    assert torch.autograd.gradcheck(
        lambda *floats: ops.onebit_linear(**rest, **dict(zip(names, floats, strict=True))), inputs
    )


def test_autograd_runs_it(monkeypatch):
    """With the compiled kernels no gradient comes from the reference, with scales frozen or not."""

    def refuse(*args: object) -> None:
        raise AssertionError("the reference expanded a layer")

    monkeypatch.setattr(reference, "unpack_signs", refuse)
    case = Case(6, 70, 21, 1)
    weight, a, b = (case.args[name] for name in ("weight", "a", "b"))
    x = case.args["x"].requires_grad_()
    exact = case.exact()
    y = ops.onebit_linear(x, weight, a, b)
    y.backward(case.args["grad"])
    torch.testing.assert_close(x.grad.double(), exact["x"][0], rtol=1e-5, atol=1e-5)
    x.grad = None
    a.requires_grad_(), b.requires_grad_()
    ops.onebit_linear(x, weight, a, b).backward(case.args["grad"])
    for name, tensor in (("x", x), ("a", a), ("b", b)):
        torch.testing.assert_close(tensor.grad.double(), exact[name][0].detach(), rtol=1e-5, atol=1e-5)


def test_compiles_whole(isa):
    case = Case(6, 70, 21, 2)
    weight, a, b, weight_1, a_1, b_1 = (case.args[n] for n in ("weight", "a", "b", "weight_1", "a_1", "b_1"))

    def loss(x: Tensor, a: Tensor) -> Tensor:
        return torch.relu(ops.onebit_linear(x, weight, a, b, None, weight_1, a_1, b_1)).square().sum()

    inputs = [case.args["x"].requires_grad_(), a.requires_grad_()]
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*inputs), inputs)
    for result, want in zip(compiled, torch.autograd.grad(loss(*inputs), inputs), strict=True):
        assert torch.equal(result, want)


# --- refusals -----------------------------------------------------------------------------------------------

REFUSED = [
    ({"grad": torch.ones(3, 4)}, None),
    ({"grad": torch.ones(5)}, None),
    ({"grad": torch.ones(3, 5).double()}, None),
    ({"grad": torch.ones(3, 5, device="meta")}, None),
    ({"x": torch.ones(3, 32)}, None),
    ({"x": torch.ones(3, 33, dtype=torch.int32)}, None),
    ({"weight": torch.ones(1, 5, dtype=torch.int32)}, None),
    ({"a_1": None}, None),
    ({"b_1": torch.ones(34)}, None),
    ({}, [True, True]),
    ({"weight_1": None, "a_1": None, "b_1": None}, [False, False, False, True, False]),
]


@pytest.mark.parametrize(("changes", "needs"), REFUSED)
def test_refusals_are_the_schemas(changes, needs):
    case = Case(3, 33, 5, 2)
    args = (*{**case.args, **changes}.values(), needs or case.needs)
    with pytest.raises(RuntimeError) as wanted:
        reference.onebit_linear_backward(*args)
    with pytest.raises(RuntimeError) as got:
        backward(*args)
    message = str(got.value)
    if needs is not None and len(needs) == 2:  # the dispatcher itself counts a bool[5]
        assert "5" in message
    else:
        assert str(wanted.value) in message
