"""Layer inputs that wait in host memory between forward and backward, copied beside the arithmetic.

A second stream carries the copies: an input leaves while its own layer runs, and comes back while the layer above runs
its backward. At 8 kB a token and layer the bus needs far less time for it than the layer does for its products.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deepdoctor.engine.memory import RING
from deepdoctor.errors import TrainingError

__all__ = ["HostInputs"]


class HostInputs:
    """Inputs of the first ``layers`` layers, (tokens, hidden) each; page-locked where the device is a GPU."""

    def __init__(self, layers: int, tokens: int, hidden: int, dtype: torch.dtype, device: torch.device):
        self.layers = layers
        self.buffers = [torch.empty(tokens, hidden, dtype=dtype) for _ in range(layers)]
        self.cuda = device.type == "cuda" and layers > 0
        self._registered: list[int] = []
        if not self.cuda:
            return
        self.stream = torch.cuda.Stream(device)
        self.sent: list[torch.cuda.Event | None] = [None] * layers
        self.fetched: list[torch.cuda.Event | None] = [None] * layers
        self.freed: list[torch.cuda.Event | None] = [None] * layers
        runtime = torch.cuda.cudart()
        for buffer in self.buffers:
            # PyTorch's own pinned memory comes in powers of two, up to twice what is asked for.
            code = runtime.cudaHostRegister(buffer.data_ptr(), buffer.nbytes, 0)
            if int(code):
                self.close()
                raise TrainingError(
                    f"{buffer.nbytes / 2**30:.1f} GiB of host memory cannot be page-locked for layer inputs",
                    "free host memory, or shorten the rows (`--data.max_seq_len`)",
                )
            self._registered.append(buffer.data_ptr())

    def close(self) -> None:
        """Give the memory back."""
        if self._registered:
            torch.cuda.synchronize()
            for address in self._registered:
                torch.cuda.cudart().cudaHostUnregister(address)
        self._registered.clear()
        self.buffers.clear()

    def send(self, number: int, x: Tensor) -> None:
        """Copy layer ``number``'s input x (T, D) to the host, once what is queued now has run."""
        target = self.buffers[number][: x.shape[0]]
        if not self.cuda:
            target.copy_(x)
            return
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            target.copy_(x, non_blocking=True)
            self.sent[number] = self.stream.record_event()

    def wait_until_sent(self, number: int) -> None:
        """Let what is queued next wait until layer ``number``'s input has left, since its memory is used again."""
        if self.cuda and 0 <= number < self.layers:
            event = self.sent[number]
            assert event is not None
            torch.cuda.current_stream().wait_event(event)

    def fetch(self, number: int, ring: list[Tensor], first: bool) -> Tensor:
        """Return layer ``number``'s input on the device and begin to bring the one below it.

        first: whether this is the first fetch of a backward.
        """
        place = ring[number % RING]
        if not self.cuda:
            place.copy_(self.buffers[number][: place.shape[0]])
            return place
        if first:
            self.freed = [None] * self.layers
            self._bring(number, ring)
        if number:
            self._bring(number - 1, ring)
        event = self.fetched[number]
        assert event is not None
        torch.cuda.current_stream().wait_event(event)
        return place

    def _bring(self, number: int, ring: list[Tensor]) -> None:
        place = ring[number % RING]
        above = number + RING
        event = self.freed[above] if above < self.layers else None
        if event is not None:
            self.stream.wait_event(event)
        else:
            # The slot held what forward left there.
            self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            place.copy_(self.buffers[number][: place.shape[0]], non_blocking=True)
            self.fetched[number] = self.stream.record_event()

    def done(self, number: int) -> None:
        """Mark layer ``number``'s backward as queued: its place may be used again after it."""
        if self.cuda and number < self.layers:
            self.freed[number] = torch.cuda.current_stream().record_event()
