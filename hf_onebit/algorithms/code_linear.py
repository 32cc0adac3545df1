"""The training form of a group-quantized layer: codes as bytes, scales and zeros that learn, and codes that follow.

The matrix W = s q − z is folded once a step and used like any other matrix. What learns beside the scale s is not z
but the centre c = s m − z of the group's range, m = 2^(bits − 1): W = s (q − m) + c, so that a step of s turns the
group about its centre and does not move it as a whole by m times that step. With the gradient g_W of the loss by W,
which backward forms once,

    ∂L/∂s_g = Σ_{j in g} g_W[j] (q_j − m),     ∂L/∂c_g = Σ_{j in g} g_W[j],     ∂L/∂u_j = g_W[j] s_g

u is the latent of a code, q = round(u): the gradient passes straight through the rounding (Bengio et al. 2013,
arXiv:1308.3432). All three learned together is the block-wise step of Chen et al. 2024 (arXiv:2407.11062).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_onebit.algorithms.distill import Trained
from hf_onebit.algorithms.gptq import GroupFit, Round
from hf_onebit.algorithms.latents import Latents
from hf_onebit.algorithms.weight_gradient import weight_gradient

__all__ = ["CodeLatents", "CodeLinear", "code_layers"]

# Latents start at most this far from their codes, so that the first step changes none.
_MOST_MARGIN = 0.49
# What is taken of the steps at two bits for each bit more.
_SHARE_BY_BIT = 0.3


class CodeLinear(nn.Module):
    """y = W x + bias with W = s q − z, the form in which a group-quantized layer trains.

    Args:
        fit: codes, scales, zeros and groups.
        bits: width of one code.
        group_size: inputs that share a scale, or -1 for all; not looked at where the fit has a ``g_idx``.
        bias: (out,) or None; copied.
        dtype: of the products. The layer takes 1 byte a weight for the codes and this dtype's size for W.
        rounding: what the file does to scales and zeros beyond float16; W is folded from what comes of it.

    Attributes:
        scales, centers: (groups, out) float32 parameters; ``centers`` is None in a symmetric layer.
        codes: (out, in) uint8.
        latent: (out, in) float32 whose gradient backward fills (``CodeLatents``), or None.
    """

    bias: nn.Parameter | None
    centers: nn.Parameter | None

    def __init__(
        self,
        fit: GroupFit,
        bits: int,
        group_size: int,
        bias: Tensor | None = None,
        dtype: torch.dtype = torch.bfloat16,
        rounding: Round | None = None,
    ) -> None:
        super().__init__()
        self.rounding = rounding
        n = fit.codes.shape[1]
        self.codes = fit.codes.clone()
        self.top = (1 << bits) - 1
        self.middle = 0.5 if bits == 1 else float(1 << (bits - 1))
        self.size = n if group_size == -1 else min(group_size, n)
        self.g_idx = None if fit.g_idx is None else fit.g_idx.long()
        self.scales = nn.Parameter(fit.scales.float().clone())
        centers = None if fit.zeros is None else nn.Parameter(self.scales.detach() * self.middle - fit.zeros.float())
        self.register_parameter("centers", centers)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach().float().clone()))
        self.folded = torch.empty(fit.codes.shape, dtype=dtype, device=fit.codes.device)
        self.latent: Tensor | None = None
        self.fold()

    def spread(self, statistics: Tensor) -> Tensor:
        """(groups, out) -> (out, in)."""
        columns = statistics.T
        if self.g_idx is not None:
            return columns[:, self.g_idx]
        return columns.repeat_interleave(self.size, 1)[:, : self.codes.shape[1]]

    def gather(self, values: Tensor) -> Tensor:
        """(out, in), summed over each group -> (groups, out)."""
        rows, n = values.shape
        if self.g_idx is not None:
            return values.new_zeros(rows, len(self.scales)).index_add_(1, self.g_idx, values).T
        missing = len(self.scales) * self.size - n
        return F.pad(values, (0, missing)).view(rows, len(self.scales), self.size).sum(-1).T

    @torch.no_grad()
    def statistics(self) -> tuple[Tensor, Tensor | None]:
        """Scales and zeros, (groups, out) float16, as the file holds them; no zeros in a symmetric layer."""
        scales = self.scales.half()
        zeros = None if self.centers is None else (scales.float() * self.middle - self.centers).half()
        if self.rounding is not None:
            rounded, rounded_zeros = self.rounding(scales.float(), None if zeros is None else zeros.float())
            return rounded.half(), None if rounded_zeros is None else rounded_zeros.half()
        return scales, zeros

    @torch.no_grad()
    def dense(self) -> Tensor:
        """W as float32, from the codes, scales and zeros that would be stored now."""
        scales, zeros = self.statistics()
        if zeros is None:
            return (self.codes.float() - self.middle).mul_(self.spread(scales.float()))
        return self.codes.float().mul_(self.spread(scales.float())).sub_(self.spread(zeros.float()))

    def codes_of(self, latent: Tensor) -> Tensor:
        """The codes nearest to latents, (out, in) uint8."""
        return latent.round().clamp_(0, self.top).to(torch.uint8)

    def trained(self, name: str) -> dict[str, Trained]:
        """Scales and centres as parameters that learn, in steps relative to the scales' size, by full names.

        A step of a scale counts where codes are far from the middle: it is as much smaller as those are far. And the
        finer the codes, the nearer the start is to where learning ends: at steps that help two bits, three get worse.
        """
        share = _SHARE_BY_BIT ** max(0, self.top.bit_length() - 2)
        spread = float((self.codes.float() - self.middle).square().mean().sqrt()) or 1.0
        found = {f"{name}.scales": Trained(self.scales, torch.float16, rate=share / max(1.0, spread))}
        if self.centers is not None:
            size = float(self.centers.detach().abs().mean()) or 1e-2
            rate = share * float(self.scales.detach().abs().mean()) / size
            # Zeros are rounded where W is folded, together with the scales they belong to.
            found[f"{name}.centers"] = Trained(self.centers, torch.float32, rate=rate)
        return found

    @torch.no_grad()
    def fold(self) -> None:
        """Make W, of the latents' codes where there are latents; whoever changes any of them calls this."""
        if self.latent is not None:
            self.codes.copy_(self.latent.round().clamp_(0, self.top))
        self.folded.copy_(self.dense())

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out) in x's dtype."""
        y: Tensor = _CodedProduct.apply(x.to(self.folded.dtype), self.scales, self.centers, self)
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)
        return y.to(x.dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> CodeLinear:
        # Statistics stay float32 and products in their dtype: only the device may change.
        device = fn(torch.empty(0, device=self.codes.device)).device
        for parameter in (self.scales, self.centers, self.bias):
            if parameter is not None:
                parameter.data = parameter.data.to(device)
        self.codes, self.folded = self.codes.to(device), self.folded.to(device)
        self.g_idx = None if self.g_idx is None else self.g_idx.to(device)
        return self


class _CodedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scales: Tensor, centers: Tensor | None, layer: CodeLinear) -> Tensor:
        ctx.layer = layer
        # W is written in place at the next fold: what backward needs of it is used before that.
        ctx.save_for_backward(x)
        return F.linear(x, layer.folded)

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        layer: CodeLinear = ctx.layer
        gx = gy @ layer.folded if ctx.needs_input_grad[0] else None
        gs = gc = None
        if ctx.needs_input_grad[1] or layer.latent is not None:
            gW = weight_gradient(gy, x)
            gs = layer.gather(gW * (layer.codes.float() - layer.middle))
            gc = None if layer.centers is None else layer.gather(gW)
            if layer.latent is not None:
                through = gW.mul_(layer.spread(layer.scales.detach()))
                layer.latent.grad = through if layer.latent.grad is None else layer.latent.grad.add_(through)
        return gx, gs, gc, None


