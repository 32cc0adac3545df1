"""Single layers as llama.cpp quantizes them, dequantized: what its types cost where a model's shapes allow them."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from .llama import gguf_name, importance_of, quantize_apart


def llama_layers(
    source: Path, kind: str, model: Any, names: Mapping[str, nn.Linear], batches: Sequence[Any], folder: Path
) -> tuple[dict[str, nn.Linear], float, dict[str, Any]]:
    """The layers of a GGUF file of llama.cpp's type ``kind``.

    Args:
        source: the GGUF file that the model came from.
        kind: as llama.cpp names it, "IQ1_S".
        model: the float model; its inputs to all layers weigh their columns (llama.cpp's importance matrix).
        names: layers wanted, by name.
        batches: calibration text.
        folder: gets the files.

    Returns:
        {name: a float layer}, their stored bits per weight, and {"stored": {type: how many of them}}.

    Raises:
        RuntimeError: llama.cpp refuses; with its own words.
    """
    import gguf

    importance, target = folder / "importance.npz", folder / f"{kind}.gguf"
    if not importance.exists():
        np.savez(importance, **importance_of(model, batches))
    said = quantize_apart(source, target, kind, importance)
    if "error" in said:
        raise RuntimeError(said["error"])
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(target).tensors}
    layers: dict[str, nn.Linear] = {}
    wanted = {name: tensors[gguf_name(name)] for name in names}
    for name, layer in names.items():
        values = gguf.dequantize(wanted[name].data, wanted[name].tensor_type)
        made = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, dtype=layer.weight.dtype)
        with torch.no_grad():
            made.weight.copy_(torch.from_numpy(values))
            if layer.bias is not None:
                made.bias.copy_(layer.bias)
        layers[name] = made
    bits = 8 * sum(int(t.n_bytes) for t in wanted.values()) / sum(int(t.n_elements) for t in wanted.values())
    return layers, bits, {"stored": dict(Counter(t.tensor_type.name for t in wanted.values()))}
