"""Checkpoint folders: atomic saves, the side file ``hf_onebit.json``, and reading what is in one."""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from hf_onebit.argument_checks import path_of, require_module, shown
from hf_onebit.byte_sizes import parse_size
from hf_onebit.config import PackingConfig
from hf_onebit.counts import counted
from hf_onebit.digests import sha256_of_file, sha256_of_tensor
from hf_onebit.disk_space import told_if_full
from hf_onebit.formats import onebit as fmt
from hf_onebit.mpq_config import CONFIGS, config_from_dict
from hf_onebit.nn import packed_layers
from hf_onebit.nn.adapters import adapted_modules
from hf_onebit.quantization.resume import try_lock
from hf_onebit.report import REPORT_FOLDER, json_safe, measured_section, model_card
from hf_onebit.storage.exchange import exchange
from hf_onebit.storage.tensor_files import stored_tensors
from hf_onebit.version import __version__

SIDE_FILE = "hf_onebit.json"
# Where Transformers puts the chat templates of a tokenizer that has several.
CHAT_TEMPLATES = "additional_chat_templates"
# What a save may replace in the folder of an older checkpoint: models, tokenizers, cards, plots, what a killed write
# left.
_FILES = (
    *("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.bpe", "*.vocab", "*.md", "*.svg"),
    *("*.spm", "*.tokenizer", "bpe.codes", "vocab", "*.png", "LICENSE*", "NOTICE*", ".gitattributes", ".gitignore"),
    *(".DS_Store", ".*.partial"),
)
_FOLDERS = (REPORT_FOLDER, ".cache", CHAT_TEMPLATES)
# What tells of the weights that were replaced, or of nothing.
_OF_WEIGHTS = (SIDE_FILE, "*.safetensors", "*.index.json", "README.md", f"{REPORT_FOLDER}/*", ".cache/*", "*.partial")


@contextlib.contextmanager
def atomic_folder(target: str | os.PathLike[str]) -> Iterator[Path]:
    """A fresh folder beside ``target`` that takes its place when the block ends well, and vanishes when it does not.

    An existing ``target`` stays complete until the new folder is, and on the disk; on Linux the two change places in
    one step. Elsewhere ``target`` is away for a moment: what a process that was killed then left is put back by the
    next save there.

    Raises:
        ValueError: ``target`` is a file, or a folder that holds something other than a checkpoint.
        DiskFullError: there is no room for the new folder; an existing ``target`` is as it was.
    """
    check_replaceable(target)
    target = Path(target).resolve()  # where a link points to, and with a name even for ".."
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(target)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    held = _hold(temporary)
    try:
        with told_if_full(target, "Nothing was left there. Free some space, or save to another disk"):
            yield temporary
            os.chmod(temporary, 0o777 & ~_umask())
            _write_through(temporary)
        if not target.exists():
            os.rename(temporary, target)
        elif not exchange(temporary, target):
            _replace(target, temporary)
        _write_through(target.parent, files=False)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if held is not None:
            os.close(held)


def _replace(target: Path, new: Path) -> None:
    """Put a folder in the place of another by two renames; the other is back where the second one fails."""
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".old", dir=target.parent))
    held = _hold(old)
    os.rename(target, old / "checkpoint")
    try:
        os.rename(new, target)
    except OSError:
        os.rename(old / "checkpoint", target)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)
        if held is not None:
            os.close(held)


def _write_through(folder: Path, files: bool = True) -> None:
    """Have a folder's names on the disk, and what its files hold: the work that they came from is removed next."""
    for path in [*(p for p in folder.rglob("*") if files and p.is_file()), folder]:
        with contextlib.suppress(OSError):  # folders, on some systems
            file = os.open(path, os.O_RDONLY)
            try:
                os.fsync(file)
            finally:
                os.close(file)


def _hold(folder: Path) -> int | None:
    """A descriptor that locks a folder until it is closed; None where another process has it, or folders have none."""
    try:
        file = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    if try_lock(file):
        return file
    os.close(file)
    return None


