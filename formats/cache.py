"""A cache that counts bytes: a number of pictures says nothing, one may take 100 MB."""

from collections import OrderedDict


class ByteCache:
    """The values that were used last, up to so many bytes; the newest stays, whatever its size."""

    def __init__(self, most):
        self.most = most
        self.total = 0
        self.values = OrderedDict()  # key: (value, its bytes), the newest at the end

    def get(self, key, make, size_of):
        """The value of a key; what is not there is made: make(), of size_of(value) bytes."""
        if key not in self.values:
            value = make()
            size = size_of(value)
            self.values[key] = value, size
            self.total += size
        self.values.move_to_end(key)
        while self.total > self.most and len(self.values) > 1:
            _, (_, size) = self.values.popitem(last=False)
            self.total -= size
        value, _ = self.values[key]
        return value
