"""``MPQWeightParameter``: packed codes as a parameter that knows what they mean and can be trained.

PyTorch lets only floating tensors require gradients, and a gradient must have its tensor's shape; packed words can do
neither. So of a packed parameter these are views in Python, and autograd never learns of them:

* ``requires_grad`` is a flag of the object. The module that holds it makes backward add the gradient of the float
  weight that the words stand for to ``privileged_grad`` where the flag is set.
* ``grad`` is ``privileged_grad``, of shape ``(in, out)``; so ``zero_grad`` and clipping by norm work.
* ``register_post_accumulate_grad_hook`` calls back in backward, after the last use of the weight has added its part.

How ``update`` rounds is said by attributes, which copies and moves keep: ``rounding`` ("stochastic", "nearest", or
"inertia" for codes of one bit), ``seed`` and ``stream`` of the random words, ``inertia`` that signs start with, and
``updates``, the number of steps that were not counted by the caller.

The module that holds it keeps its attributes pointing at its own scales, zeros and indices: see ``nn.binding``.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hf_onebit.argument_checks import shown
from hf_onebit.arithmetic import product_dtype
from hf_onebit.formats.weight_layout import WeightLayout, layout_of, require_supported
from hf_onebit.nn.packed_update import start_inertia, update_words
from hf_onebit.nn.parameter_checks import NUMBERS, TENSORS, check_arguments, check_update, checked_rounding
from hf_onebit.nn.update_step import Layout, Step, Tally

__all__ = ["REDUCER", "TRAINING", "GradientFlag", "MPQWeightParameter"]

_FLAG = "gradient_flag"
# What says how updates round; a parameter made anew by a move takes it over.
TRAINING = ("rounding", "seed", "stream", "inertia", "updates")
# What makes backward come to this very object; copies have none.
_HOOKS, _ANCHOR = "_gradient_hooks", "_gradient_anchor"
# Who averages its gradients over ranks: see nn.data_parallel.
REDUCER = "_gradient_reducer"
_OWN = (_HOOKS, _ANCHOR, REDUCER, "_dynamo_static_indices", "_fsdp_number")
# Numbers of a gradient that are multiplied at once.
_PRODUCT = 1 << 20
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
    rounding: str = "stochastic"
    seed: int = 0
    stream: int = 0
    inertia: float = 1e-3
    updates: int = 0

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
        names = (*TENSORS, *NUMBERS, "requires_grad", "asym", "rows")
        given = {key: value for key, value in locals().items() if key in names}
        check_arguments(self, given)
        vars(self)[_FLAG] = GradientFlag(given.pop("requires_grad"))
        vars(self).update(given)

    @classmethod
    def adopt(cls, parameter: nn.Parameter) -> MPQWeightParameter:
        """Make a plain parameter of integers one of these, frozen, without a new object: others may hold it too."""
        parameter.__class__ = cls
        vars(parameter).update(dict.fromkeys((*TENSORS, "rows")), asym=False, **dict.fromkeys(NUMBERS, -1))
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
            # The compiler takes no gradient of another dtype than its tensor's. One that a frozen weight has kept is
            # nothing to what it traces; weights that learn are left out of graphs.
            if torch.compiler.is_compiling() and not self.gradient_flag.on:
                return None
            return vars(self).get("privileged_grad")
        found: Tensor | None = _NATIVE_GRAD.__get__(self)
        return found

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        if self.is_packed:
            if value is not None and not (isinstance(value, Tensor) and value.is_floating_point()):
                raise TypeError(f"grad of packed words is {shown(value)}, expected None or a floating tensor (in, out)")
            self.privileged_grad = value
        else:
            _NATIVE_GRAD.__set__(self, value)

    @torch.no_grad()
    def add_gradient(self, x: Tensor, grad: Tensor) -> None:
        """Add xᵀ grad, the gradient of the float weight ``(in, out)``, to ``privileged_grad``.

        On a CPU that multiplies bfloat16, bfloat16 stays that: products are summed in float32, and the sums of one call
        are rounded to bfloat16, as those of a bfloat16 layer are, before they are added in float32.

        Args:
            x: ``(..., in)``, what the layer was given.
            grad: ``(..., out)``, the gradient of its result.
        """
        X, Y = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        if X.is_cpu and X.dtype == Y.dtype == torch.bfloat16 == product_dtype(X.device):
            self.privileged_grad = _add_bfloat16(self.privileged_grad, X, Y)
            return
        dtype = torch.float64 if grad.dtype == torch.float64 else torch.float32
        G = X.to(dtype).T @ Y.to(dtype)
        old = self.privileged_grad
        self.privileged_grad = G if old is None else old.add_(G)

    def gradient_anchor(self, device: torch.device) -> Tensor:
        """The empty tensor that learns in this weight's place: what is computed with it runs in backward."""
        anchor: Tensor | None = vars(self).get(_ANCHOR)
        if anchor is None or anchor.device != device:
            anchor = vars(self)[_ANCHOR] = torch.empty(0, device=device, requires_grad=True)
            if vars(self).get(_HOOKS):
                self._hook_anchor(anchor)
        return anchor

    def register_post_accumulate_grad_hook(self, hook: Callable[[Any], None]) -> RemovableHandle:
        """Call ``hook(parameter)`` in backward, once all uses of the weight have added to its gradient.

        As for float parameters, where it is PyTorch's own. By then backward needs the words no more, so the hook may
        update them and drop the gradient. With reentrant checkpointing each checkpointed part is a backward pass of
        its own, and the hook is called in each that uses the weight.
        """
        if not self.is_packed:
            native: RemovableHandle = super().register_post_accumulate_grad_hook(hook)
            return native
        hooks: OrderedDict[int, Callable[[Any], None]] = vars(self).setdefault(_HOOKS, OrderedDict())
        handle = RemovableHandle(hooks)
        anchor = vars(self).get(_ANCHOR)
        if not hooks and anchor is not None:
            self._hook_anchor(anchor)
        hooks[handle.id] = hook
        return handle

    def _hook_anchor(self, anchor: Tensor) -> None:
        # The anchor is this parameter's own; weakly, so that the two are no circle through the autograd engine.
        here = weakref.ref(self)

        def call(_: Tensor) -> None:
            weight = here()
            if weight is not None:
                for hook in list(vars(weight).get(_HOOKS, {}).values()):
                    hook(weight)

        if not vars(anchor).get("hooked"):
            anchor.register_post_accumulate_grad_hook(call)
            vars(anchor)["hooked"] = True

    @property
    def _fsdp_orig_uid(self) -> int:
        """What FSDP2 numbers the parameters with that it is about to shard; so it is asked whether that can be."""
        if self.gradient_flag.on and "in_features" in vars(self):  # of a packed layer, whatever became of its data
            raise RuntimeError(
                "FSDP2 cannot shard packed words that learn: train them under DistributedDataParallel, or freeze them "
                "(weight.requires_grad_(False)) and train adapters"
            )
        number: int | None = vars(self).get("_fsdp_number")
        if number is None:
            raise AttributeError("_fsdp_orig_uid")
        return number

    @_fsdp_orig_uid.setter
    def _fsdp_orig_uid(self, number: int) -> None:
        vars(self)["_fsdp_number"] = number

    # -- copies -----------------------------------------------------------------------------------------------------

    def __deepcopy__(self, memo: dict[int, Any]) -> MPQWeightParameter:
        if id(self) in memo:
            found: MPQWeightParameter = memo[id(self)]
            return found
        result = type(self)(self.data.clone(memory_format=torch.preserve_format), self.requires_grad)
        memo[id(self)] = result
        # The memo makes the copied module's scales and the ones here the same tensors again.
        vars(result).update({key: copy.deepcopy(value, memo) for key, value in self._carried().items()})
        return result

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (type(self), self.data, self.requires_grad), self._carried()

    def _carried(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key not in _OWN}

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
        """One optimizer step on packed codes, in place: the rule of ``algorithms.update``.

        ``qweight.rounding`` says how codes take the step: "stochastic" (the default: small steps add up in the mean),
        "nearest" (a step of less than half a level vanishes), or, for codes of one bit, "inertia" (signs flip by
        double momentum). The random words are a function of ``qweight.seed``, ``qweight.stream``, the number of the
        step and the place of the weight. Scales and zeros stay as they are. Arithmetic is float32 at least: in half
        precision second moments vanish. It goes piece by piece, and no copy of the weight outlives its piece.

        Args:
            qweight: an ``MPQWeightParameter`` of integers.
            exp_avg_s: second moment, of the gradient's shape; changed in place. None: as if it were zero. With
                inertia: its state n, of the weight's shape with rows in packed order; None: its start.
            exp_avg_l: first moment, of the gradient's shape; changed in place. None: as if it were zero. Both may also
                be a moment of ``hf_onebit.algorithms.moments``.
            step: tensor of one number, how many steps there were; 1 is added in place. None: ``qweight.updates``
                counts.
            lr: learning rate, at least 0.
            weight_decay: decoupled: the weight shrinks by the factor 1 - lr · weight_decay. With inertia n does. At
                least 0.
            beta1, beta2: decay of the first and of the second moment, from 0 to below 1.
            eps: added to the root of the second moment. With inertia: times the output's root mean square, where
                votes fade. At least 0.
            dtype: of the arithmetic, where it is wider than float32.
            correct_bias: whether the moments' start at zero is corrected for. Signs need none.
            projector: has ``project_back(tensor)``, and ``project(tensor, step)`` where the gradient is not projected
                yet: the moments (with inertia, the first) are of the projected shape.
            grad: gradient of the float weight ``(in, out)``, or the projected one; ``privileged_grad`` if None.

        Raises:
            NotImplementedError: a layer type or width that there is not.
            TypeError: ``qweight`` is no ``MPQWeightParameter``, or another argument is of another type.
            ValueError: no gradient, one that is not finite, a number out of range, shapes, dtypes, devices or
                attributes that do not belong together, or a rounding that there is not. What is raised here leaves
                words, moments and counts as they were, also where the projector raises.
        """
        if not isinstance(qweight, MPQWeightParameter):
            raise TypeError(f"update got a {type(qweight).__name__}, expected an MPQWeightParameter")
        about = (lr, weight_decay, beta1, beta2, eps, dtype, correct_bias, projector)
        qweight.take_step(grad, Step(exp_avg_s, exp_avg_l, step, *about))

    @torch.no_grad()
    def take_step(self, grad: Tensor | None, step: Step, tally: Tally | None = None) -> None:
        """What :meth:`update` does, with its arguments in one; sums of what happened are added to ``tally``."""
        self._require_updatable()
        gradient, name = (self.privileged_grad, "privileged_grad") if grad is None else (grad, "grad")
        if gradient is None:
            raise ValueError("update got no gradient: grad is None and so is privileged_grad; run backward first")
        rounding = checked_rounding(self)
        plain = check_update(self.data, gradient, step, rounding.rounding == "inertia", name)
        known = vars(self).get("in_features")
        rows = gradient.shape[0] if known is None and step.projector is None and gradient.dim() == 2 else known
        step = dataclasses.replace(step, count=self.updates, rounding=rounding, tally=tally, **plain)
        update_words(self.data, self._update_layout(rows), gradient, step)
        if step.step is None:
            self.updates += 1

    @torch.no_grad()
    def start_inertia(self, state: Any) -> None:
        """Write the start of ``exp_avg_s`` for rounding "inertia" into a tensor or moment of the weight's shape."""
        self._require_updatable()
        start_inertia(self.data, self._update_layout(state.shape[0]), checked_rounding(self), state)

    def _require_updatable(self) -> None:
        require_supported(self)

    def _update_layout(self, in_features: int | None) -> Layout:
        return layout_of(self, in_features)


# What help() and editors show of the class is __init__'s: __new__, which they look at first, tells PyTorch's part only.
_OF_INIT = inspect.signature(MPQWeightParameter.__init__)
MPQWeightParameter.__signature__ = _OF_INIT.replace(  # type: ignore[attr-defined]
    parameters=list(_OF_INIT.parameters.values())[1:], return_annotation=inspect.Signature.empty
)


def _add_bfloat16(old: Tensor | None, X: Tensor, Y: Tensor) -> Tensor:
    """old + Xᵀ Y in float32; some rows at a time, so that there is no second gradient in bfloat16."""
    total = torch.empty(X.shape[1], Y.shape[1], device=X.device) if old is None else old
    rows = max(1, _PRODUCT // max(Y.shape[1], 1))
    for part, target in zip(X.split(rows, 1), total.split(rows), strict=True):
        product = part.T @ Y
        target.copy_(product) if old is None else target.add_(product)
    return total


def _rebuild(cls: type[MPQWeightParameter], data: Tensor, requires_grad: bool) -> MPQWeightParameter:
    return cls(data, requires_grad)
