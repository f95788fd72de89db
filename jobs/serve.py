"""`python jobs/serve.py …`: the service on this machine. On a cluster use `serve deploy`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the code beside this file, first

from brainray.cli import run_serve

if __name__ == "__main__":
    run_serve(sys.argv[1:])
