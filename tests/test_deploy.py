"""Deployment files: they follow Ray's and KubeRay's schemas, and keep docs/security.md."""

import copy
import gzip
import importlib
import json
import re
import shlex
import subprocess
import tomllib
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.serve.schema import HTTPOptionsSchema, ServeDeploySchema

from brainray import cli
from brainray.errors import ConfigError
from brainray.images.decode import DecodeLimits
from brainray.inference.options import ClassifyJob
from brainray.inference.schema import SCHEMA_VERSION, build_schema
from brainray.io.lock import LEASE_LIFE_S
from brainray.model.reasons import REASONS
from brainray.serving.local import PRODUCTION_VARIABLES
from brainray.serving.middleware import MIN_TOKEN_CHARACTERS, TOKEN_VARIABLE
from brainray.serving.options import ServiceLimits, read_arguments

ROOT = Path(__file__).resolve().parents[1]
DOCKERFILE = ROOT / "deploy" / "Dockerfile"
SCHEMAS = ROOT.parent / "shared" / "schemas"
TRAIN, CLASSIFY, SERVE = "rayjob-train.yaml", "raycronjob-classify.yaml", "rayservice.yaml"
CODE_PORTS = {8265, 10001, 6379}
"""Dashboard and jobs, Ray client, GCS: each runs code for anyone who can connect."""


def load(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((ROOT / name).read_text()))


def get_ray_version() -> str:
    lock = (ROOT / "requirements.lock").read_text()
    (version,) = re.findall(r"^ray==([\w.]+)", lock, flags=re.MULTILINE)
    return version


def read_dockerfile() -> list[tuple[str, list[str]]]:
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE)
    lines = text.replace("\\\n", " ").splitlines()
    words = [shlex.split(line) for line in lines if line.strip()]
    return [(name.upper(), arguments) for name, *arguments in words]


def walk(value: object, path: str = "") -> Iterator[tuple[str, object]]:
    """Yield the path and the value of every key and list item."""
    children: Any = {}.items()
    if isinstance(value, dict):
        children = value.items()
    elif isinstance(value, list):
        children = enumerate(value)
    for key, child in children:
        yield f"{path}/{key}", child
        yield from walk(child, f"{path}/{key}")


def find_rejected(value: object, schema: dict[str, Any], path: str = "") -> list[str]:
    """List unknown fields and wrong quantities: JSON Schema accepts them, API servers do not."""
    if schema.get("x-kubernetes-preserve-unknown-fields"):
        return []
    if schema.get("x-kubernetes-int-or-string"):
        is_valid = isinstance(value, int | str) and not isinstance(value, bool)
        return [] if is_valid else [f"{path}: {value!r} is neither an integer nor a string"]
    found = []
    if isinstance(value, dict):
        known, others = schema.get("properties", {}), schema.get("additionalProperties")
        for key, child in value.items():
            if key in known:
                found += find_rejected(child, known[key], f"{path}/{key}")
            elif isinstance(others, dict):
                found += find_rejected(child, others, f"{path}/{key}")
            elif others is not True:
                found.append(f"{path}/{key}: unknown field")
    elif isinstance(value, list):
        for index, child in enumerate(value):
            found += find_rejected(child, schema.get("items", {}), f"{path}/{index}")
    return found


