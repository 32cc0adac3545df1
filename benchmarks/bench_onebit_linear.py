"""Times onebit_linear from packed bits beside the plain-torch reference and torch's own float layers.

With --backward it times the gradient of x instead, beside `grad @ W` in bfloat16 and float32.

Correctness first: a result outside its bound ends the run. Then every contender runs once a round, in turn, so that
whatever else the machine does hits all alike; the figures are medians over rounds, and ratios of them. `hot` repeats
one layer. `stream` walks through as many copies of each layer as fill the working set, larger than any cache, so
that weights come from memory as they do in a model.

    python benchmarks/bench_onebit_linear.py --threads 1 --json bench.json
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
from hf_onebit.formats.onebit import pack_signs
from hf_onebit.ops import cpu, reference

# out x in: the square one, then the layers of SmolLM2-135M.
SHAPES = ("4096x4096", "576x576", "192x576", "1536x576", "576x1536")
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
# By name: the weights to walk through, and what to do with each.
Contenders = dict[str, tuple[list[Tensor], Callable[[Tensor], Tensor]]]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--shape", nargs="+", default=list(SHAPES), metavar="OUTxIN")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 4, 16, 64, 512])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the activations of onebit_linear")
    parser.add_argument("--backward", action="store_true", help="time the gradient of x, not the forward")
    parser.add_argument("--isa", help=f"one of {', '.join(cpu.isas())}; the best by default")
    parser.add_argument("--activations", choices=("exact", "int8"), default="exact", help="digits that kernels keep")
    parser.add_argument("--mode", nargs="+", choices=("hot", "stream"), default=["hot", "stream"])
    parser.add_argument("--working-set", type=float, default=1.1, metavar="GIB", help="of each contender's weights")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", metavar="FILE", help="write all figures there")
    options = parser.parse_args(arguments)
    if cpu.isa() is None:
        print(cpu.status(), file=sys.stderr)
        return 1
    if options.isa:
        cpu.select_isa(options.isa)
    cpu.set_activations(options.activations)
    torch.set_num_threads(options.threads)
    results = []
    what = "gradient of x" if options.backward else "forward"
    print(f"{what}, {cpu.isa()}, {options.threads} thread(s), {options.dtype}, {cpu.activations()} activations")
    print(f"torch {torch.__version__}; medians")
    print(f"{'shape':>10} {'batch':>5} {'mode':>6} {'packed':>9}  slower than packed, times")
    with torch.inference_mode():
        for shape in options.shape:
            out_features, in_features = (int(size) for size in shape.split("x"))
            for mode in options.mode:
                layers = Layers(out_features, in_features, mode, int(options.working_set * 2**30))
                for batch in options.batch:
                    result = {"shape": [out_features, in_features], "batch": batch, "mode": mode}
                    result |= layers.measure(batch, DTYPES[options.dtype], options.rounds, options.backward)
                    results.append(result)
                    others = "  ".join(f"{name} {ratio:.2f}" for name, ratio in result["ratios"].items())
                    print(f"{shape:>10} {batch:>5} {mode:>6} {result['seconds']['packed'] * 1e6:>6.0f} µs  {others}")
                    sys.stdout.flush()
    if options.json:
        about = {"what": what, "isa": cpu.isa(), "activations": cpu.activations(), "threads": options.threads,
                 "dtype": options.dtype, "rounds": options.rounds,
                 "torch": torch.__version__, "platform": platform.platform()}  # fmt: skip
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump({**about, "results": results}, file, indent=1)
    return 0


class Layers:
    """One shape in every representation, in as many copies as the mode takes."""

    def __init__(self, out_features: int, in_features: int, mode: str, working_set: int) -> None:
        def copies(numbers_bytes: float) -> int:
            return 1 if mode == "hot" else max(2, int(working_set / numbers_bytes))

        size = out_features * in_features
        self.stream = mode == "stream"
        self.signs = torch.rand(out_features, in_features) < 0.5
        words = pack_signs(self.signs)
        self.a, self.b = torch.rand(out_features).half() + 0.1, torch.rand(in_features).half() + 0.1
        self.packed = [words.clone() for _ in range(copies(size / 8))]
        W = torch.randn(out_features, in_features)
        self.bf16 = [W.bfloat16() for _ in range(copies(size * 2))]
        self.f32 = [W.clone() for _ in range(copies(size * 4))]

    def measure(self, batch: int, dtype: torch.dtype, rounds: int, backward: bool) -> dict[str, Any]:
        x = torch.randn(batch, (self.a if backward else self.b).shape[0]).to(dtype)
        error = self.error(x, backward)
        contenders = self._backward(x) if backward else self._forward(x)
        times: dict[str, list[float]] = {name: [] for name in contenders}
        next_layer = dict.fromkeys(contenders, 0)
        repeat = self._repeat(contenders)
        for _ in range(rounds):
            for name, (weights, run) in contenders.items():
                first = next_layer[name]
                chosen = [weights[(first + i) % len(weights)] for i in range(repeat[name])]
                next_layer[name] = first + repeat[name]
                if not self.stream:
                    run(chosen[0])  # into the caches, after what the others left there
                begin = time.perf_counter()
                for W in chosen:
                    run(W)
                times[name].append((time.perf_counter() - begin) / len(chosen))
        seconds = {name: statistics.median(values) for name, values in times.items()}
        ratios = {name: value / seconds["packed"] for name, value in seconds.items() if name != "packed"}
        return {"error": error, "seconds": seconds, "ratios": ratios}

    def _forward(self, x: Tensor) -> Contenders:
        x_bf16, x_f32 = x.bfloat16(), x.float()
        return {
            "packed": (self.packed, lambda words: ops.onebit_linear(x, words, self.a, self.b)),
            "reference": (self.packed, lambda words: reference.onebit_linear(x, words, self.a, self.b)),
            "bf16 F.linear": (self.bf16, lambda W: linear(x_bf16, W)),
            "fp32 F.linear": (self.f32, lambda W: linear(x_f32, W)),
        }

    def _backward(self, grad: Tensor) -> Contenders:
        grad_bf16, grad_f32 = grad.bfloat16(), grad.float()
        rest = self._rest(grad)
        return {
            "packed": (
                self.packed,
                lambda words: torch.ops.hf_onebit.onebit_linear_backward.default(grad, rest[0], words, *rest[1:])[0],
            ),
            "reference": (
                self.packed,
                lambda words: reference.onebit_linear_backward(grad, rest[0], words, *rest[1:])[0],
            ),
            "bf16 grad @ W": (self.bf16, lambda W: grad_bf16 @ W),
            "fp32 grad @ W": (self.f32, lambda W: grad_f32 @ W),
        }

    def _rest(self, grad: Tensor) -> tuple[Any, ...]:
        """As autograd calls it with frozen scales: x is a stand-in without memory."""
        stand_in = grad.new_zeros(()).expand(len(grad), self.b.shape[0])
        return stand_in, self.a, self.b, None, None, None, [True, False, False, False, False]

    def _repeat(self, contenders: Contenders) -> dict[str, int]:
        """Calls per timing, so that each timing takes some milliseconds."""
        repeat = {}
        for name, (weights, run) in contenders.items():
            run(weights[0])
            begin = time.perf_counter()
            run(weights[0])
            repeat[name] = max(1, min(200, int(5e-3 / max(time.perf_counter() - begin, 1e-7))))
        return repeat

    def error(self, x: Tensor, backward: bool) -> float:
        """Largest error relative to Σ |a b x|, beyond the rounding of the result to its dtype."""
        S, a, b = torch.where(self.signs, 1.0, -1.0).double().T, self.a, self.b
        if backward:  # x is the gradient of the outputs
            y = self._backward(x)["packed"][1](self.packed[0]).double()
            S, a, b = S.T, b, a
        else:
            y = ops.onebit_linear(x, self.packed[0], a, b).double()
        u = x.double() * b.double()
        exact = u @ S * a.double()
        bound = u.abs().sum(-1, keepdim=True) * a.double()
        rounding = 0.0 if x.dtype == torch.float32 else torch.finfo(x.dtype).eps / 2
        error = float((((y - exact).abs() - rounding * exact.abs()).clamp(min=0) / bound).max())
        allowed = 1e-6 if x.dtype == torch.float32 else 2e-4
        if cpu.activations() == "int8":
            allowed = float((u.shape[-1] * u.abs().amax(-1) / u.abs().sum(-1)).max()) / 254
        if error > allowed:
            raise SystemExit(f"wrong: error {error:.1e} of sum |a b x|, expected at most {allowed:.0e}")
        return error


if __name__ == "__main__":
    sys.exit(main())
