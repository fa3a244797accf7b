"""The command line of every program: one dataclass of settings, whose fields are the flags.

@dataclass
class Settings:
    steps: int = setting(80, "rollout steps (paper: 600)", at_least=1)  # --steps 80, and --help
"""

import argparse
import atexit
import dataclasses
import importlib.util
import os
import sys

import torch.distributed as dist

from engine.output import guard_streams
from formats.errors import UserError

MOST = 10**9  # of a number without an upper bound of its own; more would fill a memory


@dataclasses.dataclass(frozen=True)
class Range:
    """The values of a number: finite, between two bounds; `also`: one outside of them."""

    at_least: float | None
    above: float | None
    at_most: float | None
    below: float | None
    also: float | None

    def __contains__(self, value):
        if value == self.also:
            return True
        # NaN is beyond every bound, since it compares with nothing.
        from_below = value > self.above if self.at_least is None else value >= self.at_least
        from_above = value < self.below if self.at_most is None else value <= self.at_most
        return from_below and from_above

    def __str__(self):
        least = f"above {self.above:,}" if self.at_least is None else f"from {self.at_least:,}"
        most = f"below {self.below:,}" if self.at_most is None else f"{self.at_most:,}"
        text = f"{least} to {most}"
        return text if self.also is None else f"{self.also}, or {text}"


def setting(
    default,
    reason,
    choices=(),
    positional=False,
    flag="",
    at_least=None,
    above=None,
    at_most=None,
    below=None,
    also=None,
    not_with=(),
    only_with=(),
    package="",
):
    """A field of a dataclass of settings; reason: its line in --help.

    default None: must be given. positional: given without its name. flag: its name on the command
    line where that is no name in Python. What `parse` refuses:

    choices: all values but these. at_least or above, at_most or below: the range of a number, which
    every number has; also: a number outside of it that means something else. not_with, only_with:
    settings, "name" or "name=value", beside or without which this one has no effect. package: a
    switch whose package is not installed.
    """
    is_number = type(default) in (int, float)
    if is_number and at_most is None and below is None:
        at_most = MOST
    metadata = {
        "help": reason,
        "default": default,
        "choices": choices,
        "positional": positional,
        "flag": flag,
        "range": Range(at_least, above, at_most, below, also) if is_number else None,
        "not_with": not_with,
        "only_with": only_with,
        "package": package,
    }
    return dataclasses.field(default_factory=lambda: default, metadata=metadata)


# ----------------------------------------------------------------------------------------------
# from the command line


def parse(settings, description, argv=None, moved=None, check=None):
    """Command line -> settings object.

    A list takes several values, also in several turns, a bool is a switch, all else is
    `--name value`. UserError for what
    a setting can't be (see `setting`), for one without effect, and for a flag that has moved
    (moved: flag -> new command). check(settings, asked): what else does not go together; asked: the
    names of the settings that the command line sets to something.
    """
    argv = sys.argv[1:] if argv is None else argv
    for flag, command in (moved or {}).items():
        if any(word == flag or word.startswith(f"{flag}=") for word in argv):
            raise UserError(f"{flag}: is a command of its own now: {command}")
    parser = Parser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    fields = {field.name: field for field in dataclasses.fields(settings)}
    for field in fields.values():
        add_flag(parser, field)
    values = vars(parser.parse_args(argv))  # of the flags that are there
    values = {name: read_value(fields[name], value) for name, value in values.items()}
    given = settings(**values)
    asked = [name for name, value in values.items() if value]
    for name in asked:
        check_effect(fields[name], given, fields)
        check_package(fields[name])
    if check:
        check(given, asked)
    return given


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{one_line(message, 240)} (--help shows all flags)")


def add_flag(parser, field):
    """One setting as an argument of the parser; values stay text, see `read_value`."""
    default = field.metadata["default"]
    reason = field.metadata["help"].replace("%", "%%")
    if field.metadata["positional"]:
        count = "+" if isinstance(default, list) else None
        parser.add_argument(field.name, nargs=count, metavar=field.name.upper(), help=reason)
        return
    names = dict.fromkeys((flag_of(field), flag_of(field).replace("_", "-")))
    if default is None:
        parser.add_argument(*names, dest=field.name, required=True, metavar="X", help=reason)
        return
    range_of = f"{field.metadata['range']}; " if field.metadata["range"] else ""
    parser.add_argument(
        *names,
        dest=field.name,
        default=argparse.SUPPRESS,
        help=f"{reason} [{range_of}default: {default}]",
        **kind_of_flag(default),
    )


