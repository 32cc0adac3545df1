"""Quantizing in two processes: what they find together is what one finds, and no failure of one keeps the other."""

import os
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from processes import run_ranks
from sharing_processes import ROWS, RUNS, llama, quantized, read
from tiny import save_float, tiny_tokenizer

from hf_onebit import loading
from hf_onebit.nn.replace import find_layers
from hf_onebit.ranks import ALONE, Ranks
from hf_onebit.rungs.prefix import walk_prefix
from hf_onebit.rungs.walk import walk

# They read the same as in one process to the last digit of a sum.
FIRST_LAYERS = ("model.layers.0.self_attn.q", "model.layers.0.self_attn.k", "model.layers.0.self_attn.v")
SCRIPT = """
    import time
    from pathlib import Path
    import sharing_processes as sharing
    from hf_onebit import ranks as module
    from hf_onebit.rungs import ladder, prefix, walk as walk_module
    from hf_onebit.nn.replace import find_layers
    from hf_onebit.rungs.prefix import walk_prefix
    from hf_onebit.ranks import PeerError, current_ranks
    from hf_onebit.quantization.resume import WorkFolder
    from hf_onebit.rungs.walk import walk

    # --- what they find together
    folder = Path({folder!r})
    for name in sharing.RUNS:
        sharing.write(name, folder, rank)
    hessians, crosses = {{}}, {{}}
    model = sharing.llama()
    layers = list(find_layers(model).selected)
    with current_ranks() as ranks:
        walk(model, layers, sharing.ROWS, lambda _, found: hessians.update(found), ranks=ranks)
        def visit(stage):
            crosses.update({{name: (s.hessian, s.cross, s.heldout_hessian, s.heldout_cross, s.rows)
                            for name, s in stage.items() if s is not None}})
        drifts = walk_prefix(model, layers, sharing.ROWS, visit, heldout={{3, 7}}, ranks=ranks, collects=False)
    torch.save([hessians, crosses, [depth.relative_error for depth in drifts]], folder / f"statistics-{{rank}}.pt")

    # --- block by block from files
    import hf_onebit
    streamed = hf_onebit.OneBitQuantizer.from_pretrained(
        folder / "float", preset="fast", dataset=sharing.ROWS, low_memory=True
    )
    streamed.recipes = {{"fast": sharing.recipes.Recipe(**sharing.PLAIN)}}
    assert streamed.quantize(folder / "streamed", load=False) is None
    print("layers", len(streamed.report["layers"]))

    # --- a run that is interrupted, and goes on
    keep, kept = WorkFolder.save, []
    def once(self, *state):
        if kept:
            raise KeyboardInterrupt
        kept.append(keep(self, *state))
        return True
    WorkFolder.save = once
    try:
        sharing.quantized("signs", work_dir=folder / "work")
        raise AssertionError("it was not interrupted")
    except (KeyboardInterrupt, PeerError) as error:
        print("interrupted by", type(error).__name__)
    WorkFolder.save = keep
    fits, fit = [], ladder.SignMethod.fit
    ladder.SignMethod.fit = lambda self, name, *rest: fits.append(name) or fit(self, name, *rest)
    sharing.RUNS["again"] = sharing.RUNS["signs"]
    sharing.write("again", folder, rank, work_dir=folder / "work")
    print("fitted", len(fits))

    # --- failures
    module.HEARTBEAT_S = 0.2
    def broken(*_):
        raise MemoryError("no room")

    def ends(run, first, second):
        try:
            run()
            raise AssertionError("nothing was raised")
        except (MemoryError, ValueError, RuntimeError) as error:
            expected = (first, second)[rank]
            assert expected in f"{{type(error).__name__}}: {{error}}", error

    original = prefix._float_pass
    if rank == 1:
        prefix._float_pass = broken
    ends(lambda: sharing.quantized("signs"), "PeerError: Process 1 of 2 failed: MemoryError: no room", "no room")
    prefix._float_pass = original
    if rank == 0:  # while it is the other that waits
        walk_module.HessianSum.hessian = property(broken)
    ends(lambda: sharing.quantized("closed"), "no room", "PeerError: Process 0 of 2 failed: MemoryError: no room")
    ends(lambda: sharing.quantized("signs", seed=rank), "Start all of them alike", "Start all of them alike")
    module.TIMEOUT_S = 1.5
    with current_ranks() as ranks:  # longer than any wait: who works alone says that it still does
        ranks.alone(lambda: time.sleep(2.5))
        assert ranks.value_of_first(["done"] if rank == 0 else None) == ["done"]
    def late():
        with current_ranks() as ranks:
            if rank == 1:
                time.sleep(3)
            ranks.gather(1)
    ends(late, "PeerError: Process 0 of 2 lost the others", "PeerError: Process 1 of 2 lost the others")
    print("all ended")
"""


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """What two processes did: a folder with the files of `sharing_processes.write`, and what they said."""
    folder = tmp_path_factory.mktemp("together")
    save_float(llama(), folder / "float")
    said = run_ranks(SCRIPT.format(folder=str(folder)), 2, folder / "processes", timeout=400, patience=380)
    return folder, said


