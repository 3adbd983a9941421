"""A simulation of DeepSpeed's ZeRO-3 coordinator on parameter sizes: what is gathered, how often, and the peak.

DeepSpeed records in which order modules are visited, fetches each module's parameters before it runs, prefetches the
next ones, and releases those that are not needed again soon (`runtime/zero/partitioned_param_coordinator.py`, 0.19.8).
Which parameters are gathered twice, and how much is held at once, depends on its bounds and on its history. Both are
simulated here step by step instead of being approximated by a formula.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Visit:
    """One execution of a module.

    own: indices of the parameters fetched for it. below: these and the parameters of the modules inside it.
    """

    module: str
    own: tuple[int, ...]
    below: tuple[int, ...]
    is_leaf: bool = False
    """A decoder layer, fetched and released as a whole."""


@dataclass(frozen=True)
class Bounds:
    """DeepSpeed's limits, in number of elements: `stage3_prefetch_bucket_size`, `stage3_max_live_parameters`,
    `stage3_max_reuse_distance`, `stage3_param_persistence_threshold`."""

    prefetch: int
    max_live: int
    max_reuse: int
    persistence: int


@dataclass(frozen=True)
class Gathers:
    """The gathers of one micro-step."""

    times: tuple[int, ...]
    """Number of gathers of each parameter."""
    peak_bytes: int
    """Largest amount of gathered parameters at one time, including the receive buffers of collectives."""


def steady_gathers(
    sizes: Sequence[int],
    item_bytes: Sequence[int],
    forward: Sequence[Visit],
    backward: Sequence[Visit],
    bounds: Bounds,
    *,
    begins_with_forward: bool = True,
) -> Gathers:
    """Gathers of a micro-step after DeepSpeed has recorded the order of modules.

    Args:
        sizes: number of elements of each parameter.
        item_bytes: bytes per element of each parameter.
        begins_with_forward: whether the first recorded order was a forward alone, as in the checks before the first
            step and in evaluations. DeepSpeed keeps the release decisions that it made then: no layer stays gathered
            from the forward to the backward.
    """
    coordinator = _Coordinator(sizes, item_bytes, bounds)
    if begins_with_forward:
        coordinator.run(forward, (), order=forward)
        coordinator.release_everything()
    order = [*forward, *backward]
    result = coordinator.run(forward, backward, order=order)
    for _ in range(_MICRO_STEPS_TO_SETTLE):
        result = coordinator.run(forward, backward, order=order)
    return result


def forward_gathers(
    sizes: Sequence[int], item_bytes: Sequence[int], forward: Sequence[Visit], bounds: Bounds
) -> Gathers:
    """Gathers of a forward alone, after DeepSpeed has recorded the order and with nothing gathered before it."""
    coordinator = _Coordinator(sizes, item_bytes, bounds)
    coordinator.run(forward, (), order=forward)
    coordinator.release_everything()
    return coordinator.run(forward, (), order=forward)


_MICRO_STEPS_TO_SETTLE = 3


@dataclass
class _Coordinator:
    sizes: Sequence[int]
    item_bytes: Sequence[int]
    bounds: Bounds
    available: set[int] = field(default_factory=set)
    in_flight: dict[int, int] = field(default_factory=dict)
    """From each parameter in flight to the number of the collective that gathers it."""
    released_after: dict[tuple[str, int], frozenset[int]] = field(default_factory=dict)
    """Parameters to release, by module and place in the order; kept forever, like DeepSpeed's lru_cache."""
    collectives: int = 0

    def run(self, forward: Sequence[Visit], backward: Sequence[Visit], *, order: Sequence[Visit]) -> Gathers:
        """Simulate one micro-step. The recorded `order` may be longer than the modules that run now."""
        self.times = [0] * len(self.sizes)
        self.peak = 0
        self._land(list(self.in_flight))
        self.queue = deque((p, place) for place, visit in enumerate(order) for p in sorted(visit.own))
        self.used_at: dict[int, int] = {}
        self.live_numbers = 0
        for place, visit in enumerate([*forward, *backward]):
            self._fetch(visit, place)
            self._release(visit, place + 1, order)
        if backward:
            self.available -= {p for visit in backward for p in visit.own if not self._persists(p)}
        return Gathers(tuple(self.times), self.peak)

    def release_everything(self) -> None:
        self.available.clear()
        self.in_flight.clear()

    def _persists(self, parameter: int) -> bool:
        return self.sizes[parameter] <= self.bounds.persistence

    def _gather(self, parameters: Sequence[int]) -> None:
        for p in parameters:
            self.times[p] += 1
            self.in_flight[p] = self.collectives
            self.live_numbers += self.sizes[p]
        self.collectives += 1
        self._note_peak(0)

    def _note_peak(self, arriving_bytes: int) -> None:
        held = sum(self.sizes[p] * self.item_bytes[p] for p in self.available | self.in_flight.keys())
        self.peak = max(self.peak, held + arriving_bytes)

    def _land(self, parameters: Sequence[int]) -> None:
        """Wait for gathers in flight; DeepSpeed releases these when it resets the recorded order."""
        for p in parameters:
            del self.in_flight[p]

    def _fetch(self, visit: Visit, place: int) -> None:
        missing = [p for p in visit.own if p not in self.available and p not in self.in_flight]
        if missing:
            self._gather(missing)
        # A collective of several parameters arrives in one buffer, from which each is copied: both exist for a moment.
        brought = {self.in_flight[p] for p in visit.own if p in self.in_flight}
        arriving = [p for p, collective in self.in_flight.items() if collective in brought]
        if len(arriving) > 1:
            self._note_peak(sum(self.sizes[p] * self.item_bytes[p] for p in arriving))
        for p in visit.own:
            if p in self.in_flight:
                del self.in_flight[p]
                self.available.add(p)
        for _ in [p for p in visit.own if self.used_at.get(p, -1) < place]:
            if self.queue:
                p, used_at = self.queue.popleft()
                self.used_at[p] = used_at
        self._prefetch()

    def _prefetch(self) -> None:
        most = min(self.bounds.max_live - self.live_numbers, self.bounds.prefetch)
        chosen: list[int] = []
        numbers = 0
        while self.bounds.prefetch > 0 and self.queue and numbers < most:
            p, used_at = self.queue.popleft()
            self.used_at[p] = max(self.used_at.get(p, -1), used_at)
            if p not in self.available and p not in self.in_flight and p not in chosen:
                chosen.append(p)
                numbers += self.sizes[p]
        if chosen:
            self._gather(chosen)

    def _release(self, visit: Visit, place: int, order: Sequence[Visit]) -> None:
        key = (visit.module, place)
        if key not in self.released_after:
            self.released_after[key] = self._no_longer_needed(visit, place, order)
        for p in self.released_after[key] & self.available:
            self.available.discard(p)
            self.live_numbers -= self.sizes[p]

    def _no_longer_needed(self, visit: Visit, place: int, order: Sequence[Visit]) -> frozenset[int]:
        leaving = {p for p in visit.own if not self._persists(p) and self.used_at.get(p, -1) <= place}
        passed = 0
        for later in order[place:]:
            if passed >= self.bounds.max_reuse:
                break
            # DeepSpeed considers the submodules of a later module only if the current module is a leaf.
            for p in later.below if visit.is_leaf else later.own if not later.is_leaf else ():
                leaving.discard(p)
                passed += self.sizes[p]
        return frozenset(leaving)
