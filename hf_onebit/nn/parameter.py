"""``MPQWeightParameter``: packed codes as a parameter that knows what they mean and can be trained.

PyTorch lets only floating tensors require gradients, and a gradient must have its tensor's shape; packed words can do
neither. So of a packed parameter these are views in Python, and autograd never learns of them:

* ``requires_grad`` is a flag of the object. The module that holds it makes backward add the gradient of the float
  weight that the words stand for to ``privileged_grad`` where the flag is set.
* ``grad`` is ``privileged_grad``, of shape ``(in, out)``; so ``zero_grad`` and clipping by norm work.

The module that holds it keeps its attributes pointing at its own scales, zeros and indices: see ``nn.binding``.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from hf_onebit.formats.weight_layout import WeightLayout, check_rows, layout_of, require_supported
from hf_onebit.nn.packed_update import Step, update_words

__all__ = ["GradientFlag", "MPQWeightParameter"]

_TENSORS = (
    "privileged_grad",
    "scales",
    "zeros",
    "g_idx",
    "q_perm",
    "qscales_zeros",
    "qscales_scales",
    "qzeros_zeros",
    "qzeros_scales",
    "q_group_map",
)
_NUMBERS = ("w_bit", "group_size", "layer_type")
_FLAG = "gradient_flag"
# What the views below stand before.
_NATIVE_FLAG: Any = torch.Tensor.requires_grad
_NATIVE_GRAD: Any = torch.Tensor.grad


class GradientFlag:
    """``requires_grad`` of packed words; an object, so that traced code can ask without touching the words."""

    __slots__ = ("on",)

    def __init__(self, on: bool = False) -> None:
        self.on = on


class MPQWeightParameter(nn.Parameter):
    """A weight in group-quantized codes, with what they mean.

    Of the modules of this package: ``data`` is int32 ``(words, out)``, see docs/formats.md. Any other tensor will do;
    then it is an ordinary parameter with attributes.

    Args:
        data: the words, or any tensor; an empty one if None.
        requires_grad: for integer data, whether backward adds to ``privileged_grad``.
        privileged_grad: ``(in, out)`` float, the gradient of the float weight, inputs in their own order.
        scales: ``(groups, out)`` float.
        zeros: ``(groups, out)`` float, already multiplied by the scales; or int32, packed zero points less one as GPTQ
            stores them; or None: code 2^(w_bit - 1) means 0.
        g_idx: ``(in,)`` integer, group of each input; None: neighbours share one.
        w_bit: width of one code.
        asym: whether there are ``zeros``.
        group_size: inputs that share a scale; -1 for all of them.
        layer_type: 1 for ``MPQLinear``, 2 for ``MBWQLinear``.
        q_perm: ``(in,)`` integer, the input of each packed row; int16 is read as unsigned.
        qscales_zeros, qscales_scales, qzeros_zeros, qzeros_scales: what doubly quantized statistics were restored
            with; carried, and used by nothing.
        q_group_map: ``(2 * in,)`` integer, for each packed row its group and how many rows of that are left.
        rows: seven whole numbers: where the blocks of 8, 6, 5, 4, 3 and 2 bits end, and a mask of the widths.

    Raises:
        TypeError: an argument of another type.
        ValueError: an argument of a shape or dtype that it cannot have.
    """

    privileged_grad: Tensor | None
    scales: Tensor | None
    zeros: Tensor | None
    g_idx: Tensor | None
    w_bit: int
    asym: bool
    group_size: int
    layer_type: int
    q_perm: Tensor | None
    qscales_zeros: Tensor | None
    qscales_scales: Tensor | None
    qzeros_zeros: Tensor | None
    qzeros_scales: Tensor | None
    q_group_map: Tensor | None
    rows: list[int] | None
    gradient_flag: GradientFlag

    def __new__(cls, data: Tensor | None = None, requires_grad: bool = True, *args: Any, **kwargs: Any) -> Any:
        if data is None:
            data = torch.empty(0)
        if not isinstance(data, Tensor):
            raise TypeError(f"MPQWeightParameter got data of type {type(data).__name__}, expected a tensor or None")
        learns = bool(requires_grad) and (data.is_floating_point() or data.is_complex())
        return torch.Tensor._make_subclass(cls, data.detach(), learns)

    def __init__(
        self,
        data: Tensor | None = None,
        requires_grad: bool = True,
        privileged_grad: Tensor | None = None,
        scales: Tensor | None = None,
        zeros: Tensor | None = None,
        g_idx: Tensor | None = None,
        w_bit: int = -1,
        asym: bool = False,
        group_size: int = -1,
        layer_type: int = -1,
        q_perm: Tensor | None = None,
        qscales_zeros: Tensor | None = None,
        qscales_scales: Tensor | None = None,
        qzeros_zeros: Tensor | None = None,
        qzeros_scales: Tensor | None = None,
        q_group_map: Tensor | None = None,
        rows: list | None = None,
    ) -> None:
        given = {key: value for key, value in locals().items() if key in (*_TENSORS, *_NUMBERS, "asym", "rows")}
        _check_arguments(self, given)
        vars(self).update(given)
        vars(self)[_FLAG] = GradientFlag(bool(requires_grad))

    @classmethod
    def adopt(cls, parameter: nn.Parameter) -> MPQWeightParameter:
        """Make a plain parameter of integers one of these, frozen, without a new object: others may hold it too."""
        parameter.__class__ = cls
        vars(parameter).update(dict.fromkeys((*_TENSORS, "rows")), asym=False, **dict.fromkeys(_NUMBERS, -1))
        vars(parameter)[_FLAG] = GradientFlag()
        assert isinstance(parameter, cls)
        return parameter

    # -- what autograd cannot do ------------------------------------------------------------------------------------

    @property
    def is_packed(self) -> bool:
        """Whether the data are integers, which autograd knows nothing of."""
        return not (self.is_floating_point() or self.is_complex())

    @property
    def requires_grad(self) -> bool:
        if self.is_packed:
            return self.gradient_flag.on
        return bool(_NATIVE_FLAG.__get__(self))

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self.gradient_flag.on = bool(value)
        if not self.is_packed:
            _NATIVE_FLAG.__set__(self, value)

    def requires_grad_(self, requires_grad: bool = True) -> MPQWeightParameter:
        """Set ``requires_grad``; returns the parameter."""
        self.requires_grad = requires_grad
        return self

    @property
    def grad(self) -> Tensor | None:
        if self.is_packed:
            return vars(self).get("privileged_grad")
        found: Tensor | None = _NATIVE_GRAD.__get__(self)
        return found

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        if self.is_packed:
            self.privileged_grad = value
        else:
            _NATIVE_GRAD.__set__(self, value)

    @torch.no_grad()
    def add_gradient(self, x: Tensor, grad: Tensor) -> None:
        """Add xᵀ grad, the gradient of the float weight ``(in, out)``, to ``privileged_grad``.

        Args:
            x: ``(..., in)``, what the layer was given.
            grad: ``(..., out)``, the gradient of its result.
        """
        dtype = torch.float64 if grad.dtype == torch.float64 else torch.float32
        G = x.reshape(-1, x.shape[-1]).to(dtype).T @ grad.reshape(-1, grad.shape[-1]).to(dtype)
        old = self.privileged_grad
        self.privileged_grad = G if old is None else old.add_(G)

    # -- copies -----------------------------------------------------------------------------------------------------

    def __deepcopy__(self, memo: dict[int, Any]) -> MPQWeightParameter:
        if id(self) in memo:
            found: MPQWeightParameter = memo[id(self)]
            return found
        result = type(self)(self.data.clone(memory_format=torch.preserve_format), self.requires_grad)
        memo[id(self)] = result
        # The memo makes the copied module's scales and the ones here the same tensors again.
        vars(result).update({key: copy.deepcopy(value, memo) for key, value in vars(self).items()})
        return result

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (type(self), self.data, self.requires_grad), dict(vars(self))

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)

    # -- training ---------------------------------------------------------------------------------------------------

    def weight_layout(self, in_features: int | None = None) -> WeightLayout:
        """What the attributes say of the words; see ``formats.weight_layout``.

        Raises:
            NotImplementedError: a layer type or width that there is not.
            ValueError: attributes that do not belong together.
        """
        known = vars(self).get("in_features") if in_features is None else in_features
        return layout_of(self, known)

    @torch.no_grad()
    def float_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The float weight ``(in, out)``, inputs in their own order.

        Raises:
            NotImplementedError, ValueError: as :meth:`weight_layout`.
        """
        layout = self.weight_layout()
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        scale, offset = layout.affine(slice(None), compute)
        W = (layout.unpack(self.data).to(compute).mul_(scale).sub_(offset)).to(dtype)
        return W if layout.perm is None else torch.empty_like(W).index_copy_(0, layout.perm, W)

    @staticmethod
    @torch.no_grad()
    def update(
        qweight: nn.Parameter,
        exp_avg_s: Tensor | None = None,
        exp_avg_l: Tensor | None = None,
        step: Tensor | None = None,
        lr: float = 0.0001,
        weight_decay: float = 0.0,
        beta1: float = 0.99,
        beta2: float = 0.9999,
        eps: float = 1e-06,
        dtype: torch.dtype = torch.float16,
        correct_bias: Any = None,
        projector: Any = None,
        grad: Tensor | None = None,
    ) -> None:
        """One step of Adam on packed codes, in place, rounded to the nearest codes: the rule of ``algorithms.update``.

        Scales and zeros stay as they are, so a step of less than half of one vanishes. Arithmetic is float32 at least:
        in half precision second moments vanish.

        Args:
            qweight: an ``MPQWeightParameter`` of integers.
            exp_avg_s: second moment, of the gradient's shape; changed in place. None: as if it were zero.
            exp_avg_l: first moment, of the gradient's shape; changed in place. None: as if it were zero.
            step: one number, how many steps there were; 1 is added in place. None: this is the first.
            lr: learning rate.
            weight_decay: decoupled: the weight shrinks by the factor 1 - lr · weight_decay.
            beta1, beta2: decay of the first and of the second moment.
            eps: added to the root of the second moment.
            dtype: of the arithmetic, where it is wider than float32.
            correct_bias: whether the moments' start at zero is corrected for.
            projector: has ``project_back(tensor)``, and ``project(tensor, step)`` where the gradient is not projected
                yet: the moments are of the projected shape.
            grad: gradient of the float weight ``(in, out)``, or the projected one; ``privileged_grad`` if None.

        Raises:
            NotImplementedError: a layer type or width that there is not.
            TypeError: ``qweight`` is no ``MPQWeightParameter``.
            ValueError: no gradient, one that is not finite, or shapes or attributes that do not belong together.
                What is raised here leaves everything as it was.
        """
        if not isinstance(qweight, MPQWeightParameter):
            raise TypeError(f"update got a {type(qweight).__name__}, expected an MPQWeightParameter")
        require_supported(qweight)
        gradient = qweight.privileged_grad if grad is None else grad
        if gradient is None:
            raise ValueError("update got no gradient: grad is None and so is privileged_grad; run backward first")
        known = vars(qweight).get("in_features")
        rows = gradient.shape[0] if known is None and projector is None and gradient.dim() == 2 else known
        update_words(
            qweight.data,
            layout_of(qweight, rows),
            gradient,
            Step(exp_avg_s, exp_avg_l, step, lr, weight_decay, beta1, beta2, eps, dtype, bool(correct_bias), projector),
        )


