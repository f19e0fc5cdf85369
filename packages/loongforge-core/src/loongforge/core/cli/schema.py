"""`loongforge schema`: the JSON schema of a run's YAML."""

from __future__ import annotations

import json

from loongforge.core.errors import ConfigError

USAGE = """\
usage: loongforge schema > loongforge.schema.json

Prints the JSON schema of a run's YAML with every installed model family, so that an editor completes and checks it.
"""


def command(argv: list[str]) -> int:
    """Print the schema; the exit code."""
    if any(word in ("-h", "--help") for word in argv):
        print(USAGE, end="")
        return 0
    if argv:
        raise ConfigError(f"loongforge schema takes no arguments, got {' '.join(argv)!r}.")
    from loongforge.core.config.schema import json_schema

    print(json.dumps(json_schema(), indent=2))
    return 0
