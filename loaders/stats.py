"""The time that a loader spends, stage by stage."""

from __future__ import annotations

import dataclasses
import threading


@dataclasses.dataclass
class Stats:
    """Seconds per stage since the loader was opened, and how many images went through.

    read, decode, crop, augment: summed over worker threads (CPU seconds, except read, which is elapsed time).
    copy: launching host-to-device copies and device augmentation; device: what these take on the GPU, by its own
    clock. wait: the consumer waiting for its next batch, the only stage that costs training time.
    """

    read: float = 0.0
    decode: float = 0.0
    crop: float = 0.0
    copy: float = 0.0
    augment: float = 0.0
    device: float = 0.0
    wait: float = 0.0
    images: int = 0
    replaced: int = 0  # broken samples for which another one was taken

    def __post_init__(self) -> None:
        self._lock = threading.Lock()

    def add(self, **amounts: float) -> None:
        """Add to the named fields; safe from any thread."""
        with self._lock:
            for name, amount in amounts.items():
                setattr(self, name, getattr(self, name) + amount)

    def snapshot(self) -> dict[str, float]:
        """Copy of the fields as a dict."""
        with self._lock:
            return dataclasses.asdict(self)
