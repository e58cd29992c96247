"""Loaders that know their position: from any checkpoint a run has the data and draws of one that was not stopped."""

import copy
import random

import numpy as np
import pytest

from stepguard.errors import CheckpointMismatchError
from stepguard.steps.random_streams import RandomStreams
from stepguard.steps.stateful_feeds import StatefulFeed

ITEMS, EPOCHS = 5, 3
STREAMS = RandomStreams()


class Shuffled:
    """It draws the order of an epoch when it begins one."""

    def __init__(self):
        self.at, self.order, self.is_loaded = 0, [], False

    def __iter__(self):
        if not self.is_loaded:
            self.at, self.order = 0, self.drawn()
        self.is_loaded = False
        return self.rest()

    def drawn(self):
        return np.random.permutation(ITEMS).tolist()

    def rest(self):
        while self.at < ITEMS:
            self.at += 1
            yield self.order[self.at - 1]

    def state_dict(self):
        return {"at": self.at, "order": list(self.order)}

    def load_state_dict(self, state):
        self.at, self.order, self.is_loaded = state["at"], list(state["order"]), True


class AlwaysDrawing(Shuffled):
    """It draws an order whenever its iteration begins, needed or not."""

    def __iter__(self):
        order = self.drawn()
        if not self.is_loaded:
            self.at, self.order = 0, order
        self.is_loaded = False
        return self.rest()


class Augmenting(Shuffled):
    """It draws for each item too."""

    def rest(self):
        return (one + random.random() for one in super().rest())


class AlwaysDrawingLate(AlwaysDrawing):
    """A generator: its code runs with the first item."""

    def __iter__(self):
        yield from super().__iter__()


class CountingEpochs(Shuffled):
    """Its state has the number of its epoch, from which the order follows."""

    epoch = 0

    def __iter__(self):
        while self.at < ITEMS:
            self.at += 1
            yield np.random.default_rng(self.epoch).permutation(ITEMS).tolist()[self.at - 1]
        self.epoch, self.at = self.epoch + 1, 0

    def state_dict(self):
        return {"at": self.at, "epoch": self.epoch}

    def load_state_dict(self, state):
        self.at, self.epoch = state["at"], state["epoch"]


class Run:
    """A process: what it trains with, and what its checkpoints have."""

    def __init__(self, kind, checkpoint=None):
        random.seed(1)
        np.random.seed(1)
        self.feed = StatefulFeed(kind(), STREAMS)
        self.trained, self.checkpoints = [], []
        if checkpoint is not None:
            self.feed.resume(checkpoint["position"])
            STREAMS.restore(checkpoint["random"])

    def train(self, steps=None):
        """Until ``steps`` steps are done; without it, until all epochs are, each with a rest after its end."""
        for epochs in range(self.feed.epoch + 1, EPOCHS + 1):
            while True:
                try:
                    item = self.feed.next(epochs)
                except StopIteration:
                    break
                self.feed.consumed()
                self.trained.append((item, random.random(), np.random.rand()))
                self.save()
                if len(self.trained) == steps:
                    return
            self.save()

    def save(self):
        checkpoint = {"position": self.feed.position(), "random": STREAMS.capture()}
        self.checkpoints.append((len(self.trained), copy.deepcopy(checkpoint)))


@pytest.mark.parametrize("kind", [Shuffled, AlwaysDrawing, Augmenting, AlwaysDrawingLate, CountingEpochs])
def test_a_run_goes_on_as_it_was_from_every_checkpoint(kind):
    whole = Run(kind)
    whole.train()
    assert len(whole.trained) == EPOCHS * ITEMS
    for steps, checkpoint in whole.checkpoints:
        again = Run(kind, checkpoint)
        again.train(steps=2)
        for more, second in again.checkpoints:
            third = Run(kind, second)
            third.train()
            assert again.trained[:more] + third.trained == whole.trained[steps:]


def test_a_checkpoint_before_the_first_item_has_what_the_one_before_had():
    whole = Run(Augmenting)
    whole.train()
    for steps, checkpoint in whole.checkpoints:
        idle = Run(Augmenting, checkpoint)
        idle.save()
        again = Run(Augmenting, idle.checkpoints[0][1])
        again.train()
        assert again.trained == whole.trained[steps:]


def test_a_state_that_the_loader_does_not_take_is_refused():
    class Refusing(Shuffled):
        def load_state_dict(self, state):
            raise KeyError("shard")

    whole = Run(Refusing)
    whole.train(steps=2)
    again = Run(Refusing, whole.checkpoints[-1][1])
    with pytest.raises(CheckpointMismatchError, match=r"does not take the state .*shard.*resume_data=False"):
        again.train()
