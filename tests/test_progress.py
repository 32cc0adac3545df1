"""The package's lines: how they begin, and whose switches they follow."""

import io
import logging
from collections.abc import Iterator

import pytest
from transformers.utils import logging as hf_logging

from hf_onebit import progress

ROOT = hf_logging.get_logger()


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    """What a handler with Transformers' default format writes."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter("[transformers] %(message)s"))
    before = ROOT.level
    monkeypatch.setattr(ROOT, "handlers", [handler])
    progress.mark_lines()
    yield stream
    ROOT.setLevel(before)


def test_each_librarys_lines_begin_with_its_own_name(shown: io.StringIO) -> None:
    progress.logger.warning("ours, %s", "filled in")
    ROOT.warning("theirs")
    hf_logging.get_logger("transformers.modeling_utils").warning("theirs too")
    assert shown.getvalue() == "[hf_onebit] ours, filled in\n[transformers] theirs\n[transformers] theirs too\n"


def test_marking_twice_is_marking_once(shown: io.StringIO) -> None:
    progress.mark_lines()
    progress.say("ours")
    ROOT.warning("theirs")
    assert shown.getvalue() == "[hf_onebit] ours\n[transformers] theirs\n"


def test_transformers_switches_hold_for_our_lines(shown: io.StringIO) -> None:
    hf_logging.set_verbosity_error()
    progress.logger.warning("not said")
    hf_logging.set_verbosity_info()
    progress.logger.info("said")
    assert shown.getvalue() == "[hf_onebit] said\n"
    hf_logging.enable_explicit_format()
    progress.logger.warning("explicit")
    hf_logging.reset_format()
    progress.logger.warning("bare")
    lines = shown.getvalue().splitlines()[1:]
    assert lines[0].startswith("[WARNING|test_progress.py:")
    assert lines[0].endswith(">> explicit")
    assert lines[1] == "bare"


def test_a_format_of_ones_own_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    handler, own = logging.StreamHandler(io.StringIO()), logging.Formatter("%(levelname)s %(message)s")
    handler.setFormatter(own)
    monkeypatch.setattr(ROOT, "handlers", [handler, logging.StreamHandler(io.StringIO())])
    progress.mark_lines()
    assert handler.formatter is own


def test_the_package_marks_the_handler_that_transformers_has() -> None:
    record = progress.logger.makeRecord(progress.logger.name, logging.WARNING, "f", 1, "a line", (), None)
    formats = [handler.format(record) for handler in ROOT.handlers if type(handler) is logging.StreamHandler]
    assert formats == ["[hf_onebit] a line"]
