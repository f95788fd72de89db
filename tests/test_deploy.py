"""Deployment files, checked against the schemas of those who will read them."""

import copy
import gzip
import importlib
import json
import re
import shlex
import subprocess
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import fields
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.dashboard.http_server_agent import PUBLIC_EXACT_PATHS
from ray.serve.schema import HTTPOptionsSchema, ServeDeploySchema

from brainray import cli
from brainray.errors import ConfigError
from brainray.images.decode import DecodeLimits
from brainray.inference.options import ClassifyJob
from brainray.inference.predict import CPUS_PER_ENGINE
from brainray.inference.schema import SCHEMA_VERSION, build_schema
from brainray.io.lock import LEASE_LIFE_S
from brainray.model.reasons import REASONS
from brainray.serving.auth import MIN_TOKEN_CHARACTERS, TOKEN_VARIABLE
from brainray.serving.local import PRODUCTION_VARIABLES, is_loopback
from brainray.serving.options import ServeJob, ServiceLimits, read_arguments

ROOT = Path(__file__).resolve().parents[1]
DOCKERFILE = ROOT / "deploy" / "Dockerfile"
GUIDE = ROOT / "docs" / "bulk.md"
SECURITY = ROOT / "docs" / "security.md"
SCHEMAS = ROOT.parent / "shared" / "schemas"
TRAIN, CLASSIFY, SERVE = "rayjob-train.yaml", "raycronjob-classify.yaml", "rayservice.yaml"

# For what holds of some of the manifests only.
only_training = pytest.mark.parametrize("documents", [TRAIN], indirect=True)
only_classifying = pytest.mark.parametrize("documents", [CLASSIFY], indirect=True)
only_serving = pytest.mark.parametrize("documents", [SERVE], indirect=True)

# Dashboard and jobs, Ray client, GCS: each of them runs code for whoever reaches it.
CODE_PORTS = {8265, 10001, 6379}


def locked_ray_version() -> str:
    lock = (ROOT / "requirements.lock").read_text()
    (version,) = re.findall(r"^ray==([\w.]+)", lock, flags=re.MULTILINE)
    return version


def dockerfile_instructions() -> list[tuple[str, list[str]]]:
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE)
    lines = text.replace("\\\n", " ").splitlines()
    words = [shlex.split(line) for line in lines if line.strip()]
    return [(name.upper(), arguments) for name, *arguments in words]


def walk(value: object, path: str = "") -> Iterator[tuple[str, object]]:
    """Yield every key's path and value, and every list item's."""
    if isinstance(value, dict):
        children = value.items()
    elif isinstance(value, list):
        children = enumerate(value)
    else:
        return
    for key, child in children:
        yield f"{path}/{key}", child
        yield from walk(child, f"{path}/{key}")


def find_refused(value: object, schema: dict[str, Any], path: str = "") -> list[str]:
    """List what an API server prunes or refuses and plain JSON Schema lets through."""
    if schema.get("x-kubernetes-preserve-unknown-fields"):
        return []
    if schema.get("x-kubernetes-int-or-string"):
        good = isinstance(value, int | str) and not isinstance(value, bool)
        return [] if good else [f"{path}: {value!r} is neither an integer nor a string"]
    found = []
    if isinstance(value, dict):
        known, others = schema.get("properties", {}), schema.get("additionalProperties")
        for key, child in value.items():
            if key in known:
                found += find_refused(child, known[key], f"{path}/{key}")
            elif isinstance(others, dict):
                found += find_refused(child, others, f"{path}/{key}")
            elif others is not True:
                found.append(f"{path}/{key}: unknown field")
    elif isinstance(value, list):
        for index, child in enumerate(value):
            found += find_refused(child, schema.get("items", {}), f"{path}/{index}")
    return found


@pytest.fixture
def cluster() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "cluster.yaml").read_text())


@pytest.fixture(params=[TRAIN, CLASSIFY, SERVE])
def documents(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((ROOT / "deploy" / request.param).read_text()))


