"""The session of a PyTorch program: that of every loop framework, with PyTorch's loaders and streams."""

from __future__ import annotations

import copy
import gc
import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from stepguard.coordination.coordinator import Coordinator
from stepguard.steps.digests import digest
from stepguard.steps.feeds import Feed
from stepguard.steps.gate import Gate
from stepguard.steps.process_state import ProcessState
from stepguard.steps.random_streams import RandomStreams
from stepguard.steps.session import Session as LoopSession
from stepguard.steps.strangers import Strangers, state_of_generator
from stepguard.torch.checkpoint.attributes import Attributes
from stepguard.torch.checkpoint.modes import Modes
from stepguard.torch.checkpoint.optimizers import has_hooks, optimizers_in
from stepguard.torch.checkpoint.state import Component, leaves, with_numpys
from stepguard.torch.data.feeds import feed_of
from stepguard.torch.data.generators import put_back_once
from stepguard.torch.data.inside import Inside
from stepguard.torch.data.own_iterators import OwnIterators
from stepguard.torch.data.reordered import Reordered
from stepguard.torch.data.stream_feed import StreamFeed
from stepguard.torch.digests import tensor_bytes
from stepguard.torch.gradients import Gradients, needed_besides, put_back
from stepguard.torch.random_states import STREAMS
from stepguard.torch.unnamed import Unnamed, reached
from stepguard.torch.unnamed_modules import UnnamedModules
from stepguard.words import logger

_log = logger(__name__)

# What is copied in each step of a program that takes from an object of its state between two steps.
_MOST_VALUES = 32
_MOST_BYTES = 1 << 16

_HAS_CUDA = torch.backends.cuda.is_built()


class Session(LoopSession):
    """A run of a PyTorch program, from its start or restart to its stop.

    ``global_step`` is the number of steps done; inside the first step it is 0. :meth:`steps` runs many steps,
    :meth:`step` runs one.
    """

    def __init__(
        self,
        coord: Coordinator,
        write_summary: Callable[[Mapping[str, Any], int], Mapping[str, float] | None],
        *,
        gate: Gate | None = None,
        processes: int = 1,
        holders: Mapping[str, Any] | None = None,
        own: Sequence[Component] = (),
        attributes: Attributes | None = None,
        components: Sequence[Component] = (),
    ) -> None:
        self._torch_state = _TorchProcessState(STREAMS, processes, own, attributes or Attributes(()), components)
        super().__init__(coord, write_summary, self._torch_state, gate=gate)
        holders = holders or {}
        self._torch_state.watch_gradients(_optimizers(holders), lambda: self.boundary.steps)
        self._torch_state.watch_others(
            holders, lambda: self.boundary.steps, lambda: self.boundary.is_mine, lambda: self.boundary.is_resting
        )
        self._training_streams: dict[torch.device, torch.cuda.Stream] = {}

    @property
    def training_streams(self) -> Mapping[torch.device, torch.cuda.Stream]:
        """The CUDA streams on which the last step was run."""
        return self._training_streams

    def put_gradients_back(self) -> None:
        """Restore the saved gradients. The engine calls this after it has put the restored state back."""
        self._torch_state.put_gradients_back()

    def put_modes_back(self) -> None:
        """Set the modes that the models had when the run was interrupted, where the program has come to now."""
        self._torch_state.put_modes_back()

    def restore_own(self, state: Mapping[str, Any]) -> None:
        """Restore the objects of which each process has its own."""
        self._torch_state.restore_own(state)

    def _step_is_ending(self) -> None:
        if _HAS_CUDA and torch.cuda.is_initialized():
            stream = torch.cuda.current_stream()
            self._training_streams[stream.device] = stream

    def _has_trained(self) -> bool:
        return self._torch_state.has_trained()

    def _has_trained_outside(self) -> bool:
        return self._torch_state.has_updates


