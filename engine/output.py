"""What a program leaves: lines on a terminal that do no harm, and files that appear whole.

guard_streams()                                   # once, before anything is printed
check_outputs({"--json": path}, inputs)           # before any work
with whole_file(path, "--json") as file: ...      # after it
"""

import os
import re
import secrets
import stat
import sys
from contextlib import contextmanager
from pathlib import Path

from formats.errors import UserError

# ----------------------------------------------------------------------------------------------
# lines on a terminal

# What a terminal obeys instead of showing it: control characters but for the tab and the end of a
# line, and marks that end a line or turn its direction. A bar may return to the start of its line.
OBEYED = re.compile(
    "(?!^)\r|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]"
)


def printable(text):
    """The text with escapes such as \\x1b for what a terminal would obey."""
    return OBEYED.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class Guarded:
    """A text stream that shows whatever is written to it, and that cannot fail.

    Questions, responses and names of files may hold sequences that command a terminal, or
    characters that it has not: escapes are written for both. Where the stream ends early
    (`| head -1`) or its disk is full, the run goes on without it.
    """

    def __init__(self, stream):
        self.stream = stream
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        try:
            self.stream.write(printable(text))
        except OSError as error:
            self.give_up(error)
        return len(text)

    def flush(self):
        try:
            self.stream.flush()
        except OSError as error:
            self.give_up(error)

    def give_up(self, error):
        """Lead the stream, and what it still holds, to nowhere; say so if its reader is not gone.

        Its descriptor is led there, so that the end of Python and other programs find it open.
        """
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.stream.fileno())
        os.close(nowhere)
        if not isinstance(error, BrokenPipeError):
            print(f"{self.stream.name}: {error.strerror}; not shown from here", file=sys.stderr)


def guard_streams():
    """Make standard output and standard error `Guarded`; one that is closed leads to nowhere."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")  # noqa: SIM115 (to the end)
        if not isinstance(stream, Guarded):
            setattr(sys, name, Guarded(stream))


# ----------------------------------------------------------------------------------------------
# files


def check_outputs(outputs, inputs=()):
    """UserError where an output could not be written, or would replace an input; before any work.

    outputs: {flag: path of a file, or "" for none}; inputs: paths of what the program reads; ""
    for none. Nothing is left behind.
    """
    checked = {}  # flag: path
    for flag, path in outputs.items():
        if not path:
            continue
        for other in filter(None, inputs):
            if is_same_file(path, other):
                raise UserError(f"{flag} {path}: is read by this command; name another file")
        for other_flag, other in checked.items():
            if is_same_file(path, other):
                raise UserError(f"{flag} {path}: is also the file of {other_flag}; name another")
        try_file(flag, path)
        checked[flag] = path


def is_same_file(path, other):
    """Do two paths lead to one file, which need not exist?"""
    if os.path.exists(path) and os.path.exists(other):
        return os.path.samefile(path, other)
    return os.path.realpath(path) == os.path.realpath(other)


def try_file(flag, path):
    """UserError where a file of this path could not be written."""
    target = os.path.realpath(path)
    try:
        mode = os.stat(target).st_mode
    except FileNotFoundError:
        mode = stat.S_IFREG  # a new one
    except OSError as error:
        raise cannot_write(flag, path, error.strerror) from None
    if stat.S_ISDIR(mode):
        raise UserError(f"{flag} {path}: is a folder, needs the name of a file")
    if not stat.S_ISREG(mode):
        raise UserError(f"{flag} {path}: is a device or a pipe, needs the name of a file")
    if os.path.exists(target) and not os.access(target, os.W_OK):
        raise cannot_write(flag, path, "it is read-only")
    try_folder(flag, path, *os.path.split(target))


def try_folder(flag, path, folder, name="file"):
    """UserError where no file of this name could be written into a folder, which may be new.

    path: what the flag was given, for the message.
    """
    new = [name]  # the parts of the path that do not exist yet
    while not os.path.lexists(folder):
        folder, part = os.path.split(folder)
        new.append(part)
    trial = partial_of(os.path.join(folder, "trial"))
    try:
        most = os.pathconf(folder, "PC_NAME_MAX") - len(partial_of(""))
        with open(trial, "x"):
            os.remove(trial)
    except OSError as error:
        raise cannot_write(flag, path, error.strerror) from None
    if max(len(os.fsencode(part)) for part in new) > most:
        raise cannot_write(flag, path, "the name is too long")


def partial_of(path):
    """A new name beside the path, for the file while it is written: it replaces no other file."""
    return f"{path}.{secrets.token_hex(4)}.partial"


def cannot_write(flag, path, reason):
    return UserError(f"{flag} {path}: cannot write there ({reason})".lstrip())


@contextmanager
def whole_file(path, flag="", binary=False):
    """A file to write, text in UTF-8 or binary, that appears under its name only when complete.

    UserError where it can't be written, such as on a full disk; flag: for the message. Half of a
    character, which a model may write and UTF-8 has no bytes for, becomes "?".
    """
    target = os.path.realpath(path)
    partial = partial_of(target)
    way = {"mode": "x", "encoding": "utf-8", "errors": "replace", "newline": "\n"}
    if binary:
        way = {"mode": "xb"}
    try:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        file = open(partial, **way)  # noqa: SIM115 (closed below)
    except OSError as error:
        raise cannot_write(flag, path, error.strerror) from None
    try:
        with file:
            yield file
        os.replace(partial, target)
    except OSError as error:
        if error.errno is None or error.filename not in (None, partial):
            raise  # of another file, which was read meanwhile
        raise cannot_write(flag, path, error.strerror) from None
    finally:
        Path(partial).unlink(missing_ok=True)
