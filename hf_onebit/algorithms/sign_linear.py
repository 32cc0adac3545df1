"""The training form of a one-bit layer: frozen dense signs, scales that learn.

The matrix W = diag(a) S diag(b) is folded once a step and used like any other matrix, so a step multiplies no
activation by a scale. The scales' gradients need no gradient of W. With y = W x and g_y, g_x the gradients of the loss
by y and by this layer's x, each taken at token t,

    ∂L/∂a_i = (1/a_i) Σ_t g_y[t,i] y[t,i],        ∂L/∂b_j = (1/b_j) Σ_t g_x[t,j] x[t,j],

since y_i is linear in a_i, and the loss sees b_j only through b_j x_j. Backward costs the one product that g_x needs.

Several planes are one matrix W = Σ_k W_k, multiplied once. G = Σ_t g_y[t] x[t]ᵀ has the gradients of them all, and
those of signs that learn and of flips, so it also serves a single plane where these are wanted:

    ∂L/∂a_i = (1/a_i) Σ_j G_ij W_k,ij,            ∂L/∂b_j = (1/b_j) Σ_i G_ij W_k,ij.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_onebit.algorithms.weight_gradient import weight_gradient


@dataclass
class SignGradient:
    """What flips are chosen by: sums over what was seen since the last reset.

    Attributes:
        weight: float32 (out, in), Σ_k G_k over backward passes k, the gradient of the loss by W.
        squares: float32 (out, in), Σ_k G_k²; passes: how many k.
        outputs: float32 (out,), Σ_t g_y² over tokens t; inputs: float32 (in,), Σ_t x²; rows: how many t.
    """

    weight: Tensor
    squares: Tensor
    outputs: Tensor
    inputs: Tensor
    rows: int = 0
    passes: int = 0


class SignPlane(nn.Module):
    """One plane: y = diag(a) S diag(b) x.

    Where it has a ``latent`` (``latents.SignLatents``), W takes the latent's signs, and backward adds ∂L/∂W ⊙ a bᵀ
    to ``latent.grad``; ``signs`` are behind until the latents are published. A latent that ``stands_for_two`` planes
    (``pair_latents.PairLatents``) has the gradient alike, and W the ``signs``.

    Args:
        signs: (out, in), values above zero mean +1, all others −1.
        a: (out,) and b: (in,), any float dtype; trained in float32. An entry that is exactly zero stays zero.
        dtype: of the products. The plane takes 1 byte a weight for the signs and this dtype's size for W.

    Raises:
        ValueError: shapes that do not belong together.
    """

    def __init__(self, signs: Tensor, a: Tensor, b: Tensor, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        if signs.shape != (len(a), len(b)):
            raise ValueError(
                f"SignPlane: signs have shape {tuple(signs.shape)}, expected (out, in) = ({len(a)}, {len(b)})"
            )
        self.signs = torch.where(signs > 0, 1, -1).to(torch.int8).contiguous()
        self.a = nn.Parameter(a.detach().float().clone())
        self.b = nn.Parameter(b.detach().float().clone())
        self.folded = torch.empty(signs.shape, dtype=dtype, device=signs.device)
        self.sign_gradient: SignGradient | None = None
        self.latent: Tensor | None = None
        self.stands_for_two = False
        self.fold()

    @torch.no_grad()
    def fold(self) -> None:
        """Make W from the signs and scales as they are now; whoever changes any of them calls this."""
        if self.latent is None or self.stands_for_two:
            self.folded.copy_(torch.outer(self.a, self.b)).mul_(self.signs)
        else:  # once a step: few passes over the matrix
            signs = torch.copysign(self.a.new_ones(()), self.latent)
            self.folded.copy_(signs.mul_(self.a[:, None]).mul_(self.b))

    def collect_sign_gradient(self, enabled: bool = True) -> None:
        """Start, at zero, to sum what flips are chosen by, or stop and free it (8 bytes a weight)."""
        self.sign_gradient = None
        if enabled:
            weight, squares = (torch.zeros(self.signs.shape, device=self.signs.device) for _ in range(2))
            self.sign_gradient = SignGradient(weight, squares, torch.zeros_like(self.a), torch.zeros_like(self.b))

    @property
    def needs_weight_gradient(self) -> bool:
        """Whether backward must find ∂L/∂W: signs learn, or flips are chosen."""
        return self.latent is not None or self.sign_gradient is not None

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), in the dtype of the products."""
        x = x.to(self.folded.dtype)
        if self.needs_weight_gradient:
            return _product_of_all([self], x)
        y: Tensor = _FoldedProduct.apply(x, self.a, self.b, self.folded)
        return y

    def _apply(self, fn: Any, recurse: bool = True) -> SignPlane:
        # Scales stay float32 and products in their dtype: only the device may change.
        device = fn(torch.empty(0, device=self.a.device)).device
        for scale in (self.a, self.b):
            scale.data = scale.data.to(device)
        self.signs, self.folded = self.signs.to(device), self.folded.to(device)
        return self