class CodeLatents(Latents):
    """Codes that learn: the latents of some layers, and their optimizer (``blockwise.Discrete``).

    Args:
        layers: in training form.
        latents: {layer: (out, in) float, where the code would like to be}; the codes of a layer that is missing here
            stay as they are. Each starts nearer to its code than to another.
        betas: Adam's.

    Raises:
        ValueError: latents of another shape than their layer, or of a layer that is not there.
    """

    def __init__(
        self,
        layers: Mapping[str, CodeLinear],
        latents: Mapping[str, Tensor] | None = None,
        betas: tuple[float, float] = (0.9, 0.95),
    ) -> None:
        self.layers = dict(layers)
        super().__init__({name: self._start(name, wish) for name, wish in (latents or {}).items()}, betas)
        for name, latent in self.latents.items():
            self.layers[name].latent = latent

    @torch.no_grad()
    def _start(self, name: str, wish: Tensor) -> Tensor:
        if name not in self.layers:
            raise ValueError(f"CodeLatents: latents of {name!r}, which is not among the {len(self.layers)} layers")
        codes = self.layers[name].codes
        if wish.shape != codes.shape:
            raise ValueError(
                f"CodeLatents: latents of {name!r} have shape {tuple(wish.shape)}, expected {tuple(codes.shape)}"
            )
        return _near(wish.detach().to(codes.device).float(), codes)

    def _follow(self) -> None:
        for name, latent in self.latents.items():
            latent.clamp_(-_MOST_MARGIN, self.layers[name].top + _MOST_MARGIN)

    def publish(self) -> None:
        """Give the layers the codes of their latents, and fold all layers."""
        for layer in self.layers.values():
            layer.fold()

    def fold(self) -> None:
        """The same."""
        self.publish()

    def values(self) -> dict[str, Tensor]:
        """A copy of the codes that learn."""
        return {name: self.layers[name].codes_of(latent) for name, latent in self.latents.items()}

    @torch.no_grad()
    def go_back(self, values: Mapping[str, Tensor]) -> None:
        """Take other codes, each latent as near to its own as it was or at their border, and forget the moments."""
        for name, latent in self.latents.items():
            latent.copy_(_near(latent, values[name]))
        self.forget()

    def release(self) -> None:
        """Let the layers have no latents again; their codes stay as they are."""
        for layer in self.layers.values():
            layer.latent = None
        self.drop_gradients()

    def snapshot(self) -> dict[str, Tensor]:
        """A copy of all codes."""
        return {name: layer.codes.clone() for name, layer in self.layers.items()}

    @torch.no_grad()
    def restore(self, codes: Mapping[str, Tensor]) -> None:
        """Take these codes for good: latents no longer count."""
        self.release()
        for name, layer in self.layers.items():
            layer.codes.copy_(codes[name])
            layer.fold()

    def changed(self, first: Mapping[str, Tensor]) -> float:
        """Share of the codes that differ from these."""
        different = sum(int((layer.codes != first[name]).sum()) for name, layer in self.layers.items())
        return different / max(1, sum(codes.numel() for codes in first.values()))


def _near(latent: Tensor, codes: Tensor) -> Tensor:
    """Latents, but none so far from its code that another one is nearer."""
    base = codes.float()
    return (latent - base).nan_to_num_(0).clamp_(-_MOST_MARGIN, _MOST_MARGIN).add_(base)


def code_layers(model: nn.Module) -> dict[str, CodeLinear]:
    """Every such layer, by its name in the model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, CodeLinear)}
