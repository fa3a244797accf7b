"""What a user can mend. `engine.settings.main` prints it as one line and ends with exit code 2."""


class UserError(ValueError):
    """A mistake of the user: what is wrong, where, and how to mend it, in one line."""

    def __init__(self, message=""):
        # From a loader process torch hands over a whole traceback, whose last line is
        # "module.Class: message".
        last = str(message).strip().splitlines()[-1:]
        name = f"{type(self).__module__}.{type(self).__qualname__}: "
        super().__init__("".join(last).removeprefix(name))


class BadRow(UserError):
    """A row or a scene that cannot be used; the message names file, row (or line) and field."""
