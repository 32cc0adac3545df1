"""A quantization that is killed again and again, run by tests as a script: interrupted.py FOLDER MODE KILLS STEPS KIND.

FOLDER/reference is what an uninterrupted run saves, FOLDER/out what the last of the killed ones does. With MODE "calls"
each attempt kills itself at one of its first calls that touch the disk, with "moments" it is killed from outside after
a random share of the processor time that the uninterrupted run took. STEPS are those of the distillation, KIND is one
of `KINDS`. The last line printed is {"attempts": ..., "killed": ...}.

This process imports everything once and computes nothing; each attempt is a fork of it, so that dozens take seconds.
"""

import json
import math
import os
import random
import resource
import signal
import sys
import time
from pathlib import Path

import torch
from tiny import tiny_ids, tiny_llama, tiny_qwen3_moe, tiny_tokenizer

import hf_onebit
from hf_onebit.algorithms.blockwise import BlockOptions
from hf_onebit.rungs import recipes, upper_rungs

# {what is interrupted: (model, options)}. Of experts some get no token in a step, and no gradient.
KINDS = {
    "one plane": (lambda: tiny_llama(layers=3), {}),
    "two planes": (lambda: tiny_llama(layers=3), {"planes": 2, "spill": True}),
    "a target": (lambda: tiny_llama(layers=3), {"target_bpw": 2.5}),
    "experts": (tiny_qwen3_moe, {}),
}
DISK_CALLS = ("replace", "fsync", "unlink", "open", "rename")


def quantize(output: Path, steps: int, kind: str) -> None:
    """All rungs on a tiny model, with the state kept after each step."""
    recipes.RECIPES["fast"] = recipes.Recipe(
        rounds=1,
        prefix_tokens=288,
        heldout_tokens=64,
        steps=steps,
        lengths=(32,),
        step_tokens=64,
        sign_rate=0.02,
        block=BlockOptions(epochs=1),
        flip_rounds=3,
        flip_tokens=128,
    )
    upper_rungs.KEEP_EVERY_S, upper_rungs.KEEP_SHARE = 0.0, math.inf
    rows = [{"input_ids": tiny_ids(1, 32, seed=i)} for i in range(12)]
    make, options = KINDS[kind]
    config = hf_onebit.OneBitConfig(preset="fast", dataset=rows, **options)
    quantizer = hf_onebit.OneBitQuantizer.from_pretrained(make(), config=config)
    quantizer.quantize(output, tokenizer=tiny_tokenizer())


def killed_at_call(number: int) -> None:
    """Have this process killed at its ``number``-th call that touches the disk: before an odd, after an even one."""
    calls = 0

    def counted(function):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == number and number % 2:
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*args, **kwargs)
            if calls == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call

    for name in DISK_CALLS:
        setattr(os, name, counted(getattr(os, name)))


def attempt(output: Path, steps: int, kind: str, call: int | None = None) -> int:
    """The process id of a fork that quantizes."""
    child = os.fork()
    if child:
        return child
    try:
        if call is not None:
            killed_at_call(call)
        quantize(output, steps, kind)
        os._exit(0)
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
        os._exit(1)


def wait_for(child: int, seconds: float) -> None:
    """Return once a process had the processor for so long, or has ended."""
    ticks = seconds * os.sysconf("SC_CLK_TCK")
    while True:
        state, *fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
        if state == "Z" or int(fields[10]) + int(fields[11]) >= ticks:
            return
        time.sleep(0.001)


def main() -> None:
    """Let one attempt pass, kill others, and let a last one end."""
    torch.set_num_threads(1)
    folder, mode, kills, steps = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    kind = sys.argv[5]
    chance = random.Random(kills)
    if os.waitpid(attempt(folder / "reference", steps, kind), 0)[1]:
        sys.exit("the uninterrupted attempt failed")
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = usage.ru_utime + usage.ru_stime
    attempts, killed, status = 0, 0, -1
    while status != 0:
        attempts += 1
        is_to_die = attempts <= kills
        # Opening the folder takes about six calls, keeping a stage eight: an attempt gets one or two stages further.
        call = chance.randint(1, 30) if is_to_die and mode == "calls" else None
        child = attempt(folder / "out", steps, kind, call)
        if is_to_die and mode == "moments":
            wait_for(child, chance.random() * 0.12 * seconds)
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        killed += os.WIFSIGNALED(status)
        if os.WIFEXITED(status) and status:
            sys.exit(f"attempt {attempts} failed")
        if status == 0 and is_to_die:
            break  # there was nothing left to interrupt
    print(json.dumps({"attempts": attempts, "killed": killed}))


if __name__ == "__main__":
    main()