@pytest.fixture
def resource(documents: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what KubeRay acts upon: a RayJob, a RayCronJob that makes RayJobs, a RayService."""
    (found,) = (document for document in documents if document["apiVersion"] == "ray.io/v1")
    return found


@pytest.fixture
def rayjob_spec(resource: dict[str, Any]) -> dict[str, Any]:
    spec = resource["spec"]
    return spec["jobTemplate"] if resource["kind"] == "RayCronJob" else spec


@pytest.fixture
def ray_cluster(resource: dict[str, Any], rayjob_spec: dict[str, Any]) -> dict[str, Any]:
    return rayjob_spec["rayClusterConfig" if resource["kind"] == "RayService" else "rayClusterSpec"]


@pytest.fixture
def resource_schema(resource: dict[str, Any]) -> dict[str, Any]:
    place = SCHEMAS / f"ray.io_v1_{resource['kind']}.json.gz"
    if not place.exists():
        pytest.skip(f"no custom resource schema at {place}")
    return json.loads(gzip.decompress(place.read_bytes()))


@pytest.fixture
def pod_templates(
    rayjob_spec: dict[str, Any], ray_cluster: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """Return every pod that is made; a service has no submitter."""
    templates = {g["groupName"]: g["template"] for g in ray_cluster["workerGroupSpecs"]}
    templates["head"] = ray_cluster["headGroupSpec"]["template"]
    if "submitterPodTemplate" in rayjob_spec:
        templates["submitter"] = rayjob_spec["submitterPodTemplate"]
    return templates


@pytest.fixture
def repository_files() -> list[str]:
    """Files that a clone has, or will have: tracked, or new and not ignored."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return [name for name in listed.stdout.splitlines() if (ROOT / name).exists()]


ReadFlags = Callable[[list[str]], ClassifyJob]


@pytest.fixture
def read_flags(monkeypatch: pytest.MonkeyPatch) -> ReadFlags:
    """Return what reads flags as `python jobs/classify.py` does, and stops before the work."""
    jobs: list[ClassifyJob] = []

    def stop(job: ClassifyJob, **_: object) -> None:
        jobs.append(job)
        raise ConfigError("far enough")

    monkeypatch.setattr("brainray.inference.bulk.classify", stop)

    def read(flags: list[str]) -> ClassifyJob:
        with pytest.raises(SystemExit):
            cli.main(["classify", *flags])
        (job,) = jobs  # empty when the parser refused
        jobs.clear()
        return job

    return read


def is_in_repository(source: str, repository_files: list[str]) -> bool:
    source = source.removeprefix("./").rstrip("/")
    return any(name == source or name.startswith(f"{source}/") for name in repository_files)


# cluster.yaml


def test_cluster_follows_the_wheels_schema(cluster: dict[str, Any]) -> None:
    schema = json.loads((files("ray.autoscaler") / "ray-schema.json").read_text())
    jsonschema.validate(cluster, schema)


def test_cluster_passes_the_autoscalers_own_checks(cluster: dict[str, Any]) -> None:
    config = prepare_config(cluster)
    validate_config(config)
    # What the defaults would have filled in, had a key been misspelt or left out.
    assert config["docker"] == {}
    assert config["head_setup_commands"] == [
        *cluster["setup_commands"],
        *cluster["head_setup_commands"],
    ]
    assert config["available_node_types"]["head"]["max_workers"] == 0


def test_cluster_trains_only_on_workers_that_scale_to_zero(cluster: dict[str, Any]) -> None:
    node_types = cluster["available_node_types"]
    head = node_types.pop(cluster["head_node_type"])
    assert head["resources"] == {"CPU": 0}
    assert "InstanceMarketOptions" not in head["node_config"]
    assert {name: kind["min_workers"] for name, kind in node_types.items()} == {
        "gpu_worker": 0,
        "cpu_worker": 0,
    }
    assert sum(kind["max_workers"] for kind in node_types.values()) == cluster["max_workers"]
    spot = node_types["gpu_worker"]["node_config"]["InstanceMarketOptions"]
    assert spot == {"MarketType": "spot"}


def test_cluster_requires_the_token_on_every_node(cluster: dict[str, Any]) -> None:
    assert cluster["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert any("chmod 600 ~/.ray/auth_token" in line for line in cluster["setup_commands"])
    for role in ("head", "worker"):
        (start,) = (c for c in cluster[f"{role}_start_ray_commands"] if "ray start" in c)
        before = start.split("ray start")[0]
        assert "export RAY_AUTH_MODE=token;" in before, role


def test_cluster_starts_quietly_on_loopback(cluster: dict[str, Any]) -> None:
    (start,) = (c for c in cluster["head_start_ray_commands"] if "ray start" in c)
    options = shlex.split(start)
    assert "--dashboard-host=127.0.0.1" in options
    assert "--disable-usage-stats" in options
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in options


def test_cluster_opens_nothing_to_the_world(cluster: dict[str, Any]) -> None:
    provider = cluster["provider"]
    assert provider["use_internal_ips"] is True
    assert not provider.get("use_external_head_ip", False)
    assert "security_group" not in provider
    for name, kind in cluster["available_node_types"].items():
        # Without a group of ours Ray creates one that admits SSH from everywhere.
        assert kind["node_config"]["SecurityGroupIds"], name
        assert kind["node_config"]["MetadataOptions"]["HttpTokens"] == "required", name
        assert kind["node_config"]["IamInstanceProfile"]["Name"], name
        assert "NetworkInterfaces" not in kind["node_config"], name
    assert f"--region {provider['region']} " in cluster["auth"]["ssh_proxy_command"]


def test_cluster_installs_the_lock(cluster: dict[str, Any]) -> None:
    installs = [line for line in cluster["setup_commands"] if "pip install" in line]
    assert len(installs) == 1
    assert "pip install -r requirements.lock && pip install --no-deps" in installs[0]


def test_cluster_mounts_only_files_of_the_repository(
    cluster: dict[str, Any], repository_files: list[str]
) -> None:
    sources = [s for s in cluster["file_mounts"].values() if not s.startswith("~")]
    missing = [s for s in sources if not is_in_repository(s, repository_files)]
    assert sources
    assert missing == []


# deploy/rayjob-train.yaml, deploy/raycronjob-classify.yaml, deploy/rayservice.yaml


def test_resource_follows_its_definition(
    resource: dict[str, Any], resource_schema: dict[str, Any]
) -> None:
    # The API server checks metadata against its own ObjectMeta, not against the resource.
    assert set(resource.pop("metadata")) <= {"name", "namespace", "labels", "annotations"}
    jsonschema.Draft202012Validator(resource_schema).validate(resource)
    assert find_refused(resource, resource_schema) == []


def set_cpu_limit(spec: dict[str, Any], cpu: object) -> None:
    pod = spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    pod["containers"][0]["resources"]["limits"] = {"cpu": cpu}


@pytest.mark.parametrize(
    ("documents", "path", "break_it"),
    [
        (
            TRAIN,
            "/spec/shutdownAfterJobFinish",
            lambda spec: spec.update(shutdownAfterJobFinish=True),
        ),
        (TRAIN, "/spec/authOptions", lambda spec: spec.update(authOptions={"mode": "token"})),
        (
            TRAIN,
            "/spec/rayClusterSpec/headGroupSpec/template/spec/containers/0/resources/limits/cpu",
            lambda spec: set_cpu_limit(spec, 0.5),
        ),
        # A batch/v1 CronJob wraps its template's spec; KubeRay's does not.
        (
            CLASSIFY,
            "/spec/jobTemplate/spec",
            lambda spec: spec["jobTemplate"].update(spec={"entrypoint": "true"}),
        ),
        # Once KubeRay has this field, the manifest should say Forbid, and its comment go.
        (
            CLASSIFY,
            "/spec/concurrencyPolicy",
            lambda spec: spec.update(concurrencyPolicy="Forbid"),
        ),
    ],
    indirect=["documents"],
)
def test_refusal_notices_what_an_api_server_would(
    resource: dict[str, Any],
    resource_schema: dict[str, Any],
    path: str,
    break_it: Callable[[dict[str, Any]], None],
) -> None:
    del resource["metadata"]
    broken = copy.deepcopy(resource)
    break_it(broken["spec"])
    (complaint,) = find_refused(broken, resource_schema)
    assert complaint.startswith(f"{path}:")


@only_training
def test_rayjob_runs_training_and_cleans_up(
    rayjob_spec: dict[str, Any], repository_files: list[str]
) -> None:
    python, script, *flags = shlex.split(rayjob_spec["entrypoint"])
    assert (python, script) == ("python", "jobs/train.py")
    assert is_in_repository(script, repository_files)
    options, _ = cli.parse_options(cli.COMMANDS["train"], flags)
    assert options.scaling.use_gpu
    assert options.data_uri.startswith("s3://")
    assert options.output_uri.startswith("s3://")
    assert options.recipe == "gpu"
    (workers,) = rayjob_spec["rayClusterSpec"]["workerGroupSpecs"]
    assert options.scaling.num_workers == workers["replicas"]
    assert rayjob_spec["shutdownAfterJobFinishes"] is True


@only_classifying
def test_cronjob_runs_the_bulk_door_and_cleans_up(
    rayjob_spec: dict[str, Any], repository_files: list[str], read_flags: ReadFlags
) -> None:
    python, script, *flags = shlex.split(rayjob_spec["entrypoint"])
    assert (python, script) == ("python", "jobs/classify.py")
    assert is_in_repository(script, repository_files)
    job = read_flags(flags)
    (inbox,) = job.scans_uri
    for uri in (inbox, job.classifier_uri, job.output_uri):
        assert uri.startswith("s3://")
    (workers,) = rayjob_spec["rayClusterSpec"]["workerGroupSpecs"]
    (container,) = workers["template"]["spec"]["containers"]
    assert int(container["resources"]["limits"]["cpu"]) % CPUS_PER_ENGINE == 0
    assert job.num_predictors is None, "the job makes one for every four CPUs"
    assert workers["minReplicas"] == workers["replicas"] == workers["maxReplicas"]
    assert rayjob_spec["shutdownAfterJobFinishes"] is True


@only_classifying
def test_cronjob_runs_never_meet(resource: dict[str, Any], rayjob_spec: dict[str, Any]) -> None:
    """Every hour, and over within it: KubeRay has no concurrencyPolicy."""
    minute, *rest = resource["spec"]["schedule"].split()
    assert minute.isdecimal()
    assert rest == ["*"] * 4
    ray = rayjob_spec["rayClusterSpec"]
    pods = [ray["headGroupSpec"], *ray["workerGroupSpecs"]]
    grace_s = max(p["template"]["spec"].get("terminationGracePeriodSeconds", 30) for p in pods)
    ended_s = rayjob_spec["activeDeadlineSeconds"] + rayjob_spec["ttlSecondsAfterFinished"]
    assert ended_s + grace_s + LEASE_LIFE_S < 3600


def test_cluster_of_a_manifest_requires_a_token(ray_cluster: dict[str, Any]) -> None:
    assert ray_cluster["authOptions"] == {"mode": "token"}
    assert ray_cluster["rayVersion"] == locked_ray_version()


def test_every_pod_is_bounded_and_unprivileged(
    pod_templates: dict[str, dict[str, Any]],
) -> None:
    assert len(pod_templates) >= 2
    for name, template in pod_templates.items():
        pod = template["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True, name
        assert pod["securityContext"]["runAsUser"] > 0, name
        (container,) = pod["containers"]
        security = container["securityContext"]
        assert security["allowPrivilegeEscalation"] is False, name
        assert security["capabilities"] == {"drop": ["ALL"]}, name
        assert security["readOnlyRootFilesystem"] is True, name
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        assert set(mounts) == {"/tmp", "/home/ray"}, "what Ray and its libraries write to"
        assert {v["name"]: v["emptyDir"] for v in pod["volumes"]} == {
            n: {} for n in mounts.values()
        }
        for bound in ("requests", "limits"):
            assert {"cpu", "memory"} <= set(container["resources"][bound]), (name, bound)


@pytest.mark.parametrize(
    ("documents", "expected"),
    [
        (TRAIN, {"head": 0, "submitter": 0, "gpu": 1}),
        (CLASSIFY, {"head": 0, "submitter": 0, "cpu": 0}),
        (SERVE, {"head": 0, "cpu": 0}),
    ],
    indirect=["documents"],
)
def test_only_workers_that_compute_on_gpus_hold_them(
    ray_cluster: dict[str, Any],
    pod_templates: dict[str, dict[str, Any]],
    expected: dict[str, int],
) -> None:
    gpus = {
        name: template["spec"]["containers"][0]["resources"]["limits"].get("nvidia.com/gpu", 0)
        for name, template in pod_templates.items()
    }
    assert gpus == expected
    assert ray_cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


def test_ray_pods_send_no_usage_reports(pod_templates: dict[str, dict[str, Any]]) -> None:
    for name in set(pod_templates) - {"submitter"}:
        (container,) = pod_templates[name]["spec"]["containers"]
        assert {"name": "RAY_USAGE_STATS_ENABLED", "value": "0"} in container["env"], name


def test_network_policy_covers_every_pod(
    documents: list[dict[str, Any]], pod_templates: dict[str, dict[str, Any]]
) -> None:
    (policy,) = (document for document in documents if document["kind"] == "NetworkPolicy")
    selected = policy["spec"]["podSelector"]["matchLabels"]
    for name, template in pod_templates.items():
        assert selected.items() <= template["metadata"]["labels"].items(), name
    for rule in policy["spec"]["ingress"]:
        assert rule["from"], "a rule without `from` admits everybody"
        for peer in rule["from"]:
            assert peer["podSelector"]["matchLabels"], "an empty selector admits every pod"


# deploy/Dockerfile


def test_dockerfile_copies_only_files_of_the_repository(repository_files: list[str]) -> None:
    copies = [words for name, words in dockerfile_instructions() if name in {"COPY", "ADD"}]
    sources = [source for words in copies for source in words[:-1]]
    assert {"requirements.lock", "brainray/", "jobs/"} == set(sources)
    assert [s for s in sources if not is_in_repository(s, repository_files)] == []


def test_dockerignore_admits_exactly_what_is_copied() -> None:
    lines = (ROOT / "deploy" / "Dockerfile.dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    copied = {
        source.rstrip("/")
        for name, words in dockerfile_instructions()
        if name == "COPY"
        for source in words[:-1]
    }
    assert rules[0] == "*"
    assert {rule[1:] for rule in rules if rule.startswith("!")} == copied


def test_dockerfile_runs_the_lock_as_a_user(pod_templates: dict[str, dict[str, Any]]) -> None:
    instructions = dockerfile_instructions()
    assert [words for name, words in instructions if name == "FROM"] == [["python:3.11-slim"]]
    assert any(name == "RUN" and "requirements.lock" in words for name, words in instructions)
    (user,) = (words[0] for name, words in instructions if name == "USER")
    uid, gid = (int(number) for number in user.split(":"))
    assert uid > 0
    for name, template in pod_templates.items():
        security = template["spec"]["securityContext"]
        assert (security["runAsUser"], security["runAsGroup"]) == (uid, gid), name


# docs/bulk.md


def test_the_guides_commands_are_accepted(read_flags: ReadFlags) -> None:
    text = GUIDE.read_text().replace("\\\n", " ")
    commands = [line for line in text.splitlines() if "python jobs/classify.py " in line]
    assert len(commands) >= 4
    for command in commands:
        _, _, flags = command.partition("jobs/classify.py ")
        assert read_flags(shlex.split(flags)).scans_uri, command


def test_the_guides_flags_exist(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["classify", "--help"])
    helped = set(re.findall(r"--[a-z][a-z.-]+", capsys.readouterr().out))
    mentioned = set(re.findall(r"--[a-z][a-z.-]+", GUIDE.read_text()))
    others = {"--address", "--working-dir", "--json"}
    assert mentioned - helped == others, "those of Ray, and of classify FILE"


def test_the_guide_lists_every_column_and_reason() -> None:
    text = GUIDE.read_text()
    rows = re.findall(r"^\| (`.+?) \| .+ \| .+ \|$", text, flags=re.MULTILINE)
    columns = [name for row in rows for name in re.findall(r"`([\w<>]+)`", row)]
    assert columns == build_schema(["<class>"]).names
    (listed,) = re.findall(r"^The reasons are (.+?)\.$", text, flags=re.MULTILINE | re.DOTALL)
    assert re.findall(r"`(\w+)`", listed) == list(REASONS)
    assert f"`schema_version` of these columns (now {SCHEMA_VERSION})" in text


# All of them


def test_images_are_named_after_the_lock(pod_templates: dict[str, dict[str, Any]]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    tag = f":{project['version']}-ray{locked_ray_version()}"
    images = {template["spec"]["containers"][0]["image"] for template in pod_templates.values()}
    assert len(images) == 1
    assert images.pop().endswith(tag)
    # The build command in the Dockerfile's header makes the image the job asks for.
    assert re.search(rf"docker build .*{re.escape(tag)} \.", DOCKERFILE.read_text())


def test_nothing_listens_everywhere(
    cluster: dict[str, Any], documents: list[dict[str, Any]]
) -> None:
    # The parsed values, not the text: a comment may name what is avoided. What Serve listens on
    # within a pod is tested with the service.
    for document in documents:
        document["spec"].pop("serveConfigV2", None)
    leaves = [(path, str(v)) for path, v in [*walk(cluster), *walk(documents)]]
    leaves += [(name, " ".join(words)) for name, words in dockerfile_instructions()]
    everywhere = re.compile(r"0\.0\.0\.0|(?<![\w:])::(?![\w:])|--\w+-host[= ]\*")
    assert len(leaves) > 100
    assert [leaf for leaf in leaves if everywhere.search(leaf[1])] == []


def test_no_port_that_runs_code_is_published(documents: list[dict[str, Any]]) -> None:
    (policy,) = (document for document in documents if document["kind"] == "NetworkPolicy")
    for rule in policy["spec"]["ingress"]:
        ports = {entry["port"] for entry in rule.get("ports", [])}
        (peer,) = rule["from"]
        if peer["podSelector"] == policy["spec"]["podSelector"]:
            continue  # the cluster's own pods
        assert ports, "a rule without `ports` opens them all"
        if "namespaceSelector" not in peer:  # clients
            assert not ports & CODE_PORTS
    kinds = {document["kind"] for document in documents}
    assert not kinds & {"Service", "Ingress", "Gateway", "HTTPRoute"}
    publishing = ("/hostPort", "/hostNetwork", "/enableIngress", "/headService", "/nodePort")
    for path, value in walk(documents):
        assert not path.endswith(publishing), path
        if path.endswith("/serviceType"):
            assert value == "ClusterIP", path
        if path.endswith("/containerPort"):
            assert value not in CODE_PORTS, path
    exposed = [
        word for name, words in dockerfile_instructions() if name == "EXPOSE" for word in words
    ]
    assert not CODE_PORTS & {int(word.split("/")[0]) for word in exposed}


def test_no_account_is_invented() -> None:
    identifier = re.compile(r"\b\d{12}\b|\b(?:ami|sg|subnet|vpc)-[0-9a-f]{8,17}\b|\bAKIA\w{16}\b")
    names = [
        "cluster.yaml",
        "deploy/Dockerfile",
        *(f"deploy/{m}" for m in (TRAIN, CLASSIFY, SERVE)),
    ]
    found = {name: identifier.findall((ROOT / name).read_text()) for name in names}
    assert found == {name: [] for name in names}


# --- docs/security.md -----------------------------------------------------------------------------


def test_one_file_listens_everywhere(repository_files: list[str]) -> None:
    kinds = (".py", ".yaml", "Dockerfile", "Makefile")
    listening = [
        name
        for name in repository_files
        if name.endswith(kinds) and not name.startswith("tests/")
        if re.search(r"\b0\.0\.0\.0\b(?!/)|[\"']::[\"']", (ROOT / name).read_text())
    ]
    assert listening == [f"deploy/{SERVE}"]
    (host,) = (field.default for field in fields(ServeJob) if field.name == "host")
    assert is_loopback(host)
    assert f"The one file that says `0.0.0.0` is [deploy/{SERVE}]" in SECURITY.read_text()


def test_the_security_page_says_the_limits_and_ports_that_hold() -> None:
    text = SECURITY.read_text()
    mib = 2**20
    assert f"| {DecodeLimits().max_bytes // mib} MiB (`--limits.max-bytes`)" in text
    assert f"| {ServiceLimits().body_bytes // mib} MiB, the whole body" in text
    assert f"| {DecodeLimits().max_pixels // 10**6} million |" in text
    assert f"| scans of a request | | {ServiceLimits().files} |" in text
    assert f"{MIN_TOKEN_CHARACTERS} characters or more" in text
    for port in CODE_PORTS:
        assert re.search(rf"^\| {port} \| .*\*\*runs code\*\*", text, flags=re.MULTILINE), port


# --- Ray Serve: deploy/serve.yaml, deploy/rayservice.yaml ----------------------------------------


def read_serve_config(name: str) -> dict[str, Any]:
    first = next(iter(yaml.safe_load_all((ROOT / "deploy" / name).read_text())))
    return yaml.safe_load(first["spec"]["serveConfigV2"]) if name == SERVE else first


@pytest.fixture(params=["serve.yaml", SERVE])
def serve_config(request: pytest.FixtureRequest) -> dict[str, Any]:
    return read_serve_config(request.param)


def test_serve_config_follows_rays_schema(serve_config: dict[str, Any]) -> None:
    schema = ServeDeploySchema.model_validate(serve_config)
    (application,) = schema.applications
    assert application.route_prefix == "/"
    known = set(ServeDeploySchema.model_fields)
    assert set(serve_config) <= known, "Ray ignores what it does not know"
    assert set(serve_config["http_options"]) <= set(HTTPOptionsSchema.model_fields)


def test_serve_config_builds_the_service(serve_config: dict[str, Any]) -> None:
    (application,) = serve_config["applications"]
    module, name = application["import_path"].split(":")
    build = getattr(importlib.import_module(module), name)
    config = read_arguments(application["args"])
    assert config.limits.request_s < serve_config["http_options"]["request_timeout_s"]
    built = build(application["args"])
    deployment = built._bound_deployment
    assert deployment.name == "Model"
    assert deployment.max_ongoing_requests > config.limits.in_flight, (
        "it refuses itself, with a problem body"
    )
    assert deployment.max_queued_requests > 0, "what waits in Serve's proxy is bounded"


def test_serve_config_opens_nothing_and_holds_no_secret(serve_config: dict[str, Any]) -> None:
    assert not [path for path, _ in walk(serve_config) if "token" in path.lower()]
    config = read_serve_config("serve.yaml")
    assert config["http_options"]["host"] == "127.0.0.1"
    text = (ROOT / "deploy" / "serve.yaml").read_text()
    assert TOKEN_VARIABLE in text
    for name, value in PRODUCTION_VARIABLES.items():
        assert f"{name}={value}" in text, "how HAProxy is turned on"


def test_both_serve_configs_agree() -> None:
    """But for the address, which a pod's probes must reach, and for how many are always there."""
    alone, embedded = read_serve_config("serve.yaml"), read_serve_config(SERVE)
    differing = [
        path
        for (path, value), (other, found) in zip(walk(alone), walk(embedded), strict=True)
        if (path, value) != (other, found) and not isinstance(value, dict | list)
    ]
    assert differing == ["/http_options/host", "/applications/0/args/min_replicas"]
    assert read_arguments(embedded["applications"][0]["args"]).min_replicas >= 2


@only_serving
def test_service_answers_nobody_without_a_token(
    documents: list[dict[str, Any]], pod_templates: dict[str, dict[str, Any]]
) -> None:
    """Serve listens on every address of its pods; two things stand before it."""
    (policy,) = (document for document in documents if document["kind"] == "NetworkPolicy")
    port = read_serve_config(SERVE)["http_options"]["port"]
    (clients,) = (
        r
        for r in policy["spec"]["ingress"]
        if {"protocol": "TCP", "port": port} in r.get("ports", [])
    )
    assert clients["from"] == [{"podSelector": {"matchLabels": {"brainray-client": "true"}}}]
    for name, template in pod_templates.items():
        environment = {e["name"]: e for e in template["spec"]["containers"][0]["env"]}
        reference = environment[TOKEN_VARIABLE]["valueFrom"]["secretKeyRef"]
        assert not reference.get("optional", False), name
        for variable, value in PRODUCTION_VARIABLES.items():
            assert environment[variable]["value"] == value, name
        switches = {variable for variable in environment if variable.startswith("RAY_SERVE_")}
        assert switches == set(PRODUCTION_VARIABLES), "Ray's documentation names no other"


@only_serving
def test_service_has_room_for_every_replica(ray_cluster: dict[str, Any]) -> None:
    (application,) = read_serve_config(SERVE)["applications"]
    config = read_arguments(application["args"])
    (workers,) = ray_cluster["workerGroupSpecs"]
    (container,) = workers["template"]["spec"]["containers"]
    each = int(container["resources"]["limits"]["cpu"]) // (config.model.engine.num_threads or 1)
    assert workers["replicas"] * each == config.max_replicas


@only_serving
def test_service_pods_are_probed(pod_templates: dict[str, dict[str, Any]]) -> None:
    """By paths that need neither token: PUBLIC_EXACT_PATHS of Ray's agent, and Serve's proxy."""
    for name, template in pod_templates.items():
        (container,) = template["spec"]["containers"]
        probes = {kind: container[f"{kind}Probe"]["httpGet"] for kind in ("liveness", "readiness")}
        assert probes["liveness"] == {"path": "/api/healthz", "port": 52365}, name
        assert probes["liveness"]["path"] in PUBLIC_EXACT_PATHS
        port = read_serve_config(SERVE)["http_options"]["port"]
        traffic = {"path": "/-/healthz", "port": port}
        assert probes["readiness"] == (probes["liveness"] if name == "head" else traffic), name


@only_serving
def test_disruption_budget_keeps_a_worker(
    documents: list[dict[str, Any]], pod_templates: dict[str, dict[str, Any]]
) -> None:
    (budget,) = (document for document in documents if document["kind"] == "PodDisruptionBudget")
    assert budget["apiVersion"] == "policy/v1"
    spec = budget["spec"]
    # For pods whose controller has no scale, the API knows this one form.
    assert set(spec) == {"minAvailable", "unhealthyPodEvictionPolicy", "selector"}
    assert (
        0
        < spec["minAvailable"]
        < read_arguments(read_serve_config(SERVE)["applications"][0]["args"]).min_replicas
    )
    labels = dict(spec["selector"]["matchLabels"])
    assert labels.pop("ray.io/node-type") == "worker"  # KubeRay's own label
    assert labels.items() <= pod_templates["cpu"]["metadata"]["labels"].items()
