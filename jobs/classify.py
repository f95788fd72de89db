"""`brainray classify`, for `ray job submit -- python jobs/classify.py …`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the submitted code, not an installed one

from brainray.cli import main

if __name__ == "__main__":
    main(["classify", *sys.argv[1:]])