class Manifest:
    """A manifest of deploy/: the KubeRay resource, and the resources beside it."""

    def __init__(self, name: str) -> None:
        self.documents = load(f"deploy/{name}")
        self.resource = self.find(lambda document: document["apiVersion"] == "ray.io/v1")
        spec = self.resource["spec"]
        self.job = spec["jobTemplate"] if self.resource["kind"] == "RayCronJob" else spec
        self.cluster = self.job.get("rayClusterSpec") or self.job["rayClusterConfig"]
        self.policy = self.find(lambda document: document["kind"] == "NetworkPolicy")["spec"]
        self.pods: dict[str, dict[str, Any]] = {
            "head": self.cluster["headGroupSpec"]["template"],
            **{group["groupName"]: group["template"] for group in self.cluster["workerGroupSpecs"]},
        }
        if "submitterPodTemplate" in self.job:  # a service has none
            self.pods["submitter"] = self.job["submitterPodTemplate"]

    def find(self, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        (found,) = (document for document in self.documents if condition(document))
        return found

    def load_schema(self) -> dict[str, Any]:
        path = SCHEMAS / f"ray.io_v1_{self.resource['kind']}.json.gz"
        if not path.exists():
            pytest.skip(f"no custom resource schema at {path}")
        schema: dict[str, Any] = json.loads(gzip.decompress(path.read_bytes()))
        return schema


@pytest.fixture(params=[TRAIN, CLASSIFY, SERVE])
def manifest(request: pytest.FixtureRequest) -> Manifest:
    return Manifest(request.param)


# ---- schemas -------------------------------------------------------------------------------------


def test_cluster_follows_rays_schema() -> None:
    schema = json.loads((files("ray.autoscaler") / "ray-schema.json").read_text())
    (cluster,) = load("cluster.yaml")
    jsonschema.validate(cluster, schema)


def test_manifest_follows_kuberays_schema(manifest: Manifest) -> None:
    schema, resource = manifest.load_schema(), manifest.resource
    del resource["metadata"]  # the API server has a schema of its own for it
    jsonschema.Draft202012Validator(schema).validate(resource)
    assert find_rejected(resource, schema) == []
    broken = copy.deepcopy(resource)
    broken["spec"]["unknown"] = True
    assert find_rejected(broken, schema) == ["/spec/unknown: unknown field"]


@pytest.mark.parametrize("name", ["serve.yaml", SERVE])
def test_serve_config_follows_rays_schema_and_builds_the_service(name: str) -> None:
    config = read_serve_config(name)
    (application,) = ServeDeploySchema.model_validate(config).applications
    assert application.route_prefix == "/"
    assert set(config) <= set(ServeDeploySchema.model_fields), "Ray ignores unknown names"
    assert set(config["http_options"]) <= set(HTTPOptionsSchema.model_fields)
    limits = read_arguments(application.args).limits
    assert limits.request_s < config["http_options"]["request_timeout_s"]
    module, function = str(application.import_path).split(":")
    assert getattr(importlib.import_module(module), function)(application.args)


def read_serve_config(name: str) -> dict[str, Any]:
    (first, *_) = load(f"deploy/{name}")
    config: dict[str, Any] = first
    return yaml.safe_load(first["spec"]["serveConfigV2"]) if name == SERVE else config


def test_both_serve_configs_agree() -> None:
    """Except for the address, which a pod's probes must reach, and the number of replicas."""
    alone, embedded = (
        dict(walk(read_serve_config("serve.yaml"))),
        dict(walk(read_serve_config(SERVE))),
    )
    differing = {
        path
        for path in alone.keys() | embedded.keys()
        if alone.get(path) != embedded.get(path) and not isinstance(alone.get(path), dict | list)
    }
    assert differing == {"/http_options/host", "/applications/0/args/min_replicas"}


# ---- jobs ----------------------------------------------------------------------------------------

ReadFlags = Callable[[list[str]], ClassifyJob]


@pytest.fixture
def read_flags(monkeypatch: pytest.MonkeyPatch) -> ReadFlags:
    """Return a function that parses flags as `python jobs/classify.py` does."""
    jobs: list[ClassifyJob] = []

    def stop(job: ClassifyJob, **_: object) -> None:
        jobs.append(job)
        raise ConfigError("parsed")

    monkeypatch.setattr("brainray.inference.bulk.classify", stop)

    def read(flags: list[str]) -> ClassifyJob:
        with pytest.raises(SystemExit):
            cli.main(["classify", *flags])
        (job,) = jobs  # empty if the parser rejected the flags
        jobs.clear()
        return job

    return read


def test_jobs_give_their_commands_valid_options(read_flags: ReadFlags) -> None:
    train, classify = Manifest(TRAIN), Manifest(CLASSIFY)
    _, script, *flags = shlex.split(train.job["entrypoint"])
    assert script == "jobs/train.py"
    options, _ = cli.parse_options(cli.COMMANDS["train"], flags)
    (workers,) = train.cluster["workerGroupSpecs"]
    assert options.scaling.use_gpu
    assert options.scaling.num_workers == workers["replicas"]
    _, script, *flags = shlex.split(classify.job["entrypoint"])
    assert script == "jobs/classify.py"
    assert read_flags(flags).output_uri.startswith("s3://")
    for manifest in (train, classify):
        assert manifest.job["shutdownAfterJobFinishes"] is True


def test_runs_of_the_cron_job_do_not_overlap() -> None:
    """KubeRay has no concurrencyPolicy: a run must end within its hour."""
    manifest = Manifest(CLASSIFY)
    minute, *rest = manifest.resource["spec"]["schedule"].split()
    assert minute.isdecimal()
    assert rest == ["*"] * 4
    grace_s = max(
        pod["spec"].get("terminationGracePeriodSeconds", 30) for pod in manifest.pods.values()
    )
    ended_s = manifest.job["activeDeadlineSeconds"] + manifest.job["ttlSecondsAfterFinished"]
    assert ended_s + grace_s + LEASE_LIFE_S < 3600


def test_service_pods_have_cpus_for_all_replicas() -> None:
    (workers,) = Manifest(SERVE).cluster["workerGroupSpecs"]
    config = read_arguments(read_serve_config(SERVE)["applications"][0]["args"])
    (container,) = workers["template"]["spec"]["containers"]
    per_pod = int(container["resources"]["limits"]["cpu"]) // (config.model.engine.num_threads or 1)
    assert workers["replicas"] * per_pod == config.max_replicas


# ---- security ------------------------------------------------------------------------------------


def test_clusters_require_rays_token(manifest: Manifest) -> None:
    assert manifest.cluster["authOptions"] == {"mode": "token"}
    assert manifest.cluster["rayVersion"] == get_ray_version(), "KubeRay needs it for the token"
    (cluster,) = load("cluster.yaml")
    assert cluster["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    for role in ("head", "worker"):
        (start,) = (c for c in cluster[f"{role}_start_ray_commands"] if "ray start" in c)
        assert "export RAY_AUTH_MODE=token;" in start.split("ray start")[0], role


def test_machines_of_the_cluster_are_private() -> None:
    (cluster,) = load("cluster.yaml")
    provider = cluster["provider"]
    assert provider["use_internal_ips"] is True
    assert not provider.get("use_external_head_ip", False)
    for name, kind in cluster["available_node_types"].items():
        # Without it, Ray creates a security group that allows SSH from everywhere.
        assert kind["node_config"]["SecurityGroupIds"], name
        assert kind["node_config"]["MetadataOptions"]["HttpTokens"] == "required", name


def test_pods_are_unprivileged_and_bounded(manifest: Manifest) -> None:
    users = [words[0] for name, words in read_dockerfile() if name == "USER"]
    for name, template in manifest.pods.items():
        pod = template["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True, name
        assert [f"{pod['securityContext'][f'runAs{role}']}" for role in ("User", "Group")] == (
            users[0].split(":")
        ), name
        (container,) = pod["containers"]
        security = container["securityContext"]
        assert security["allowPrivilegeEscalation"] is False, name
        assert security["capabilities"] == {"drop": ["ALL"]}, name
        assert security["readOnlyRootFilesystem"] is True, name
        assert all(set(volume) == {"name", "emptyDir"} for volume in pod["volumes"]), name
        for bound in ("requests", "limits"):
            assert {"cpu", "memory"} <= set(container["resources"][bound]), (name, bound)


def test_network_policy_closes_the_ports_that_run_code(manifest: Manifest) -> None:
    selected = manifest.policy["podSelector"]
    for name, template in manifest.pods.items():
        labels = template["metadata"]["labels"]
        assert selected["matchLabels"].items() <= labels.items(), name
    for rule in manifest.policy["ingress"]:
        (peer,) = rule["from"]
        assert peer["podSelector"]["matchLabels"], "an empty selector matches every pod"
        if peer["podSelector"] == selected:
            continue  # the cluster's own pods
        ports = {entry["port"] for entry in rule["ports"]}
        if "namespaceSelector" not in peer:  # clients
            assert ports == {8000}
    kinds = {document["kind"] for document in manifest.documents}
    assert not kinds & {"Service", "Ingress", "Gateway", "HTTPRoute"}
    publishing = ("/hostPort", "/hostNetwork", "/enableIngress", "/headService", "/nodePort")
    paths = dict(walk(manifest.documents))
    assert not [path for path in paths if path.endswith(publishing)]
    assert not CODE_PORTS & {v for path, v in paths.items() if path.endswith("/containerPort")}


def test_the_service_on_kubernetes_requires_its_token() -> None:
    assert "token" not in json.dumps(read_serve_config(SERVE)).lower(), "Serve's dashboard shows it"
    for name, template in Manifest(SERVE).pods.items():
        (container,) = template["spec"]["containers"]
        environment = {entry["name"]: entry for entry in container["env"]}
        assert not environment[TOKEN_VARIABLE]["valueFrom"]["secretKeyRef"].get("optional"), name
        switches = {k: v["value"] for k, v in environment.items() if k.startswith("RAY_SERVE_")}
        assert switches == PRODUCTION_VARIABLES, name


@pytest.fixture
def repository_files() -> list[str]:
    """List the files that a clone has: tracked, or new and not ignored."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return [name for name in listed.stdout.splitlines() if (ROOT / name).exists()]


def test_only_the_service_on_kubernetes_listens_on_every_interface(
    repository_files: list[str],
) -> None:
    kinds = (".py", ".yaml", "Dockerfile", "Makefile")
    listening = [
        name
        for name in repository_files
        if name.endswith(kinds) and not name.startswith("tests/")
        if re.search(r"\b0\.0\.0\.0\b(?!/)|[\"']::[\"']", (ROOT / name).read_text())
    ]
    assert listening == [f"deploy/{SERVE}"]
    assert read_serve_config("serve.yaml")["http_options"]["host"] == "127.0.0.1"


# ---- the image -----------------------------------------------------------------------------------


def test_the_image_has_the_lock_the_code_and_nothing_else(repository_files: list[str]) -> None:
    instructions = read_dockerfile()
    assert any(name == "RUN" and "requirements.lock" in words for name, words in instructions)
    copied = {source for name, words in instructions if name == "COPY" for source in words[:-1]}
    assert copied == {"requirements.lock", "brainray/", "jobs/"}
    assert all(any(f.startswith(source) for f in repository_files) for source in copied)
    ignore = (ROOT / "deploy" / "Dockerfile.dockerignore").read_text().splitlines()
    rules = [line for line in ignore if line and not line.startswith("#")]
    assert rules[0] == "*"
    assert {rule[1:] for rule in rules if rule.startswith("!")} == {s.rstrip("/") for s in copied}


def test_image_tags_match_the_lock(manifest: Manifest) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    tag = f":{project['version']}-ray{get_ray_version()}"
    for template in manifest.pods.values():
        (container,) = template["spec"]["containers"]
        assert container["image"].endswith(tag)
    assert re.search(rf"docker build .*{re.escape(tag)} \.", DOCKERFILE.read_text())


# ---- docs ----------------------------------------------------------------------------------------


def test_the_bulk_guide_lists_every_column_and_reason() -> None:
    text = (ROOT / "docs" / "bulk.md").read_text()
    rows = re.findall(r"^\| (`.+?) \| .+ \| .+ \|$", text, flags=re.MULTILINE)
    columns = [name for row in rows for name in re.findall(r"`([\w<>]+)`", row)]
    assert columns == build_schema(["<class>"]).names
    (listed,) = re.findall(r"^The reasons are (.+?)\.$", text, flags=re.MULTILINE | re.DOTALL)
    assert re.findall(r"`(\w+)`", listed) == list(REASONS)
    assert f"`schema_version` of these columns (now {SCHEMA_VERSION})" in text


def test_the_security_page_has_the_current_limits_and_ports() -> None:
    text = (ROOT / "docs" / "security.md").read_text()
    mib = 2**20
    assert f"| {DecodeLimits().max_bytes // mib} MiB (`--limits.max-bytes`)" in text
    assert f"| {ServiceLimits().body_bytes // mib} MiB, the whole body" in text
    assert f"| {DecodeLimits().max_pixels // 10**6} million |" in text
    assert f"| scans of a request | | {ServiceLimits().files} |" in text
    assert f"{MIN_TOKEN_CHARACTERS} characters or more" in text
    for port in CODE_PORTS:
        assert re.search(rf"^\| {port} \| .*\*\*runs code\*\*", text, flags=re.MULTILINE), port
