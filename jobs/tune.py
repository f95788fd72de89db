"""`python jobs/tune.py …`, also as `ray job submit -- python jobs/tune.py …`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the code that was submitted, first

from brainray.cli import run_tune

if __name__ == "__main__":
    run_tune(sys.argv[1:])
