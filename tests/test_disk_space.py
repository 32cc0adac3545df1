"""A disk that gets full: the message says where, what is free and what to do, and nothing is lost."""

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from tiny import tiny_ids, tiny_llama

from hf_onebit import OneBitConfig, OneBitQuantizer
from hf_onebit.algorithms.blockwise import BlockOptions
from hf_onebit.disk_space import DiskFullError, free_space, told_if_full
from hf_onebit.rungs import states
from hf_onebit.rungs.recipes import Recipe

RECIPE = Recipe(rounds=1, prefix_tokens=256, block=BlockOptions(epochs=1), steps=2, heldout_tokens=32)


def test_free_space_of_a_folder_that_is_to_be_made(tmp_path: Path) -> None:
    assert free_space(tmp_path) > 0
    assert free_space(tmp_path / "a" / "b") == pytest.approx(free_space(tmp_path), rel=0.1)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EFBIG, "File too large"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_what_fails_for_want_of_space_says_where(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(DiskFullError, match=r"Cannot write '.*out': .* are free there\)\. Free some") as found:
        with told_if_full(tmp_path / "out", "Free some space"):
            raise error
    assert found.value.__cause__ is error


def test_other_errors_stay_what_they_are(tmp_path: Path) -> None:
    for error in (OSError(errno.EACCES, "Permission denied"), ValueError("x"), SafetensorError("no such tensor")):
        with pytest.raises(type(error)) as found, told_if_full(tmp_path, "Free some space"):
            raise error
        assert found.value is error
    with pytest.raises(OSError, match="Input/output error") as other, told_if_full(tmp_path, "Free some space"):
        raise SafetensorError("I/O error: Input/output error (os error 5)")
    assert other.value.errno == errno.EIO
    assert other.value.filename == str(tmp_path)


def quantizer(**options: object) -> OneBitQuantizer:
    dataset = [{"input_ids": tiny_ids(1, 64, seed)[0].tolist()} for seed in range(16)]
    config = OneBitConfig(preset="fast", dataset=dataset, **options)  # type: ignore[arg-type]
    return OneBitQuantizer.from_pretrained(tiny_llama(), config=config)


def test_a_save_that_fills_the_disk_keeps_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OneBitQuantizer, "recipes", {"fast": RECIPE})
    expected = quantizer().quantize(tmp_path / "whole")
    assert expected is not None

    def full(*_: object, **__: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr("transformers.modeling_utils.safe_save_file", full)
        with pytest.raises(DiskFullError, match=r"packed': No space left.*kept in '.*packed\.work'"):
            quantizer().quantize(tmp_path / "packed")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".packed.work", "whole"]
    again = quantizer().quantize(tmp_path / "packed")
    assert again is not None
    tensors = again.state_dict()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.state_dict().items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["packed", "whole"]


def test_hidden_states_that_fill_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OneBitQuantizer, "recipes", {"fast": RECIPE})

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(states.os, "posix_fallocate", full)
    with pytest.raises(DiskFullError, match=r"packed\.work': .*--spill.*free some space, keep them in memory"):
        quantizer(spill=True).quantize(tmp_path / "packed")


@pytest.mark.skipif(sys.platform == "win32", reason="no such limit")
def test_the_command_line_says_it_in_one_line(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "float")

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    command = [sys.executable, "-m", "hf_onebit.cli", "quantize", str(tmp_path / "float"), "-o", str(tmp_path / "out")]
    done = subprocess.run(
        [*command, "--preset", "closed"], preexec_fn=limit, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"hf-onebit: error: Cannot write {str(tmp_path / 'out')!r}: File too large")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