def _rebuild(cls: type[MPQWeightParameter], data: Tensor, requires_grad: bool) -> MPQWeightParameter:
    return cls(data, requires_grad)


def _check_arguments(weight: Tensor, given: dict[str, Any]) -> None:
    what = "MPQWeightParameter"
    for name in _TENSORS:
        if given[name] is not None and not isinstance(given[name], Tensor):
            raise TypeError(f"{what} got {name} of type {type(given[name]).__name__}, expected a tensor or None")
    for name in _NUMBERS:
        if isinstance(given[name], bool) or not isinstance(given[name], int):
            raise TypeError(f"{what} got {name}={given[name]!r}, expected a whole number")
    if not isinstance(given["asym"], bool):
        raise TypeError(f"{what} got asym={given['asym']!r}, expected True or False")
    if given["rows"] is not None:
        check_rows(given["rows"])
    for name in ("g_idx", "q_perm", "q_group_map"):
        tensor = given[name]
        if tensor is not None and (tensor.is_floating_point() or tensor.is_complex() or tensor.dim() != 1):
            raise ValueError(
                f"{what} got {name} of {tensor.dtype} {tuple(tensor.shape)}, expected integers of one dimension"
            )
    if given["q_group_map"] is not None and given["q_group_map"].numel() % 2:
        raise ValueError(f"{what} got a q_group_map of {given['q_group_map'].numel()} numbers, expected pairs")
    scales, zeros = given["scales"], given["zeros"]
    for name, tensor in (("scales", scales), ("privileged_grad", given["privileged_grad"])):
        if tensor is not None and not tensor.is_floating_point():
            raise ValueError(f"{what} got {name} of {tensor.dtype}, expected floating point")
    if scales is not None and weight.dim() == 2 and (scales.dim() != 2 or scales.shape[1] != weight.shape[1]):
        raise ValueError(
            f"{what} got scales of shape {tuple(scales.shape)}, expected (groups, {weight.shape[1]}): one column for "
            "each column of the data"
        )
    if scales is not None and zeros is not None and zeros.is_floating_point() and zeros.shape != scales.shape:
        raise ValueError(f"{what} got zeros of shape {tuple(zeros.shape)}, expected scales' {tuple(scales.shape)}")
    if zeros is not None and not zeros.is_floating_point() and not given["asym"]:
        raise ValueError(
            f"{what} got integer zeros with asym=False, expected asym=True: packed zero points are asymmetric"
        )
