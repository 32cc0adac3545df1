"""A layer's Hessian made ready for use: scaled, shrunk towards its diagonal, damped, factored."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["DAMPING", "SOLVE_DAMPING", "Curvature", "check_fit", "cholesky", "shrink"]

# Damping, as a fraction of the mean of H's diagonal: what every solve starts from, raised tenfold while it fails.
DAMPING = 1e-2
SOLVE_DAMPING = 1e-6
_MOST_DAMPING = 1e6


class Curvature:
    """A Hessian made ready for use: scaled to a mean diagonal of 1, shrunk and damped; layers of one input share it.

    Args:
        H: (in, in) Hessian of the inputs, symmetric and positive semi-definite up to rounding; its scale does not
            matter. All zero means that nothing is known: then the inputs count alike.
        shrinkage: share of the off-diagonal entries to give up, 0 to 1 (``shrink``).
        damping: added to the diagonal as a fraction of its mean, >= 0.

    Attributes:
        H: (in, in) float32, positive definite in all but pathological cases.
        shrinkage: as given.

    Raises:
        ValueError: H is not square, or not finite.
    """

    def __init__(self, H: Tensor, shrinkage: float = 0.0, damping: float = DAMPING) -> None:
        if H.ndim != 2 or H.shape[0] != H.shape[1]:
            raise ValueError(f"the Hessian must be a square matrix (in, in), got shape {tuple(H.shape)}")
        if not bool(torch.isfinite(H).all()):
            raise ValueError(
                "the Hessian holds NaN or infinite values (calibration activations overflowed): calibrate in float32 "
                "or bfloat16"
            )
        self.shrinkage = shrinkage
        mean = float(H.diagonal().double().clamp(min=0).mean())
        if mean > 0:
            self.H = shrink(H.detach().float() / mean, shrinkage)
            self.H.diagonal().clamp_(min=0).add_(damping)
        else:
            self.H = torch.eye(H.shape[0], device=H.device)
        self._feedback: tuple[Tensor, Tensor] | None = None

    def feedback(self) -> tuple[Tensor, Tensor]:
        """The order in which columns are rounded, by falling H_jj, and the upper unit U with H = U D Uᵀ in that order.

        D is diagonal, so that the loss is Σ_k D_kk ‖Σ_{j <= k} (W − Q)_j U_jk‖²: what the columns before k lost asks
        column k for the target w_k + Σ_{j < k} (W − Q)_j U_jk.
        """
        if self._feedback is None:
            order = self.H.diagonal().argsort(descending=True, stable=True)
            backwards = order.flip(0)  # the lower factor of H turned round is the upper one turned round
            factor = cholesky(self.H[backwards][:, backwards], 0.0)
            factor.div_(factor.diagonal().clone())
            self._feedback = order, factor.flip(0, 1).contiguous()
        return self._feedback


def check_fit(W: Tensor, curvature: Curvature, rounds: int, layer: str | None) -> None:
    """Refuse what no layer is fitted to under a curvature.

    Args:
        W: (out, in) weights, or targets in their place.
        curvature: of the inputs.
        rounds: how many a fit is asked for.
        layer: the layer's name, for the message.

    Raises:
        ValueError: W is no matrix of floats, the curvature is of another number of inputs, or ``rounds`` is negative.
    """
    name = f"layer {layer!r}" if layer else "this weight"
    if W.ndim != 2 or not W.numel() or not W.is_floating_point():
        raise ValueError(f"{name}: expected a non-empty float matrix (out, in), got {W.dtype} of {tuple(W.shape)}")
    if curvature.H.shape[0] != W.shape[1]:
        raise ValueError(
            f"{name}: the Hessian must have shape ({W.shape[1]}, {W.shape[1]}), got {tuple(curvature.H.shape)}"
        )
    if rounds < 0:
        raise ValueError(f"{name}: rounds must be >= 0, got {rounds}")


def shrink(H: Tensor, gamma: float) -> Tensor:
    """(1 − γ) H + γ diag(H): what is left of the correlations when they are trusted less."""
    shrunk = H * (1 - gamma)
    shrunk.diagonal().copy_(H.diagonal())
    return shrunk


def cholesky(A: Tensor, damping: float) -> Tensor:
    """The lower factor of A + damping · I, the damping raised tenfold for as long as A is not definite enough.

    A has a mean diagonal near 1, so the largest damping always succeeds on finite numbers.
    """
    diagonal = A.diagonal().clone()
    while damping <= _MOST_DAMPING:
        A.diagonal().add_(damping)  # in place and back: a copy of A may be half a gigabyte
        factor, failed = torch.linalg.cholesky_ex(A)
        A.diagonal().copy_(diagonal)
        if int(failed) == 0:
            return factor
        damping = max(damping * 10, SOLVE_DAMPING)
    raise ValueError("a Hessian holds NaN or infinite values: calibrate in float32 or bfloat16")
