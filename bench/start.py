"""How long the command line takes to answer: `maxact --help`, beside an interpreter that does nothing."""

from __future__ import annotations

import subprocess
import sys

from common import arguments, finish, interleaved, median, seconds


def main() -> None:
    """Measures and reports."""
    args = arguments(__doc__ or "", rounds=15)
    commands = {
        "python -c pass": [sys.executable, "-c", "pass"],
        "maxact --help": [sys.executable, "-m", "maxact.cli", "--help"],
    }
    runs = {
        name: lambda command=command: seconds(lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL))
        for name, command in commands.items()
    }
    measured = interleaved(runs, args.rounds)
    rows = [(name, median(measured[name])) for name in commands]
    finish("start", ("command", "seconds"), rows, {"measured": measured}, args.json)


if __name__ == "__main__":
    main()
