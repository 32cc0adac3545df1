"""Scales in a file of their own, in float32: for what training must go on from, and beside adapters."""

from __future__ import annotations

import os
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import nn

from hf_onebit.argument_checks import require_module, shown
from hf_onebit.disk_space import told_if_full
from hf_onebit.nn.scales import plain_name, scale_parameters, set_scales

SCALE_FILE = "hf_onebit_scales.safetensors"


def save_scales(model: nn.Module, folder: str | os.PathLike[str]) -> Path:
    """Write the scales that learn, in float32, to ``hf_onebit_scales.safetensors`` in a folder.

    A checkpoint holds float16. This file is for going on with training exactly where it was, and for scales that were
    trained beside an adapter: PEFT's ``save_pretrained`` writes the adapter alone.

    Args:
        model: a model whose scales learn (``train_scales``), with or without adapters.
        folder: made if it is not there.

    Raises:
        TypeError: the model is no module, or the folder no path.
        ValueError: no scale learns.
        DiskFullError: there is no room; a file of before is as it was.
    """
    require_module("save_scales", model)
    path = _path("save_scales", folder)
    learning = {plain_name(n): p.detach().float().cpu() for n, p in scale_parameters(model).items() if p.requires_grad}
    if not learning:
        raise ValueError("save_scales found no scale that learns: call hf_onebit.train_scales(model) first")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with told_if_full(path, "Free some space, or save to another disk"):
            # A name for each, even where memory is shared.
            save_file({name: tensor.clone().contiguous() for name, tensor in learning.items()}, partial)
            os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def load_scales(model: nn.Module, folder: str | os.PathLike[str]) -> int:
    """Read what :func:`save_scales` wrote into a model's scales, in whatever dtype they have now.

    Args:
        model: the packed model, with or without adapters; call ``train_scales`` before to keep float32.
        folder: where the file is.

    Returns:
        How many tensors were read.

    Raises:
        TypeError: the model is no module, or the folder no path.
        ValueError: there is no such file, it is of another model, or float16 scales cannot hold a value.
    """
    require_module("load_scales", model)
    path = _path("load_scales", folder)
    if not path.is_file():
        raise ValueError(f"{str(folder)!r} holds no {SCALE_FILE}: expected a folder that hf_onebit.save_scales wrote")
    values = load_file(path)
    set_scales(model, values)
    return len(values)


def _path(what: str, folder: str | os.PathLike[str]) -> Path:
    if not isinstance(folder, (str, os.PathLike)):
        raise TypeError(f"{what} got folder={shown(folder)}, expected the path of a folder")
    return Path(folder) / SCALE_FILE
