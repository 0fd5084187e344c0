"""The command `prefcache`: parse, load the config, call one stage, turn errors into exit codes.

Nothing heavy is imported before a command is known, so that help answers at once. A command is a function in one of the
files here.
"""

from stages.cli import asking, keeping, knowing, making
from stages.cli.program import main

__all__ = ["asking", "keeping", "knowing", "main", "making"]