def _remove_abandoned(target: Path) -> None:
    """Remove what killed saves to ``target`` left, and put back what they had moved away.

    The folder of a save is locked for as long as its process lives.
    """
    for folder in target.parent.iterdir():
        if folder.name.startswith(f".{target.name}.") and folder.name.endswith((".partial", ".old")):
            held = _hold(folder)
            if held is not None:
                if (folder / "checkpoint").is_dir() and not target.exists():
                    os.rename(folder / "checkpoint", target)
                shutil.rmtree(folder, ignore_errors=True)
                os.close(held)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def check_replaceable(target: str | os.PathLike[str], *, packed_only: bool = False) -> None:
    """Refuse to save where something else would be lost; asked before long work too.

    Args:
        target: folder to save to.
        packed_only: an older packed checkpoint may go, a float one or another method's may not, nor may what is no
            part of a checkpoint: a repository's ``.git``, a run's ``checkpoint-10``.

    Raises:
        ValueError: ``target`` is a file, or a folder that holds something other than such a checkpoint.
    """
    target = Path(target)
    if target.is_file():
        raise ValueError(f"Cannot save to {str(target)!r}: it is a file. Pass a folder")
    if Path.cwd().is_relative_to(target.resolve()):
        raise ValueError(
            f"Cannot save to {str(target)!r}: the current folder is in it, and a save replaces the whole folder. Pass "
            "another folder"
        )
    if target.is_dir() and any(target.iterdir()) and not (target / "config.json").is_file():
        raise ValueError(
            f"Will not save to {str(target)!r}: it holds files that are no checkpoint (there is no config.json). Pass "
            "an empty or a new folder"
        )
    if packed_only and (target / "config.json").is_file():
        _check_packed(target)


def _check_packed(target: Path) -> None:
    """Refuse a folder with another model than a packed one, or with more than a checkpoint's files.

    Raises:
        ValueError: it is such a folder.
    """
    method = _quantization_of(read_json(target / "config.json")).get("quant_method")
    if method not in CONFIGS:
        held = "a float model" if method is None else f"a model of quantization method {method!r}"
        raise ValueError(
            f"Will not save to {str(target)!r}: it holds {held}, which would be lost. Pass another folder, or "
            "remove that one first"
        )
    own = _listed_files(target)
    others = sorted(path.name for path in target.iterdir() if not _belongs(path, own))
    if others:
        raise ValueError(
            f"Will not save to {str(target)!r}: beside a packed checkpoint it holds {len(others)} other files or "
            f"folders, which would be lost (the first is {others[0]}). Pass another folder, or move them away"
        )


def _belongs(path: Path, own: Container[str]) -> bool:
    """Whether checkpoints, repositories on the hub and reports are made of such, or of a folder all are its ``own``."""
    if path.is_dir():
        below = (file.relative_to(path.parent).as_posix() for file in path.rglob("*") if not file.is_dir())
        return path.name in _FOLDERS or all(name in own for name in below)
    return path.name in own or any(fnmatch.fnmatch(path.name, pattern) for pattern in _FILES)


def _listed_files(folder: Path) -> frozenset[str]:
    """Names of the files that a checkpoint's own ``hf_onebit.json`` lists; none where there is no readable one."""
    try:
        files = (read_side_file(folder) or {}).get("files")
    except ValueError:
        return frozenset()
    return frozenset(files) if isinstance(files, dict) else frozenset()


def parse_shard_size(value: int | str) -> int:
    """Bytes of ``max_shard_size``.

    Raises:
        ValueError: it is no size.
    """
    try:
        return parse_size(value)
    except ValueError as error:
        raise ValueError(f"max_shard_size is {value!r}: {error}") from None