def kind_of_flag(default):
    """What argparse has to know of a flag with this default."""
    if isinstance(default, bool):
        return {"action": argparse.BooleanOptionalAction}
    if isinstance(default, list):
        return {"nargs": "+", "action": "extend", "metavar": "X"}
    return {"metavar": "X"}


def flag_of(field):
    """The name of a setting on the command line."""
    if field.metadata["positional"]:
        return field.name
    return f"--{field.metadata['flag'] or field.name}"


def one_line(text, most=60):
    """A user's text for a message: unprintable characters as escapes, long ones cut."""
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    return shown if len(shown) <= most else f"{shown[:most]}..."


# ----------------------------------------------------------------------------------------------
# what a setting can be


def read_value(field, value):
    """What the command line says -> the value of the setting; UserError where it can't be that."""
    default = field.metadata["default"]
    choices = field.metadata["choices"]
    if field.metadata["range"]:
        return read_number(field, value)
    if choices and value not in choices:
        allowed = ", ".join(filter(None, choices))
        raise UserError(f"{flag_of(field)} {one_line(value)}: needs one of {allowed}")
    # Only what is empty by default has a meaning when it is empty.
    is_empty = "" in value if isinstance(value, list) else value == "" != default
    if is_empty:
        raise UserError(f"{flag_of(field)}: is empty")
    return value


def read_number(field, text):
    """The number that a text says; UserError where it is none, or not in the setting's range."""
    kind = type(field.metadata["default"])
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or value not in field.metadata["range"]:
        name = "a whole number" if kind is int else "a number"
        raise UserError(
            f"{flag_of(field)} {one_line(text)}: needs {name}, {field.metadata['range']}"
        )
    return value


def check_effect(field, settings, fields):
    """UserError for a setting that has no effect beside the others."""
    beside = [flag_if_set(other, settings, fields) for other in field.metadata["not_with"]]
    if any(beside):
        flag = next(filter(None, beside))
        raise UserError(f"{flag_of(field)}: has no effect with {flag}; leave one of them out")
    needed = field.metadata["only_with"]
    if needed and not any(flag_if_set(other, settings, fields) for other in needed):
        flags = " or ".join(f"--{other.replace('=', ' ')}" for other in needed)
        raise UserError(f"{flag_of(field)}: has no effect without {flags}")


def flag_if_set(condition, settings, fields):
    """A condition, "name" or "name=value", as it is on the command line; "" where it is not met."""
    name, _, wanted = condition.partition("=")
    value = getattr(settings, name)
    met = value == wanted if wanted else bool(value)
    return f"{flag_of(fields[name])} {wanted}".rstrip() if met else ""


def check_package(field):
    """UserError for a switch whose package is not installed."""
    package = field.metadata["package"]
    if package and importlib.util.find_spec(package) is None:
        raise UserError(f"{flag_of(field)}: pip install {package} first")


# ----------------------------------------------------------------------------------------------
# the end of a program


def run_main(main):
    """Run a program; a mistake of the user ends in one line on standard error and exit code 2."""
    guard_streams()
    try:
        code = exit_code(main)
    finally:
        several = dist.is_initialized() and dist.get_world_size() > 1
        if dist.is_initialized():
            dist.destroy_process_group()
    if several:
        leave(code)
    if code:
        sys.exit(code)


def exit_code(main):
    """Run a program -> its exit code."""
    try:
        main()
    except UserError as error:
        # Every rank prints, since the mistake may be one rank's alone; the others' message is
        # empty.
        if str(error):
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:  # outside of the training, which ends on its own terms
        return 130
    except SystemExit as end:
        return end.code or 0
    return 0


def leave(code):
    """End one process of several without shutting down the interpreter.

    While it shuts down, a thread of torch.distributed may ask for it once more, and the process
    aborts, one time in forty ("terminate called without an active exception").
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
