"""What Ray Train's workers are sent to do.

Apart from the loop, because Ray Train's controller loads the function and its arguments as well,
and has no use for all that the loop imports.
"""

from typing import Any

import ray


def train_worker(loop_config: dict[str, Any]) -> None:
    """Train; Ray Train calls this in every worker.

    Parameters
    ----------
    loop_config : dict
        ``setup``: reference to a :class:`brainray.training.loop.WorkerSetup`.
    """
    from brainray.training.loop import Worker

    Worker(ray.get(loop_config["setup"])).run()
