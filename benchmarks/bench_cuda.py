"""Packed layers beside torch's float layer on a CUDA device: checked first, then timed, as CUDA graphs and eagerly.

    python benchmarks/bench_cuda.py [--quick] [--json OUT] [--shape 4096x4096 ...] [--batch 1 16 ...]
    python benchmarks/bench_cuda.py --sweep [--json OUT]

Every contender walks through copies of its weights that together are three times the second-level cache, so that each
call reads its weights from memory, as in a model. *graph*: one CUDA graph holds a call of every copy; the median of
replays, divided by the calls. *eager*: the median of single calls with a flushed cache (``triton.testing.do_bench``),
launches included. *floor*: the bytes of weights, x and y over the bandwidth of a large copy on the same device.

GemLite, bitsandbytes and GPTQModel are timed beside these where they are installed (``--kind``).

--sweep times other launch plans of the tensor-core kernel instead, the best last; --profile adds each kernel's time.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import triton
from cuda_peers import PEERS, missing, peer
from torch import Tensor

import hf_onebit
from hf_onebit import ops
from hf_onebit.formats import mpq, onebit
from hf_onebit.ops import gpu, gpu_plans, gpu_tuning, triton_launch

DEVICE = torch.device("cuda")
SHAPES = ("4096x4096", "11008x4096", "28672x8192")
BATCHES = (1, 4, 16, 64, 512)
KINDS = ("float", "onebit", "onebit2", "mpq4", "mpq2")
GROUP = 64
# ‖y - y32‖ / ‖y32‖ that a contender may have.
ALLOWED = {torch.float16: 2e-3, torch.bfloat16: 1e-2}
Call = Callable[[Tensor], Tensor]


def l2_bytes() -> int:
    """Of the second-level cache."""
    return int(torch.cuda.get_device_properties(DEVICE).L2_cache_size)


def bandwidth() -> float:
    """Bytes per second that a large copy reads and writes."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.nbytes / (triton.testing.do_bench(lambda: target.copy_(source), return_mode="median") * 1e-3)


def words(rows: int, out: int) -> Tensor:
    """Random packed words."""
    return torch.randint(-(2**31), 2**31, (rows, out), dtype=torch.int32, device=DEVICE)


