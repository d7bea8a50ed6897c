"""tensorflow-datasets' array_record files, read without TensorFlow."""

import importlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from mlfs_jax.errors import DownloadError


def open_dataset(
    name: str, module: str | None, data_dir: str | Path | None = None, *, download: bool = True
) -> Mapping[str, Sequence[dict]]:
    """{split: records} of the data set `name`; a record is a dict whose texts are bytes.

    `module` is where tensorflow-datasets defines it (None: nowhere, it can only be read where it lies prepared),
    `data_dir` where tensorflow-datasets keeps its data sets (default: its own, $TFDS_DATA_DIR). A data set that is not
    there is downloaded and prepared, if `download`. Raises `DownloadError` when it cannot be had.
    """
    try:
        import tensorflow_datasets as tfds

        # Without TensorFlow, tensorflow-datasets does not look for its own builders: importing one registers it.
        if module is not None:
            importlib.import_module(f"tensorflow_datasets.{module}")
    except ImportError as e:
        raise DownloadError(
            f"{name!r} is read with tensorflow-datasets: `pip install 'mlfs-jax[tfds]'` first ({e})."
        ) from e
    data_dir = data_dir or os.environ.get("TFDS_DATA_DIR")  # its own look at it was at import
    try:
        sources = tfds.data_source(
            name,
            data_dir=None if data_dir is None else str(data_dir),
            download=download,
            builder_kwargs={"file_format": "array_record"},  # the default, TFRecord, needs TensorFlow
        )
    except Exception as e:  # its download code raises a dozen kinds
        first = (str(e).strip().splitlines() or [""])[0]
        raise DownloadError(
            f"tensorflow-datasets could not load {name!r}: {type(e).__name__}: {first} Check the network, "
            "or put the prepared data set (array_record files) under data_dir, or $TFDS_DATA_DIR."
        ) from e
    if not sources:
        raise DownloadError(f"tensorflow-datasets has no prepared {name!r}.")
    return sources


def as_text(value: bytes | str) -> str:
    """A text field of a record."""
    return value.decode("utf-8") if isinstance(value, bytes) else str(value)
