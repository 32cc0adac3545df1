"""Random packed layers with their float64 results, for tests of kernels on any device."""

from typing import Any

import torch
from torch import Tensor

from hf_onebit import ops
from hf_onebit.formats import mpq
from hf_onebit.formats import onebit as fmt
from hf_onebit.formats.packing import pack

# ‖y - y64‖ / ‖y64‖: 11 digits of float16, 8 of bfloat16, and what float32 sums in tensor cores lose.
RELATIVE = {torch.float16: 1.5e-3, torch.bfloat16: 1e-2, torch.float32: 2e-5}


class OneBit:
    """Arguments of onebit_linear, on the CPU, and its dense float64 twin."""

    def __init__(self, out_features: int, in_features: int, planes: int = 1, bias: bool = True, seed: int = 0,
                 scale_dtype: torch.dtype = torch.float16) -> None:  # fmt: skip
        random = torch.Generator().manual_seed(seed)
        self.in_features = in_features
        self.W = torch.zeros(out_features, in_features, dtype=torch.float64)
        self.tensors: list[Tensor | None] = []
        for _ in range(planes):
            signs = torch.rand(out_features, in_features, generator=random) < 0.5
            a, b = (torch.randn(n, generator=random).to(scale_dtype) for n in (out_features, in_features))
            weight = fmt.pack_signs(signs)
            if in_features % 32:
                weight[-1] |= -(1 << 31)  # padding must not count
            self.W += a.double()[:, None] * (signs.double() * 2 - 1) * b.double()
            self.tensors += [weight, a, b]
        self.bias = torch.randn(out_features, generator=random).to(scale_dtype) if bias else None

    def args(self, device: Any = "cpu") -> tuple[Any, ...]:
        """weight, a, b, bias, weight_1, a_1, b_1."""
        tensors = [*self.tensors, None, None, None][:6]
        given = [*tensors[:3], self.bias, *tensors[3:]]
        return tuple(None if t is None else t.to(device) for t in given)

    def linear(self, x: Tensor) -> Tensor:
        """The operator, on x's device."""
        return ops.onebit_linear(x, *self.args(x.device))

    def exact(self, x: Tensor) -> Tensor:
        """In float64, on the CPU."""
        y = x.cpu().double() @ self.W.T
        return y if self.bias is None else y + self.bias.double()


class Groups(OneBit):
    """Arguments of mpq_linear, on the CPU, and its dense float64 twin."""

    def __init__(self, out_features: int, in_features: int, bits: int = 4, group_size: int = 64,
                 symmetric: bool = False, bias: bool = True, seed: int = 0,
                 scale_dtype: torch.dtype = torch.float16) -> None:  # fmt: skip
        random = torch.Generator().manual_seed(seed)
        self.in_features, self.bits, self.group_size = in_features, bits, group_size
        groups = mpq.group_count(in_features, group_size)
        self.codes = torch.randint(0, 1 << bits, (out_features, in_features), generator=random, dtype=torch.uint8)
        self.weight = pack(self.codes, bits)
        if in_features % 32:
            self.weight[-1] |= -(1 << 31)
        self.scales = ((torch.rand(groups, out_features, generator=random) + 0.5) / (1 << bits)).to(scale_dtype)
        middle = ((1 << bits) - 1) / 2 + torch.randn(groups, out_features, generator=random) / 4
        self.zeros = None if symmetric else (self.scales.float() * middle).to(scale_dtype)
        self.bias = torch.randn(out_features, generator=random).to(scale_dtype) if bias else None
        group = torch.arange(in_features) // (in_features if group_size == -1 else group_size)
        s = self.scales.double()[group].T
        z = s * mpq.zero_point(bits) if self.zeros is None else self.zeros.double()[group].T
        self.W = s * self.codes.double() - z

    def args(self, device: Any = "cpu") -> tuple[Any, ...]:
        """weight, scales, zeros, bias, bits, group_size."""
        tensors = (self.weight, self.scales, self.zeros, self.bias)
        return (*(None if t is None else t.to(device) for t in tensors), self.bits, self.group_size)

    def linear(self, x: Tensor) -> Tensor:
        """The operator, on x's device."""
        return ops.mpq_linear(x, *self.args(x.device))


