"""The Serve application: a thin HTTP ingress, and model replicas, which scale apart."""

import asyncio
import os
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

from brainray.pixels.preprocess import Preprocessing
from brainray.serving.auth import Guard, read_token
from brainray.serving.config import ServiceConfig
from brainray.serving.gate import App
from brainray.serving.handler import Handler
from brainray.serving.http import build_app
from brainray.serving.journal import Journal
from brainray.serving.meters import Meters
from brainray.serving.predictor import ModelOptions, Predictor, Reply
from brainray.serving.problem import RETRY_AFTER_S, Problem

CPU_BATCH, GPU_BATCH = 8, 64
"""Images of one call, at most. A CPU computes them one after another: eight are enough for Ray's
own time for a call (a few ms) to be small beside theirs. A GPU gains from more."""

CALLS_PER_REPLICA = 2
"""One that is computed, and one that is there when it ends."""

HEALTH_PERIOD_S = 2.0
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

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle

    async def predict(
        self, preprocessing: Preprocessing, images: Sequence[NDArray[np.uint8]]
    ) -> Reply:
        """Predict class probabilities."""
        # One argument for each: Ray sends those below 100 kB along, and puts others into its store.
        return await self._ask("predict", preprocessing, *images)

    async def explain(
        self, preprocessing: Preprocessing, images: Sequence[NDArray[np.uint8]]
    ) -> Reply:
        """Predict them, with maps."""
        return await self._ask("explain", preprocessing, *images)

    async def describe(self) -> dict[str, Any]:
        """Return card, meaning and runtime."""
        return await self._ask("describe")

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

    def __init__(self, model: DeploymentHandle, config: ServiceConfig) -> None:
        token = read_token(config.api_token_file, os.environ)
        handler = Handler(
            RemoteModel(model),
            config.limits,
            max_calls=CALLS_PER_REPLICA * config.max_replicas,
            max_images=GPU_BATCH if config.model.use_gpu else CPU_BATCH,
        )
        replica = serve.get_replica_context().replica_id.unique_id
        self._app = build_app(
            handler,
            guard=Guard(token),
            meters=Meters(replica),
            journal=Journal(config.log_path),
            echo_id=False,
        )

    def __serve_build_asgi_app__(self) -> App:
        return self._app


def build_application(config: ServiceConfig) -> Application:
    """Build the application that `serve.run` takes."""
    options = config.model
    threads = options.num_threads or 1
    model = ModelReplica.options(
        ray_actor_options={
            "num_cpus": config.replica_cpus if config.replica_cpus is not None else threads,
            "num_gpus": 1 if options.use_gpu else 0,
        },
        autoscaling_config={
            "min_replicas": config.min_replicas,
            "max_replicas": config.max_replicas,
            "target_ongoing_requests": CALLS_PER_REPLICA - 0.5,
            "upscale_delay_s": 5,
            "downscale_delay_s": 120,
        },
    )
    ingress = Ingress.options(num_replicas=config.ingress_replicas)
    return ingress.bind(model.bind(options), config)
