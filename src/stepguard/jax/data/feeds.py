"""Chooses how the position in a loader is kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stepguard.jax.data.arrays import ArraysFeed, Batches
from stepguard.jax.data.held_generators import HoldingFunctionFeed
from stepguard.steps.feeds import Feed, IterableFeed, is_function
from stepguard.steps.group_feed import GroupFeed
from stepguard.steps.random_streams import RandomStreams
from stepguard.steps.stateful_feeds import GrainFeed, StatefulFeed, is_grain, is_stateful
from stepguard.steps.tf_data import TfDataFeed, is_tf_data


def feed_of(loader: Any, streams: RandomStreams, put_back: dict[int, Any]) -> Feed:
    """The feed for a loader of any kind. ``put_back`` is shared by the feeds of a session; see HoldingFunctionFeed.

    Raises:
        TypeError: ``loader`` cannot be iterated over.
    """
    if _is_group(loader):
        return GroupFeed(loader, lambda one: feed_of(one, streams, put_back))
    if isinstance(loader, Batches):
        return ArraysFeed(loader)
    if is_tf_data(loader):
        return TfDataFeed(loader, streams)
    if is_function(loader):
        return HoldingFunctionFeed(loader, streams, put_back)
    if is_grain(loader):
        return GrainFeed(loader)
    if is_stateful(loader):
        return StatefulFeed(loader, streams)
    if not hasattr(loader, "__iter__") or isinstance(loader, type):
        raise TypeError(f"steps: expected a loader or None, found {type(loader).__name__}: {loader!r:.80}")
    return IterableFeed(loader, streams)


def _is_group(loader: Any) -> bool:
    if isinstance(loader, Mapping):
        return True
    # A list of batches is the data itself.
    return type(loader) in (list, tuple) and bool(loader) and all(_is_loader(one) for one in loader)


def _is_loader(one: Any) -> bool:
    return isinstance(one, Batches) or is_grain(one) or is_stateful(one)
