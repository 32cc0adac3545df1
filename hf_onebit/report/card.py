"""The model card, and the part of it that says what was measured."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from hf_onebit.report.summary import coverage_line, facts, skipped_table, worst_table
from hf_onebit.report.table import format_table

# Beside the method's name.
TAGS = ("hf_onebit",)


def model_card(info: Mapping[str, Any]) -> str:
    """The README.md of a packed checkpoint: how to load it, what was done, what was measured, what it cannot
    do.

    Args:
        info: the report (see the top of this file), and besides, each of them optional:
            ``repo_id``, where the checkpoint will be published;
            ``provenance``, its origin: base_model, base_model_license, command, calibration, seed;
            ``evaluation``, what ``hf_onebit.evaluation.compare`` or ``perplexity`` returned, to which may be added
            ``data`` (name of the text), ``sha256`` (of the text) and ``reference`` (what the reference model was);
            or a list of several.

    Returns:
        Markdown with a YAML head. The licence is the base model's; where that is unknown there is none in the
        head, and a sentence says so.
    """
    from huggingface_hub import ModelCard

    info = {**info, **{key: value for key, value in _provenance(info).items() if value is not None}}
    parts = [
        f"# {info.get('repo_id') or _title(info)}",
        _introduction(info),
        _loading(info),
        "## What was done\n\n" + _what_was_done(info),
        measured_section(info.get("evaluation")),
        "## Limits\n\n" + _limits(info),
        "## Licence\n\n" + _licence(info),
    ]
    head = _card_data(info).to_yaml()
    return str(ModelCard(f"---\n{head}\n---\n\n" + "\n\n".join(parts) + "\n"))


def _provenance(info: Mapping[str, Any]) -> dict[str, Any]:
    """What the provenance knows better than the report."""
    provenance = info.get("provenance") or {}
    keys = ("base_model", "base_model_license", "source", "command", "calibration", "seed")
    return {key: provenance.get(key) for key in keys}


def _card_data(info: Mapping[str, Any]) -> Any:
    from huggingface_hub import ModelCardData

    base = info.get("base_model")
    known: dict[str, Any] = {}
    if _is_repository(base):
        known = {"base_model": base, "base_model_relation": "quantized"}
    return ModelCardData(
        library_name="transformers",
        license=info.get("base_model_license"),
        tags=[*TAGS, *_method_tags(info)],
        **known,
    )


def _method_tags(info: Mapping[str, Any]) -> list[str]:
    method = info.get("method") or "onebit"
    if info.get("bits") == "auto":
        return [method, "mixed-precision"]
    widths = _planes(info) if method == "onebit" else {info["bits"]}
    return [method, f"{widths.pop()}-bit" if len(widths) == 1 else "mixed-precision"]


def _planes(info: Mapping[str, Any]) -> set[int]:
    """How many sign matrices its layers have; each is one bit a weight."""
    return {layer["planes"] for layer in (info.get("layers") or {}).values() if layer.get("planes")} or {
        info.get("planes") or 1
    }


def _is_repository(name: str | None) -> bool:
    """Whether a base model is named as on the hub; a folder on a disk says nothing to anybody else."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    if not name or os.path.exists(name):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _base_name(info: Mapping[str, Any]) -> str | None:
    base = info.get("base_model")
    if not base:
        source = info.get("source")  # where it was read from, which is no name on the hub
        return str(source) if source else None
    if _is_repository(base):
        return str(base)
    return os.path.basename(os.path.normpath(base))


def _title(info: Mapping[str, Any]) -> str:
    base = _base_name(info)
    method = info.get("method", "onebit")
    return f"{base.split('/')[-1]}, {method}" if base else f"A {method} model"


def _introduction(info: Mapping[str, Any]) -> str:
    base = _base_name(info)
    public = _is_repository(info.get("base_model"))
    link = f"[{base}](https://huggingface.co/{base})" if public else f"`{base}`"
    of = f" of {link}" if base else ""
    bpw = info.get("linear_bpw")
    bits = "" if bpw is None else f" at {bpw:.3f} bits per weight in its packed layers"
    return f"A quantized version{of}{bits}, packed by hf_onebit. It stays packed on disk and in memory."


