"""A float model given back where something goes wrong while it is made a packed one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn


@contextlib.contextmanager
def restored_on_failure(model: nn.Module, *others: Any) -> Iterator[None]:
    """Whatever is raised inside, the model is then as it was: modules, their attributes, configs, parameters' values.

    Matrices are held and not copied, so nothing may write into them; vectors are copied, and may change in place. Until
    the end, what was replaced takes memory beside what is there now.

    Args:
        model: whole in memory.
        *others: objects whose attributes go back too.
    """
    modules = list(model.modules())
    tables = [table for m in modules for table in (m._parameters, m._buffers, m._modules)]
    dicts: list[dict[str, Any]] = [*tables, *(vars(one) for one in (*modules, *_configs(modules), *others))]
    contents = [(one, dict(one)) for one in dicts]
    values = [(p, p.data, p.data.clone() if p.dim() < 2 else None, p.requires_grad) for p in model.parameters()]
    try:
        yield
    except BaseException:
        for one, content in contents:
            one.clear()
            one.update(content)
        for parameter, place, value, learns in values:
            parameter.data = place if value is None else place.copy_(value)
            parameter.requires_grad_(learns)
        raise


def _configs(modules: list[nn.Module]) -> list[Any]:
    """The configs of a model and of its parts, each once, with those of the text parts within."""
    found = [module.config for module in modules if hasattr(getattr(module, "config", None), "get_text_config")]
    found += [config.get_text_config() for config in found]  # type: ignore[union-attr,operator]
    return list({id(config): config for config in found}.values())
