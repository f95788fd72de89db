"""`python jobs/report_dicom.py …`, also as `ray job submit -- python jobs/report_dicom.py …`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the code that was submitted, first

from brainray.cli import run_dicom_results

if __name__ == "__main__":
    run_dicom_results(sys.argv[1:])
