"""The tables that benchmarks come in -> rows as dicts: parquet and TFRecord files.

Parquet needs pyarrow; pictures and depth maps stay on disk until they are asked for. TFRecord files
are read without TensorFlow, and both checksums of each record are checked.
"""

import os
import struct
from functools import cache, lru_cache, partial

from formats.errors import BadRow
from formats.files import open_parquet

# ----------------------------------------------------------------------------------------------
# parquet

LAZY_COLUMNS = ("image", "image_bytes", "image_1", "image_2", "image_3", "image_4", "depth")


def parquet_rows(path):
    """-> dicts; a cell of a lazy column is a function (functools.partial) that reads it."""
    file = open_parquet(path)
    names = file.schema_arrow.names
    lazy = [name for name in names if name in LAZY_COLUMNS]
    light = [name for name in names if name not in LAZY_COLUMNS]
    rows = []
    for group in range(file.num_row_groups):
        for index, row in enumerate(file.read_row_group(group, light).to_pylist()):
            for name in lazy:
                row[name] = partial(read_cell, path, group, index, name)
            rows.append(row)
    return rows


def read_cell(path, group, index, name):
    return read_column(path, group, name)[index].as_py()


@lru_cache(maxsize=8)  # the cells of neighbouring rows are asked for one after the other
def read_column(path, group, name):
    """One column of one row group."""
    return open_parquet(path).read_row_group(group, [name]).column(0)


# ----------------------------------------------------------------------------------------------
# TFRecord: a sequence of records, each a protocol buffer message of the type tf.train.Example


def tfrecord_rows(path):
    """-> dicts of lists, of bytes or of ints; BadRow for a record that is damaged or cut off.

    A record is: its length (8 bytes), the checksum of that (4), the message, its checksum (4).
    """
    rows = []
    with open(path, "rb") as file:
        while header := file.read(12):
            try:
                rows.append(read_example(read_message(file, header)))
            except (IndexError, KeyError, ValueError, TypeError, AttributeError, struct.error):
                raise BadRow(
                    f"{path}: record {len(rows)}: wrong length or checksum; download it again"
                ) from None
    return rows


def read_message(file, header):
    """The bytes of the record whose header was just read.

    ValueError where a checksum is wrong, or the length more than the file holds.
    """
    length, checksum = struct.unpack("<QI", header)
    left = os.fstat(file.fileno()).st_size - file.tell()
    if masked_crc(header[:8]) != checksum or length > left:
        raise ValueError
    message = file.read(length)
    (checksum,) = struct.unpack("<I", file.read(4))
    if masked_crc(message) != checksum:
        raise ValueError
    return message


def read_example(message):
    """A tf.train.Example -> {name: list of bytes or of ints}.

    In field numbers it is {1: {1: {1: name, 2: feature}, ...}}, a feature is {1: list of bytes} or
    {3: list of ints}, and the values of a list are its fields 1, ints one by one or packed.
    """
    row = {}
    for _, entry in read_fields(dict(read_fields(message))[1]):
        (_, name), (_, feature) = sorted(read_fields(entry))
        values = []
        for kind, listed in read_fields(feature):
            for _, value in read_fields(listed):
                packed = kind == 3 and isinstance(value, bytes)
                values += unpack_ints(value) if packed else [value]
        row[name.decode()] = values
    return row


def read_fields(message):
    """A protocol buffer message -> [(field number, value), ...]; a value is an int or bytes."""
    found = []
    position = 0
    while position < len(message):
        key, position = read_varint(message, position)
        wire_type = key & 7
        if wire_type == 0:  # a varint
            value, position = read_varint(message, position)
        else:
            if wire_type == 2:  # bytes, with their number in front
                size, position = read_varint(message, position)
            else:  # a number of fixed size; KeyError for a wire type that does not exist
                size = {1: 8, 5: 4}[wire_type]
            value = message[position : position + size]
            position += size
        found.append((key >> 3, value))
    return found


def unpack_ints(packed):
    """Varints one after the other -> a list of ints."""
    values = []
    position = 0
    while position < len(packed):
        value, position = read_varint(packed, position)
        values.append(value)
    return values


def read_varint(message, position):
    """The int that is written at a position of a message -> the int, and the next position.

    Each byte holds 7 bits, the lowest ones first; its highest bit says that more bytes follow.
    ValueError for more than ten bytes, which is more than 64 bits.
    """
    value = 0
    shift = 0
    while True:
        byte = message[position]
        position += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, position
        if shift == 70:
            raise ValueError


def masked_crc(message):
    """The checksum of TFRecord files: CRC-32C, rotated right by 15 bits, plus a constant."""
    table = crc_table()
    crc = 0xFFFFFFFF
    for byte in message:
        crc = table[(crc ^ byte) & 255] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    rotated = crc >> 15 | crc << 17
    return (rotated + 0xA282EAD8) & 0xFFFFFFFF


@cache
def crc_table():
    """CRC-32C of each single byte; its polynomial (Castagnoli's) has its lowest bit first."""
    table = []
    for crc in range(256):
        for _ in range(8):
            odd = crc & 1
            crc >>= 1
            if odd:
                crc ^= 0x82F63B78
        table.append(crc)
    return table