class MixedRows:
    """Arguments of mbwq_linear, on the CPU: blocks of rows of several widths; and their dense float64 twin.

    Args:
        widths: (bits, rows, group size) of each block.
        out_features: N.
        ordered: whether the packed rows are the inputs in another order.
        symmetric: whether there are no zeros.
        scale_dtype: of scales, zeros and bias.
    """

    def __init__(self, widths: list[tuple[int, int, int]], out_features: int, ordered: bool, symmetric: bool,
                 scale_dtype: torch.dtype = torch.float32) -> None:  # fmt: skip
        parts = [Groups(out_features, rows, bits, size, symmetric, seed=bits, scale_dtype=scale_dtype)
                 for bits, rows, size in widths]  # fmt: skip
        self.in_features = sum(rows for _, rows, _ in widths)
        random = torch.Generator().manual_seed(self.in_features)
        self.q_perm = torch.randperm(self.in_features, generator=random) if ordered else None
        self.weight, self.scales = (torch.cat([getattr(p, name) for p in parts]) for name in ("weight", "scales"))
        self.zeros = None if symmetric else torch.cat([part.zeros for part in parts if part.zeros is not None])
        self.bias = parts[0].bias
        self.blocks = [n for block in widths for n in block]
        self.W = torch.cat([part.W for part in parts], 1)
        if self.q_perm is not None:
            self.W = torch.empty_like(self.W).index_copy_(1, self.q_perm, self.W)

    def args(self, device: Any = "cpu") -> tuple[Any, ...]:
        """weight, scales, zeros, bias, q_perm, blocks."""
        tensors = (self.weight, self.scales, self.zeros, self.bias, self.q_perm)
        return (*(None if t is None else t.to(device) for t in tensors), self.blocks)

    def exact(self, x: Tensor) -> Tensor:
        """In float64, on the CPU."""
        return x.cpu().double() @ self.W.T + self.bias.double()

    def gradients(self, x: Tensor, needs: list[bool]) -> tuple[Tensor, ...]:
        """Of x, scales and zeros, where a random gradient of x's dtype comes in; by the operator, on x's device."""
        weight, scales, zeros, _, *rest = self.args(x.device)
        return torch.ops.hf_onebit.mbwq_linear_backward.default(
            self._grad(x).to(x.device), x, weight, scales, zeros, *rest, needs
        )

    def exact_gradients(self, x: Tensor, needs: list[bool]) -> tuple[Tensor, ...]:
        """The same in float64, on the CPU, by the reference of each block; that of x by the dense twin."""
        weight, scales, zeros, _, *rest = self.args()
        doubles = (scales.double(), None if zeros is None else zeros.double())
        grad = self._grad(x).double()
        found = torch.ops.hf_onebit.mbwq_linear_backward.default(grad, x.cpu().double(), weight, *doubles, *rest, needs)
        return (grad @ self.W, *found[1:])

    def _grad(self, x: Tensor) -> Tensor:
        random = torch.Generator().manual_seed(1)
        return torch.randn(x.shape[0], self.W.shape[0], generator=random).to(x.dtype)


def check(y: Tensor, exact: Tensor, factor: float = 1.0) -> None:
    """Dtype-sized agreement with float64; NaN never passes."""
    assert y.shape == exact.shape
    got = y.detach().cpu().double()
    error = float((got - exact).norm() / exact.norm().clamp(min=1e-30))
    assert error <= RELATIVE[y.dtype] * factor, f"{error:.2e} in {y.dtype}"
    # A single wrong element may hide in the norm of many.
    worst = float((got - exact).abs().max() / exact.abs().max().clamp(min=1e-30))
    assert worst <= RELATIVE[y.dtype] * factor * 4, f"{worst:.2e} of the largest in {y.dtype}"
