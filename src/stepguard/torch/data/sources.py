"""What the order and the items of a DataLoader come from: generators, counts and lists of its samplers and data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader

from stepguard.steps.feeds import shown
from stepguard.steps.process_file import taking
from stepguard.torch.data import generators
from stepguard.torch.data.contents import Contents, Lists, warn_of_other_data
from stepguard.torch.data.counts import Counts, warn_of_counts_in_workers
from stepguard.torch.data.inside import Inside, warn_of_new_generators
from stepguard.torch.data.set_before import SetBefore


class Sources:
    """What ``loader`` holds beside the streams of the process: saved with its position, and put back at a restart."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self._loader = loader
        self._inside = Inside(loader)
        samplers = Inside(loader.batch_sampler, loader.sampler)
        of_data = Inside(loader.dataset, loader.collate_fn)
        # The lists and arrays of samplers and data set, and what the checkpoint has of them.
        lists = Lists(sampler=loader.sampler, batch_sampler=loader.batch_sampler)
        self._contents = Contents([*samplers.objects, *of_data.objects, lists])
        self._ids_of_items = {id(one) for one in of_data.objects}
        self._made = self._contents.marks()
        self._contents_before: Mapping[str, Any] = {}
        # Those from which the order is drawn, and those from which items are made in this process. A sampler may refer
        # to the data set, so that a generator may be both.
        self._of_order = _of_order(loader, samplers)
        self._counts = Counts(of_data.objects, may_keep_more=True)
        # Also with workers, which have copies: the training may draw from these, and a sampler that refers to the data
        # set puts them back to the epoch's beginning. Not from that of the order, which is drawn ahead for workers.
        items = [one for one in of_data.generators if one is not loader.generator]
        known = {id(one) for one in items}
        others = [one for one in self._inside.generators if id(one) not in known]
        self._of_items: list[Any] = [self._counts, *items, *(() if loader.num_workers else others)]
        self._items_before: Sequence[Any] = ()
        self._set_before = SetBefore([*self._of_items, *self._of_order, self._contents])
        # What feeds of this restart have put back, and where the generators were before the order is drawn again.
        self._put_back = generators.known_as_put_back()
        self._now: Mapping[int, Any] = {}

    def references(self) -> int:
        """How often the loader is referred to from here."""
        return 1 + self._inside.holds(self._loader)

    def begin_body(self) -> None:
        """Look at the data before the program sets up an epoch."""
        self._set_before.begin_body()

    def begin_epoch(self, epoch: int, skip: int) -> None:
        """Look at the data that the program has set up, and tell samplers and data set the number of the epoch.

        The first ``skip`` batches of the epoch are not given again.
        """
        self._set_before.begin_epoch()
        self._inside.set_epoch(epoch)
        held = [*self._of_items, *self._of_order] if skip else []
        self._now = dict(zip(map(id, held), generators.states(held), strict=True))

    # --- in a checkpoint ---

    def position(self, *, is_in_epoch: bool, is_untouched: bool) -> dict[str, Any]:
        """What a checkpoint keeps; ``is_untouched`` if the epoch of the checkpoint before has not been begun again."""
        found: dict[str, Any] = {"made": self._made, "set before": self._set_before.saved()}
        found["items"] = self._items_before if is_untouched else generators.states(self._of_items)
        found["contents"] = self._contents_before if is_untouched else self._contents.state()
        if not is_in_epoch:
            found["generators"] = generators.states(self._of_order)
        if not self._loader.num_workers:
            found["new generators"] = self._inside.new_generators(self._loader)
        return found

    def resume(self, position: Mapping[str, Any]) -> None:
        """Go on from what :meth:`position` has returned in an earlier process."""
        # Before anything is compared: the length of a data set may depend on the epoch, and on its contents.
        self._inside.set_epoch(position["epoch"])
        self._contents_before = position.get("contents", {})
        self._items_before = self._items_in(position)
        self._set_before.restore(position.get("set before", ()))
        if position["batches"]:
            with taking(f"the contents of {shown(self._loader)}"):
                self._contents.put(self._contents_before)
            return
        held = self._pairs(position.get("generators"))
        # Among them the contents, each time: what the checkpoint has of them is of this loader alone.
        for _, contents in self._set_before.without([(self._contents, self._contents_before)]):
            generators.restore([self._contents], [contents])
        generators.put_back(self._set_before.without(held), self._put_back)

    def warn(self, position: Mapping[str, Any]) -> None:
        """Warn of what differs from the earlier process, and of what could not be kept of it."""
        name = shown(self._loader)
        warn_of_other_data(name, position.get("made", {}), self._made, but=self._contents_before)
        warn_of_new_generators(name, position)
        warn_of_counts_in_workers(name, position)

    def _items_in(self, position: Mapping[str, Any]) -> Sequence[Any]:
        """The states for what items are made from."""
        items: Sequence[Any] = position.get("items", ())
        if not items or "counted" in position or "new generators" in position:
            return items
        # A checkpoint of an earlier version has them in the order in which they are found, and the counts last.
        found = dict(zip(map(id, self._inside.generators), items, strict=False))
        return [items[-1], *(found.get(id(one)) for one in self._of_items[1:])]

    def _pairs(self, of_order: Sequence[Any] | None) -> Iterator[tuple[Any, Any]]:
        """The generators with their states in the checkpoint."""
        yield from zip(self._of_items, self._items_before, strict=False)
        yield from zip(self._of_order, of_order or (), strict=False)

    # --- for the order of an epoch ---

    def of_order(self) -> dict[str, Any]:
        """What the order of the epoch is drawn from now."""
        changed = self._contents.state()
        held = {"contents": changed} if changed else {}
        return {"generators": self.order_generators(), **held}

    def order_generators(self) -> list[Any]:
        """The states of the generators that the order is drawn from, and maybe others draw from as well."""
        return generators.states(self._of_order)

    def put_back_order(self, saved: Mapping[str, Any]) -> None:
        """Go back to what :meth:`of_order` has returned."""
        generators.restore(self._of_order, saved["generators"])
        self._contents.go_back(saved.get("contents", {}))

    def digests(self) -> dict[str, Any]:
        """Digests of the lists and arrays."""
        return self._contents.digests()

    def go_on(self, of_order: Sequence[Any] | None, undrawn: Mapping[str, Any]) -> None:
        """Put back what the checkpoint has, now that the order was drawn again from where its epoch began.

        ``of_order`` are the states of the generators of the order in the checkpoint, and ``undrawn`` the digests before
        it was drawn.
        """
        generators.put_back(self._pairs(of_order), self._put_back, self._now)
        # What the sampler has just drawn itself is as far as it must be; the rest the training has changed.
        now = self._contents.digests()
        self._contents.put(self._contents_before, but={key for key in now if now[key] != undrawn.get(key)})

    # --- for workers, which have the data set as it was when they were started ---

    def of_workers(self) -> dict[str, Any]:
        """What the data set has changed so far."""
        return {"counts": self._counts.state(), "contents": self._contents.state()}

    def put_back_of_workers(self, saved: Mapping[str, Any]) -> None:
        """Go back to what :meth:`of_workers` has returned."""
        self._counts.go_back(saved["counts"])
        self._contents.go_back(saved["contents"], of=self._ids_of_items)


def _of_order(loader: DataLoader[Any], samplers: Inside) -> list[Any]:
    found: list[Any] = [loader.generator] if isinstance(loader.generator, torch.Generator) else []
    found += [one for one in samplers.generators if one is not loader.generator]
    in_data = {id(one) for one in Inside(loader.dataset).objects}
    return [*found, Counts((one for one in samplers.objects if id(one) not in in_data), may_keep_more=False)]
