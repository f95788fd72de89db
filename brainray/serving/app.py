"""The Serve application: one deployment, whose replicas answer HTTP and hold the classifier.

A second deployment could scale HTTP and model separately, but each request would pass through one
more process. ``serve deploy`` and ``serve run`` call :func:`build`.
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
from brainray.serving.metrics import Metrics
from brainray.serving.middleware import AccessLog, read_token
from brainray.serving.options import ServiceConfig, read_arguments
from brainray.serving.pipeline import MAX_BATCH_SIZE, MAX_GPU_BATCH_SIZE, Pipeline
from brainray.serving.predictor import Predictor
from brainray.serving.problem import RETRY_AFTER_S
from brainray.serving.routes import build_app

SPARE_REQUESTS = 64
"""Requests that Serve passes on beyond ``limits.in_flight``: the replica refuses them itself, with
a problem body, and answers health checks under any load."""
SELF_TEST_PERIOD_S = 10.0
LOGGING = LoggingConfig(log_level="WARNING", enable_access_log=False)
"""Without Serve's access log, because the service writes its own."""


@serve.deployment(
    name="Model",
    max_surge_percent=100,  # replicas with a new classifier start before the old ones stop
    graceful_shutdown_timeout_s=60,
    graceful_shutdown_wait_loop_s=0.2,
    health_check_period_s=2,
    health_check_timeout_s=30,
    backpressure_config=BackpressureConfig(status_code=429, retry_after_s=RETRY_AFTER_S),
    logging_config=LOGGING,
)
@serve.ingress()
class Model:
    """A replica: the ASGI application and the classifier in one process."""

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
        """Run the self-test periodically; Serve replaces a replica that fails it three times."""
        await self._pipeline.check_ready(SELF_TEST_PERIOD_S)


def get_max_batch_size(engine: EngineOptions) -> int:
    """Return the largest batch of a replica; half of it keeps the replica busy."""
    return MAX_GPU_BATCH_SIZE if engine.use_gpu else MAX_BATCH_SIZE


def build_application(config: ServiceConfig, *, use_ray_metrics: bool) -> Application:
    """Build the application that `serve.run` takes; ``/metrics`` does not need Ray's metrics."""
    engine, limits = config.model.engine, config.limits
    cpus = engine.num_threads or 1 if config.replica_cpus is None else config.replica_cpus
    deployment = Model.options(  # type: ignore[attr-defined]  # Serve's decorator is untyped
        ray_actor_options={"num_cpus": cpus, "num_gpus": 1 if engine.use_gpu else 0},
        max_ongoing_requests=limits.in_flight + SPARE_REQUESTS,
        max_queued_requests=limits.in_flight,
        autoscaling_config={
            "min_replicas": config.min_replicas,
            "max_replicas": config.max_replicas,
            "target_ongoing_requests": get_max_batch_size(engine) // 2,
            "upscale_delay_s": 5,
            "downscale_delay_s": 120,
        },
    )
    id_key = secrets.token_bytes(NUM_KEY_BYTES)  # shared by all replicas
    application: Application = deployment.bind(config, id_key, use_ray_metrics)
    return application


def build(arguments: dict[str, Any]) -> Application:
    """Build the application from the `args` of a Serve config file: a nested ServiceConfig."""
    return build_application(read_arguments(arguments), use_ray_metrics=True)
