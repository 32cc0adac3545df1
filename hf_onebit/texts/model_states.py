"""What a model keeps of the tokens it has read: keys and values in memory that is reserved once, and their size."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


class _Reserved(DynamicLayer):
    """Keys and values of one layer in memory that is reserved once: joining them anew for each token costs more time
    than all of the model's products."""

    def __init__(self, layer: DynamicLayer, tokens: int) -> None:
        super().__init__()
        keys, values = layer.keys, layer.values
        assert keys is not None
        assert values is not None
        self.is_initialized, self.dtype, self.device = True, keys.dtype, keys.device
        self._length = keys.shape[-2]
        self._whole: list[Tensor] = []
        for kept in (keys, values):
            *shape, length, width = kept.shape
            whole = kept.new_empty(*shape, max(tokens, length), width)
            whole[..., :length, :] = kept
            self._whole.append(whole)
        self.keys, self.values = (whole[..., : self._length, :] for whole in self._whole)

    def skip(self, tokens: int) -> None:
        """Have zeros for the next ones up to so many tokens in all."""
        for whole in self._whole:
            whole[..., self._length : tokens, :] = 0
        self._length = tokens

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add the next tokens' and return all."""
        start, end = self._length, self._length + key_states.shape[-2]
        if end > self._whole[0].shape[-2]:
            raise ValueError(f"room for {self._whole[0].shape[-2]} tokens was reserved, and {end} are needed")
        for whole, new in zip(self._whole, (key_states, value_states), strict=True):
            whole[..., start:end, :] = new
        self._length = end
        keys, values = (whole[..., :end, :] for whole in self._whole)
        self.keys, self.values = keys, values
        return keys, values


def reserve(state: Any, tokens: int) -> bool:
    """Let the layers of a growing cache hold ``tokens`` tokens from now on without being joined anew.

    Returns:
        whether it did: layers of other kinds (sliding windows, recurrent states) and other caches stay as they are.
    """
    layers = getattr(state, "layers", None)
    if type(state) is not DynamicCache or not isinstance(layers, list):
        return False
    plain = [index for index, layer in enumerate(layers) if type(layer) is DynamicLayer and layer.is_initialized]
    for index in plain:
        layers[index] = _Reserved(layers[index], tokens)
    return bool(plain)


def skip(state: Any, tokens: int) -> bool:
    """Have a state say that it holds so many tokens, zeros mostly; False where not all layers of it can."""
    layers = getattr(state, "layers", None)
    if type(state) is not DynamicCache or not layers or not all(type(layer) is _Reserved for layer in layers):
        return False
    for layer in layers:
        layer.skip(tokens)
    return True


def state_name(model: Any) -> str | None:
    """What a model calls its keys and values, or its recurrent state."""
    parameters = inspect.signature(model.forward).parameters
    return next((name for name in ("past_key_values", "cache_params", "state") if name in parameters), None)


def state_bytes(model: Any) -> float:
    """Bytes that keys and values of one token take, at the most; 1 where the config does not tell."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None)
    layers = getattr(config, "num_hidden_layers", None)
    if not isinstance(heads, int) or not isinstance(layers, int):
        return 1.0
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    kept = getattr(config, "num_key_value_heads", None) or heads
    return float(2 * layers * kept * width * next(model.parameters()).element_size())
