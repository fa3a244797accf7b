"""What a user can mend. `engine.settings.run_main` prints it as one line and ends with code 2."""

LONGEST = 300  # characters of a message
QUOTED = 80  # characters of a value that a message quotes


class UserError(ValueError):
    """A mistake of the user: what is wrong, where, and how to mend it, in one line."""

    def __init__(self, message=""):
        text = str(message)
        # From a loader process torch hands over a whole traceback, whose last line is
        # "module.Class: message".
        if text.startswith("Caught ") and "\nOriginal Traceback" in text:
            name = f"{type(self).__module__}.{type(self).__qualname__}: "
            text = text.rstrip("\n").rpartition("\n")[2].removeprefix(name)
        super().__init__(shorten(one_line(text), LONGEST))


class BadRow(UserError):
    """A row or a scene that cannot be used; the message names file, row (or line) and field."""


def one_line(text):
    """The text as one line that every terminal can show: all else is written as an escape."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def shorten(text, most):
    """The text, its middle left out where it has more than so many characters."""
    if len(text) <= most:
        return text
    tail = most // 3
    return f"{text[: most - tail - 3]}...{text[-tail:]}"


def quote(value, most=QUOTED):
    """A value as a message shows it: at most a line of it."""
    return shorten(one_line(value if isinstance(value, str) else repr(value)), most)
