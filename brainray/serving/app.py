"""The Serve application: one deployment, whose replicas speak HTTP and hold the classifier.

A second deployment would scale HTTP and model apart, for one more hop between processes of each
request. ``serve deploy`` and ``serve run`` call :func:`build`.
"""

import os
import secrets
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve import Application
from ray.serve.config import BackpressureConfig
from ray.serve.schema import LoggingConfig

from brainray.inference.engine import EngineOptions
from brainray.io.identifiers import NUM_KEY_BYTES, read_key
from brainray.serving.access_log import AccessLog
from brainray.serving.auth import read_token
from brainray.serving.metrics import Metrics
from brainray.serving.options import ServiceConfig, read_arguments
from brainray.serving.pipeline import MAX_BATCH_SIZE, MAX_GPU_BATCH_SIZE, Pipeline
from brainray.serving.predictor import Predictor
from brainray.serving.problem import RETRY_AFTER_S
from brainray.serving.routes import build_app

ROOM_FOR_HEALTH = 64
"""Requests that a replica takes beyond ``limits.in_flight``, so that it refuses them itself, with a
problem body, and answers health whatever the load."""
SELF_TEST_PERIOD_S = 10.0
QUIET = LoggingConfig(log_level="WARNING", enable_access_log=False)
"""The service writes its own line for a request."""


@serve.deployment(
    name="Model",
    max_surge_percent=100,  # a new classifier answers before the old one stops
    graceful_shutdown_timeout_s=60,
    graceful_shutdown_wait_loop_s=0.2,
    health_check_period_s=2,
    health_check_timeout_s=30,
    backpressure_config=BackpressureConfig(status_code=429, retry_after_s=RETRY_AFTER_S),
    logging_config=QUIET,
)
@serve.ingress()
class Model:
    """A replica: the ASGI application, and the classifier in the same process."""

    def __init__(self, config: ServiceConfig, id_key: bytes, use_ray_metrics: bool) -> None:
        self._config = config
        self._pipeline = Pipeline(
            Predictor(config.model),
            config.limits,
            id_key=read_key(config.id_key_file) if config.id_key_file else id_key,
            max_batch_size=get_max_batch_size(config.model.engine),
        )
        self._metrics = Metrics(
            serve.get_replica_context().replica_id.unique_id, use_ray=use_ray_metrics
        )

    async def __serve_build_asgi_app__(self) -> FastAPI:
        return build_app(
            self._pipeline,
            token=read_token(self._config.api_token_file, os.environ),
            metrics=self._metrics,
            access_log=AccessLog(self._config.log_path),
            sends_request_id=False,
        )

    async def check_health(self) -> None:
        """Run the self-test now and then; Serve replaces a replica that fails it three times."""
        await self._pipeline.check_ready(SELF_TEST_PERIOD_S)


def get_max_batch_size(engine: EngineOptions) -> int:
    """Return how many images a replica computes together, at most; half of them keep it busy."""
    return MAX_GPU_BATCH_SIZE if engine.use_gpu else MAX_BATCH_SIZE


def build_application(config: ServiceConfig, *, use_ray_metrics: bool) -> Application:
    """Build the application that `serve.run` takes.

    Parameters
    ----------
    config : ServiceConfig
        What answers.
    use_ray_metrics : bool
        Whether replicas count with Ray's metrics beside those that ``/metrics`` shows.
    """
    engine, limits = config.model.engine, config.limits
    cpus = engine.num_threads or 1 if config.replica_cpus is None else config.replica_cpus
    deployment = Model.options(  # type: ignore[attr-defined]  # Serve's decorator is untyped
        ray_actor_options={"num_cpus": cpus, "num_gpus": 1 if engine.use_gpu else 0},
        max_ongoing_requests=limits.in_flight + ROOM_FOR_HEALTH,
        max_queued_requests=limits.in_flight,
        autoscaling_config={
            "min_replicas": config.min_replicas,
            "max_replicas": config.max_replicas,
            "target_ongoing_requests": get_max_batch_size(engine) // 2,
            "upscale_delay_s": 5,
            "downscale_delay_s": 120,
        },
    )
    id_key = secrets.token_bytes(NUM_KEY_BYTES)  # the same in all replicas
    application: Application = deployment.bind(config, id_key, use_ray_metrics)
    return application


def build(arguments: dict[str, Any]) -> Application:
    """Build the application from a config file's `args`; `serve deploy` and `serve run` call it.

    Parameters
    ----------
    arguments : dict
        Fields of :class:`ServiceConfig`; those of ``model`` and ``limits`` below their names.
    """
    return build_application(read_arguments(arguments), use_ray_metrics=True)
