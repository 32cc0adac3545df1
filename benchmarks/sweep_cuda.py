"""Launch plans of the GPU kernels beside the usual one, timed in a CUDA graph, the best last.

    python benchmarks/sweep_cuda.py [--shape 4096x4096 ...] [--batch 1 16 64] [--packed 1p ...] [--json OUT]

``hf-onebit bench --device cuda`` compares layers; this is for choosing their usual plans (hf_onebit/ops/gpu_plans.py).
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import hf_onebit
from hf_onebit.bench import cuda, cuda_clock, parse_shape
from hf_onebit.bench.cuda_layers import check, kind_of, packed_layer
from hf_onebit.choices import Choice
from hf_onebit.formats import mpq
from hf_onebit.formats.packing import word_rows
from hf_onebit.ops import gpu, gpu_plans, gpu_products

DEVICE = torch.device("cuda", 0)


def sweep(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Other launch plans of the tensor-core kernel, for one-bit layers and for 4-bit codes."""
    os.environ["HF_ONEBIT_AUTOTUNE"] = "0"  # or what was found before would take the place of each plan
    results: list[dict[str, Any]] = []
    tiles = ((32, 1), (64, 1), (64, 2), (128, 2), (64, 4), (128, 4))
    deadline = time.perf_counter() + arguments.seconds
    for shape in arguments.shape:
        out, in_ = parse_shape(shape)
        for packed in arguments.packed:
            kind = kind_of(packed)
            for rows in arguments.batch:
                x = torch.randn(rows, in_, device=DEVICE).half()
                layer = packed_layer(packed, out, in_, DEVICE, cuda_clock.l2_bytes(DEVICE))
                check(layer, x)  # and so the self-examination, before any plan is replaced
                chosen = gpu_plans.plan_for
                found: list[tuple[float, Any]] = []
                usual = plan_of(packed, out, in_, x, chosen)
                plans = [usual, gpu_plans.EXPAND]
                columns = rows * (2 if kind.startswith("onebit") and rows <= 16 else 1)
                block_c = min(max(power_of_2(columns), 8), 64)
                for block_n, warps in tiles:
                    most = power_of_2(-(-in_ // 512))
                    plans += [gpu_plans.Plan(block_n, block_c, splits, warps, stages)
                              for splits in (1, 2, 4, 8, 16, 32) if splits <= most
                              for stages in ((1, 2) if block_c <= 32 else (2,))]  # fmt: skip
                if kind.startswith("onebit"):
                    plans += [gpu_plans.few_rows_plan(rows, in_, x.dtype, warps) for warps in (1, 2, 4, 8)]
                for plan in dict.fromkeys(plans):
                    if time.perf_counter() > deadline:
                        break
                    gpu_plans.plan_for = lambda *_, plan=plan: plan
                    gpu_products._plans.clear()
                    try:
                        check(layer, x)
                        found.append((cuda_clock.graph_microseconds(layer.calls, x, 5), plan))
                    except Exception as error:  # a plan that this device cannot run
                        print(f"{plan}: {type(error).__name__}")
                    finally:
                        gpu_plans.plan_for = chosen
                        gpu_products._plans.clear()
                found.sort(key=lambda pair: -pair[0])
                usual_time = next((t for t, plan in found if plan == usual), float("nan"))
                print(f"{shape} {kind} {rows} rows: usual {tuple(usual)} {usual_time:.2f} µs; best:", flush=True)
                for microseconds, plan in found[-4:]:
                    print(f"    {microseconds:8.2f} µs {tuple(plan)}", flush=True)
                results += [{"shape": shape, "kind": kind, "rows": rows, "graph_us": t, "plan": list(plan)}
                            for t, plan in found]  # fmt: skip
                del layer
                torch.cuda.empty_cache()
    return results


def power_of_2(number: int) -> int:
    """The next one that is not smaller."""
    return 1 << max(number - 1, 0).bit_length()


def plan_of(packed: str, out: int, in_: int, x: Tensor, choose: Callable[..., Any]) -> Any:
    """What the kernels would do by themselves."""
    from hf_onebit.ops import triton_launch  # which imports triton

    choice = Choice.parse(packed)
    bits = int(choice.bits)
    weight = torch.empty(word_rows(in_, bits), out, dtype=torch.int32, device=DEVICE)
    if choice.planes:
        plane = (weight, *(torch.empty(size, device=DEVICE).half() for size in (out, in_)))
        operand = triton_launch.onebit_operand(*plane, *(plane if choice.planes == 2 else (None,) * 3))
    else:
        scales = torch.empty(mpq.group_count(in_, choice.group_size), out, device=DEVICE).half()
        operand = triton_launch.mpq_operand(weight, scales, scales, bits, choice.group_size)
    return choose(x.shape[0], in_, operand, x.dtype, DEVICE)


def main() -> None:
    """Measure; print the best, and write JSON where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", nargs="+", default=["4096x4096"], metavar="OUTxIN")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 16, 64], metavar="N")
    parser.add_argument("--packed", nargs="+", default=["1p"], metavar="NAME", help="1p, 2p, 4g64, ...")
    parser.add_argument("--seconds", type=float, default=200.0, help="at most")
    parser.add_argument("--json", metavar="OUT")
    arguments = parser.parse_args()
    if reason := cuda.obstacle(str(DEVICE)):
        parser.exit(2, f"{parser.prog}: error: {reason}\n")
    torch.manual_seed(0)
    start = time.perf_counter()
    results = sweep(arguments)
    report = {
        "device": cuda_clock.device_name(DEVICE),
        "torch": torch.__version__,
        "triton": cuda_clock.triton_version(),
        "hf_onebit": hf_onebit.__version__,
        "l2_bytes": cuda_clock.l2_bytes(DEVICE),
        "autotune": False,
        "seconds": time.perf_counter() - start,
        "results": results,
    }
    if refused := {f"{what} on {device}": why for (device, what), why in gpu.examined().items() if why}:
        report["refused"] = refused
        print("REFUSED, so that the reference was timed:", refused)
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            file.write(json.dumps(report, indent=1) + "\n")
    print(f"{report['device']}, torch {torch.__version__}, triton {report['triton']}: {report['seconds']:.0f} s")


if __name__ == "__main__":
    main()
