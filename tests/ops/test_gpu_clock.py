"""Captures on a device, with a device that is made up."""

import contextlib

import pytest
import torch

from hf_onebit.ops import gpu_clock


class Device:
    """What torch.cuda says of streams: each device has a current one, captures leave theirs behind if they fail."""

    def __init__(self, monkeypatch):
        self.number, self.current = 0, {0: "usual 0", 1: "usual 1"}
        self.captured = []
        gpu_clock._stream.cache_clear()
        for name, fake in {
            "current_device": lambda: self.number,
            "current_stream": lambda device: self.current[device.index],
            "CUDAGraph": object,
            "Stream": lambda device: f"side {device.index}",
            "graph": self.graph,
            "stream": self.stream,
        }.items():
            monkeypatch.setattr(torch.cuda, name, fake)

    @contextlib.contextmanager
    def graph(self, graph, stream, capture_error_mode):
        assert capture_error_mode == "thread_local"
        before, self.current[self.number] = self.current[self.number], stream
        yield
        self.captured.append((self.number, stream))
        self.current[self.number] = before  # not where the capture fails

    @contextlib.contextmanager
    def stream(self, stream):
        before, self.current[self.number] = self.current[self.number], stream
        try:
            yield
        finally:
            self.current[self.number] = before


@pytest.fixture
def device(monkeypatch):
    yield Device(monkeypatch)
    gpu_clock._stream.cache_clear()


def test_each_device_captures_on_a_stream_of_its_own(device):
    for number in (0, 1, 0):
        device.number = number
        gpu_clock.capture(lambda: None)
    assert device.captured == [(0, "side 0"), (1, "side 1"), (0, "side 0")]


def test_a_capture_that_fails_gives_the_stream_back(device):
    def call():
        assert device.current[0] == "side 0"
        raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="not permitted"):
        gpu_clock.capture(call)
    assert device.current == {0: "usual 0", 1: "usual 1"}
    assert not device.captured
