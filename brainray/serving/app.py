"""The Serve application: a thin HTTP ingress, and model replicas, which scale apart."""

import asyncio
import logging
import os
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from ray import serve
from ray.exceptions import RayError
from ray.serve import Application
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig

from brainray.images.preprocess import Preprocessing
from brainray.serving.asgi import App
from brainray.serving.auth import Guard, read_token
from brainray.serving.config import ServiceConfig, read_arguments
from brainray.serving.handler import Handler
from brainray.serving.http import build_app
from brainray.serving.journal import Journal
from brainray.serving.meters import Meters, merge
from brainray.serving.predictor import ModelOptions, Predictor, Reply
from brainray.serving.problem import RETRY_AFTER_S, Problem

logger = logging.getLogger(__name__)

CPU_BATCH, GPU_BATCH = 8, 64
"""Images of one call, at most. A CPU computes them one after another: eight are enough for Ray's
own time for a call (a few ms) to be small beside theirs. A GPU gains from more."""

CALLS_PER_REPLICA = 2
"""One that is computed, and one that is there when it ends."""

HEALTH_PERIOD_S = 2.0
BOARD_PERIOD_S, BOARD_KEEPS_S = 2.0, 300.0
SELF_TEST_PERIOD_S = 10.0
QUIET = LoggingConfig(log_level="WARNING", enable_access_log=False)
"""The service writes its own line for a request."""


@serve.deployment(
    name="Model",
    max_ongoing_requests=CALLS_PER_REPLICA + 1,  # one more for a self-test
    health_check_period_s=HEALTH_PERIOD_S,
    health_check_timeout_s=30,
    graceful_shutdown_wait_loop_s=0.2,
    logging_config=QUIET,
)
class ModelReplica:
    """A predictor in a process of its own."""

    def __init__(self, options: ModelOptions) -> None:
        self._predictor = Predictor(options)
        self._follows = options.follow
        self._checked_at = 0.0

    async def predict(self, preprocessing: Preprocessing, *images: NDArray[np.uint8]) -> Reply:
        """Predict class probabilities."""
        return await asyncio.to_thread(self._predictor.predict, preprocessing, images)

    async def explain(self, preprocessing: Preprocessing, *images: NDArray[np.uint8]) -> Reply:
        """Predict them, with maps."""
        return await asyncio.to_thread(self._predictor.explain, preprocessing, images)

    async def describe(self) -> dict[str, Any]:
        """Return card, meaning and runtime."""
        return self._predictor.describe()

    async def check(self) -> None:
        """Run the self-test."""
        await asyncio.to_thread(self._predictor.check)

    async def check_health(self) -> None:
        """Run the self-test now and then; a replica that fails it is replaced by Serve."""
        now = asyncio.get_running_loop().time()
        if now - self._checked_at < SELF_TEST_PERIOD_S:
            return
        self._checked_at = now
        if self._follows:
            await asyncio.to_thread(self._predictor.follow)
        await self.check()


