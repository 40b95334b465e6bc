"""The position of a run: what a method's hooks are told before and after every step."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """One step of a run: `before_step`, `after_backward` and `after_step` of a method all get the same one."""

    step: int
    """Steps done before this one, from 0."""
    steps: int
    """Steps of the whole run, epochs x steps_per_epoch."""
    steps_per_epoch: int

    @property
    def epoch(self) -> int:
        """The epoch that this step belongs to, from 0."""
        return self.step // self.steps_per_epoch

    @property
    def share(self) -> float:
        """The share of the run that is done before this step, in [0, 1)."""
        return self.step / self.steps
