"""Interleaved timing: each contender runs once a round, so that whatever else the machine does hits all alike."""

import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

# A timing repeats its work to last about this long: far above the clock's resolution and one call from Python.
TIMING_SECONDS = 5e-3
MOST_REPEATS = 200


@dataclass(frozen=True)
class Contender:
    """One thing to time.

    Args:
        name: how it is called in the results.
        run: does the work once for each copy of the weights whose number it is given.
        copies: how many copies of the weights there are.
        weights: a name for those copies: contenders that read the same ones take turns through them, so that no one
            finds in a cache what another one has just read.
    """

    name: str
    run: Callable[[Sequence[int]], None]
    copies: int
    weights: str


@dataclass(frozen=True)
class Times:
    """Seconds of one pass in each round: on the wall's clock, and those that the process had the processor for."""

    wall: list[float]
    cpu: list[float]


def time_rounds(contenders: Sequence[Contender], rounds: int) -> dict[str, Times]:
    """Times of one pass of each contender in each round, by name.

    With one copy the weights are hot: the pass before the clock starts has brought them into the caches, as far as they
    fit. With many copies every pass takes the next ones.
    """
    repeat = {contender.name: _repeats(contender) for contender in contenders}
    position = {contender.weights: 0 for contender in contenders}
    times = {contender.name: Times([], []) for contender in contenders}
    for number in range(rounds):
        first = number % len(contenders)  # nobody always comes after the same one
        for contender in (*contenders[first:], *contenders[:first]):
            start = position[contender.weights]
            chosen = [(start + i) % contender.copies for i in range(repeat[contender.name])]
            position[contender.weights] = start + len(chosen)
            if contender.copies == 1:
                contender.run([0])
            begin, begin_cpu = time.perf_counter(), time.process_time()
            contender.run(chosen)
            times[contender.name].cpu.append((time.process_time() - begin_cpu) / len(chosen))
            times[contender.name].wall.append((time.perf_counter() - begin) / len(chosen))
    return times


def _repeats(contender: Contender) -> int:
    contender.run([0])
    begin = time.perf_counter()
    contender.run([0])
    return max(1, min(MOST_REPEATS, int(TIMING_SECONDS / max(time.perf_counter() - begin, 1e-7))))


def median_ratio(times: Sequence[float], others: Sequence[float]) -> float:
    """The median over rounds of times / others: both halves of a ratio come from the same round."""
    return statistics.median(mine / max(other, 1e-9) for mine, other in zip(times, others, strict=True))


class Threads:
    """Threads of Python for work that releases the interpreter's lock."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._pool = ThreadPoolExecutor(count - 1) if count > 1 else None

    def split(self, size: int, unit: int, body: Callable[[int, int], object]) -> None:
        """Run body(begin, end) over 0 .. size, in one range a thread; ranges begin at multiples of ``unit``."""
        share = -(-size // (self.count * unit)) * unit
        ranges = [(begin, min(begin + share, size)) for begin in range(0, size, share)]
        waiting = [self._pool.submit(body, *each) for each in ranges[1:]] if self._pool else []
        body(*ranges[0])
        for future in waiting:
            future.result()