def test_sums_of_two_processes_are_those_of_one(together):
    model, hessians, stages = llama(), {}, {}
    layers = list(find_layers(model).selected)
    walk(model, layers, ROWS, lambda _, found: hessians.update(found))
    walk_prefix(model, layers, ROWS, stages.update, heldout={3, 7})
    first, second = (torch.load(together[0] / f"statistics-{rank}.pt") for rank in (0, 1))
    assert first[0].keys() == hessians.keys()
    assert not second[0]
    assert first[1].keys() == stages.keys()
    for name, expected in hessians.items():
        torch.testing.assert_close(first[0][name], expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))
    for name, statistics in stages.items():
        *matrices, rows = first[1][name]
        assert rows == statistics.rows
        wanted = statistics.hessian, statistics.cross, statistics.heldout_hessian, statistics.heldout_cross
        for found, expected in zip(matrices, wanted, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    assert first[2] == second[2]


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_find_what_one_finds(together, name):
    model, conductor = quantized(name)
    alone = model.state_dict()
    (first, report), (second, other_report) = (read(name, together[0], rank) for rank in (0, 1))
    assert report == other_report
    assert first.keys() == second.keys() == alone.keys()
    assert all(torch.equal(tensor, second[key]) for key, tensor in first.items())  # one fits, the other takes it
    layers = conductor.report["layers"]
    assert report["layers"].keys() == layers.keys()
    if name == "tuned":  # a last digit turns a choice between two that are as good, and all that is trained after it
        assert report["fit"]["blocks"].keys() == conductor.report["fit"]["blocks"].keys()
        kl = conductor.report["fit"]["distillation"]["kl_after"]
        assert report["fit"]["distillation"]["kl_after"] == pytest.approx(kl, rel=0.2)
        return
    for key, expected in alone.items():
        # A sign that falls differently is carried on, by the layer's own error feedback first, and of two strengths of
        # the correction that are as good on so little text the other may be taken.
        if name == "signs" and not key.startswith(FIRST_LAYERS):
            continue
        if expected.is_floating_point():
            lost = float((first[key] - expected).float().norm() / expected.float().norm())
            assert lost < 1e-2, (key, lost)
        else:
            assert same_bits(first[key], expected) > 0.98, key
    for layer, record in layers.items():
        if name == "signs" and not layer.startswith(FIRST_LAYERS):
            continue
        for key in ("relative_weight_error", "relative_output_error"):
            assert report["layers"][layer][key] == pytest.approx(record[key], rel=0.02), (layer, key)


def same_bits(one, other):
    differing = (one ^ other).contiguous().view(torch.uint8).numpy()
    return 1 - np.unpackbits(differing).mean()


def test_two_processes_read_a_model_block_by_block(together):
    folder, said = together
    assert all("layers 14" in words for words in said)
    found = loading.load(folder / "streamed").state_dict()
    expected = read("signs", folder, 0)[0]
    assert found.keys() == expected.keys()
    for part in ("q_proj", "k_proj", "v_proj"):
        key = f"model.layers.0.self_attn.{part}.weight"
        assert same_bits(found[key], expected[key]) > 0.999
    assert not list(folder.glob(".*"))


def test_an_interrupted_run_of_two_goes_on(together):
    folder, (first, second) = together
    assert "interrupted by KeyboardInterrupt" in first
    assert "fitted 7" in first  # the second block's
    assert "interrupted by PeerError" in second
    assert "fitted 0" in second
    expected = read("signs", folder, 0)[0]
    for rank in (0, 1):
        found = read("again", folder, rank)[0]
        assert all(torch.equal(tensor, found[key]) for key, tensor in expected.items())
    with pytest.raises(ValueError, match=r"machine\.processes: 2 / absent"):
        quantized("signs", work_dir=folder / "work")


def test_a_failure_of_one_process_ends_all(together):
    assert all("all ended" in said for said in together[1])


def test_a_launcher_starts_the_command(tmp_path):
    source = save_float(llama(), tmp_path / "float", tiny_tokenizer())
    text = tmp_path / "text.txt"
    text.write_text("The boat drifted down the river, and nobody looked up. " * 20, encoding="utf-8")
    words = ["quantize", str(source), "-o", str(tmp_path / "out"), "--preset", "closed", "--calibration", str(text)]
    words += ["--calibration-context", "32", "--json"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    command = [*launcher, "-m", "hf_onebit", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('"linear_bpw"') == 1  # the first process prints
    assert len(list(tmp_path.glob(".*"))) == 0
    model = loading.load(tmp_path / "out")
    assert len(model.config.quantization_config.modules) == 14


def test_one_process_exchanges_nothing():
    calls = []
    tensor = torch.ones(2)
    assert ALONE.share(5) == [0, 1, 2, 3, 4]
    assert ALONE.alone(lambda: calls.append(1) or 7) == 7
    assert ALONE.gather("x") == ["x"]
    assert ALONE.sum_on_first(tensor) is tensor
    assert ALONE.collect([tensor], 1)[0] is tensor
    with pytest.raises(MemoryError), Ranks():
        raise MemoryError
    start = time.monotonic()
    assert ALONE.value_of_first(3) == 3
    assert time.monotonic() - start < 1