class _TorchProcessState(ProcessState):
    """Adds the gradients that the next step needs; each of several processes has its own."""

    LIVE = (*ProcessState.LIVE, "reordered", "modes")

    def __init__(
        self,
        streams: RandomStreams,
        processes: int,
        own: Sequence[Component],
        attributes: Attributes,
        components: Sequence[Component],
    ) -> None:
        super().__init__(streams, processes)
        self._attributes = attributes
        # Whether all that the earlier run had changed in attributes was compared, and after which step that was last.
        self._is_settled = True
        self._compared_after = 0
        self._steps_done: Callable[[], int] = lambda: 0
        self._own = own
        self._givers = {one.name: one for one in components if one.is_giver}
        self._gradients: dict[str, Gradients] = {}
        self._restored_gradients: Mapping[str, Any] = {}
        self._holders: Mapping[str, Any] = {}
        self._unnamed: Unnamed | None = None
        self._unnamed_modules = UnnamedModules({})
        self._has_own_loop = False
        self._is_resting: Callable[[], bool] = lambda: True
        self._iterators = OwnIterators(lambda: self.loaders)
        self._put_back: dict[int, Any] = {}
        self.strangers = Strangers(_state_of_generator, _seed_of_generator)
        self._reordered = Reordered()
        self._modes = Modes({})
        self._restored_modes: Mapping[str, bool] = {}
        # The lists that there were when the first body after a restart began, of an epoch that had not begun before.
        self._lists: list[Any] | None = None

    def watch_gradients(self, optimizers: Mapping[str, torch.optim.Optimizer], steps_done: Callable[[], int]) -> None:
        """Save, from now on, the gradients that ``optimizers`` have not applied."""
        self._steps_done = steps_done
        self._gradients = {name: Gradients(name, one, steps_done) for name, one in optimizers.items()}

    def watch_others(
        self,
        holders: Mapping[str, Any],
        steps_done: Callable[[], int],
        is_in_step: Callable[[], bool],
        is_resting: Callable[[], bool],
    ) -> None:
        """Look, from now on, for what trains and is not among ``holders``."""
        self._holders = holders
        self._unnamed_modules = UnnamedModules(holders)
        self._modes = Modes(holders)
        self._is_resting = is_resting
        self._unnamed = Unnamed(holders, steps_done, is_in_step)

    def begin_loop(self, number: int | None) -> bool:
        self._unnamed_modules.begin_loop()
        self._reordered.begin_loop(sys._getframe(1))
        self._lists = None
        return super().begin_loop(number)

    def begin_own_step(self) -> None:
        if not self._has_own_loop:
            self._has_own_loop = True
            self._unnamed_modules.begin_loop()
        super().begin_own_step()

    def begin_step(self) -> None:
        if not self._is_settled:
            self._compare_attributes()
        if self._iterators.is_needed:
            self._iterators.begin_step()
        super().begin_step()

    def begin_epoch(self) -> bool:
        # First, before the place of the interrupted run is left.
        progress = self.progress
        self._reordered.begin_body(sys._getframe(1), is_begun=progress.is_epoch_begun)
        self._lists = None
        if not progress.is_there and not progress.is_epoch_begun and not gc.get_freeze_count():
            # Held, so that no list of the body comes to have the identity of one that is gone.
            self._lists = [one for one in gc.get_objects() if type(one) is list]
        return super().begin_epoch()

    def _compare_attributes(self) -> None:
        steps_done = self._steps_done()
        # A loop may begin a step for which there is no batch.
        if steps_done > self._compared_after:
            self._compared_after = steps_done
            self._is_settled = self._attributes.settle()

    def copies_of(self, names: Sequence[str]) -> dict[str, Any]:
        found = {}
        for name in names:
            state = self._givers[name].state() if name in self._givers else None
            if state is not None and _is_small(name, state):
                found[name] = copy.deepcopy(state)
        return found

    def digest_of(self, value: Any) -> Any:
        return digest(value, tensor_bytes)

    def put_before_own_step(self) -> None:
        """Put the objects from which the program takes something for its next step to where they were before that."""
        for name, state in self.own.held_before.items():
            if name in self._givers:
                self._givers[name].load(state)

    def saved_generators(self) -> list[Any]:
        held = [one for loader in self.loaders for one in Inside(loader).generators]
        return [*reached(self._holders.values()), *held, *self._attributes.generators]

    def has_trained(self) -> bool:
        """Whether an optimizer was called in the running step, or gradients came, as far as can be known."""
        return not self._gradients or not all(one.is_idle for one in self._gradients.values())

    @property
    def has_updates(self) -> bool:
        """Whether an optimizer was called."""
        return any(one.has_stepped for one in self._gradients.values())

    def new_feed(self, loader: Any) -> Feed:
        with put_back_once(self._put_back):
            feed = feed_of(loader)
        if isinstance(feed, StreamFeed):
            feed.is_reordered = lambda: self._reordered.has_found
            feed.is_of_body = self._lists is not None and not any(one is loader for one in self._lists)
        return feed

    def _live(self) -> dict[str, Any]:
        reordered = self._reordered.saved(self.progress.is_epoch_begun)
        modes = self._modes.now() if self.progress.is_there else self._restored_modes
        if self._is_resting():
            modes = {}  # What the program leaves at its end, as after a last evaluation, is not the mode of its steps.
        return {**super()._live(), **({"reordered": reordered} if reordered else {}), "modes": modes}

    def capture(self) -> dict[str, Any]:
        needed = {name: one.needed() for name, one in self._gradients.items()}
        gradients = {name: found for name, found in needed.items() if found}
        others = [] if self._unnamed is None else self._unnamed.gradients()
        gradients |= needed_besides(self._modules(), self._gradients.values(), others)
        drawn = self._attributes.drawn()
        unnamed = [] if self._unnamed is None else self._unnamed.changed()
        own = {one.name: one.state() for one in self._own}
        if not self._is_resting():
            self._unnamed_modules.warn()
        return {
            **super().capture(),
            "iterators": self._iterators.advanced(),
            **({"gradients": gradients} if gradients else {}),
            **({"own": own, "built": {one.name: one.built() for one in self._own}} if own else {}),
            **({"generators": drawn} if drawn else {}),
            **({"computed": computed} if (computed := self._attributes.computed()) else {}),
            **({"unnamed": unnamed} if unnamed else {}),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        super().restore(state)
        self._iterators.restore(state.get("iterators", ()))
        self._reordered.restore(state.get("reordered", {}))
        self._restored_modes = state.get("modes", {})
        self.restore_own(state)
        if self._unnamed is not None:
            self._unnamed.expect(state.get("unnamed", ()))
        self._attributes.restore_generators(state.get("generators", {}))
        self._attributes.restore_computed(state.get("computed", {}))
        self._is_settled, self._compared_after = False, self._steps_done()
        self._restored_gradients = state.get("gradients", {})
        self.put_gradients_back()
        self.put_before_own_step()

    def restore_own(self, state: Mapping[str, Any]) -> None:
        """Restore the objects of which each process has its own."""
        saved = state.get("own", {})
        for one in self._own:
            if one.name in saved:
                held = with_numpys(f"process.own.{one.name}", saved[one.name], state.get("numpys", {}))
                one.load(held, built=state.get("built", {}).get(one.name, ()))
            else:
                _log.warning(
                    "%s: the checkpoint has none of this process, so it begins as the program made it", one.name
                )

    def put_gradients_back(self) -> None:
        """Until the first step, set the gradients of the parameters to those in the checkpoint."""
        modules = self._modules()
        for name, saved in self._restored_gradients.items():
            if name in self._gradients:
                self._gradients[name].put_back(saved)
            elif name in modules:
                put_back(name, list(modules[name].parameters()), saved)

    def put_modes_back(self) -> None:
        """Set the modes of the interrupted run."""
        self._modes.put_back(self._restored_modes)

    def _modules(self) -> dict[str, torch.nn.Module]:
        return {name: one for name, one in self._holders.items() if isinstance(one, torch.nn.Module)}

    def note_first_step(self) -> None:
        super().note_first_step()
        self._restored_gradients = {}

    def close(self) -> None:
        super().close()
        if not self._is_settled:
            self._is_settled = self._attributes.settle(is_last=True)
        for one in self._gradients.values():
            one.close()
        if self._unnamed is not None:
            self._unnamed.close()


def _optimizers(holders: Mapping[str, Any]) -> dict[str, torch.optim.Optimizer]:
    """The optimizers of the state, and those that its objects hold, such as a trainer of the program; each once."""
    found = {name: one for name, one in holders.items() if isinstance(one, torch.optim.Optimizer)}
    for name, holder in holders.items():
        for place, one in optimizers_in(name, holder).items():
            if not any(one is known for known in found.values()):
                found[place] = one
    return {place: one for place, one in found.items() if has_hooks(one)}


def _is_small(name: str, state: Any) -> bool:
    values = itertools.islice(leaves(name, state), _MOST_VALUES + 1)
    sizes = [one.nbytes if isinstance(one, torch.Tensor) else sys.getsizeof(one) for _, one in values]
    return len(sizes) <= _MOST_VALUES and sum(sizes) <= _MOST_BYTES


def _seed_of_generator(value: Any) -> int | None:
    return value.initial_seed() if issubclass(type(value), torch.Generator) else None


def _state_of_generator(value: Any) -> Any:
    if issubclass(type(value), torch.Generator):
        return None if value is torch.default_generator else value.get_state().numpy().tobytes()
    return state_of_generator(value)