class SignLinear(nn.Module):
    """A layer in training form: the sum of its planes, and the bias.

    Args:
        planes: (signs, a, b) of each plane, as for ``SignPlane``.
        bias: (out,) or None; copied.
        dtype: of the products.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        planes: Sequence[tuple[Tensor, Tensor, Tensor]],
        bias: Tensor | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        super().__init__()
        self.planes = nn.ModuleList(SignPlane(*plane, dtype=dtype) for plane in planes)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach().float().clone()))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out) in x's dtype."""
        if not len(self.planes):
            raise ValueError("SignLinear: expected at least one plane, got none")
        planes: list[SignPlane] = list(self.planes)  # type: ignore[arg-type]
        total = planes[0](x) if len(planes) == 1 else _product_of_all(planes, x.to(planes[0].folded.dtype))
        if self.bias is not None:
            total = total + self.bias.to(total.dtype)
        return total.to(x.dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> SignLinear:
        for plane in self.planes:
            plane._apply(fn)
        if self.bias is not None:
            self.bias.data = self.bias.data.to(fn(torch.empty(0, device=self.bias.device)).device)
        return self


def sign_planes(model: nn.Module) -> dict[str, SignPlane]:
    """Every plane in training form, by its name in the model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SignPlane)}


class _FoldedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, W: Tensor) -> Tensor:
        y = F.linear(x, W)
        _, needs_a, needs_b = ctx.needs_input_grad[:3]
        ctx.save_for_backward(x if needs_b else None, y if needs_a else None, a, b, W)
        return y

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        x, y, a, b, W = ctx.saved_tensors
        needs_x, _, needs_b = ctx.needs_input_grad[:3]
        gx = gy @ W if needs_x or needs_b else None
        ga = None if y is None else _column_dot(gy, y) / _nonzero(a)
        gb = _column_dot(gx, x) / _nonzero(b) if needs_b and gx is not None else None
        return gx if needs_x else None, ga, gb, None


def _product_of_all(planes: Sequence[SignPlane], x: Tensor) -> Tensor:
    """(..., in) -> (..., out), the sum of all planes' products; backward fills what each of them collects."""
    scales = [scale for plane in planes for scale in (plane.a, plane.b)]
    y: Tensor = _ProductOfAll.apply(x, planes, *scales, *(plane.folded for plane in planes))
    return y


def _sum(matrices: Sequence[Tensor]) -> Tensor:
    total = matrices[0]
    for W in matrices[1:]:
        total = total + W
    return total


class _ProductOfAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, planes: Sequence[SignPlane], *tensors: Tensor) -> Tensor:
        ctx.planes = planes
        ctx.save_for_backward(x, *tensors)
        return F.linear(x, _sum(tensors[2 * len(planes) :]))

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        planes: Sequence[SignPlane] = ctx.planes
        x, *tensors = ctx.saved_tensors
        scales, folded = tensors[: 2 * len(planes)], tensors[2 * len(planes) :]
        gx = gy @ _sum(folded) if ctx.needs_input_grad[0] else None
        if not any(ctx.needs_input_grad[1:]) and not any(plane.needs_weight_gradient for plane in planes):
            return gx, *(None for _ in ctx.needs_input_grad[1:])
        G = weight_gradient(gy, x)
        found: list[Tensor | None] = []
        for k, (plane, W) in enumerate(zip(planes, folded, strict=True)):
            needs_a, needs_b = ctx.needs_input_grad[2 + 2 * k : 4 + 2 * k]
            products = G * W if needs_a or needs_b else None
            a, b = scales[2 * k : 2 * k + 2]
            found.append(products.sum(1) / _nonzero(a) if products is not None and needs_a else None)
            found.append(_row_sum(products) / _nonzero(b) if products is not None and needs_b else None)
            if plane.latent is not None:
                own = (G * a[:, None]).mul_(b)
                plane.latent.grad = own if plane.latent.grad is None else plane.latent.grad.add_(own)
            if plane.sign_gradient is not None:
                _collect(plane.sign_gradient, G, gy, x)
        return gx, None, *found, *(None for _ in folded)


def _collect(gradient: SignGradient, G: Tensor, gy: Tensor, x: Tensor) -> None:
    rows, columns = gy.reshape(-1, gy.shape[-1]), x.reshape(-1, x.shape[-1])
    gradient.weight += G
    gradient.squares.addcmul_(G, G)
    gradient.passes += 1
    gradient.outputs += rows.float().square().sum(0)
    gradient.inputs += columns.float().square().sum(0)
    gradient.rows += len(rows)


def _row_sum(matrix: Tensor) -> Tensor:
    """Σ_i of rows i: a product with a row of ones, faster than a sum over a strided axis."""
    return (matrix.new_ones(1, len(matrix)) @ matrix)[0]


def _column_dot(u: Tensor, v: Tensor) -> Tensor:
    """Σ_t u[t,:] v[t,:] in float32."""
    return _row_sum((u * v).reshape(-1, u.shape[-1])).float()


def _nonzero(scales: Tensor) -> Tensor:
    # Where a scale is zero its sum is zero too: any divisor gives the gradient zero.
    return torch.where(scales == 0, torch.ones_like(scales), scales)
