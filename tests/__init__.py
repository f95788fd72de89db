"""Tests. What they start, they start in this environment."""

import os

os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # it costs every Ray worker some 20 s of imports

# Many processes share few cores here. These cost or save time, and change no answer.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # torch's threads spin while they wait
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy's and scipy's do, too
os.environ.setdefault("RAY_worker_niceness", "0")  # else whatever else runs here goes first
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")  # of 2 s, each run's end waits
os.environ.setdefault("RAY_idle_worker_killing_time_threshold_ms", "600000")  # they have imported
