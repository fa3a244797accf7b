"""Tables that benchmarks come in -> rows as dicts: parquet, whose pictures stay on disk until they are asked for, and
TFRecord files, read without TensorFlow, with both checksums of each record checked.
"""

import struct
from functools import cache, lru_cache, partial

from formats.errors import BadRow
from formats.files import open_parquet

LAZY = ("image", "image_bytes", "image_1", "image_2", "image_3", "image_4", "depth")


def parquet_rows(path):
    """-> dicts; a cell of a column in LAZY is a function (functools.partial) that reads it."""
    file = open_parquet(path)
    names = file.schema_arrow.names
    light = [name for name in names if name not in LAZY]
    groups = [file.read_row_group(g, light).to_pylist() for g in range(file.num_row_groups)]
    return [
        {**row, **{name: partial(cell, path, g, i, name) for name in names if name in LAZY}}
        for g, rows in enumerate(groups)
        for i, row in enumerate(rows)
    ]


@lru_cache(maxsize=8)  # neighbours are asked for one after the other
def column(path, group, name):
    return open_parquet(path).read_row_group(group, [name]).column(0)


def cell(path, group, index, name):
    return column(path, group, name)[index].as_py()


@cache
def crc_table():
    table = list(range(256))
    for _ in range(8):
        table = [c >> 1 ^ (0x82F63B78 if c & 1 else 0) for c in table]
    return table


def masked_crc(blob):
    """The checksum of TFRecord files: CRC-32C (Castagnoli), rotated right by 15 bits, plus a constant."""
    table, crc = crc_table(), 0xFFFFFFFF
    for byte in blob:
        crc = table[(crc ^ byte) & 255] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def varint(message, at):
    value = shift = 0
    while True:
        byte, at = message[at], at + 1
        value, shift = value | (byte & 127) << shift, shift + 7
        if byte < 128:
            return value, at


def fields(message):
    """Protocol buffer message -> [(field number, value)]: an int for a varint, else bytes."""
    found, at = [], 0
    while at < len(message):
        key, at = varint(message, at)
        if key & 7 == 0:
            value, at = varint(message, at)
        else:
            size, at = varint(message, at) if key & 7 == 2 else ({1: 8, 5: 4}[key & 7], at)
            value, at = message[at : at + size], at + size
        found.append((key >> 3, value))
    return found


def ints(packed):
    values, at = [], 0
    while at < len(packed):
        value, at = varint(packed, at)
        values.append(value)
    return values


def tfrecord_rows(path):
    """TFRecord of tf.train.Example -> rows of lists of bytes or ints, both checksums of each record checked.

    Record: length (8 bytes), its checksum (4), data, its checksum (4). Data: {1: {1: {1: name, 2: value}, ..}} with
    value {1: list of bytes} or {3: list of ints}, list {1: ..}, ints one by one or packed.
    """
    rows = []
    with open(path, "rb") as file:
        while head := file.read(12):
            try:
                size, check = struct.unpack("<QI", head)
                blob = file.read(size) if masked_crc(head[:8]) == check else b""
                if masked_crc(blob) != struct.unpack("<I", file.read(4))[0]:
                    raise ValueError
                row = {}
                for _, entry in fields(dict(fields(blob))[1]):
                    name, value = (value for _, value in sorted(fields(entry)))
                    values = [
                        ints(v) if kind == 3 and isinstance(v, bytes) else [v]
                        for kind, many in fields(value)
                        for _, v in fields(many)
                    ]
                    row[name.decode()] = [v for part in values for v in part]
            except (IndexError, KeyError, ValueError, struct.error):
                raise BadRow(
                    f"{path}: record {len(rows)}: wrong length or checksum; download it again"
                ) from None
            rows.append(row)
    return rows
