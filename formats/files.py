"""Files of instances, of any length: a JSON list, JSON lines or parquet.

    rows = Rows("rl.json")     len(rows), rows[i], for row in rows

Rows are read when they are used: a file of a million rows costs an index of where they stand, not
memory. What a row holds is told in formats/instances.py.
"""

import json
import mmap
import os
import re
from array import array

import numpy as np

from formats.cache import ByteCache
from formats.errors import BadRow, quote
from formats.instances import check_instance
from formats.values import tidy, unique_fields

# Fields whose keys differ by row: some parquet files hold them as JSON text.
JSON_FIELDS = ("conversations", "3d_pos", "bbox", "mask_idx")


class Rows:
    """The rows of a file: len, [i], iteration. A row is read on use and checked on its first use.

    skip_bad_rows: bad rows are counted and listed, iteration leaves them out, and [i] gives the
    next good row instead. Without it, using a bad row raises BadRow.
    A parquet file is read in its row groups: to be shuffled fast it needs small ones (100 rows with
    pictures).
    """

    def __init__(self, path, skip_bad_rows=False):
        if not os.path.isfile(path):
            raise BadRow(
                f"{path}: no such file (give a JSON list, JSON lines or parquet of instances)"
            )
        self.path = path
        self.skip_bad_rows = skip_bad_rows
        self.check = check_instance
        self.is_parquet = path.lower().endswith(".parquet")
        if self.is_parquet:
            self.group_ends = index_parquet(path)
            self.length = int(self.group_ends[-1]) if len(self.group_ends) else 0
        else:
            self.spans = index_json(path)
            self.length = len(self.spans)
        if not self.length:
            raise BadRow(f"{path}: needs a list of rows, each a JSON object")
        self.checked = bytearray(self.length)  # 1 = the row is checked and good
        self.problems = {}  # row: what is wrong with it

    def __len__(self):
        return self.length

    def __getitem__(self, i):
        for k in range(len(self)):
            row = self.usable((i + k) % len(self))
            if row is not None:
                return row
        raise BadRow(f"{self.path}: no usable row")

    def __iter__(self):
        for i in range(len(self)):
            row = self.usable(i)
            if row is not None:
                yield row

    def usable(self, i):
        """Row i, checked; None if it is bad and to be skipped."""
        if i in self.problems:
            return None
        try:
            row = self.read(i)
            if not self.checked[i]:
                self.check(row)
                self.checked[i] = 1
            return row
        except BadRow as error:
            if not self.skip_bad_rows:
                raise BadRow(f"{error} (--skip_bad_rows leaves such rows out)") from None
            self.problems[i] = str(error)
            count = len(self.problems)
            if count <= 20 or count % 1000 == 0:
                print(f"skipped, {count} of {len(self):,} so far: {error}", flush=True)
            return None

    def check_with(self, check):
        """Ask this function, too, if a row is good: it raises BadRow for one that is not."""
        self.check = check
        self.checked = bytearray(self.length)

    def read(self, i):
        """Row i as it is in the file, with its "source" and the "folder" of its files."""
        source = f"{self.path}: row {i}"
        try:
            row = self.read_parquet(i) if self.is_parquet else self.read_json(i)
        except (ValueError, OSError, RecursionError) as error:
            raise BadRow(f"{source}: not readable ({quote(str(error))})") from None
        if not isinstance(row, dict):
            raise BadRow(f"{source}: needs a list of rows, each a JSON object")
        return {
            **tidy(row),
            "source": source,
            "folder": os.path.dirname(os.path.abspath(self.path)),
        }

    def read_json(self, i):
        start, end = map(int, self.spans[i])
        with open(self.path, "rb") as file:
            file.seek(start)
            return json.loads(file.read(end - start), object_pairs_hook=unique_fields)

    def read_parquet(self, i):
        group = int(np.searchsorted(self.group_ends, i, side="right"))
        start = int(self.group_ends[group - 1]) if group else 0
        table = row_group(self.path, group).slice(i - start, 1)
        row = tidy(table.to_pylist()[0])
        for field in JSON_FIELDS:
            if isinstance(row.get(field), str):
                row[field] = json.loads(row[field], object_pairs_hook=unique_fields)
        return row


# ----------------------------------------------------------------------------------------------
# JSON: where the rows stand

# The text up to the next brace that is not inside a string. The quantifiers are possessive, they
# never give back what they took: the time is linear, also on text that is no JSON.
BRACE = re.compile(rb'(?:[^{}"]++|"(?:[^"\\]++|\\.)*+")*+[{}]', re.DOTALL)


def index_json(path):
    """Where the rows of a JSON list or of JSON lines stand: (rows, 2), first byte and end of each.

    It takes one pass over the file, which is mapped: no row is kept in memory.
    """
    with open(path, "rb") as file:
        if not file.read(1):
            raise BadRow(f"{path}: empty, needs a list of rows, each a JSON object")
        text = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if b"\0" in text[:4]:
        raise BadRow(f"{path}: not in UTF-8, as JSON is; save it in UTF-8")
    start = text.find(b"[") + 1
    is_list = text[:start].lstrip(b"\xef\xbb\xbf \t\r\n") == b"["  # after a byte order mark
    spans = spans_of_list(path, text, start) if is_list else spans_of_lines(text)
    return np.array(spans).reshape(-1, 2)


def spans_of_lines(text):
    """JSON lines -> first byte and end of each line that is not blank, one after the other."""
    spans = array("q")
    start = 0
    for line in iter(text.readline, b""):
        end = start + len(line)
        if line.strip(b"\xef\xbb\xbf \t\r\n"):
            spans.extend((start, end))
        start = end
    return spans


def spans_of_list(path, text, start):
    """A JSON list -> first byte and end of each of its objects, one after the other.

    start: the place after the list's opening bracket. Looked at are braces, what stands between the
    objects, and the closing bracket; an object itself is parsed when its row is read.
    """
    spans = array("q")
    place = start
    end = start  # of the last object that is complete
    depth = 0  # of nested braces
    while brace := BRACE.match(text, place):
        place = brace.end()
        if text[place - 1] == ord("{"):
            if depth == 0:
                start = place - 1
                if text[end:start].strip() != (b"," if spans else b""):
                    break  # not just a comma stands before this object
            depth += 1
        else:
            depth -= 1
            if depth == 0:
                end = place
                spans.extend((start, end))
    if not spans or depth or text[end:].strip() != b"]":
        raise BadRow(
            f"{path}: needs a list of rows, each a JSON object; it is not after byte {end}, "
            f"row {len(spans) // 2}"
        )
    return spans


# ----------------------------------------------------------------------------------------------
# parquet


def open_parquet(path):
    """The ParquetFile of a path; BadRow without pyarrow, or if the file is not parquet."""
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise BadRow(f"{path}: parquet needs pyarrow: pip install pyarrow") from None
    try:
        return ParquetFile(path)
    except (OSError, ValueError) as error:
        raise BadRow(f"{path}: not a parquet file ({quote(str(error))})") from None


def index_parquet(path):
    """The number of rows up to the end of each row group, (groups,)."""
    metadata = open_parquet(path).metadata
    rows = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    return np.cumsum(rows)


groups = ByteCache(256 * 2**20)


def row_group(path, group):
    """One row group of a parquet file, a table."""
    key = (path, os.stat(path).st_mtime_ns, group)
    return groups.get(
        key, lambda: open_parquet(path).read_row_group(group), lambda table: table.nbytes
    )
