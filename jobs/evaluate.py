"""`python jobs/evaluate.py …`, also as `ray job submit -- python jobs/evaluate.py …`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the code that was submitted, first

from brainray.cli import run_evaluate

if __name__ == "__main__":
    run_evaluate(sys.argv[1:])
