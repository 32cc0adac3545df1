"""What users see while they wait: one bar on a terminal, a line now and then elsewhere; and the package's logger.

Both obey Transformers' switches (``transformers.logging.set_verbosity_*`` and ``disable_progress_bar``).
"""

from __future__ import annotations

import logging
import sys
import time
from types import TracebackType

from tqdm.auto import tqdm
from transformers.utils import logging as hf_logging

# A child of Transformers' root logger, so that its verbosity and handlers apply to us too.
logger = hf_logging.get_logger("transformers.hf_onebit")
_THEIR_MARK, _OUR_MARK = "[transformers]", "[hf_onebit]"


class _Marked(logging.Formatter):
    """A format of Transformers that begins each line with its name: ours begin with ours."""

    def __init__(self, theirs: logging.Formatter, format: str) -> None:
        super().__init__(_OUR_MARK + format.removeprefix(_THEIR_MARK))
        self._theirs = theirs

    def format(self, record: logging.LogRecord) -> str:
        return super().format(record) if record.name == logger.name else self._theirs.format(record)


def mark_lines() -> None:
    """Have lines of this package begin with its own name where Transformers' handlers would write theirs.

    Formats that someone chose (``enable_explicit_format``, ``TRANSFORMERS_VERBOSITY=detail``) stay as they are.
    """
    for handler in hf_logging.get_logger().handlers:
        format = getattr(handler.formatter, "_fmt", None) or ""
        if handler.formatter is not None and format.startswith(_THEIR_MARK):
            handler.setFormatter(_Marked(handler.formatter, format))


mark_lines()

_LINE_EVERY_S = 15.0


class Progress:
    """A context manager that shows how far a loop over named steps has come.

    Args:
        total: number of steps.
        description: what is being done, e.g. "Quantizing".
        unit: name of one step.
    """

    def __init__(self, total: int, description: str, unit: str = "layer") -> None:
        self.total, self.description, self.unit = total, description, unit
        enabled = hf_logging.is_progress_bar_enabled()
        self._bar = tqdm(total=total, desc=description, unit=unit, disable=not (enabled and sys.stderr.isatty()))
        self._lines = enabled and not sys.stderr.isatty()
        self._first_step = self._last_line = time.monotonic()
        self._done = 0

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def step(self, name: str, **figures: str) -> None:
        """One step is done: show its name and figures (error, memory, ...)."""
        self._done += 1
        self._bar.set_description(f"{self.description} {name}", refresh=False)
        self._bar.set_postfix({**figures, "ram": f"{memory_mb() / 1024:.1f}G"}, refresh=False)
        self._bar.update()
        now = time.monotonic()
        if self._done == 1:
            self._first_step = now  # what came before it was preparation, and says nothing about the steps to come
        elif self._lines and (now - self._last_line > _LINE_EVERY_S):
            self._last_line = now
            remaining = (now - self._first_step) / (self._done - 1) * (self.total - self._done)
            shown = " ".join(f"{key}={value}" for key, value in figures.items())
            count = f"{self._done}/{self.total} {self.unit}s"
            about = f"{self.description} {name}".rstrip()
            logger.warning(f"{about}: {count}, about {remaining:.0f} s left {shown}".rstrip())


def say(line: str) -> None:
    """Show a line to those who want to see progress."""
    if hf_logging.is_progress_bar_enabled():
        logger.warning(line)


def memory_mb() -> float:
    """Resident memory of this process now, in MiB (0.0 where the system does not tell)."""
    try:
        with open("/proc/self/statm", encoding="ascii") as statm:
            pages = int(statm.read().split()[1])
    except OSError:
        return 0.0
    import resource

    return pages * resource.getpagesize() / 2**20