def contender(kind: str, out: int, in_: int, dtype: torch.dtype) -> tuple[list[Call], Tensor, int]:
    """Calls, one for each copy of the weights; the first copy's float32 weight (out, in); bytes of one copy."""
    if kind == "float":
        one = out * in_ * 2
        copies = [torch.randn(out, in_, device=DEVICE).to(dtype) / in_**0.5 for _ in range(count(one))]
        return [lambda x, W=W: F.linear(x, W) for W in copies], copies[0].float(), one
    calls: list[Call] = []
    if kind.startswith("onebit"):
        planes = 2 if kind.endswith("2") else 1
        one = planes * (out * in_ // 8 + 2 * (out + in_))
        first: list[Tensor] = []
        for _ in range(count(one)):
            tensors: list[Tensor] = []
            for _ in range(planes):
                tensors += [words(in_ // 32, out), torch.rand(out, device=DEVICE).half() + 0.5]
                tensors += [(torch.rand(in_, device=DEVICE).half() + 0.5) / in_**0.5]
            first = first or tensors
            calls.append(lambda x, t=tensors: ops.onebit_linear(x, *t[:3], None, *t[3:]))
        return calls, onebit.dequantize([tuple(first[i : i + 3]) for i in range(0, 3 * planes, 3)], in_), one
    if kind in PEERS:
        one = out * in_ * int(kind[-1]) // 8 + 4 * out * in_ // GROUP
        pairs = [peer(kind, out, in_, GROUP, dtype, DEVICE) for _ in range(count(one))]
        return [call for call, _ in pairs], pairs[0][1], one
    bits = int(kind.removeprefix("mpq"))
    groups = mpq.group_count(in_, GROUP)
    one = out * in_ * bits // 8 + 4 * groups * out
    W: Tensor | None = None
    for _ in range(count(one)):
        weight = words(in_ // 32 * bits, out)
        scales = (torch.rand(groups, out, device=DEVICE) + 0.5).half() / in_**0.5
        zeros = (scales.float() * (2**bits - 1) / 2).half()
        if W is None:
            W = mpq.dequantize(weight, scales, zeros, in_, bits, GROUP)
        calls.append(lambda x, w=weight, s=scales, z=zeros: ops.mpq_linear(x, w, s, z, None, bits, GROUP))
    assert W is not None
    return calls, W, one


def count(one: int) -> int:
    """Copies that overflow the cache thrice."""
    return max(2, min(-(-3 * l2_bytes() // one), 96))


def check(calls: list[Call], W: Tensor, x: Tensor) -> float:
    """How far the first copy's product is off; an assertion where that is too much."""
    exact = x.double() @ W.double().T
    error = float((calls[0](x).double() - exact).norm() / exact.norm())
    if not error <= ALLOWED[x.dtype]:
        raise AssertionError(f"off by {error:.1e} of the result's norm, allowed {ALLOWED[x.dtype]:.0e}: not timed")
    return error


def graph_microseconds(calls: list[Call], x: Tensor, milliseconds: float) -> float:
    """A call's time in a CUDA graph of all calls, the median of replays."""
    for call in calls[:2]:
        call(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call(x) for call in calls]
    times: list[float] = []
    for _ in range(3):
        graph.replay()
    start = time.perf_counter()
    while len(times) < 5 or ((time.perf_counter() - start) * 1e3 < milliseconds and len(times) < 200):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    del kept
    return statistics.median(times) * 1e3 / len(calls)


def eager_microseconds(calls: list[Call], x: Tensor, milliseconds: int) -> float:
    """A single call's time, launch included."""
    return 1e3 * triton.testing.do_bench(
        lambda: calls[0](x), warmup=milliseconds // 2 or 1, rep=milliseconds, return_mode="median"
    )


def kernel_times(calls: list[Call], x: Tensor) -> dict[str, float]:
    """Microseconds of each kernel in a call, by the profiler, without the gaps between them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for call in calls:
            call(x)
        torch.cuda.synchronize()
    return {event.key[:60]: event.self_device_time_total / len(calls) for event in profile.key_averages()
            if event.self_device_time_total > 0}  # fmt: skip


def not_timed(shape: str, dtype: str, kind: str, rows: int | None, why: Exception) -> dict[str, Any]:
    """What is reported of another library's layer that cannot be made, is wrong or does not run; ours must."""
    if kind not in PEERS:
        raise why
    print(f"{shape:>12} {dtype:>9} {kind:>8} {rows or '':>5}: not timed, {type(why).__name__}: {why}", flush=True)
    return {"shape": shape, "dtype": dtype, "kind": kind, "rows": rows, "not_timed": f"{type(why).__name__}: {why}"}


def compare(arguments: argparse.Namespace, results: list[dict[str, Any]], save: Callable[[], None]) -> None:
    """All contenders, into ``results``; ``save`` is called after each figure."""
    speed = bandwidth()
    print(f"copy: {speed / 1e9:.0f} GB/s")
    print(f"{'shape':>12} {'dtype':>9} {'kind':>8} {'rows':>5}   graph µs  x float   eager µs   floor µs     error")
    for shape in arguments.shape:
        out, in_ = (int(n) for n in shape.split("x"))
        for name in arguments.dtype:
            dtype = getattr(torch, name)
            base: dict[int, float] = {}
            for kind in ("float", *(k for k in arguments.kind if k != "float")):
                try:
                    calls, W, one = contender(kind, out, in_, dtype)
                except Exception as why:
                    results.append(not_timed(shape, name, kind, None, why))
                    continue
                for rows in arguments.batch:
                    x = torch.randn(rows, in_, device=DEVICE).to(dtype)
                    try:
                        error = check(calls, W, x)
                        graph = graph_microseconds(calls, x, arguments.milliseconds)
                        eager = eager_microseconds(calls, x, int(arguments.milliseconds))
                    except Exception as why:
                        results.append(not_timed(shape, name, kind, rows, why))
                        continue
                    base.setdefault(rows, graph)
                    floor = (one + x.nbytes + rows * out * 2) / speed * 1e6
                    row = {"shape": shape, "dtype": name, "kind": kind, "rows": rows, "graph_us": graph,
                           "eager_us": eager, "float_over_packed": base[rows] / graph, "floor_us": floor,
                           "error": error, "copies": len(calls)}  # fmt: skip
                    if arguments.profile:
                        row["kernels_us"] = kernel_times(calls, x)
                    results.append(row)
                    save()
                    figures = f"{graph:10.2f} {base[rows] / graph:8.2f} {eager:10.2f} {floor:10.2f} {error:9.1e}"
                    more = row.get("kernels_us", "")
                    print(f"{shape:>12} {name:>9} {kind:>8} {rows:>5} {figures} {more}", flush=True)
                del calls, W
                torch.cuda.empty_cache()


def sweep(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Other launch plans of the tensor-core kernel, for one-bit layers and for 4-bit codes."""
    os.environ["HF_ONEBIT_AUTOTUNE"] = "0"  # or what was found before would take the place of each plan
    results: list[dict[str, Any]] = []
    tiles = ((32, 1), (64, 1), (64, 2), (128, 2), (64, 4), (128, 4))
    deadline = time.perf_counter() + arguments.seconds
    for shape in arguments.shape:
        out, in_ = (int(n) for n in shape.split("x"))
        for kind in [k for k in arguments.kind if k != "float"]:
            for rows in arguments.batch:
                x = torch.randn(rows, in_, device=DEVICE).half()
                calls, W, _ = contender(kind, out, in_, x.dtype)
                check(calls, W, x)  # and so the self-examination, before any plan is replaced
                chosen = gpu_plans.plan_for
                found: list[tuple[float, Any]] = []
                usual = plan_of(kind, out, in_, x, chosen)
                plans = [usual, gpu_plans.EXPAND]
                columns = rows * (2 if kind.startswith("onebit") and rows <= 16 else 1)
                block_c = min(max(triton.next_power_of_2(columns), 8), 64)
                for block_n, warps in tiles:
                    most = triton.next_power_of_2(-(-in_ // 512))
                    plans += [gpu_plans.Plan(block_n, block_c, splits, warps, stages)
                              for splits in (1, 2, 4, 8, 16, 32) if splits <= most
                              for stages in ((1, 2) if block_c <= 32 else (2,))]  # fmt: skip
                if kind.startswith("onebit"):
                    plans += [gpu_plans.few_rows_plan(rows, in_, x.dtype, warps) for warps in (1, 2, 4, 8)]
                for plan in dict.fromkeys(plans):
                    if time.perf_counter() > deadline:
                        break
                    gpu_plans.plan_for = lambda *_, plan=plan: plan
                    gpu._plans.clear()
                    try:
                        check(calls, W, x)
                        found.append((graph_microseconds(calls, x, 5), plan))
                    except Exception as error:  # a plan that this device cannot run
                        print(f"{plan}: {type(error).__name__}")
                    finally:
                        gpu_plans.plan_for = chosen
                        gpu._plans.clear()
                found.sort(key=lambda pair: -pair[0])
                usual_time = next((t for t, plan in found if plan == usual), float("nan"))
                print(f"{shape} {kind} {rows} rows: usual {tuple(usual)} {usual_time:.2f} µs; best:", flush=True)
                for microseconds, plan in found[-4:]:
                    print(f"    {microseconds:8.2f} µs {tuple(plan)}", flush=True)
                results += [{"shape": shape, "kind": kind, "rows": rows, "graph_us": t, "plan": list(plan)}
                            for t, plan in found]  # fmt: skip
                del calls, W
                torch.cuda.empty_cache()
    return results


def plan_of(kind: str, out: int, in_: int, x: Tensor, choose: Callable[..., Any]) -> Any:
    """What the kernels would do by themselves."""
    vector = torch.empty(max(out, in_), device=DEVICE).half()
    if kind.startswith("onebit"):
        weight = torch.empty(in_ // 32, out, dtype=torch.int32, device=DEVICE)
        plane = (weight, vector[:out], vector[:in_])
        operand = triton_launch.onebit_operand(*plane, *(plane if kind.endswith("2") else (None,) * 3))
    else:
        bits = int(kind.removeprefix("mpq"))
        weight = torch.empty(in_ // 32 * bits, out, dtype=torch.int32, device=DEVICE)
        scales = torch.empty(mpq.group_count(in_, GROUP), out, device=DEVICE).half()
        operand = triton_launch.mpq_operand(weight, scales, scales, bits, GROUP)
    return choose(x.shape[0], in_, operand, x.dtype, DEVICE)


def main() -> None:
    """Measure; print a table, and write JSON where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one shape, one dtype, three batches")
    parser.add_argument("--sweep", action="store_true", help="time other launch plans")
    parser.add_argument("--profile", action="store_true", help="the time of each kernel, too")
    parser.add_argument("--shape", nargs="+", default=None, metavar="OUTxIN")
    parser.add_argument("--batch", nargs="+", type=int, default=None, metavar="N")
    parser.add_argument("--dtype", nargs="+", default=None, choices=("float16", "bfloat16"))
    parser.add_argument("--kind", nargs="+", default=None, choices=(*KINDS, *PEERS))
    parser.add_argument("--milliseconds", type=float, default=20.0, help="for each figure")
    parser.add_argument("--seconds", type=float, default=200.0, help="at most, for --sweep")
    parser.add_argument("--json", metavar="OUT")
    arguments = parser.parse_args()
    small = arguments.quick or arguments.sweep
    arguments.shape = arguments.shape or list(SHAPES[:1] if small else SHAPES)
    arguments.batch = arguments.batch or list((1, 16, 64) if small else BATCHES)
    arguments.dtype = arguments.dtype or ["float16"] + ([] if small else ["bfloat16"])
    absent = [kind for kind in PEERS if missing(kind)]
    for kind in absent:
        if kind in (arguments.kind or ()):
            raise SystemExit(f"--kind {kind}: {missing(kind)}")
    installed = [] if small else [kind for kind in PEERS if kind not in absent]
    arguments.kind = arguments.kind or list(KINDS[:2] if arguments.sweep else (*KINDS, *installed))
    start = time.perf_counter()
    if gpu.obstacle():
        raise SystemExit(f"the GPU kernels are not in use: {gpu.obstacle()}")
    torch.manual_seed(0)
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name(DEVICE),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "hf_onebit": hf_onebit.__version__,
        "l2_bytes": l2_bytes(),
        "autotune": gpu_tuning.enabled() and not arguments.sweep,
        "results": [],
    }

    def save() -> None:
        """What there is so far: a run that is cut off is not lost."""
        report["seconds"] = time.perf_counter() - start
        if arguments.json:
            with open(arguments.json, "w", encoding="utf-8") as file:
                json.dump(report, file, indent=1)
                file.write("\n")

    if arguments.sweep:
        report["results"] = sweep(arguments)
    else:
        compare(arguments, report["results"], save)
    refused = {" on ".join(key[::-1]): why for key, why in gpu._examined.items() if why}
    if refused:
        report["refused"] = refused
        print("REFUSED, so that the reference was timed:", refused)
    save()
    print(f"{report['device']}, torch {torch.__version__}, triton {triton.__version__}: {report['seconds']:.0f} s")


if __name__ == "__main__":
    main()
