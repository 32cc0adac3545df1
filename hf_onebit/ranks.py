"""Several processes that quantize one model: each runs its share of the calibration sequences, sums meet on the first.

Every exchange begins with a word of each process on how it is (``Ranks._meet``). A process that fails says so there, at
whatever exchange the others come to next, and all of them end with its error. While the first one works alone, it lets
the others know now and then that it still does, so that they wait as long as it takes and no longer. Values travel as
JSON and as raw bytes of tensors.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

T = TypeVar("T")

# The longest that a process waits for the others. Parts that take longer are those that one does alone.
TIMEOUT_S = 1800.0
# How often a process that works alone says so.
HEARTBEAT_S = 5.0
_READY, _BUSY, _FAILED = 0, 1, 2


class PeerError(RuntimeError):
    """Another process failed."""


class Ranks:
    """The processes at work; as it stands, this one alone. A context manager: an error inside ends all of them.

    Attributes:
        rank: number of this process.
        size: how many there are.
    """

    def __init__(self, group: Any = None) -> None:
        self._group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)

    @property
    def is_first(self) -> bool:
        """Whether this is the process that fits, keeps and writes."""
        return self.rank == 0

    def __enter__(self) -> Ranks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.size == 1:
            return
        if error is not None and not isinstance(error, PeerError):
            with contextlib.suppress(Exception):  # what went wrong here is what counts
                self._meet(_FAILED, f"{type(error).__name__}: {error}")
        with contextlib.suppress(Exception):
            dist.destroy_process_group(self._group)
        self._group = None

    def share(self, count: int) -> list[int]:
        """Positions of the sequences that this process runs: every ``size``-th, so that all get alike ones."""
        return list(range(self.rank, count, self.size))

    def alone(self, work: Callable[[], T]) -> T | None:
        """Have the first process do something while the others wait; its result there, None elsewhere.

        Raises:
            PeerError: it failed, or another process did.
        """
        if self.size == 1:
            return work()
        result = None
        if self.is_first:
            with self._heartbeat():
                result = work()
        while _BUSY in self._meet(_READY):
            pass
        return result

    def gather(self, value: Any) -> list[Any]:
        """A value (JSON types) of every process, in their order, on all of them."""
        if self.size == 1:
            return [value]
        self._meet(_READY)
        return self._gather(value)

    def value_of_first(self, value: T) -> T:
        """A value (JSON types) that the first process has, on all of them."""
        if self.size == 1:
            return value
        self._meet(_READY)
        found: T = self._value_of_first(value)
        return found

    def tensors_of_first(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Tensors that the first process has, on all of them (on the CPU)."""
        if self.size == 1:
            return tensors
        self._meet(_READY)
        about = self._value_of_first({name: _about(tensor) for name, tensor in tensors.items()})
        found = {}
        for name, said in about.items():
            tensor = tensors[name] if self.is_first else _empty(said)
            flat = _bytes(tensor)
            if flat.numel():
                dist.broadcast(flat, 0, group=self._group)
            found[name] = tensor
        return found

    def sum_on_first(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over all processes, on the first; what the others get means nothing."""
        if self.size == 1:
            return tensor
        self._meet(_READY)
        total = tensor.detach().cpu().contiguous()
        dist.reduce(total, 0, group=self._group)
        return total.to(tensor.device)

    def collect(self, tensors: Sequence[Tensor], count: int) -> list[Tensor]:
        """Put together what each process holds of ``count`` sequences, in their order, on the first.

        Args:
            tensors: of this process's share.
            count: of all of them.

        Returns:
            one tensor a sequence on the first process (others' on the CPU), nothing elsewhere.
        """
        if self.size == 1:
            return list(tensors)
        about = self.gather([_about(tensor) for tensor in tensors])
        if not self.is_first:
            for tensor in tensors:
                dist.send(_bytes(tensor), 0, group=self._group)
            return []
        whole: list[Tensor] = [torch.empty(0)] * count
        for position, tensor in zip(self.share(count), tensors, strict=True):
            whole[position] = tensor
        for rank in range(1, self.size):
            for position, said in zip(range(rank, count, self.size), about[rank], strict=True):
                whole[position] = _empty(said)
                dist.recv(_bytes(whole[position]), rank, group=self._group)
        return whole

    def _meet(self, state: int, text: str = "") -> list[int]:
        """How each process is.

        Raises:
            PeerError: one of them failed, or is gone.
        """
        mine, states = torch.tensor([state]), [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        try:
            dist.all_gather(states, mine, group=self._group)
            found = [int(each) for each in states]
            said = self._gather(text) if _FAILED in found else []
        except RuntimeError as error:
            raise PeerError(
                f"Process {self.rank} of {self.size} lost the others, or waited longer than {TIMEOUT_S:.0f} s for them "
                f"({error}): one of them was ended, or did not come to quantize with this one"
            ) from error
        for rank, words in enumerate(said):
            if found[rank] == _FAILED:
                raise PeerError(f"Process {rank} of {self.size} failed: {words}")
        return found

    @contextlib.contextmanager
    def _heartbeat(self) -> Iterator[None]:
        """While this runs, the others hear that this process is busy."""
        over = threading.Event()
        errors: list[PeerError] = []

        def beat() -> None:
            while not over.wait(HEARTBEAT_S):
                try:
                    self._meet(_BUSY)
                except PeerError as error:
                    errors.append(error)
                    return

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
        if errors:
            raise errors[0]

    def _gather(self, value: Any) -> list[Any]:
        text = _encoded(value)
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([text.numel()]), group=self._group)
        longest = max(int(length) for length in lengths)
        padded = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.size)]
        dist.all_gather(padded, torch.nn.functional.pad(text, (0, longest - text.numel())), group=self._group)
        return [_decoded(row[: int(length)]) for row, length in zip(padded, lengths, strict=True)]

    def _value_of_first(self, value: Any) -> Any:
        text = _encoded(value if self.is_first else None)
        length = torch.tensor([text.numel()])
        dist.broadcast(length, 0, group=self._group)
        text = text if self.is_first else torch.zeros(int(length), dtype=torch.uint8)
        dist.broadcast(text, 0, group=self._group)
        return value if self.is_first else _decoded(text)


ALONE = Ranks()


def current_ranks(wanted: bool = True) -> Ranks:
    """The processes of the default process group, if there is one and they are ``wanted``; else this one alone.

    All of them must call it, in the same order as whatever else they do together.

    Raises:
        PeerError: the others did not come.
    """
    if not wanted or not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return Ranks()
    try:
        # A group of its own, whatever the default one is made for: sums live in main memory.
        return Ranks(dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=TIMEOUT_S)))
    except RuntimeError as error:
        raise PeerError(
            f"The other processes of the group did not come to quantize ({error}): call it on all of them, or on one "
            "with data_parallel=False"
        ) from error


@contextlib.contextmanager
def launched_group() -> Iterator[int]:
    """A process group where a launcher (torchrun, accelerate) started this process; this process's number in it."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or "RANK" not in os.environ or not dist.is_available() or dist.is_initialized():
        yield dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        return
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=TIMEOUT_S))
    try:
        yield dist.get_rank()
    finally:
        dist.destroy_process_group()


def _about(tensor: Tensor) -> list[Any]:
    return [str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]


def _empty(about: Sequence[Any]) -> Tensor:
    return torch.empty(about[1], dtype=getattr(torch, about[0]))


def _bytes(tensor: Tensor) -> Tensor:
    """The bytes of a tensor; of one that is contiguous and on the CPU a view."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def _encoded(value: Any) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _decoded(text: Tensor) -> Any:
    return json.loads(text.numpy().tobytes())
