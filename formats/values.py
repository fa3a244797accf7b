"""Values of rows: what counts as absent, as a text and as a number. The one door for numbers."""

import re

LARGEST = 1e9  # no number of a row is as large as this
HALF_CHARACTER = re.compile("[\ud800-\udfff]")


def tidy(value):
    """A value as it came from JSON or parquet -> as every reader takes it.

    A field that is null is absent, since exporters write null for a field that a row lacks; in a
    list null keeps its place. Half of a surrogate pair, which is no character, becomes U+FFFD.
    """
    if isinstance(value, dict):
        return {tidy(key): tidy(part) for key, part in value.items() if part is not None}
    if isinstance(value, list):
        return [tidy(part) for part in value]
    if isinstance(value, str):
        return HALF_CHARACTER.sub("\ufffd", value)
    return value


def unique_fields(pairs):
    """For json.loads: the fields of an object; ValueError where one is there twice.

    Python would keep the last one, other readers the first.
    """
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"field '{twice[:40]}' is there twice")
    return fields


def is_number(value, low=-LARGEST, high=LARGEST):
    """Is this a finite number from `low` to `high`? True and False are no numbers."""
    # The comparison is false for NaN.
    return isinstance(value, (int, float)) and type(value) is not bool and low <= value <= high


def are_numbers(values, count, low=-LARGEST, high=LARGEST):
    """Is this a list of so many finite numbers from `low` to `high`?"""
    if not isinstance(values, (list, tuple)) or len(values) != count:
        return False
    return all(is_number(value, low, high) for value in values)


def is_index(value, count):
    """Is this a whole number from 0 to count - 1? Also as 1.0, which some exporters write."""
    return is_number(value, 0, count - 1) and value == int(value)


def has_text(value):
    """Is this a text that is not blank, or a number?"""
    return is_number(value, -1e300, 1e300) or isinstance(value, str) and bool(value.strip())
