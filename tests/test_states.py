"""Hidden states in files instead of memory: the same values, no files left, and memory that does not grow with them."""

import errno
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from tiny import tiny_ids, tiny_llama, tiny_tokenizer

from hf_onebit import OneBitConfig, OneBitQuantizer
from hf_onebit.algorithms.blockwise import BlockOptions
from hf_onebit.nn.replace import find_layers
from hf_onebit.quantization.resume import digest_of_tensors
from hf_onebit.rungs import states
from hf_onebit.rungs.ladder import quantize_on_prefix
from hf_onebit.rungs.states import Arena

ROWS = [{"input_ids": tiny_ids(1, 32, seed=i)} for i in range(9)]
MEASURE = """
    import json, sys, threading
    import torch
    from torch import nn
    from hf_onebit.rungs.prefix import walk_prefix

    HIDDEN, TOKENS, SEQUENCES = 4096, 128, 64

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(32, 32)

        def forward(self, hidden):
            out = hidden.clone()
            out[..., :32] += self.linear(hidden[..., :32])
            return out

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(8, HIDDEN)
            self.blocks = nn.ModuleList(Block() for _ in range(3))

        def forward(self, input_ids):
            hidden = self.embedding(input_ids)
            for block in self.blocks:
                hidden = block(hidden)
            return hidden

    def anonymous():
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

    model = Model()
    batches = [{"input_ids": torch.randint(8, (1, TOKENS))} for _ in range(SEQUENCES)]
    start = anonymous()
    peak, stop = [start], threading.Event()
    def watch():
        while not stop.wait(0.002):
            peak[0] = max(peak[0], anonymous())
    threading.Thread(target=watch, daemon=True).start()
    folder = sys.argv[1] or None
    walk_prefix(model, [f"blocks.{i}.linear" for i in range(3)], batches, lambda stage: None, spill=folder)
    stop.set()
    print(json.dumps({"growth": max(peak[0], anonymous()) - start, "stream": 4 * HIDDEN * TOKENS * SEQUENCES}))
"""


def test_an_arena_in_memory_keeps_the_tensor_itself():
    tensor = torch.rand(3)
    assert Arena().keep(tensor) is tensor


def test_an_arena_in_files_keeps_equal_tensors_and_no_names(tmp_path, monkeypatch):
    monkeypatch.setattr(states, "_FIRST_BYTES", 256)
    arena = Arena(tmp_path / "new")
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 5), (), (0, 4), (1, 7, 33), (200, 10), (1,), (64,)]
    dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64]
    originals = [torch.rand(s, generator=generator).mul(9).to(d) for s in shapes for d in dtypes]
    originals += [torch.rand(6, 4, generator=generator).t()]
    kept = [arena.keep(tensor) for tensor in originals]
    assert not list((tmp_path / "new").iterdir())
    del arena  # the tensors live on without it
    for tensor, found in zip(originals, kept, strict=True):
        assert found.dtype == tensor.dtype
        assert found.shape == tensor.shape
        assert torch.equal(found, tensor)
        assert found.numel() == 0 or found.data_ptr() % 64 == 0
        assert found.is_contiguous()
    kept[0].fill_(7)
    assert all(torch.equal(a, b) for a, b in zip(originals[1:], kept[1:], strict=True))  # none lies in another


def test_a_full_disk_is_an_error(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate" if hasattr(os, "posix_fallocate") else "truncate", full)
    with pytest.raises(OSError, match="No space left"):
        Arena(tmp_path).keep(torch.rand(3))
    assert not list(tmp_path.iterdir())


def digest(tensors):
    return digest_of_tensors(sorted(tensors.items()))


def test_the_walk_gives_the_same_bytes_from_files(tmp_path):
    """With padding, so that some rows are left out, and block tuning."""
    mask = torch.ones(1, 32, dtype=torch.int64)
    mask[:, 20:] = 0
    rows = [{**ROWS[0], "attention_mask": mask}, *ROWS[1:]]
    found = []
    for spill in (None, tmp_path):
        model = tiny_llama()
        names = list(find_layers(model).selected)
        found.append(quantize_on_prefix(model, names, rows, rounds=1, block=BlockOptions(epochs=1), spill=spill))
    memory, files = found
    assert all(digest(files.packed[name]) == digest(tensors) for name, tensors in memory.packed.items())
    assert digest(files.vectors) == digest(memory.vectors)
    assert files.depths == memory.depths
    assert files.blocks == memory.blocks
    assert not list(tmp_path.iterdir())


def test_the_option_changes_no_result_and_leaves_no_files(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    spilled = []
    original = states._mapped
    monkeypatch.setattr(states, "_mapped", lambda folder, size: spilled.append(folder) or original(folder, size))
    digests = set()
    for spill in (False, True):
        model = tiny_llama()
        config = OneBitConfig(dataset=ROWS, spill=spill)
        OneBitQuantizer(config).quantize_model(model, tiny_tokenizer())
        assert "spill" not in model.config.quantization_config.to_dict()
        digests.add(digest(model.state_dict()))
        assert bool(spilled) == spill
    assert len(digests) == 1
    assert {Path(folder) for folder in spilled} == {tmp_path / "temporary"}
    assert not list((tmp_path / "temporary").iterdir())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_memory_does_not_grow_with_what_is_spilled(tmp_path):
    growth, stream = {}, 0
    for folder in ("", str(tmp_path)):
        command = [sys.executable, "-c", textwrap.dedent(MEASURE), folder]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        sizes = json.loads(done.stdout.splitlines()[-1])
        growth[bool(folder)], stream = sizes["growth"], sizes["stream"]
    assert growth[False] > 3 * stream  # both streams, before and behind a block
    assert growth[True] < stream
    assert not list(tmp_path.iterdir())
