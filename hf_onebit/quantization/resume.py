"""Work folders: what an interrupted quantization has done so far, stage by stage, and whose work it is.

A stage is two files: ``STAGE.<digest>.safetensors`` with its tensors, then ``STAGE.json``, which has that digest and
one of itself. Each is written under another name, flushed to the disk and renamed, the JSON last: a process that is
killed leaves the stage as it was before, or as it is after. What does not match its digest is not used.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hf_onebit.digests import sha256_of_file
from hf_onebit.disk_space import told_if_full
from hf_onebit.progress import logger
from hf_onebit.version import __version__

State = tuple[dict[str, Tensor], dict[str, Any]]

_LOCK, _FINGERPRINT, _PARTIAL = "hf_onebit.lock", "fingerprint.json", ".partial"
_STAGE = re.compile(r"[\w.-]+")
_MOST_LINES = 12
_REMEDY = "What an interrupted run goes on from is kept there: free some space, or save to another disk"
# Written into config.json by whoever saved it; they change no result.
_VOLATILE = ("_name_or_path", "transformers_version")
# What the CPU's products of matrices are chosen by.
_CPU_FEATURES = ("avx2", "avx512_f", "avx512_bf16", "amx_bf16", "cpu_name")


@dataclass
class Fingerprint:
    """Whose work it is.

    Attributes:
        values: whatever decides the result, as JSON types.
        defaults: of ``values`` by flat names ("options.spill"), those that mean the same as none: options that did not
            exist when a work folder was written.
    """

    values: dict[str, Any]
    defaults: dict[str, Any] = field(default_factory=dict)


class WorkFolder:
    """A folder that one process at a time keeps its stages in; a context manager.

    Stages come in a fixed order, each the work of those before it: once one is missing or damaged, those after it are
    not used either.

    Args:
        folder: to make, or one that an earlier run left.
        fingerprint: of the work (``fingerprint``), or its values alone.
        resume: go on with what is there; False throws it away.

    Attributes:
        folder: absolute path.
        kept: stages that are there from before.
        spent: seconds that runs before this one took up to the last stage that was loaded.

    Raises:
        ValueError: the folder holds something else, or the work of another fingerprint.
        RuntimeError: another process has it.
        OSError: it cannot be made or written to; DiskFullError where there is no room.
    """

    def __init__(
        self, folder: str | os.PathLike[str], fingerprint: Fingerprint | Mapping[str, Any], *, resume: bool = True
    ) -> None:
        self.folder = Path(folder).resolve()
        if not isinstance(fingerprint, Fingerprint):
            fingerprint = Fingerprint(dict(fingerprint))
        mine = _as_json(fingerprint.values)
        self._defaults = _as_json(fingerprint.defaults)
        self._digest = _digest_of(mine)
        self._whole = True  # no stage was missing yet
        self._told = False
        self.spent, self._opened = 0.0, time.perf_counter()
        if self.folder.is_dir() and any(self.folder.iterdir()) and not (self.folder / _LOCK).is_file():
            raise ValueError(
                f"{str(self.folder)!r} holds files that are no work of a quantization (there is no {_LOCK!r}): pass an "
                "empty or a new folder"
            )
        with told_if_full(self.folder, _REMEDY):
            self._lock = _Lock(self.folder)
        try:
            if resume:
                mine = self._compare(mine)
            else:
                self._sweep(lambda name: name != _LOCK)
            self._sweep(lambda name: name.endswith(_PARTIAL))
            with told_if_full(self.folder, _REMEDY):
                self._write(_FINGERPRINT, mine)
            self.kept = sum(path.suffix == ".json" for path in self.folder.iterdir()) - 1
            if self.kept:
                stages = "1 stage is" if self.kept == 1 else f"{self.kept} stages are"
                logger.warning(f"Going on with an interrupted run: {stages} kept in {str(self.folder)!r}")
        except BaseException:
            self._lock.release()
            raise

    def __enter__(self) -> WorkFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let others have the folder; what is in it stays."""
        self._lock.release()

    def save(self, stage: str, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> bool:
        """Keep a stage, in place of what it was before. A full disk is a warning: the work itself goes on.

        Args:
            stage: a name of letters, digits, dots, dashes and underscores.
            tensors, values: what :meth:`load` will give back; the values as JSON types.

        Returns:
            whether it was kept; if not, the stage is as it was.
        """
        _check_stage(stage)
        partial = self.folder / f"{stage}.safetensors{_PARTIAL}"
        try:
            save_file(_alone(tensors), partial)
            _flush(partial)
            digest = sha256_of_file(partial)
            name = f"{stage}.{digest[:16]}.safetensors"
            os.replace(partial, self.folder / name)
            spent = self.spent + time.perf_counter() - self._opened
            content = {"stage": stage, "work": self._digest, "sha256": digest, "values": dict(values), "seconds": spent}
            self._write(f"{stage}.json", content)
        except (OSError, SafetensorError) as error:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            if not self._told:
                self._told = True
                logger.warning(
                    f"Cannot keep the state of this run in {str(self.folder)!r} ({error}): going on without; a run "
                    "that is interrupted now starts again from what was kept before"
                )
            return False
        mine = re.compile(re.escape(stage) + r"\.[0-9a-f]{16}\.safetensors")
        self._sweep(lambda other: other != name and mine.fullmatch(other) is not None)
        return True

    def load(self, stage: str) -> State | None:
        """Tensors and values of a stage; None where it was never kept, is damaged, or comes after one that is."""
        _check_stage(stage)
        found = self._read(stage) if self._whole else None
        self._whole = found is not None
        return found

    def _read(self, stage: str) -> State | None:
        path = self.folder / f"{stage}.json"
        if not path.is_file():
            return None
        try:
            content = _read_checked(path)
            if content["stage"] != stage or content["work"] != self._digest:
                raise ValueError("it belongs to another work folder")
            file = self.folder / f"{stage}.{content['sha256'][:16]}.safetensors"
            if sha256_of_file(file) != content["sha256"]:
                raise ValueError(f"{file.name} does not match its digest")
            # Clones: what safetensors maps may lie anywhere, and some products depend on alignment.
            tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
            self.spent = max(self.spent, float(content["seconds"]))
            return tensors, content["values"]
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            logger.warning(f"{path} is damaged ({error}): this stage and those after it are done again")
            return None

    def _compare(self, mine: dict[str, Any]) -> dict[str, Any]:
        """The fingerprint that is there, if it means the same; else mine."""
        path = self.folder / _FINGERPRINT
        if not path.is_file():
            return mine
        try:
            theirs = _read_checked(path)
        except (OSError, ValueError) as error:
            # Nothing is trusted for that: each stage names the work that it belongs to.
            logger.warning(f"{path} is damaged ({error}): only stages that name this run's fingerprint are used")
            return mine
        known = self._defaults
        keys = sorted(
            k for k in mine.keys() | theirs.keys() if mine.get(k, known.get(k)) != theirs.get(k, known.get(k))
        )
        if not keys:
            self._digest = _digest_of(theirs)  # what the stages there name
            return theirs
        lines = [f"  - {key}: {_shown(theirs, key)} / {_shown(mine, key)}" for key in keys[:_MOST_LINES]]
        if len(keys) > _MOST_LINES:
            lines.append(f"  - and {len(keys) - _MOST_LINES} more")
        raise ValueError(
            f"The work folder {str(self.folder)!r} holds an interrupted quantization of another kind (there / here):\n"
            + "\n".join(lines)
            + "\nGo on as before, start afresh with --no-resume (resume=False), pass another output folder, or remove "
            "this one"
        )

    def _write(self, name: str, content: Mapping[str, Any]) -> None:
        partial = self.folder / (name + _PARTIAL)
        text = json.dumps({"content": content, "sha256": _digest_of(content)}, indent=1)
        with open(partial, "w", encoding="utf-8") as file:
            file.write(text + "\n")
        _flush(partial)
        os.replace(partial, self.folder / name)
        _flush(self.folder)

    def _sweep(self, is_old: Callable[[str], bool]) -> None:
        for path in self.folder.iterdir():
            if is_old(path.name):
                with contextlib.suppress(OSError):
                    path.unlink()


def remove_work(folder: str | os.PathLike[str]) -> None:
    """Remove a work folder whose result is safe; one that another process has, or that is none, stays."""
    folder = Path(folder).resolve()
    if not (folder / _LOCK).is_file():
        return
    try:
        lock = _Lock(folder)
    except (RuntimeError, OSError):
        return
    try:
        names = sorted(path.name for path in folder.iterdir() if path.name != _LOCK)
        for name in [*names, _LOCK]:  # the lock last: without it this would be no work folder
            (folder / name).unlink()
        folder.rmdir()
    except OSError as error:
        logger.warning(f"Cannot remove the work folder {str(folder)!r}, which nothing needs any more: {error}")
    finally:
        lock.release()


def work_folder_of(output: str | os.PathLike[str]) -> Path:
    """Where the state of a run that ends in the folder ``output`` is kept: hidden, beside it."""
    target = Path(output).resolve()
    return target.parent / f".{target.name}.work"


def fingerprint(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    options: Mapping[str, Any],
    recipe: Mapping[str, Any],
    tensors: Iterable[tuple[str, Tensor]] | None = None,
) -> dict[str, Any]:
    """All that decides the bytes of a result, by names that tell a user what differs.

    Args:
        model: the float model: its config, and a digest of its parameters and buffers.
        batches: calibration sequences.
        options: of the run.
        recipe: what the preset does.
        tensors: the model's parameters and buffers, where they are in files.
    """
    config: Any = getattr(model, "config", None)
    entries = {} if config is None else config.to_dict()
    own = [*model.named_parameters(), *model.named_buffers()]
    where = next((p.device for _, p in own if not p.is_meta), torch.device("cpu"))
    device = str(where) if where.type != "cuda" else f"{where} ({torch.cuda.get_device_name(where)})"
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return {
        "model": {key: value for key, value in entries.items() if key not in _VOLATILE},
        "model.class": type(model).__name__,
        "model.tensors": digest_of_tensors(own if tensors is None else tensors),
        "model.attention": getattr(config, "_attn_implementation", None),
        "model.experts": getattr(config, "_experts_implementation", None),
        "data.sha256": digest_of_tensors((f"{i}.{k}", b[k]) for i, b in enumerate(batches) for k in sorted(b)),
        "options": dict(options),
        "recipe": dict(recipe),
        "versions": {"hf_onebit": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
        "machine": {
            "device": device,
            # Sums are split by threads, so their rounding is too.
            "threads": torch.get_num_threads(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "float32_matmul_precision": torch.get_float32_matmul_precision(),
            **{name: capabilities.get(name) for name in _CPU_FEATURES},
        },
    }


def digest_of_tensors(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(flat.numpy().data)
    return digest.hexdigest()


class _Lock:
    """Holds a folder's lock file; the system lets go of it when the process ends, however that happens."""

    def __init__(self, folder: Path) -> None:
        path = folder / _LOCK
        while True:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                if not try_lock(self._file):
                    owner = os.read(self._file, 32).decode("ascii", "replace").strip()
                    raise RuntimeError(
                        f"Another process ({owner or 'unknown'}) is at work in {str(folder)!r}: wait for it, or pass "
                        "another output folder"
                    )
                with contextlib.suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(self._file), os.stat(path)):
                        break  # else its last owner removed the folder meanwhile
            except BaseException:
                os.close(self._file)
                raise
            os.close(self._file)
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, f"{os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def try_lock(file: int) -> bool:
    """Lock an open file or folder for as long as its descriptor stays open; False where another process has it."""
    try:
        fcntl = importlib.import_module("fcntl")
    except ImportError:  # Windows has no such lock
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _as_json(values: Mapping[str, Any]) -> dict[str, Any]:
    return _flat(json.loads(json.dumps(dict(values), default=str)))


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}; lists stay whole."""
    return dict(_entries(values, prefix))


def _entries(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _entries(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _shown(values: Mapping[str, Any], key: str) -> str:
    if key not in values:
        return "absent"
    text = json.dumps(values[key])
    return text if len(text) <= 80 else text[:77] + "..."


def _check_stage(stage: str) -> None:
    if not _STAGE.fullmatch(stage):
        raise ValueError(f"{stage!r} is no name of a stage: expected letters, digits, dots, dashes and underscores")


def _alone(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as safetensors wants them: contiguous, none sharing memory with another."""
    alone: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != tensor.nbytes:
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        alone[name] = tensor
    return alone


def _read_checked(path: Path) -> dict[str, Any]:
    whole = json.loads(path.read_text(encoding="utf-8"))
    content = whole.get("content") if isinstance(whole, dict) else None
    if not isinstance(content, dict) or _digest_of(content) != whole.get("sha256"):
        raise ValueError("its content does not match its digest")
    return content


def _digest_of(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _flush(path: Path) -> None:
    """Have the system write a file, or the names in a folder, to the disk."""
    try:
        file = os.open(path, os.O_RDONLY)
    except PermissionError:  # Windows opens no folders
        return
    try:
        os.fsync(file)
    finally:
        os.close(file)
