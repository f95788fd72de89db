"""Comparing many thumbnails in Ray's tasks, where there are enough of them to be worth it."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray

from brainray.data.neighbours import Block, Found, count_products, run_blocks_locally

LEAST_PRODUCTS = 2**31
"""Products that are worth sending for: every pair of 65,000 scans, some seconds on one core."""

PARTS_PER_CPU = 2
"""So that a processor that is slower or comes late does not keep the others waiting for long."""


def run_blocks_on_ray(
    work: Callable[..., Found],
    blocks: Sequence[Block],
    *shared: Any,  # noqa: ANN401 - whatever the work takes besides
) -> Iterator[Found]:
    """Do work on blocks in Ray's tasks: a :class:`brainray.data.neighbours.RunBlocks`.

    What is shared goes to the object store once, and from there to each node once. A little
    work is done here.
    """
    if count_products(blocks) < LEAST_PRODUCTS:
        yield from run_blocks_locally(work, blocks, *shared)
        return
    num_parts = PARTS_PER_CPU * max(1, int(ray.cluster_resources().get("CPU", 1)))
    task = ray.remote(work)
    stored = [ray.put(one) for one in shared]
    waiting = [task.remote(blocks[part::num_parts], *stored) for part in range(num_parts)]
    while waiting:
        (done,), waiting = ray.wait(waiting)
        yield ray.get(done)
