"""`python jobs/export.py …`, also as `ray job submit -- python jobs/export.py …`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the code that was submitted, first

from brainray.cli import run_export

if __name__ == "__main__":
    run_export(sys.argv[1:])
