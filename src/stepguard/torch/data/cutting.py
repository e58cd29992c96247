"""How a DataLoader cuts the samples of an epoch into batches, and deals them out to processes."""

from __future__ import annotations

from typing import Any

from torch.utils.data import BatchSampler

from stepguard.steps.feeds import length


def batches_of(loader: Any) -> Any:
    """What makes batches of samples: the sampler itself if the data set is given whole batches to read at once."""
    reads_in_bulk = loader.batch_sampler is None and isinstance(loader.sampler, BatchSampler)
    return loader.sampler if reads_in_bulk else loader.batch_sampler


def samples_of(loader: Any) -> Any:
    """What draws the samples."""
    return getattr(batches_of(loader), "sampler", loader.sampler)


def batch_size(loader: Any) -> int:
    """The number of samples in a batch; 1 if batches have no size."""
    return getattr(batches_of(loader), "batch_size", loader.batch_size) or 1


def shares(loader: Any) -> int | None:
    """The number of processes among which the sampler divides the data; ``None`` if it does not."""
    return getattr(samples_of(loader), "num_replicas", None)


def has_plain_batches(loader: Any) -> bool:
    """Whether batches are just so many samples of the sampler in a row."""
    batches = batches_of(loader)
    if batches is None:
        return loader.batch_size is None
    is_plain = type(batches) is BatchSampler or type(batches).__module__.startswith("torchdata.")
    return is_plain and (loader.batch_size is not None or batches is loader.sampler)


def batches_after(loader: Any, samples: int) -> int | None:
    """The number of batches of the loader's size after its first ``samples``; ``None`` if it has no length."""
    there = length(samples_of(loader))
    if there is None:
        return None
    left = max(0, there - samples)
    size = batch_size(loader)
    return left // size if getattr(batches_of(loader), "drop_last", False) else -(-left // size)