def _loading(info: Mapping[str, Any]) -> str:
    where = info.get("repo_id") or "path/to/this/folder"
    return (
        "```python\n"
        "import hf_onebit  # registers the method; without it this model does not load\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "\n"
        f'model = AutoModelForCausalLM.from_pretrained("{where}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{where}")\n'
        "```\n"
        "\n"
        "`pip install hf_onebit` installs what it needs."
    )


def _what_was_done(info: Mapping[str, Any]) -> str:
    known = facts(info)
    if info.get("seed") is not None:
        known.append(("seed", str(info["seed"])))
    data = info.get("calibration")
    if data and data.get("sha256"):
        known.append(("calibration data, sha256", f"`{data['sha256']}`"))
    known += [(f"version of {name}", version) for name, version in (info.get("versions") or {}).items()]
    parts = [coverage_line(info)] if {"layers", "skipped", "coverage", "linear_bpw"} <= set(info) else []
    parts.append(format_table(["", ""], known, markdown=True))
    if info.get("command"):
        parts.append(f"Made by this command:\n\n```bash\n{info['command']}\n```")
    if info.get("skipped"):
        parts.append("Linear layers kept in floating point:\n\n" + skipped_table(info["skipped"], markdown=True))
    if info.get("layers"):
        parts.append("The layers with the largest relative errors:\n\n" + worst_table(info["layers"], markdown=True))
    return "\n\n".join(parts)


_MEASURES = {
    "perplexity": "perplexity",
    "reference_perplexity": "perplexity of the reference",
    "kl": "KL(reference, this model), nats per token",
    "top1": "same most probable token as the reference",
    "tokens": "tokens scored",
    "context": "context, tokens",
}


def measured_section(evaluation: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None) -> str:
    """The section of the card on what was measured: one table for each evaluation.

    Args:
        evaluation: one evaluation or several, see ``model_card``.

    Returns:
        Markdown that begins with the heading ``## Measured``.
    """
    several = [evaluation] if isinstance(evaluation, Mapping) else list(evaluation or [])
    tables = [_measured(one) for one in several if one]
    nothing = "Not evaluated. `hf-onebit eval` measures perplexity and the distance from the float model."
    return "\n\n".join(["## Measured", *(tables or [nothing])])


def _measured(evaluation: Mapping[str, Any]) -> str:
    rows = [(title, evaluation[key]) for key, title in _MEASURES.items() if evaluation.get(key) is not None]
    for key, title in (("data", "text"), ("sha256", "text, sha256"), ("reference", "reference")):
        if evaluation.get(key):
            rows.append((title, evaluation[key]))
    return format_table(["measure", "value"], rows, markdown=True)


def _limits(info: Mapping[str, Any]) -> str:
    return (
        f"- {_few_bits(info)} quality. Compare with the base model on your own task before you rely on it.\n"
        f"- {_calibrated(info)}\n"
        "- What the base model must not be used for, this one must not either; refusals it has learned may "
        "be weaker.\n"
        "- Programs that do not know hf_onebit refuse this checkpoint: its packed weights do not have the shapes that "
        "they expect."
    )


def _calibrated(info: Mapping[str, Any]) -> str:
    if info.get("imported"):
        return "Another program chose the codes or signs: its own card says what text they were fitted to."
    if info.get("calibration"):
        return (
            f"The {_what_was_fitted(info)} were fitted to the calibration text above: on other kinds of text the model "
            "may be worse."
        )
    return "No calibration data was used, which costs much quality at so few bits."


def _what_was_fitted(info: Mapping[str, Any]) -> str:
    return (
        ("codes, signs and scales" if info["bits"] == "auto" else "codes and scales")
        if info.get("bits")
        else "signs and scales"
    )


def _few_bits(info: Mapping[str, Any]) -> str:
    bits = info.get("bits")
    if not bits and _planes(info) == {1}:
        return "About one bit per weight costs"
    if not bits or bits == "auto":
        bpw = info.get("onebit_bpw") or info.get("linear_bpw")
        return "So few bits per weight cost" if bpw is None else f"{bpw:.2f} bits per weight cost"
    return f"{bits} bit{'s' if bits > 1 else ''} per weight cost{'' if bits > 1 else 's'}"


def _licence(info: Mapping[str, Any]) -> str:
    licence = info.get("base_model_license")
    if licence:
        return f"That of the base model: {licence}."
    return (
        "The licence of the base model is not known to the program that wrote this card, so none is stated. The base "
        "model's licence applies to this model too: look it up before you use or share it."
    )
