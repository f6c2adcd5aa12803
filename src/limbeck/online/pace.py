"""When a draft is taught, and with how much."""

from __future__ import annotations

from dataclasses import dataclass

from limbeck.online.buffer import Buffer, Lot


@dataclass(frozen=True)
class Pace:
    """When an update begins and how much of the time it may take.

    It begins with `update_size` new positions, or `update_seconds` after the last, once the gate holds as many requests
    as can decide. An update that gains less than `least_gain` of acceptance doubles size and seconds, to 32 times at
    most, and halves the share; one that gains more, and traffic that changes, undo that.
    `share` of a core is what training takes at most while requests are served. While the draft is cold, there is no
    such bound, and the first updates begin with a quarter and a half of the size: that is until one gains less than
    `least_gain`, or acceptance is above `cold`. `window`: times `update_size`, the older positions that an update may
    replay; beside at most twice as many new ones as it waits for, so that its work has a bound whatever came meanwhile.
    `threads`: of its process.
    """

    update_size: int = 4096
    update_seconds: float = 300.0
    window: float = 16.0
    share: float = 0.1
    least_gain: float = 0.01
    cold: float = 0.5
    threads: int = 1

    def take(self, buffer: Buffer, size: float) -> Lot:
        """What an update trains on that has waited for this size."""
        return buffer.take(round(self.update_size * self.window), 2 * size)

    def size(self, *, cold: bool, updates: int, backoff: int) -> float:
        """New positions that the next update waits for."""
        return self.update_size * (min(1.0, 2**updates / 4) if cold else backoff)
