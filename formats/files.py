"""Files of instances: a JSON list, JSON lines or parquet, of any length; and the check of a file before it is used.

Rows are read when they are used: a file of a million rows costs an index of their places, not memory.
"""

import json
import mmap
import os
import re
from array import array
from functools import lru_cache

import numpy as np

from formats.errors import BadRow
from formats.instances import check_row

# The text up to the next brace outside of strings. Possessive: the time is linear, also on text that is no JSON.
BRACE = re.compile(rb'(?:[^{}"]++|"(?:[^"\\]++|\\.)*+")*+[{}]', re.DOTALL)
JSON_FIELDS = (
    "conversations",
    "3d_pos",
    "bbox",
    "mask_idx",
)  # JSON text in some parquet files: keys differ by row


def index_json(path):
    """The places of the rows of a JSON list or of JSON lines: (rows, 2), first byte and end. One pass, keeps no row."""
    spans = array("q")
    with open(path, "rb") as file:
        if not file.read(1):
            raise BadRow(f"{path}: empty, needs a list of rows, each a JSON object")
        text = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    place = text.find(b"[") + 1
    if text[:place].lstrip(b"\xef\xbb\xbf \t\r\n") != b"[":  # JSON lines
        place = 0
        for line in iter(text.readline, b""):
            if not line.isspace():
                spans.extend((place, place + len(line)))
            place += len(line)
        return np.array(spans).reshape(-1, 2)
    end, depth = place, 0
    while brace := BRACE.match(text, place):
        place = brace.end()
        if text[place - 1] == ord("{"):
            if depth == 0 and text[end : place - 1].strip() != (b"," if spans else b""):
                break  # something between the rows
            if depth == 0:
                start = place - 1
            depth += 1
        else:
            depth -= 1
            if depth == 0:
                spans.extend((start, end := place))
    if not spans or depth or text[end:].strip() != b"]":
        raise BadRow(
            f"{path}: needs a list of rows, each a JSON object; it is not after byte {end}, "
            f"row {len(spans) // 2}"
        )
    return np.array(spans).reshape(-1, 2)


def open_parquet(path):
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise BadRow(f"{path}: parquet needs pyarrow: pip install pyarrow") from None
    try:
        return ParquetFile(path)
    except (OSError, ValueError) as error:
        raise BadRow(f"{path}: not a parquet file ({str(error).splitlines()[0]})") from None


@lru_cache(maxsize=4)
def row_group(path, group):
    return open_parquet(path).read_row_group(group)


def without_nulls(value):
    """Parquet writes null for a field that a row does not have."""
    if isinstance(value, dict):
        return {key: without_nulls(part) for key, part in value.items() if part is not None}
    return [without_nulls(part) for part in value] if isinstance(value, list) else value


class Rows:
    """The rows of a file: len, [i], iteration. A row is read on use and checked on its first use.

    skip_bad_rows: bad rows are counted and listed, iteration leaves them out, and [i] gives the next good row instead.
    A parquet file is read in its row groups: to be shuffled fast it needs small ones (100 rows with pictures).
    """

    def __init__(self, path, skip_bad_rows=False):
        if not os.path.isfile(path):
            raise BadRow(
                f"{path}: no such file (give a JSON list, JSON lines or parquet of instances)"
            )
        self.path, self.skip, self.parquet = path, skip_bad_rows, path.endswith(".parquet")
        if self.parquet:
            groups = open_parquet(path).metadata
            self.index = np.cumsum(
                [groups.row_group(g).num_rows for g in range(groups.num_row_groups)]
            )
        else:
            self.index = index_json(path)
        self.length = int(self.index[-1]) if self.parquet and len(self.index) else len(self.index)
        if not self.length:
            raise BadRow(f"{path}: needs a list of rows, each a JSON object")
        self.good, self.bad = bytearray(self.length), {}  # 1 = checked; {row: why not}

    def __len__(self):
        return self.length

    def read(self, i):
        """Row i as it is in the file, with its "source" and the "folder" of its files."""
        source = f"{self.path}: row {i}"
        try:
            if self.parquet:
                group = int(np.searchsorted(self.index, i, side="right"))
                first = int(self.index[group - 1]) if group else 0
                row = without_nulls(row_group(self.path, group).slice(i - first, 1).to_pylist()[0])
                row |= {
                    key: json.loads(row[key])
                    for key in JSON_FIELDS
                    if isinstance(row.get(key), str)
                }
            else:
                start, end = map(int, self.index[i])
                with open(self.path, "rb") as file:
                    file.seek(start)
                    row = json.loads(file.read(end - start))
        except (ValueError, OSError, RecursionError) as error:
            raise BadRow(f"{source}: not readable ({str(error).splitlines()[0]})") from None
        if not isinstance(row, dict):
            raise BadRow(f"{source}: needs a list of rows, each a JSON object")
        return {**row, "source": source, "folder": os.path.dirname(os.path.abspath(self.path))}

    def usable(self, i):
        """Row i, or None if it is bad and to be skipped."""
        if i in self.bad:
            return None
        try:
            row = self.read(i)
            if not self.good[i]:
                check_row(row)
                self.good[i] = 1
            return row
        except BadRow as error:
            if not self.skip:
                raise BadRow(f"{error} (--skip_bad_rows leaves such rows out)") from None
            self.bad[i] = str(error)
            if len(self.bad) <= 20 or len(self.bad) % 1000 == 0:
                print(f"skipped, {len(self.bad)} of {len(self):,} so far: {error}", flush=True)

    def __getitem__(self, i):
        for k in range(len(self)):
            if (row := self.usable((i + k) % len(self))) is not None:
                return row
        raise BadRow(f"{self.path}: no usable row")

    def __iter__(self):
        return filter(None, map(self.usable, range(len(self))))
