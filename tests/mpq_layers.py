"""Arguments of mpq_linear with their float64 result, for several test files."""

import torch
from torch import Tensor

from hf_onebit.formats import mpq
from hf_onebit.formats.packing import pack


class Layer:
    """Arguments of mpq_linear; the float64 result with the bound of docs/kernels.md."""

    def __init__(self, rows=3, in_features=70, out_features=21, bits=4, group_size=32, symmetric=False, bias=False,
                 dtype=torch.float32, scale_dtype=torch.float16, seed=0, constant=False):  # fmt: skip
        generator = torch.Generator().manual_seed(seed)

        def randn(*shape: int) -> Tensor:
            return torch.full(shape, 0.1 + seed % 7 / 9) if constant else torch.randn(shape, generator=generator)

        self.bits, self.group_size = bits, group_size
        groups = mpq.group_count(in_features, group_size)
        codes = torch.randint(0, 1 << bits, (out_features, in_features), generator=generator, dtype=torch.uint8)
        if constant:
            codes = codes.fill_((1 << bits) - 1)  # every rounding in one direction
        self.weight = pack(codes, bits)
        if in_features % 32:
            self.weight[-1] |= -(1 << 31)  # padding must not count
        self.x = randn(rows, in_features).to(dtype)
        self.scales = randn(groups, out_features).to(scale_dtype)
        middle = ((1 << bits) - 1) / 2
        zeros = self.scales.float() * middle + randn(groups, out_features)
        self.zeros = None if symmetric else zeros.to(scale_dtype)
        self.bias = randn(out_features).to(scale_dtype) if bias else None
        # An independent float64 twin, from the codes and not from the words.
        group = torch.arange(in_features) // (max(in_features, 1) if group_size == -1 else group_size)
        s = self.scales.double()[group].T
        z = s * mpq.zero_point(bits) if self.zeros is None else self.zeros.double()[group].T
        self.W = s * codes.double() - z
        self.size = s.abs() * middle + (z - s * middle).abs()

    def args(self) -> tuple:
        return self.x, self.weight, self.scales, self.zeros, self.bias, self.bits, self.group_size

    def exact(self) -> tuple[Tensor, Tensor]:
        y, bound = self.x.double() @ self.W.T, self.x.double().abs() @ self.size.T
        if self.bias is not None:
            y, bound = y + self.bias.double(), bound + self.bias.double().abs()
        return y, bound

    def check(self, linear, allowed: float = 1e-6) -> Tensor:
        y = linear(*self.args())
        exact, bound = self.exact()
        assert y.dtype == self.x.dtype
        assert y.shape == exact.shape
        assert y.is_contiguous()
        eps = torch.finfo(y.dtype).eps
        if y.dtype == torch.float64:
            allowed = 1e-14
        elif y.dtype == torch.float32:
            eps = 0  # its own rounding is inside the bound
        error = (y.double() - exact).abs()
        limit = allowed * bound + 0.51 * eps * exact.abs() + torch.finfo(y.dtype).smallest_normal
        assert (error <= limit).all(), float((error / bound.clamp(min=1e-30)).max())
        return y


def spread(tensor: Tensor | None) -> Tensor | None:
    """The same values as every second entry of a larger tensor full of NaN (of ones if it is packed)."""
    if tensor is None:
        return None
    wide = tensor.new_full([2 * n + 1 for n in tensor.shape], float("nan") if tensor.is_floating_point() else -1)
    return wide[tuple(slice(1, None, 2) for _ in tensor.shape)].copy_(tensor)
