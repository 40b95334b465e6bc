"""Ctrl-C and SIGTERM: finish the step, save, stop; several processes after the same step."""

from __future__ import annotations

import signal

from fastssl import processes
from fastssl.processes import World


class StopSignal:
    """SIGINT and SIGTERM in a `with` block: a signal is noted, for the training loop to stop after the step.

    A second signal ends the program at once; the last checkpoint stays.
    """

    def __init__(self, world: World):
        self.world = world
        self.reason: str | None = None
        """Why all processes stop after this step; None: they go on."""
        self._received: str | None = None  # in this process

    def __enter__(self) -> StopSignal:
        self._previous = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: object) -> None:
        name = signal.Signals(number).name
        # Under torchrun the second signal has to be the same one: torchrun passes SIGINT on as a SIGTERM, too.
        if self._received and (self._received == name or self.world.size == 1):
            raise KeyboardInterrupt
        self._received = name

    def agree(self, may_wait: bool) -> None:
        """Set `reason`. Several processes ask each other, which waits for the device, only where that is allowed."""
        if self.world.size == 1:
            self.reason = self._received
        elif may_wait and processes.any_process(self.world, self._received is not None):
            self.reason = self._received or "another process"
