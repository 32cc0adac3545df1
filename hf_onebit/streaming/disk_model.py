"""A float model whose weights stay in its files: one block of it is in memory at a time.

The model is built without memory (on the meta device). Whatever is small (norms, biases outside of the blocks, buffers)
is read at once; matrices are read in parts, when one of them runs or is asked for by name: a block is a part, and so is
each module outside of the blocks. A block that comes lets all other parts go. Parts outside go when the next block
comes, so a run of the whole model holds embeddings, then block after block.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_onebit.counts import counted
from hf_onebit.nn.roles import fp32_modules, matches
from hf_onebit.quantization.finite import check_buffer, check_finite
from hf_onebit.rungs.blocks import find_blocks
from hf_onebit.sources import empty_model
from hf_onebit.storage.checkpoint import weight_files
from hf_onebit.storage.tensor_files import StoredTensor, stored_tensors


@dataclass
class _Slot:
    """One parameter: every name and place that it has in the model, and where it is stored.

    The first reading looks for NaN and inf.
    """

    stored: StoredTensor
    dtype: torch.dtype
    empty: nn.Parameter
    places: list[tuple[nn.Module, str]] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    checked: bool = False

    def read(self) -> Tensor:
        value = self.stored.read().to(self.dtype)
        if not self.checked:
            check_finite(value, self.names[0])
            self.checked = True
        return value

    def fill(self, device: torch.device) -> None:
        value = nn.Parameter(self.read().to(device), requires_grad=False)
        for module, name in self.places:
            module._parameters[name] = value

    def clear(self) -> None:
        for module, name in self.places:
            module._parameters[name] = self.empty


class DiskModel:
    """A checkpoint folder as a model of Transformers that reads itself part by part.

    Args:
        folder: config.json and safetensors files.
        device: where parts are read to.

    Attributes:
        model: the model; its modules, names, shapes and dtypes are those of the whole one.
        folder: where it is read from.

    Raises:
        ValueError: as ``sources.empty_model``, ``checkpoint.weight_files`` and ``stored_tensors``.
    """

    def __init__(self, folder: str | os.PathLike[str], device: torch.device | str | None = None) -> None:
        self.folder = Path(folder)
        self.model: Any = empty_model(folder)
        self._device = torch.device(device or "cpu")
        self._files = stored_tensors(weight_files(self.folder))
        if getattr(self.model.config, "dtype", None) is None:  # as from_pretrained(dtype="auto") does
            first = next((t.dtype for t in self._files.values() if t.dtype.is_floating_point), torch.float32)
            self.model.to(first)
            self.model.config.dtype = first
        self._slots: dict[str, _Slot] = {}  # by the first name of each parameter
        self._parts: dict[str, list[_Slot]] = {}
        self._part_of: dict[str, str] = {}  # {module: part}
        self._held: set[str] = set()
        self._blocks: set[str] = set()

    def open(self) -> None:
        """Read what is small, and get ready to read the rest. Modules must not be replaced after this.

        Raises:
            ValueError: the files do not hold the model's parameters by their names.
        """
        model = self.model
        found = find_blocks(model)
        stack, count = ("", 0) if found is None else (found[0], len(found[1]))
        self._blocks = {f"{stack}.{index}" for index in range(count)}
        slots: dict[int, _Slot] = {}
        missing: list[str] = []
        fp32 = tuple(fp32_modules(model))
        modules = dict(model.named_modules())
        tied = getattr(model, "all_tied_weights_keys", None) or {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            owner, _, short = name.rpartition(".")
            slot = slots.get(id(parameter))
            if slot is None:
                stored = self._stored(name) or next(
                    (s for other in tied.items() if name in other for s in map(self._stored, other) if s), None
                )
                if stored is None or stored.shape != tuple(parameter.shape):
                    missing.append(name)
                    continue
                dtype = torch.float32 if matches(owner, fp32) else parameter.dtype
                slot = slots[id(parameter)] = self._slots[name] = _Slot(stored, dtype, parameter)
            slot.places.append((modules[owner], short))
            slot.names.append(name)
            part = next((b for b in self._blocks if name.startswith(f"{b}.")), owner)
            self._part_of[owner] = part
            if parameter.dim() > 1 or part in self._blocks:
                self._parts.setdefault(part, []).append(slot)
        if missing:
            raise ValueError(
                f"The files of {str(self.folder)!r} do not hold {counted(len(missing), 'parameter')} by the names and "
                f"shapes that {type(model).__name__} has in memory (the first is {missing[0]}), so it cannot be read "
                "block by block: quantize it whole (low_memory=False, --no-low-memory)"
            )
        inside = {id(slot) for slots_ in self._parts.values() for slot in slots_}
        for slot in self._slots.values():
            if id(slot) not in inside:
                slot.fill(self._device)
        self._fill_buffers()
        for part in self._parts:
            self._read_when_run(modules[part], part)

    def hold(self, module: str) -> None:
        """Have the weights of a module in memory, by its full name; those of blocks that it is not in go."""
        part = self._part_of.get(module, module)
        if part in self._held or part not in self._parts:
            return
        for other in list(self._held):
            if part in self._blocks or other in self._blocks:
                self._drop(other)
        self._held.add(part)
        for slot in self._parts[part]:
            slot.fill(self._device)

    def release(self) -> None:
        """Let all parts go."""
        for part in list(self._held):
            self._drop(part)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter and buffer, one in memory at a time, named and ordered as in the whole model."""
        for name, slot in self._slots.items():
            yield name, slot.read()
        yield from self.model.named_buffers()

    def parameters_of(self, module: str) -> Iterator[tuple[list[str], Callable[[], Tensor]]]:
        """The parameters of a module ("" for all that is in no block): their full names, and what reads them."""
        for name, slot in self._slots.items():
            inside = any(name.startswith(f"{block}.") for block in self._blocks)
            if name.startswith(f"{module}.") if module else not inside:
                yield slot.names, slot.read

    def weights(self) -> int:
        """How many weights the model has; a tied matrix counts once."""
        return sum(slot.empty.numel() for slot in self._slots.values())

    @property
    def blocks(self) -> list[str]:
        """Full names of the blocks, in order."""
        return sorted(self._blocks, key=lambda name: int(name.rpartition(".")[2]))

    def close(self) -> None:
        """Let all parts go, and have the model run as it would without this."""
        self.release()
        modules = dict(self.model.named_modules())
        for part in self._parts:
            modules[part].__dict__.pop("forward", None)

    def _stored(self, name: str) -> StoredTensor | None:
        prefix = getattr(self.model, "base_model_prefix", "")
        candidates = [name, *([f"{prefix}.{name}", name.removeprefix(f"{prefix}.")] if prefix else [])]
        return next((self._files[c] for c in candidates if c in self._files), None)

    def _drop(self, part: str) -> None:
        self._held.discard(part)
        for slot in self._parts[part]:
            slot.clear()

    def _read_when_run(self, module: nn.Module, part: str) -> None:
        run = module.forward

        @functools.wraps(run)
        def forward(*args: Any, **kwargs: Any) -> Any:
            self.hold(part)
            return run(*args, **kwargs)

        # On the object: block_calls.py sets blocks idle the same way, and an idle block is not read.
        module.forward = forward

    def _fill_buffers(self) -> None:
        """Buffers that are stored are read; the others are what the model's own code makes them."""
        for name, module in self.model.named_modules():
            empty = {key: value for key, value in module._buffers.items() if value is not None and value.is_meta}
            if not empty:
                continue
            for key, value in empty.items():
                module._buffers[key] = torch.empty_like(value, device=self._device)
            with torch.no_grad():
                self._nearest(name)._init_weights(module)
            for key in empty:
                stored = self._stored(f"{name}.{key}" if name else key)
                if stored is not None and key not in module._non_persistent_buffers_set:
                    read = module._buffers[key] = stored.read().to(self._device)
                    check_buffer(read, f"{name}.{key}" if name else key)

    def _nearest(self, name: str) -> Any:
        """The innermost model of Transformers around a module, which knows how its buffers begin."""
        from transformers import PreTrainedModel

        while name:
            module = self.model.get_submodule(name)
            if isinstance(module, PreTrainedModel):
                return module
            name = name.rpartition(".")[0]
        return self.model
