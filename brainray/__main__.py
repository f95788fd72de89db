"""`brainray COMMAND`, and `python -m brainray COMMAND`.

A handful of files is answered by a room of its own, before all that the other commands need is
loaded: Ray alone takes seconds.
"""

import sys

from brainray.inference.files import find_files, run_files


def main() -> None:
    """Run `brainray COMMAND …` and exit."""
    command, *arguments = sys.argv[1:] or [""]
    if command == "classify" and find_files(arguments):
        run_files(arguments)
        return
    from brainray.cli import main as run

    run()


if __name__ == "__main__":
    main()
