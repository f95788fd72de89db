"""`python jobs/compare.py A B …`, also as `ray job submit -- python jobs/compare.py A B …`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the code that was submitted, first

from brainray.cli import run_compare

if __name__ == "__main__":
    run_compare(sys.argv[1:])