def save(
    model: nn.Module,
    save_dir: str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    report: Mapping[str, Any] | None = None,
    provenance: Mapping[str, Any] | None = None,
    max_shard_size: int | str = "5GB",
    along: Iterable[Path] = (),
) -> dict[str, Any]:
    """Save a packed model: weights, config, tokenizer, model card, and ``hf_onebit.json`` with checksums of all of
    them.

    Everything is written to a folder beside ``save_dir``, which is renamed at the end: there is never half a
    checkpoint.

    Args:
        model: a quantized Transformers model.
        save_dir: folder to make, or an older checkpoint to replace.
        tokenizer: saved beside the model when given; a processor will do too. Without one, the tokenizer of an older
            checkpoint of the same model that is replaced is kept, as are its processor and licence.
        report: what quantization reported (``OneBitQuantizer.report``); stored, and shown on the card.
        provenance: where the model came from: base_model, base_model_license, command, seed, calibration, ...
        max_shard_size: largest weight file, in bytes or as "5GB".
        along: files to copy beside the model, such as an image processor's.

    Returns:
        What was written to ``hf_onebit.json``.

    Raises:
        TypeError: the model is no module, or another argument not of its kind.
        ValueError: the model holds no packed layers, or adapters beside them, ``save_dir`` cannot be replaced, or
            ``max_shard_size`` is no size.
    """
    require_module("save", model)
    save_dir = path_of("save", "save_dir", save_dir)
    for name, given in (("report", report), ("provenance", provenance)):
        if given is not None and not isinstance(given, Mapping):
            raise TypeError(f"save got {name}={shown(given)}, expected a dict or None")
    if tokenizer is not None and not hasattr(tokenizer, "save_pretrained"):
        hint = f": AutoTokenizer.from_pretrained({tokenizer!r})" if isinstance(tokenizer, (str, os.PathLike)) else ""
        raise TypeError(f"save got tokenizer={shown(tokenizer)}, expected a tokenizer of Transformers, or None{hint}")
    packed = packed_layers(model)
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    if not packed or not isinstance(config, PackingConfig):
        raise ValueError(
            f"{type(model).__name__} holds {counted(len(packed), 'packed layer')} and "
            f"{'a' if isinstance(config, PackingConfig) else 'no'} OneBitConfig or MPQConfig: there is nothing to save "
            "as a packed checkpoint. Quantize it first: OneBitQuantizer(OneBitConfig()).quantize_model(model)"
        )
    if adapted := adapted_modules(model):
        raise ValueError(
            f"{type(model).__name__} has adapters (on {counted(len(adapted), 'module')}, the first is {adapted[0]}): "
            "expected the packed model alone, or one of the two would be lost. Save the adapter by "
            "model.save_pretrained(DIR), and the packed model after model.unload(); or merge them: "
            "hf_onebit.merge_and_requantize(model)"
        )
    report = dict(report or {})
    shard_bytes = parse_shard_size(max_shard_size)
    check_replaceable(save_dir, packed_only=True)
    with atomic_folder(save_dir) as folder:
        model.save_pretrained(folder, max_shard_size=shard_bytes)  # type: ignore[operator]
        save_beside(folder, save_dir, tokenizer, along)
        return finish_folder(folder, report, provenance or {})


def save_beside(folder: Path, older: str | os.PathLike[str], tokenizer: Any, along: Iterable[Path]) -> None:
    """Put beside weights and config what a model is used with; files that the folder has stay.

    Args:
        folder: the new checkpoint.
        older: folder of the one that it replaces, if there is one.
        tokenizer: or a processor; without one, what the older checkpoint of the same model has is kept.
        along: files to copy.
    """
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    for file in along:
        if not (folder / file.name).exists():
            shutil.copyfile(file, folder / file.name)
    if tokenizer is None:
        _keep_older(Path(older), folder)


