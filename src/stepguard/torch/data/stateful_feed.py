"""The position in loaders and data sets that know it themselves, by ``state_dict`` and ``load_state_dict``."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler

from stepguard.steps.feeds import shown
from stepguard.steps.stateful_feeds import StatefulFeed
from stepguard.torch.checkpoint.state import check_saveable
from stepguard.torch.data import generators
from stepguard.torch.data.inside import Inside, warn_of_new_generators
from stepguard.torch.data.map_feed import keep_order
from stepguard.torch.data.stream_feed import StreamFeed
from stepguard.torch.data.workers import InitWorker, SeededBatches
from stepguard.torch.random_states import STREAMS


def is_of_nodes(loader: Any) -> bool:
    """Whether ``loader`` is a Loader of torchdata.nodes."""
    return any(kind.__module__ == "torchdata.nodes.loader" for kind in type(loader).__mro__)


class TorchStatefulFeed(StreamFeed, StatefulFeed):
    """A loader that has a state of its own, or whose data set has; ``of_dataset`` says whether that has it.

    Raises:
        TypeError: the state cannot be saved.
    """

    def __init__(self, loader: Any, *, of_dataset: bool = False) -> None:
        super().__init__(loader)
        self._of_dataset = of_dataset
        self._check_state()

    @property
    def _holder(self) -> Any:
        return self.loader.dataset if self._of_dataset else self.loader

    def _check_state(self) -> None:
        what = "data set" if self._of_dataset else "loader"
        with STREAMS.preserved():
            check_saveable(f"the {what}'s state_dict()", self._holder.state_dict())

    def position(self) -> dict[str, Any]:
        """The position, with the state of the loader, of its random streams, and of the generators inside."""
        position = super().position()
        if "state" in position:
            position["items"] = self._states_inside()
        return position

    def resume(self, position: Mapping[str, Any], processes: int = 1, *, is_checked: bool = True) -> None:
        """Begin at ``position``."""
        super().resume(position, processes, is_checked=is_checked)
        if self.batches:
            self._put_inside(position.get("items", ()))

    def close(self) -> None:
        """Close the feed, and drop the iterator that torchdata's loader keeps."""
        super().close()
        if isinstance(self.loader, DataLoader):
            # If the garbage collector ended this iterator, which is in a cycle, it would wait five seconds in vain for
            # each of its workers.
            self.loader._iterator = None

    def _load(self, state: Any) -> None:
        super()._load(state)
        if self._is_loaded and hasattr(self._holder, "_initial_iter_for_state_dict"):
            # torchdata's loader makes an iterator of the end of an epoch first, and then that of the next one. That of
            # the end is made now, so that what it draws does not count.
            with STREAMS.preserved():
                self._holder.state_dict()
            self._put_inside(self._inside_before)

    def _restarts_workers(self) -> bool:
        return False

    def _begin_epoch(self, skip: int) -> Iterator[Any]:
        self._set_before.begin_epoch()
        if not skip:
            self._generators_before = self._states_inside()
        # Not as for a stream, which is read again from the states at the beginning of the epoch.
        return StatefulFeed._begin_epoch(self, skip)

    def _open(self) -> Iterator[Any]:
        if self._seen_before:
            # If the order is drawn again, it is from the states from which it was drawn.
            generators.restore(self._inside.generators, self._generators_before or ())
        return super()._open()

    def _states_inside(self) -> list[Any]:
        return generators.states(self._inside.generators)

    def _put_inside(self, states: Any) -> None:
        generators.restore(self._inside.generators, states)


class NodesFeed(TorchStatefulFeed):
    """A Loader of torchdata.nodes, whose nodes may read ahead in threads."""

    def __init__(self, loader: Any) -> None:
        super().__init__(loader)
        samplers = [one for one in self._inside.objects if isinstance(one, Sampler)]
        # If a sampler drew from the stream of the process in a thread, nobody could draw the order again.
        self._seeded: list[Any] = [one for one in samplers if getattr(one, "generator", self) is None]
        self._of_samplers = {id(one) for one in Inside(*samplers).generators}
        self._is_state_checked = False

    def _check_state(self) -> None:
        """Nothing yet: the loader would begin to read."""

    def _load(self, state: Any) -> None:
        self.loader._iter_for_state_dict = False  # Its next iterator is to be that of the state.
        super()._load(state)

    def _open(self) -> Iterator[Any]:
        for one in self._seeded:
            one.generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
        loader = self.loader
        restarts, loader.restart_on_stop_iteration = loader.restart_on_stop_iteration, False
        try:
            iterator = super()._open()  # Of the state at the end of an epoch it is empty, and the next one follows.
        finally:
            loader.restart_on_stop_iteration = restarts
        if not self._is_state_checked:
            self._is_state_checked = True
            super()._check_state()
        return iterator

    def _put_inside(self, states: Any) -> None:
        # In the middle of an epoch, those of samplers stay where the order leaves them: threads are ahead of batches.
        kept = self._of_samplers if self._seen_before else ()
        for one, state in zip(self._inside.generators, states, strict=False):
            if id(one) not in kept:
                generators.restore([one], [state])


class WorkerStatefulFeed(TorchStatefulFeed):
    """A StatefulDataLoader with workers over a data set with a state. Each of its batches gets a seed of its own.

    torchdata saves the state of the data set in each worker, and not that of the worker's random streams.
    """

    def __init__(self, loader: Any) -> None:
        self._stream = SeededBatches.of(loader.dataset, loader.collate_fn, loader.batch_size or 1)
        # A copy, so that the program's own loader does not change for its other uses.
        self._seeded: Any = copy.copy(loader)
        self._seeded._iterator = None
        self._seeded.worker_init_fn = InitWorker(loader.worker_init_fn)
        keep_order(self._seeded)
        object.__setattr__(self._seeded, "dataset", self._stream)
        self._worker_seed = torch.initial_seed() % 2**63
        self._stream.begin(0, self._worker_seed)  # The check of the state starts workers.
        super().__init__(loader)

    @property
    def _holder(self) -> Any:
        return self._seeded

    def position(self) -> dict[str, Any]:
        """The position, with the seed of the workers, and whether they have made generators."""
        new = int(self._stream.has_new_generators)
        return {**super().position(), "worker_seed": self._worker_seed, "new generators": new}

    def resume(self, position: Mapping[str, Any], processes: int = 1, *, is_checked: bool = True) -> None:
        """Begin at ``position``."""
        super().resume(position, processes, is_checked=is_checked)
        self._worker_seed = position.get("worker_seed", self._worker_seed) % 2**63
        warn_of_new_generators(shown(self.loader), position)

    def close(self) -> None:
        """Close the feed, and drop the iterator that the loader keeps."""
        super().close()
        self._seeded._iterator = None

    def _open(self) -> Iterator[Any]:
        if self._stream.begin(self.epoch, self._worker_seed):
            self._seeded._initial_iter_for_state_dict = False  # Its workers have begun another epoch.
        return iter(self._seeded)
