"""The command line of every program: one dataclass of settings, whose fields are the flags.

@dataclass
class Settings:
    steps: int = setting(80, "rollout steps (paper: 600)")        # --steps 80, and its line in --help
"""

import argparse
import atexit
import dataclasses
import os
import sys

import torch.distributed as dist

from engine.output import guard_streams
from formats.errors import UserError


def setting(default, reason, choices=(), positional=False, flag=""):
    """A field of a dataclass of settings; reason: its line in --help; choices: its only values.

    default None: must be given. positional: given without its name. flag: its name on the command
    line where that is no name in Python.
    """
    metadata = {
        "help": reason,
        "default": default,
        "choices": choices,
        "positional": positional,
        "flag": flag,
    }
    return dataclasses.field(default_factory=lambda: default, metadata=metadata)


def parse(settings, description, argv=None, moved=None):
    """Command line -> settings object.

    A list takes several values, a bool is a switch, all else is `--name value`. UserError for a
    value that is not among the setting's choices, and for a flag that has moved (moved: flag -> new
    command).
    """
    argv = sys.argv[1:] if argv is None else argv
    for flag, command in (moved or {}).items():
        if any(word == flag or word.startswith(f"{flag}=") for word in argv):
            raise UserError(f"{flag}: is a command of its own now: {command}")
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for field in dataclasses.fields(settings):
        add_flag(parser, field)
    given = settings(**vars(parser.parse_args(argv)))
    for field in dataclasses.fields(settings):
        value = getattr(given, field.name)
        choices = field.metadata["choices"]
        if choices and value not in choices:
            allowed = ", ".join(filter(None, choices))
            name = field.name if field.metadata["positional"] else f"--{field.name}"
            raise UserError(f"{name} {value}: needs one of {allowed}")
    return given


def add_flag(parser, field):
    """One setting as an argument of the parser."""
    default = field.metadata["default"]
    reason = field.metadata["help"].replace("%", "%%")
    if field.metadata["positional"]:
        count = "+" if isinstance(default, list) else None
        parser.add_argument(field.name, nargs=count, metavar=field.name.upper(), help=reason)
        return
    flag = field.metadata["flag"] or field.name
    names = dict.fromkeys((f"--{flag}", f"--{flag.replace('_', '-')}"))
    if default is None:
        parser.add_argument(*names, dest=field.name, required=True, metavar="X", help=reason)
        return
    reason = f"{reason} [default: {default}]"
    parser.add_argument(
        *names, dest=field.name, default=default, help=reason, **kind_of_flag(default)
    )


def kind_of_flag(default):
    """What argparse has to know of a flag with this default."""
    if isinstance(default, bool):
        return {"action": argparse.BooleanOptionalAction}
    if isinstance(default, list):
        return {"nargs": "+", "metavar": "X"}
    return {"type": type(default), "metavar": "X"}


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
