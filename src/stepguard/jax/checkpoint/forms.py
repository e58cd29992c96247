"""The types of arrays, and how Zarr, the format of an array in an Orbax checkpoint, names them."""

from __future__ import annotations

import json
from typing import Any

import numpy as np


def zarr_type(dtype: np.dtype[Any]) -> str:
    """The name of a type in Zarr's metadata. TensorStore added those of ml_dtypes, such as ``bfloat16``."""
    return dtype.name if dtype.kind == "V" else dtype.newbyteorder("<").str


def dtype_of(name: str) -> np.dtype[Any]:
    """The type with a name of `zarr_type` or of NumPy. Raises ValueError for a type that no array of numbers has."""
    try:
        dtype = np.dtype(name)
    except TypeError:
        import ml_dtypes

        found = getattr(ml_dtypes, name, None)
        if not isinstance(found, type) or not issubclass(found, np.generic):
            raise ValueError(f"expected the type of an array, found {name!r:.80}") from None
        dtype = np.dtype(found)
    if dtype.kind in "OSUMm" or dtype.names is not None or (dtype.kind == "V" and dtype.type is np.void):
        raise ValueError(f"expected a type of numbers, found {name!r:.80}")
    return dtype


def zarray(shape: tuple[int, ...], chunk: tuple[int, ...], dtype: np.dtype[Any]) -> bytes:
    """Zarr's description (version 2) of an array in chunks of one shape, without compression."""
    described = {
        "chunks": [max(1, size) for size in chunk],
        "compressor": None,
        "dimension_separator": ".",
        "dtype": zarr_type(dtype),
        "fill_value": None,
        "filters": None,
        "order": "C",
        "shape": list(shape),
        "zarr_format": 2,
    }
    return json.dumps(described, separators=(",", ":")).encode()