class RemoteModel:
    """Calls model replicas, and says in the service's own terms what went wrong."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._handle = handle

    async def predict(
        self, preprocessing: Preprocessing, images: Sequence[NDArray[np.uint8]]
    ) -> Reply:
        """Predict class probabilities."""
        # One argument for each: Ray sends those below 100 kB along, and puts others into its store.
        reply: Reply = await self._ask("predict", preprocessing, *images)
        return reply

    async def explain(
        self, preprocessing: Preprocessing, images: Sequence[NDArray[np.uint8]]
    ) -> Reply:
        """Predict them, with maps."""
        reply: Reply = await self._ask("explain", preprocessing, *images)
        return reply

    async def describe(self) -> dict[str, Any]:
        """Return card, meaning and runtime."""
        description: dict[str, Any] = await self._ask("describe")
        return description

    async def check(self) -> None:
        """Run the self-test."""
        await self._ask("check")

    async def _ask(self, method: str, *arguments: object) -> Any:  # noqa: ANN401 - whatever it is
        try:
            return await getattr(self._handle, method).remote(*arguments)
        except (RayError, BackPressureError, DeploymentUnavailableError) as error:
            raise Problem(
                "model_unavailable",
                "The model replica that was asked did not answer; another takes its place. "
                "Try again.",
                {"retry-after": str(RETRY_AFTER_S)},
            ) from error


@serve.deployment(
    name="Board",
    max_ongoing_requests=100,
    ray_actor_options={"num_cpus": 0},
    logging_config=QUIET,
)
class Board:
    """Keeps what several ingress replicas count; there is none where there is one ingress."""

    def __init__(self) -> None:
        self._texts: dict[str, tuple[float, bytes]] = {}

    async def put(self, replica: str, text: bytes) -> None:
        """Take the latest counts of a replica."""
        self._texts[replica] = (time.monotonic(), text)

    async def read(self) -> bytes:
        """Return all counts, without those of replicas that are long gone."""
        oldest = time.monotonic() - BOARD_KEEPS_S
        self._texts = {name: pair for name, pair in self._texts.items() if pair[0] > oldest}
        return merge(text for _, text in self._texts.values())


@serve.deployment(
    name="Ingress",
    max_ongoing_requests=100_000,  # the gate counts, and refuses in the service's own words
    ray_actor_options={"num_cpus": 0},
    health_check_period_s=HEALTH_PERIOD_S,
    graceful_shutdown_wait_loop_s=0.2,
    logging_config=QUIET,
)
@serve.ingress()
class Ingress:
    """Speaks HTTP."""

    def __init__(
        self,
        model: DeploymentHandle[Any],
        board: DeploymentHandle[Any] | None,
        config: ServiceConfig,
    ) -> None:
        token = read_token(config.api_token_file, os.environ)
        handler = Handler(
            RemoteModel(model),
            config.limits,
            max_calls=CALLS_PER_REPLICA * config.max_replicas,
            max_images=GPU_BATCH if config.model.engine.use_gpu else CPU_BATCH,
        )
        self._replica = serve.get_replica_context().replica_id.unique_id
        self._meters, self._board = Meters(self._replica), board
        self._app = build_app(
            handler,
            guard=Guard(token),
            meters=self._meters,
            journal=Journal(config.log_path),
            render_meters=self._render_all if board else None,
            echo_id=False,
        )

    async def __serve_build_asgi_app__(self) -> App:
        if self._board is not None:
            self._posting = asyncio.create_task(self._post())
        return self._app

    async def drain(self) -> None:
        """Take no further request, and return when those in flight are answered."""
        await self._app.drain()

    async def _post(self) -> None:
        """Tell the board what this replica counts, over and over."""
        while True:
            await self._put()
            await asyncio.sleep(BOARD_PERIOD_S)

    async def _put(self) -> None:
        assert self._board is not None
        try:
            await self._board.put.remote(self._replica, self._meters.render())
        except (RayError, DeploymentUnavailableError) as error:
            logger.warning("The counts could not be posted: %s", error)

    async def _render_all(self) -> bytes:
        assert self._board is not None
        await self._put()
        text: bytes = await self._board.read.remote()
        return text


def build_application(config: ServiceConfig) -> Application:
    """Build the application that `serve.run` takes."""
    options = config.model
    threads = options.engine.num_threads or 1
    model = ModelReplica.options(  # type: ignore[attr-defined]  # Serve's decorator is untyped
        ray_actor_options={
            "num_cpus": config.replica_cpus if config.replica_cpus is not None else threads,
            "num_gpus": 1 if options.engine.use_gpu else 0,
        },
        autoscaling_config={
            "min_replicas": config.min_replicas,
            "max_replicas": config.max_replicas,
            "target_ongoing_requests": CALLS_PER_REPLICA,
            "upscale_delay_s": 5,
            "downscale_delay_s": 120,
        },
    )
    ingress = Ingress.options(  # type: ignore[attr-defined]
        num_replicas=config.ingress_replicas
    )
    board = Board.bind() if config.ingress_replicas > 1 else None  # type: ignore[attr-defined]
    application: Application = ingress.bind(model.bind(options), board, config)
    return application


def build(arguments: dict[str, Any]) -> Application:
    """Build the application from a config file's `args`; `serve deploy` and `serve run` call it.

    Parameters
    ----------
    arguments : dict
        Fields of :class:`ServiceConfig`; those of ``model`` and ``limits`` below their names.
    """
    return build_application(read_arguments(arguments))
