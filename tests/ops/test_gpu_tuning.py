"""The search for launch plans, with a device, a clock and kernels that are made up: no GPU and no triton."""

import json
from types import SimpleNamespace

import pytest
import torch

from hf_onebit.ops import gpu_plans, gpu_tuning
from hf_onebit.ops.gpu_plans import EXPAND, Operand, Plan

DEVICE = torch.device("cpu")
HALF = torch.float16


@pytest.fixture(autouse=True)
def machine(tmp_path, monkeypatch):
    """A device of 100 multiprocessors, and an empty cache."""
    monkeypatch.setenv("HF_ONEBIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_ONEBIT_AUTOTUNE", raising=False)
    monkeypatch.delenv("HF_ONEBIT_EXPAND_ROWS", raising=False)
    about = {"multiprocessors": 100, "shared_memory": 228 << 10, "major": 9}
    for name, value in about.items():
        monkeypatch.setattr(gpu_plans, name, lambda _, value=value: value)
    monkeypatch.setattr(gpu_tuning, "_device_name", lambda _: "Some GPU (80 GB)")
    monkeypatch.setattr(gpu_tuning, "_known", {})
    monkeypatch.setattr(gpu_tuning, "_spent", 0.0)


class Kernels:
    """In the place of triton_launch: every plan gives the same result, and takes as long as ``times`` says."""

    def __init__(self, monkeypatch, times):
        self.times, self.ran, self.timed = times, [], []
        monkeypatch.setattr(gpu_tuning, "device_microseconds", self.timer)

    def run(self, X, operand, bias, plan):
        self.ran.append(plan)
        self.plan, self.rows = plan, X.shape[0]
        return X[:, :1].float() @ torch.ones(1, 3)

    def timer(self, call):
        call()
        self.timed.append(self.plan)
        return self.times(self.plan)