def _keep_older(older: Path, folder: Path) -> None:
    """Copy what stands beside the weights of a checkpoint that is about to be replaced, its tokenizer for one, into
    the folder of the same model that replaces it.

    The same is one of its type and vocabulary: another one's tokenizer would be worse than none.
    """
    if not (older / "config.json").is_file():
        return
    new, old = read_json(folder / "config.json"), read_json(older / "config.json")
    if any(_of_text(new, key) != _of_text(old, key) for key in ("model_type", "vocab_size")):
        return
    for file in sorted(older.rglob("*")):
        name = file.relative_to(older).as_posix()
        told = any(fnmatch.fnmatch(name, pattern) for pattern in _OF_WEIGHTS)
        if file.is_file() and not told and not (folder / name).exists():
            (folder / name).parent.mkdir(exist_ok=True, parents=True)
            shutil.copyfile(file, folder / name)


def _of_text(config: Mapping[str, Any], key: str) -> Any:
    """A setting of a model's config, or of that of its text part."""
    return (config.get("text_config") or {}).get(key, config.get(key))


def finish_folder(folder: Path, report: Mapping[str, Any], provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Write the model card and ``hf_onebit.json`` beside weights and config that are there already.

    Returns:
        What was written to ``hf_onebit.json``; its report has the sizes of the files too.
    """
    figures = file_figures(folder, report.get("total_weights"))
    report = {**report, **{key: value for key, value in figures.items() if value is not None}}
    info = {**report, "provenance": dict(provenance)}
    (folder / "README.md").write_text(model_card(info), encoding="utf-8")
    side = json_safe(_side_file(folder, report, provenance))
    (folder / SIDE_FILE).write_text(json.dumps(side, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return side


def record_evaluation(folder: str | os.PathLike[str], evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """Write what was measured of a packed checkpoint into its ``hf_onebit.json`` and onto its model card.

    A figure of the same text, context, number of tokens and reference is replaced; of the card only the section
    "Measured" changes, so that what was written there by hand stays.

    Args:
        folder: a checkpoint that ``save`` wrote.
        evaluation: ``perplexity`` and whatever else; see ``report.model_card``.

    Returns:
        the full report (see ``full_report``), ``evaluations`` included.

    Raises:
        ValueError: the folder has no ``hf_onebit.json`` or no card with a section "Measured".
    """
    folder = Path(folder)
    side = read_side_file(folder)
    card = folder / "README.md"
    if side is None or not card.is_file():
        missing = SIDE_FILE if side is None else card.name
        raise ValueError(
            f"{str(folder)!r} has no {missing} to write figures into: expected a folder that hf-onebit quantize or "
            "OneBitQuantizer.save wrote. Leave --write-card out, or save the model again"
        )
    report = side.setdefault("report", {})
    same = ("data", "sha256", "context", "tokens", "reference")
    older = [e for e in report.get("evaluations") or [] if any(e.get(key) != evaluation.get(key) for key in same)]
    report["evaluations"] = json_safe([*older, evaluation])
    text = card.read_text(encoding="utf-8")
    changed, found = re.subn(
        r"^## Measured$.*?(?=^## |\Z)",
        lambda _: measured_section(report["evaluations"]) + "\n\n",
        text,
        count=1,
        flags=re.MULTILINE | re.DOTALL,
    )
    if not found:
        raise ValueError(f'{card} has no section "## Measured" to write figures into: put that heading back')
    content = changed.encode()
    digest = hashlib.sha256(content).hexdigest()
    side.setdefault("files", {})[card.name] = {"bytes": len(content), "sha256": digest}
    _write_together({card: content, folder / SIDE_FILE: (json.dumps(side, indent=1) + "\n").encode()})
    return full_report(side)


def full_report(side: Mapping[str, Any]) -> dict[str, Any]:
    """The report of a side file with what the provenance knows: ``provenance`` itself, and its command."""
    report, provenance = dict(side.get("report") or {}), side.get("provenance") or {}
    return {**report, "command": provenance.get("command") or report.get("command"), "provenance": dict(provenance)}


def _write_together(contents: Mapping[Path, bytes]) -> None:
    """Replace files that belong together: the first takes its place when all are written, so a full disk parts none."""
    partial = {path: path.with_name(f".{path.name}.partial") for path in contents}
    try:
        for path, content in contents.items():
            partial[path].write_bytes(content)
        for path, temporary in partial.items():
            os.replace(temporary, path)
    finally:
        for temporary in partial.values():
            temporary.unlink(missing_ok=True)


def file_figures(folder: str | os.PathLike[str], total_weights: int | None) -> dict[str, Any]:
    """Bytes of the weight files, and bits per weight of the whole file where the number of weights is known."""
    size = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
    return {"file_bytes": size, "file_bpw": 8 * size / total_weights if total_weights else None}


def _side_file(folder: Path, report: Mapping[str, Any], provenance: Mapping[str, Any]) -> dict[str, Any]:
    files, tensors = {}, {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        files[name] = {"bytes": path.stat().st_size, "sha256": sha256_of_file(path)}
        if path.suffix == ".safetensors":
            tensors.update({name: sha256_of_tensor(tensor) for name, tensor in tensors_of(path)})
    return {
        "format_version": fmt.FORMAT_VERSION,
        "hf_onebit": __version__,
        "provenance": dict(provenance),
        "report": dict(report),
        "files": files,
        "tensors": tensors,
    }


def tensors_of(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of one safetensors file, one in memory at a time."""
    for name, stored in stored_tensors([path]).items():
        yield name, stored.read()


def read_side_file(folder: str | os.PathLike[str]) -> dict[str, Any] | None:
    """``hf_onebit.json`` of a checkpoint, or None where it has none.

    Raises:
        ValueError: the file is no JSON object.
    """
    path = Path(folder) / SIDE_FILE
    return read_json(path) if path.is_file() else None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a checkpoint.

    Raises:
        ValueError: the file is no JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not readable JSON ({error}): copy or download it again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds {type(value).__name__}: expected a JSON object. Copy or download it again")
    return value


def read_config(folder: str | os.PathLike[str]) -> tuple[dict[str, Any], PackingConfig]:
    """A checkpoint's config.json, and the quantization config in it.

    Raises:
        ValueError: there is no such folder or config.json, or it is no (readable) packed checkpoint.
    """
    path = Path(folder) / "config.json"
    if not Path(folder).is_dir():
        raise ValueError(f"There is no folder {str(folder)!r}")
    if not path.is_file():
        raise ValueError(f"{str(folder)!r} holds no config.json: expected the folder of a saved model")
    config = read_json(path)
    quantization = _quantization_of(config)
    if not quantization:
        raise ValueError(
            f"{path} has no quantization_config: this is a float model. Quantize it: hf-onebit quantize MODEL -o DIR"
        )
    return config, config_from_dict(quantization, str(path))


def _quantization_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The quantization config in a model's config, or in that of its text part; empty where there is none."""
    found = config.get("quantization_config") or (config.get("text_config") or {}).get("quantization_config")
    return found if isinstance(found, dict) else {}


def weight_files(folder: str | os.PathLike[str]) -> list[Path]:
    """The safetensors files that make up a checkpoint, checked against its index where it has one.

    Raises:
        ValueError: there are none, or the index names a file that is not there, or one outside of the folder.
    """
    folder = Path(folder)
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():  # Transformers, too, prefers it to an index beside it
        return [single]
    if not index.is_file():
        raise ValueError(f"{str(folder)!r} holds no model.safetensors: copy or download the checkpoint again")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise ValueError(f"{index} has no usable weight_map: copy or download it again")
    names = sorted(set(weight_map.values()))
    for name in names:
        if os.path.basename(name) != name:
            raise ValueError(
                f"{index} names the file {name!r}, which is outside of the checkpoint's folder: do not trust it"
            )
        if not (folder / name).is_file():
            raise ValueError(f"{index} names {name!r}, which is not there: copy or download that file again")
    return [folder / name for name in names]
