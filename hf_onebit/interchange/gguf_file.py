"""A packed checkpoint as a GGUF file: types chosen tensor by tensor, written one at a time, errors measured."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hf_onebit import loading
from hf_onebit.disk_space import told_if_full
from hf_onebit.interchange.gguf_blocks import BLOCK, Written, exact_type, write_blocks, write_dense
from hf_onebit.interchange.gguf_folding import Folds, plan_folds
from hf_onebit.interchange.gguf_models import (
    ARCHITECTURES,
    BLOCK_TENSORS,
    add_settings,
    check_model,
    rope_factors,
    row_order,
)
from hf_onebit.interchange.gguf_vocabulary import add_vocabulary
from hf_onebit.nn.replace import PACKED, PackedModule, float_weight, module_shape
from hf_onebit.progress import Progress, logger

FALLBACKS = ("f16", "bf16", "q8_0")
_FLOATS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F32"}
_SHOWN = 6


@dataclass
class _Tensor:
    """One tensor of the file: its name, where it comes from, its type and shape, and how its bytes are made."""

    name: str
    source: str
    kind: str
    shape: tuple[int, ...]
    write: Callable[[], Written]
    order: Tensor | None = None
    moved: str | None = None
    why: str | None = None


def export_gguf(
    folder: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    fallback: str | None = None,
    vocabulary: bool = True,
) -> dict[str, Any]:
    """Write a packed Llama-like checkpoint as a GGUF file, for llama.cpp.

    Every packed layer gets the smallest type that holds its weights exactly. Column scales of onebit layers move into
    what produces their inputs where that changes nothing (gguf_folding.py). What was left in floating point keeps its
    dtype, one-dimensional tensors become F32. ``output`` appears complete or not at all.

    Args:
        folder: a local packed checkpoint.
        output: the file to make or replace.
        fallback: type of layers that have no such type: "f16", "bf16" or "q8_0"; None refuses them.
        vocabulary: write the tokenizer beside the model too; without one, llama.cpp takes token ids only.

    Returns:
        JSON types: output, architecture, tensors {name: source, type, bytes, exact, max_error, folded, why}, types
        {type: how many}, exact (how many tensors are), max_error, file_bytes.

    Raises:
        ImportError: the gguf package is not installed.
        ValueError: it is no packed checkpoint of a model that llama.cpp knows, a layer fits no type and there is no
            fallback, or the tokenizer cannot be written.
    """
    gguf = _package()
    if fallback is not None and fallback not in FALLBACKS:
        raise ValueError(f"fallback is {fallback!r}: expected None or one of {', '.join(map(repr, FALLBACKS))}")
    if os.path.isdir(output):
        raise ValueError(f"Cannot write to {os.fspath(output)!r}: it is a folder. Pass the path of a file")
    folder = Path(folder)
    model = loading.load(folder)
    config = model.config
    check_model(config)
    tensors = _plan(model, fallback, one_bit=hasattr(gguf.GGMLQuantizationType, "Q1_0"))
    if not hasattr(gguf.GGMLQuantizationType, "Q1_0") and any(_is_one_bit(module) for module in model.modules()):
        logger.warning(
            "The installed gguf package does not know Q1_0, the type of one-bit layers: they are written as Q4_0, with "
            "the same weights and four times the size. For Q1_0: pip install -U gguf"
        )
    records = {}
    with _atomic_file(Path(output)) as path:
        writer = gguf.GGUFWriter(str(path), ARCHITECTURES[config.model_type])
        try:
            add_settings(writer, config, folder.resolve().name)
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
            if vocabulary:
                add_vocabulary(writer, folder, config.vocab_size)
            else:
                writer.add_tokenizer_model("no_vocab")
            for tensor in tensors:
                _announce(writer, tensor, gguf)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            with Progress(len(tensors), "Writing GGUF", unit="tensor") as progress:
                for tensor in tensors:
                    written = tensor.write()
                    data = written.data if tensor.order is None else written.data[tensor.order.numpy()]
                    writer.write_tensor_data(np.ascontiguousarray(data))
                    records[tensor.name] = _record(tensor, written)
                    progress.step(tensor.name)
        finally:
            writer.close()
    kinds = [record["type"] for record in records.values()]
    return {
        "output": os.fspath(output),
        "architecture": ARCHITECTURES[config.model_type],
        "tensors": records,
        "types": {kind: kinds.count(kind) for kind in sorted(set(kinds))},
        "exact": sum(record["exact"] for record in records.values()),
        "max_error": max(record["max_error"] for record in records.values()),
        "file_bytes": os.path.getsize(output),
    }


def _is_one_bit(module: nn.Module) -> bool:
    return isinstance(module, PACKED) and getattr(module, "bits", 1) == 1


def _package() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise ImportError("Writing a .gguf file needs the gguf package: pip install 'hf_onebit[gguf]'") from error
    return gguf


def _plan(model: nn.Module, fallback: str | None, one_bit: bool) -> list[_Tensor]:
    """The tensors of the file, in order; refuses layers that fit no type."""
    config: Any = model.config
    blocks = [f"model.layers.{number}" for number in range(config.num_hidden_layers)]
    packed = {name: module for name, module in model.named_modules() if isinstance(module, PACKED)}
    types = {name: exact_type(module, one_bit) for name, module in packed.items()}
    kept = [name for name, (kind, _) in types.items() if kind is None]
    folds = plan_folds(model, blocks, config.num_attention_heads, config.num_key_value_heads, kept)
    why = {name: reason for name, (kind, reason) in types.items() if kind is None and reason} | folds.stuck
    if why and fallback is None:
        shown = "\n".join(f"  - {name}: {reason}" for name, reason in list(why.items())[:_SHOWN])
        more = f"\n  ... and {len(why) - _SHOWN} more" if len(why) > _SHOWN else ""
        raise ValueError(
            f"{len(why)} of {len(packed)} packed layers fit no type of GGUF files:\n{shown}{more}\nExpected layers "
            f"with one scale for each block of {BLOCK} neighbouring inputs. Store them in another type: --fallback f16 "
            "(or bf16, or q8_0, which rounds)"
        )
    if why and fallback == "q8_0":
        ragged = [name for name in why if _inputs(packed[name]) % BLOCK]
        if ragged:
            raise ValueError(
                f"{ragged[0]} has inputs that are no multiple of {BLOCK}, which Q8_0 needs: expected --fallback f16 or "
                "bf16"
            )
    layers = {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}
    for number, block in enumerate(blocks):
        layers |= {f"{block}.{ours}": f"blk.{number}.{theirs}" for ours, theirs in BLOCK_TENSORS.items()}
    if not config.tie_word_embeddings:
        layers["lm_head"] = "output"
    tensors = []
    for name, target in layers.items():
        module = _find(model, name)
        if module is None:
            continue
        order = row_order(config, target.rpartition(".")[2])
        tensors += _tensors_of(name, target, module, types.get(name), why.get(name), fallback, folds, order)
    factors = rope_factors(config)
    if factors is not None:
        tensors.append(_vector("rope_freqs.weight", "rotary embeddings", factors, None, None))
    return tensors


def _inputs(module: PackedModule) -> int:
    shape = module_shape(module)
    assert shape is not None
    return shape.in_features


def _find(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _tensors_of(
    name: str,
    target: str,
    module: nn.Module,
    chosen: tuple[str | None, str | None] | None,
    why: str | None,
    fallback: str | None,
    folds: Folds,
    order: Tensor | None,
) -> list[_Tensor]:
    """Weight and bias of one module."""
    rows = folds.rows.get(name)
    weight: Any = module.weight
    if weight.dim() == 1:
        return [_vector(f"{target}.weight", f"{name}.weight", weight, folds.gains.get(name), None)]
    shape = module_shape(module)
    assert shape is not None
    note = chosen[1] if chosen is not None else None
    if chosen is None:
        kind = _FLOATS[weight.dtype]
        write = _dense(module, kind, rows)
    elif why is not None:
        assert fallback is not None
        kind, note = fallback.upper(), why
        write = _dense(module, kind, rows)
    elif note is not None:  # no exact type, and a near one
        kind = "Q8_0"
        write = _dense(module, kind, rows)
    else:
        kind = str(chosen[0])
        write = _blocks(module, kind, rows)
    size = (shape.out_features, shape.in_features)
    result = [_Tensor(f"{target}.weight", f"{name}.weight", kind, size, write, order, folds.moved.get(name), note)]
    bias = getattr(module, "bias", None)
    if bias is not None:
        result.append(_vector(f"{target}.bias", f"{name}.bias", bias, rows, order))
    return result


def _blocks(module: Any, kind: str, rows: Tensor | None) -> Callable[[], Written]:
    packed: PackedModule = module
    return lambda: write_blocks(packed, kind, rows)


def _dense(module: nn.Module, kind: str, rows: Tensor | None) -> Callable[[], Written]:
    def weight() -> Tensor:
        return module.dequantize() if isinstance(module, PACKED) else float_weight(module)

    return lambda: write_dense(weight, kind, rows)


def _vector(name: str, source: str, values: Tensor, factor: Tensor | None, order: Tensor | None) -> _Tensor:
    """A one-dimensional tensor, in F32."""

    def write() -> Written:
        exact = values.detach().double() if factor is None else values.detach().double() * factor
        stored = exact.float()
        return Written(stored.numpy(), float((stored.double() - exact).abs().max()))

    return _Tensor(name, source, "F32", tuple(values.shape), write, order)


def _announce(writer: Any, tensor: _Tensor, gguf: Any) -> None:
    """Tell the writer what will come."""
    kind = gguf.GGMLQuantizationType[tensor.kind]
    if len(tensor.shape) == 1:
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), 4 * tensor.shape[0], kind)
        return
    block, size = gguf.GGML_QUANT_SIZES[kind]
    rows, inputs = tensor.shape
    row_bytes = inputs // block * size
    writer.add_tensor_info(tensor.name, (rows, row_bytes), np.dtype(np.uint8), rows * row_bytes, kind)


def _record(tensor: _Tensor, written: Written) -> dict[str, Any]:
    return {
        "source": tensor.source,
        "type": tensor.kind,
        "bytes": int(written.data.nbytes),
        "exact": written.max_error == 0.0,
        "max_error": written.max_error,
        "folded": tensor.moved,
        "why": tensor.why,
    }


@contextlib.contextmanager
def _atomic_file(output: Path) -> Iterator[Path]:
    """A path beside ``output`` that takes its place when the block ends well."""
    output = output.resolve()
    output.parent.mkdir(parents=True, exist_ok=True)
    number, name = tempfile.mkstemp(prefix=f".{output.name}.", suffix=".partial", dir=output.parent)
    os.close(number)
    temporary = Path(name)
    try:
        with told_if_full(output, "Nothing was left there. Free some space, or write to another disk"):
            yield temporary
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(temporary, 0o666 & ~umask)
            os.replace(temporary, output)
    finally:
        temporary.unlink(missing_ok=True)
