"""The files and clips that the last build set aside."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from ...utils.storage import Storage, open_storage
from .. import format as fmt
from ..partition import REJECTS, folder_of, partition_numbers

logger = logging.getLogger(__name__)


def iter_rejects(storage: Storage) -> Iterator[pa.Table]:
    """Yield the rejects of each partition that has some (`format.REJECTS`)."""
    for number in partition_numbers(storage):
        name = f"{folder_of(number)}/{REJECTS}"
        try:
            with storage.open(name) as file:
                table = pq.read_table(file).cast(fmt.REJECTS)
        except FileNotFoundError:
            continue
        except (pa.ArrowException, ValueError) as error:
            logger.warning("%s is damaged (%s); the next build writes it again", storage.path(name), error)
            continue
        yield table


def read_rejects(path: Path | str) -> pa.Table:
    """Return all rejects of a cache."""
    return pa.concat_tables([fmt.REJECTS.empty_table(), *iter_rejects(open_storage(path))])
