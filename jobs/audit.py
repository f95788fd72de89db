"""`python jobs/audit.py …`, also as `ray job submit -- python jobs/audit.py …`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the code that was submitted, first

from brainray.cli import run_audit

if __name__ == "__main__":
    run_audit(sys.argv[1:])