def signs(N=4096, K=4096, planes=1):
    weight = torch.empty(K // 32, N, dtype=torch.int32, device="meta")
    second = weight if planes == 2 else None
    return Operand(weight, weight, None, weight, second, second, second, 1, 0)


def codes(bits=4, N=4096, K=4096, zeros=True):
    weight = torch.empty(K // 32 * bits, N, dtype=torch.int32, device="meta")
    scales = torch.empty(K // 64, N, dtype=HALF, device="meta")
    return Operand(weight, scales, scales if zeros else None, None, None, None, None, bits, 64)


def plan(kernels, rows, operand, dtype=HALF, search=True, K=4096):
    return gpu_tuning.plan(kernels, rows, K, operand, dtype, DEVICE, search)


@pytest.mark.parametrize("dtype", [HALF, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("operand", [signs(), signs(planes=2), codes(2), codes(3), codes(8, zeros=False)])
def test_candidates_are_few_begin_with_the_usual_and_have_room(operand, dtype):
    for rows in (1, 2, 4, 8, 16, 32, 64, 128, 256):
        plans = gpu_tuning.candidates(rows, 4096, operand, dtype, DEVICE)
        assert plans[0] == gpu_plans.plan_for(rows, 4096, operand, dtype, DEVICE)
        assert 1 <= len(plans) <= gpu_tuning.MOST_PLANS
        assert len(set(plans)) == len(plans)
        for each in plans:
            few = not operand.is_mpq and each.block_c <= (2 if dtype == torch.float32 else 4)
            assert each == EXPAND or each.splits > 0 or few
        if operand.is_mpq and dtype == torch.float32:
            assert plans == [EXPAND]
        elif rows >= 16:
            assert EXPAND in plans
            assert len(plans) > 2


@pytest.mark.parametrize(("hip", "least"), [(None, 8), ("6.4", 16)])
def test_no_candidate_has_fewer_columns_than_a_matrix_instruction(monkeypatch, hip, least):
    monkeypatch.setattr(torch.version, "hip", hip)
    for rows in (1, 2, 8):
        plans = gpu_tuning.candidates(rows, 4096, codes(), HALF, DEVICE)
        assert {plan.block_c for plan in plans} == {least}


@pytest.mark.parametrize("operand", [signs(), codes()])
def test_before_compute_capability_8_everything_is_expanded(monkeypatch, operand):
    monkeypatch.setattr(gpu_plans, "major", lambda _: 7)
    for rows in (1, 8, 64):
        assert gpu_plans.plan_for(rows, 4096, operand, HALF, DEVICE) == EXPAND
        assert gpu_tuning.candidates(rows, 4096, operand, HALF, DEVICE) == [EXPAND]


def test_the_fastest_is_found_kept_and_read_by_the_next_process(monkeypatch):
    operand = codes()
    wanted = gpu_tuning.candidates(4, 4096, operand, HALF, DEVICE)[3]
    kernels = Kernels(monkeypatch, lambda p: 5.0 if p == wanted else 9.0)
    usual = gpu_plans.plan_for(3, 4096, operand, HALF, DEVICE)
    assert plan(kernels, 3, operand, search=False) == usual != wanted
    assert not kernels.ran
    assert plan(kernels, 3, operand) == wanted
    assert isinstance(plan(kernels, 3, operand), Plan)
    assert kernels.rows == 4  # measured at the end of the bucket
    searched = len(kernels.timed)
    # 3 and 4 rows, and sizes that are nearly the same, share what was found; it is not looked for again.
    assert plan(kernels, 4, operand) == wanted
    assert plan(kernels, 4, codes(N=4000), K=4032) == wanted
    assert len(kernels.timed) == searched
    assert plan(kernels, 5, operand) != wanted or len(kernels.timed) > searched
    monkeypatch.setattr(gpu_tuning, "_known", {})  # another process
    kernels.ran.clear()
    assert plan(kernels, 3, operand, search=False) == wanted
    assert not kernels.ran
    (file,) = (gpu_tuning.file_of(DEVICE).parent).iterdir()
    assert file.name.startswith("Some-GPU-80-GB-")
    text = json.loads(file.read_text())
    assert text["device"] == "Some GPU (80 GB)"
    assert text["plans"]["mpq4z float16 4 rows 4096x4096"] == list(wanted)


def test_what_depends_on_the_device_the_kernels_or_the_layer_is_another_place(monkeypatch):
    first = gpu_tuning.file_of(DEVICE)
    monkeypatch.setattr(gpu_tuning, "_software", lambda: "triton 9, kernels of tomorrow")
    other_kernels = gpu_tuning.file_of(DEVICE)
    monkeypatch.setattr(gpu_tuning, "_device_name", lambda _: "Some GPU (40 GB)")
    assert len({first, other_kernels, gpu_tuning.file_of(DEVICE)}) == 3
    names = {gpu_tuning.bucket(rows, K, operand, dtype) for rows in (1, 2) for K in (2048, 4096)
             for operand in (signs(), signs(planes=2), codes(), codes(3), codes(zeros=False), signs(N=11008))
             for dtype in (HALF, torch.bfloat16)}  # fmt: skip
    assert len(names) == 2 * 2 * 6 * 2


def test_the_usual_plan_stays_unless_another_is_clearly_faster(monkeypatch):
    operand = signs()
    usual = gpu_plans.plan_for(1, 4096, operand, HALF, DEVICE)
    kernels = Kernels(monkeypatch, lambda p: 10.0 if p == usual else 9.8)
    assert plan(kernels, 1, operand) == usual
    assert len(kernels.timed) > 3


def test_plans_that_fail_or_are_wrong_do_not_win(monkeypatch):
    operand = signs()
    plans = gpu_tuning.candidates(1, 4096, operand, HALF, DEVICE)
    kernels = Kernels(monkeypatch, lambda p: 10.0 - plans.index(p))
    right = kernels.run

    def run(X, operand, bias, each):
        if each == plans[-1]:
            raise RuntimeError("out of shared memory")
        y = right(X, operand, bias, each)
        return y * {plans[-2]: 1.1, plans[-3]: float("nan")}.get(each, 1.0)

    monkeypatch.setattr(kernels, "run", run)
    assert plan(kernels, 1, operand) == plans[-4]


@pytest.mark.parametrize("value", ["0", "off", "False"])
def test_switched_off_nothing_is_searched_read_or_written(monkeypatch, value):
    operand = codes()
    kernels = Kernels(monkeypatch, lambda p: 10.0 - p.block_n / 100)
    usual = gpu_plans.plan_for(1, 4096, operand, HALF, DEVICE)
    found = plan(kernels, 1, operand)
    monkeypatch.setenv("HF_ONEBIT_AUTOTUNE", value)
    kernels.ran.clear()
    assert plan(kernels, 1, operand) == usual
    assert plan(kernels, 2, operand) == gpu_plans.plan_for(2, 4096, operand, HALF, DEVICE)
    assert not kernels.ran
    monkeypatch.setenv("HF_ONEBIT_AUTOTUNE", "1")
    assert plan(kernels, 1, operand) == found
    torch.use_deterministic_algorithms(True)
    try:
        assert plan(kernels, 1, operand) == usual
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_search_ends_in_time_and_so_do_all(monkeypatch):
    operand, clock = codes(), [0.0]
    monkeypatch.setattr(gpu_tuning, "time", SimpleNamespace(monotonic=lambda: clock[0]))

    def slow(p):
        clock[0] += 9.0
        return 10.0

    kernels = Kernels(monkeypatch, slow)
    plan(kernels, 1, operand)
    assert len(kernels.timed) == 3  # 20 seconds are over after the third
    for rows in (2, 4, 8, 16, 32):
        plan(kernels, rows, operand)
    assert clock[0] <= gpu_tuning.SECONDS_IN_ALL + 9.0
    kernels.ran.clear()
    assert plan(kernels, 64, operand) == gpu_plans.plan_for(64, 4096, operand, HALF, DEVICE)
    assert not kernels.ran
    gpu_tuning.forget()
    plan(kernels, 64, operand)
    assert kernels.ran


def test_a_failed_search_is_not_repeated_and_not_kept(monkeypatch):
    operand, kernels = codes(), Kernels(monkeypatch, lambda p: 1.0)

    def run(*_):
        kernels.ran.append(None)
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(kernels, "run", run)
    for _ in range(2):
        assert plan(kernels, 1, operand) == gpu_plans.plan_for(1, 4096, operand, HALF, DEVICE)
    assert len(kernels.ran) == 1
    assert not gpu_tuning.file_of(DEVICE).exists()


@pytest.mark.parametrize(
    "text",
    ["", "[]", '{"plans": 3}', '{"plans": {"NAME": [64, 8, 999999, 1, 2]}}', '{"plans": {"NAME": [0, 8, 0, 8]}}',
     '{"plans": {"NAME": "rm"}}', '{"plans": {"NAME": [64.0, 8, 1, 1, true]}}'],
)  # fmt: skip
def test_files_that_are_not_as_written_change_nothing(monkeypatch, text):
    operand = codes()
    path = gpu_tuning.file_of(DEVICE)
    path.parent.mkdir(parents=True)
    path.write_text(text.replace("NAME", gpu_tuning.bucket(1, 4096, operand, HALF)))
    kernels = Kernels(monkeypatch, lambda p: 1.0)
    assert plan(kernels, 1, operand, search=False) == gpu_plans.plan_for(1, 4096, operand, HALF, DEVICE)


def test_what_another_process_wrote_is_kept(monkeypatch):
    kernels = Kernels(monkeypatch, lambda p: 10.0 - p.warps)
    plan(kernels, 1, codes())
    monkeypatch.setattr(gpu_tuning, "_known", {str(DEVICE): {}})  # it read the file before the other one wrote
    plan(kernels, 1, signs())
    names = list(json.loads(gpu_tuning.file_of(DEVICE).read_text())["plans"])
    assert names == ["mpq4z float16 1 rows 4096x4096", "onebit1 float16 1 rows 4096x4096"]


def test_a_matrix_whose_places_pass_32_bits_is_only_expanded(monkeypatch):
    monkeypatch.setattr(gpu_plans, "MOST_WORDS", 4096 // 32 * 4096 - 1)
    for rows in (1, 32):
        assert gpu_tuning.candidates(rows, 4096, signs(), HALF, DEVICE) == [EXPAND]


def test_a_cache_that_cannot_be_written_is_no_error(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HF_ONEBIT_CACHE", str(tmp_path / "file" / "below"))
    kernels = Kernels(monkeypatch, lambda p: 10.0 - p.warps)
    best = max(gpu_tuning.candidates(1, 4096, codes(), HALF, DEVICE), key=lambda p: p.warps)
    assert plan(kernels, 1, codes()) == best


@pytest.mark.parametrize("failing", [(gpu_tuning.json, "dump"), (gpu_tuning.os, "replace")], ids=["dump", "replace"])
def test_a_file_that_was_begun_and_fails_is_removed(monkeypatch, failing):
    def fail(*_, **__):
        raise OSError("no space left on device")

    monkeypatch.setattr(*failing, fail)
    plan(Kernels(monkeypatch, lambda p: 1.0), 1, codes())
    assert gpu_tuning.file_of(DEVICE).parent.is_dir()
    assert not list(gpu_tuning.file_of(DEVICE).parent.iterdir())


def test_a_forced_number_of_rows_is_obeyed(monkeypatch):
    monkeypatch.setenv("HF_ONEBIT_EXPAND_ROWS", "20")
    kernels = Kernels(monkeypatch, lambda p: 1.0 if p == EXPAND else 2.0)
    assert plan(kernels, 16, codes()) != EXPAND
    assert plan(kernels, 19, codes()) != EXPAND
    assert plan(kernels, 20, codes()) == EXPAND


def test_tiles_of_devices_and_what_they_say_of_registers():
    """The tiles of compute capability 9 that were timed keep the compiler's choice; nobody else's compiler is told."""
    for major in (8, 9, 10):
        for bits, is_mpq in ((1, False), (4, True), (8, True)):
            for block_c in (8, 16, 32, 64):
                usual = gpu_plans.tile_for(block_c, bits, is_mpq, major)
                assert usual in gpu_tuning.tiles_of(block_c, bits, is_mpq, major)
    assert gpu_plans.tile_for(64, 4, True, 9) == gpu_plans.tile_for(64, 4, True, 0) == (128, 4)

    def options(bits, zeros, block_n, block_c, warps, major):
        return gpu_plans.registers_of_product(Plan(block_n, block_c, 4, warps, 2), bits, True, zeros, major)

    assert options(4, True, 64, 16, 2, 9) == options(4, False, 64, 8, 1, 9) == options(8, True, 64, 16, 2, 0) == {}
    assert options(8, True, 64, 16, 2, 9) == options(4, False, 64, 32, 2, 9) == {"maxnreg": 255}
    assert options(4, True, 64, 16, 2, 8) == options(4, True, 64, 16, 4, 9) == {"maxnreg": 255}
    assert options(4, True, 64, 8, 1, 10) == {}
