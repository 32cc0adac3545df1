"""Times mpq_linear from packed codes beside torch's own float layers.

Correctness first: a result outside its bound ends the run. Then every contender runs once a round, in turn; the
figures are minima and medians over rounds, and ratios of them. Each contender's weights are one layer, which stays
in caches as far as it fits.

    OMP_NUM_THREADS=1 python benchmarks/bench_mpq_linear.py --json bench.json
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from hf_onebit import ops
from hf_onebit.formats import mpq
from hf_onebit.formats.packing import pack
from hf_onebit.ops import cpu

SHAPES = ("4096x4096", "49152x576")  # out x in: a square one, and the head of SmolLM2-135M
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--shape", nargs="+", default=list(SHAPES), metavar="OUTxIN")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--bits", nargs="+", type=int, default=[2, 4, 8])
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--asymmetric", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the activations")
    parser.add_argument("--isa", help=f"one of {', '.join(cpu.isas())}; the best by default")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", metavar="FILE", help="write all figures there")
    options = parser.parse_args(arguments)
    if cpu.isa() is None:
        print(cpu.status(), file=sys.stderr)
        return 1
    if options.isa:
        cpu.select_isa(options.isa)
    torch.set_num_threads(options.threads)
    about = {"isa": cpu.isa(), "threads": options.threads, "dtype": options.dtype, "rounds": options.rounds,
             "group_size": options.group_size, "symmetric": not options.asymmetric, "torch": torch.__version__,
             "platform": platform.platform()}  # fmt: skip
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    print(f"{'shape':>10} {'batch':>5} {'bits':>4} {'min':>9} {'median':>9} {'GB/s':>5}  bf16 F.linear takes, times")
    results = []
    with torch.inference_mode():
        for shape in options.shape:
            for batch in options.batch:
                results += measure(shape, batch, options)
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump({**about, "results": results}, file, indent=1)
    return 0


def measure(shape: str, batch: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    out_features, in_features = (int(size) for size in shape.split("x"))
    x = torch.randn(batch, in_features).to(DTYPES[options.dtype])
    W, x_bf16 = torch.randn(out_features, in_features).bfloat16(), x.bfloat16()
    contenders: dict[str, Callable[[], Tensor]] = {"bf16": lambda: linear(x_bf16, W)}
    for bits in options.bits:
        contenders[str(bits)] = checked(x, out_features, bits, options)
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(options.rounds):
        for name, run in contenders.items():
            run()  # into the caches, after what the others left there
            begin = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - begin)
    rows = []
    base = times.pop("bf16")
    for name, values in times.items():
        least, median = min(values), statistics.median(values)
        ratios = {"min": min(base) / least, "median": statistics.median(base) / median}
        size = out_features * in_features * int(name) / 8
        rows.append({"shape": [out_features, in_features], "batch": batch, "bits": int(name), "min": least,
                     "median": median, "ratios": ratios})  # fmt: skip
        micros = f"{least * 1e6:>6.0f} µs {median * 1e6:>6.0f} µs {size / least / 1e9:>5.1f}"
        print(f"{shape:>10} {batch:>5} {name:>4} {micros}  {ratios['min']:.2f} (medians {ratios['median']:.2f})")
        sys.stdout.flush()
    return rows


def checked(x: Tensor, out_features: int, bits: int, options: argparse.Namespace) -> Callable[[], Tensor]:
    """A random layer's product, after one that was held against float64."""
    in_features, group_size = x.shape[1], options.group_size
    weight = pack(torch.randint(0, 1 << bits, (out_features, in_features), dtype=torch.uint8), bits)
    groups = mpq.group_count(in_features, group_size)
    scales = (torch.rand(groups, out_features) + 0.1).half()
    zeros = (scales.float() * mpq.zero_point(bits)).half() if options.asymmetric else None

    def run() -> Tensor:
        return ops.mpq_linear(x, weight, scales, zeros, None, bits, group_size)

    some = slice(0, 256)
    part = (weight[:, some], scales[:, some], None if zeros is None else zeros[:, some])
    exact = x.double() @ mpq.dequantize(*part, in_features, bits, group_size, torch.float64).T
    bound = x.double().abs() @ mpq.spread(scales[:, some].double(), group_size, in_features) * ((1 << bits) - 1) / 2
    rounding = 0.0 if x.dtype == torch.float32 else torch.finfo(x.dtype).eps / 2
    error = (((run()[:, some].double() - exact).abs() - rounding * exact.abs()).clamp(min=0) / bound).max()
    if float(error) > 1e-5:
        raise SystemExit(f"wrong: error {float(error):.1e} at {bits} bits, expected at most 1e-05")
    return run


if __name__ == "__main__":
    sys.exit(main())
