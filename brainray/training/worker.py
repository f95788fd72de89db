"""Entry point of Ray Train's workers.

It is not in :mod:`brainray.training.loop`, because Ray Train's controller also unpickles this
function, and would import torch and torchvision for nothing.
"""

from typing import Any

import ray


def train_worker(loop_config: dict[str, Any]) -> None:
    """Run the training loop; Ray Train calls this in every worker.

    Parameters
    ----------
    loop_config : dict
        ``setup``: reference to a :class:`brainray.training.loop.WorkerSetup`.
    """
    from brainray.training.loop import Worker

    Worker(ray.get(loop_config["setup"])).run()
