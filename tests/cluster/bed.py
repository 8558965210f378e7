"""`python -m tests.cluster.bed build|up|down`: the real servers of Kubernetes, JobSet, Trainer and Kueue, on this machine.

They are built from `go.mod` beside this file and run as ordinary processes on 127.0.0.1. All that `up` starts lies in one
folder: keys, logs, process ids and the kubeconfig, whose path it prints. RBAC is on. Pods are run by `kubelet.py`.
"""

from __future__ import annotations

import base64
import json
import os
import secrets
import shutil
import signal
import socket
import ssl
import subprocess
import time
import urllib.request
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import tyro
import yaml

from dmd2.errors import Refused, one_sentence
from manifests.__main__ import kubectl

HERE = Path(__file__).parent
PROGRAMS = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "dmd2-testbed" / "bin"
"""Where the servers are, once built."""
FOLDER = Path("runs/testbed")
"""Default folder of a running test bed."""
KUBERNETES = "v1.36.3"
HOST = "127.0.0.1"
ACCOUNTS = "dmd2"
"""Namespace of the accounts whose requests are recorded."""
READY_S = 120.0
TIED = ("setpriv", "--pdeathsig", "KILL")
"""In front of a command: its process is killed when the one that started it is gone."""
SERVERS = {
    "etcd": "go.etcd.io/etcd/server/v3",
    "kube-apiserver": "k8s.io/kubernetes/cmd/kube-apiserver",
    "kube-controller-manager": "k8s.io/kubernetes/cmd/kube-controller-manager",
    "kube-scheduler": "k8s.io/kubernetes/cmd/kube-scheduler",
    "jobset": "sigs.k8s.io/jobset",
    "trainer": "github.com/kubeflow/trainer/v2/cmd/trainer-controller-manager",
    "kueue": "sigs.k8s.io/kueue/cmd/kueue",
}
"""In the order of their start, each with the package it is built from."""


class Manager(NamedTuple):
    """A controller manager that brings kinds of its own."""

    module: str
    kinds: str
    """Folder of its kinds in the module."""
    webhooks: str
    config: str
    """Group and version of its configuration."""


MANAGERS = {
    "jobset": Manager(
        "sigs.k8s.io/jobset", "config/components/crd/bases", "config/components/webhook", "jobset.x-k8s.io/v1alpha1"
    ),
    "trainer": Manager(
        "github.com/kubeflow/trainer/v2", "manifests/base/crds", "manifests/base/webhook", "trainer.kubeflow.org/v1alpha1"
    ),
    "kueue": Manager("sigs.k8s.io/kueue", "config/components/crd/bases", "config/components/webhook", "kueue.x-k8s.io/v1beta2"),
}  # fmt: skip
FRAMEWORKS = ["batch/job", "jobset.x-k8s.io/jobset", "trainer.kubeflow.org/trainjob", "pod"]
"""What Kueue manages."""
STATUS = "trainer-status"
"""Port at which Trainer takes the progress of trainings, with its alpha feature TrainJobStatus."""
TRAINER = "kubeflow-trainer-controller-manager.trainer-system.svc"
"""The name by which pods would reach Trainer's service."""
PORTS = ("etcd", "peer", "api", STATUS, *(name + end for name in MANAGERS for end in ("", "-health")))


def missing() -> list[str]:
    """Servers that are not built yet."""
    return [name for name in SERVERS if not (PROGRAMS / name).exists()]


def build() -> None:
    """Build all servers with Go into the user's cache. A second time takes seconds."""
    if not shutil.which("go"):
        raise Refused("the servers of the test bed are built with Go 1.26, which is not installed")
    PROGRAMS.mkdir(parents=True, exist_ok=True)
    flags = f"-X k8s.io/component-base/version.gitVersion={KUBERNETES} -s -w"
    for name, package in SERVERS.items():
        begun = time.monotonic()
        command = ["go", "build", "-trimpath", f"-ldflags={flags}", "-o", str(PROGRAMS / name), package]
        env = os.environ | {"GOFLAGS": "-mod=readonly", "CGO_ENABLED": "0"}
        if subprocess.run(command, cwd=HERE, env=env).returncode:
            raise Refused(f"{name} could not be built; see above")
        print(
            f"{name}: {time.monotonic() - begun:.1f} s, {(PROGRAMS / name).stat().st_size / 2**20:.0f} MiB",
            flush=True,
        )


@dataclass
class Bed:
    """The folder of a running test bed."""

    folder: Path = FOLDER
    is_tied: bool = False
    """Whether the servers end with the process that starts them, however it ends."""
    ports: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder = self.folder.resolve()

    @property
    def kubeconfig(self) -> Path:
        return self.folder / "kubeconfig"

    @property
    def env(self) -> dict[str, str]:
        return os.environ | {"KUBECONFIG": str(self.kubeconfig), "TMPDIR": str(self.folder / "tmp")}

    def up(self) -> None:
        """Start everything anew."""
        self.down()
        self.folder.mkdir(parents=True)
        self._make_keys()
        self.ports = dict(zip(PORTS, _free_ports(len(PORTS)), strict=True))
        admin = secrets.token_hex(16)
        self._write("tokens.csv", f"{admin},admin,admin,system:masters\n")
        self._write("kubeconfig", json.dumps(kubeconfig(self.url, self.folder / "tls.crt", admin)))
        self._write("ports.json", json.dumps(self.ports))
        self._start_etcd()
        self.start_api_server()
        # The sync period: or the quota of a kind that is younger than the controller is unknown for five minutes.
        self._start(
            "kube-controller-manager", "--kubeconfig", "kubeconfig", "--service-account-private-key-file", "tls.key",
            "--root-ca-file", "tls.crt", "--use-service-account-credentials", "--leader-elect=false", "--secure-port", 0,
            "--resource-quota-sync-period", "10s",
        )  # fmt: skip
        self._start(
            "kube-scheduler", "--kubeconfig", "kubeconfig", "--leader-elect=false", "--secure-port", 0
        )
        self._start_managers()

    @property
    def url(self) -> str:
        return f"https://{HOST}:{self.ports['api']}"

    def _start_etcd(self) -> None:
        client, peer = (f"http://{HOST}:{self.ports[name]}" for name in ("etcd", "peer"))
        self._start(
            "etcd", "--data-dir", "data", "--listen-client-urls", client, "--advertise-client-urls", client,
            "--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer, "--initial-cluster", f"default={peer}",
            "--unsafe-no-fsync", "--log-level", "warn",
        )  # fmt: skip

    def start_api_server(self) -> None:
        """What our accounts ask is written to audit.log."""
        rule = {"level": "Metadata", "userGroups": [f"system:serviceaccounts:{ACCOUNTS}"], "omitStages": ["RequestReceived"]}  # fmt: skip
        policy = {"apiVersion": "audit.k8s.io/v1", "kind": "Policy", "rules": [rule, {"level": "None"}]}
        self._write("audit.yaml", json.dumps(policy))
        self._start(
            "kube-apiserver", "--etcd-servers", f"http://{HOST}:{self.ports['etcd']}", "--secure-port", self.ports["api"],
            "--bind-address", HOST, "--advertise-address", HOST, "--endpoint-reconciler-type", "none",
            "--authorization-mode", "RBAC", "--token-auth-file", "tokens.csv",
            "--tls-cert-file", "tls.crt", "--tls-private-key-file", "tls.key",
            "--service-account-issuer", self.url, "--service-account-jwks-uri", f"{self.url}/openid/v1/jwks",
            "--service-account-key-file", "tls.key", "--service-account-signing-key-file", "tls.key",
            "--service-cluster-ip-range", "10.96.0.0/16", "--kubelet-preferred-address-types", "InternalIP",
            "--audit-policy-file", "audit.yaml", "--audit-log-path", "audit.log", "--audit-log-mode", "blocking-strict",
        )  # fmt: skip
        self._wait_until_ready(f"{self.url}/readyz")

    def stop(self, name: str) -> None:
        """End one of the servers."""
        _stop(int((self.folder / "pids" / name).read_text()), PROGRAMS / name)

    def _start_managers(self) -> None:
        """The kinds first; then the managers; their webhooks last, or nothing could be made while they start."""
        for name, manager in MANAGERS.items():
            self.kubectl("create", "namespace", f"{name}-system")
            self.apply((_source(manager.module) / manager.kinds).glob("*_*.yaml"))
        self._wait_for_kinds()
        for name in MANAGERS:
            config = self._write(f"{name}.yaml", json.dumps(self._config(name)))
            self._start(
                name, "--config", config.name, first=self._etc_of_its_own() if name == "kueue" else []
            )
        for name in MANAGERS:
            self._wait_until_ready(f"http://{HOST}:{self.ports[f'{name}-health']}/readyz")
        for name in MANAGERS:
            self.apply([self._write(f"{name}-webhooks.yaml", yaml.safe_dump_all(self._webhooks(name)))])

    def restart_trainer(self, with_status: bool) -> None:
        """Trainer again, with its alpha feature TrainJobStatus or without."""
        self.stop("trainer")
        config = self._config("trainer")
        if with_status:
            config |= {
                "featureGates": {"TrainJobStatus": True},
                "statusServer": {"port": self.ports[STATUS]},
            }
        path = self._write("trainer.yaml", json.dumps(config))
        self._start("trainer", "--config", path.name, first=self._account_of_its_own() if with_status else [])
        self._wait_until_ready(f"http://{HOST}:{self.ports['trainer-health']}/readyz")

    def _account_of_its_own(self) -> list[str]:
        """Trainer learns from the token of its pod who issues tokens, and takes its certificate to the pods from a Secret."""
        account, space = (
            self.folder / "run" / "secrets" / "kubernetes.io" / "serviceaccount",
            "trainer-system",
        )
        account.mkdir(parents=True, exist_ok=True)
        (account / "token").write_text(self.kubectl("create", "token", "default", "-n", space))
        (account / "namespace").write_text(space)
        secret = [
            "create",
            "secret",
            "generic",
            "kubeflow-trainer-webhook-cert",
            "--dry-run=client",
            "-o",
            "json",
        ]
        text = self.kubectl(*secret, "-n", space, f"--from-file=ca.crt={self.folder / 'tls.crt'}")
        self.kubectl("apply", "--server-side", "-f", "-", given=text)
        return [*self._overlaid("run", "tmp"), "env", "TMPDIR=/tmp"]

    def _overlaid(self, *names: str) -> list[str]:
        """In front of a command: it sees what is in folders of ours over those of this machine with the same names."""
        mounts = []
        for name in names:
            work = self.folder / f"{name}.work"
            work.mkdir(exist_ok=True)
            layers = f"lowerdir=/{name},upperdir={self.folder / name},workdir={work}"
            mounts.append(f"mount -t overlay overlay -o {layers} /{name}")
        return ["unshare", "--mount", "sh", "-ec", f'{"; ".join(mounts)}; exec "$0" "$@"']

    def _wait_for_kinds(self) -> None:
        """The server may not list a kind yet that it has just accepted."""
        command = ["wait", "crd", "--all", "--for", "condition=established", "--timeout", "60s"]
        for attempt in range(5):
            try:
                self.kubectl(*command)
                return
            except subprocess.CalledProcessError:
                if attempt == 4:
                    raise
                time.sleep(3)

    def _webhooks(self, name: str) -> list[dict[str, Any]]:
        """The webhooks of a manager, called by the address at which it listens here."""
        folder = _source(MANAGERS[name].module) / MANAGERS[name].webhooks
        found = yaml.safe_load_all(self.kubectl("kustomize", str(folder)))
        objects = [one for one in found if one and one["kind"].endswith("WebhookConfiguration")]
        bundle = base64.b64encode((self.folder / "tls.crt").read_bytes()).decode()
        for one in objects:
            one["metadata"]["name"] = f"{name}-{one['metadata']['name']}"
            one["metadata"].pop("namespace", None)
            one["webhooks"] = [
                webhook for webhook in one["webhooks"] if name != "kueue" or _is_served(webhook)
            ]
            for webhook in one["webhooks"]:
                path = webhook["clientConfig"].pop("service")["path"]
                url = f"https://{HOST}:{self.ports[name]}{path}"
                webhook["clientConfig"] |= {"url": url, "caBundle": bundle}
        return objects

    def _config(self, name: str) -> dict[str, Any]:
        """The managers are configured much alike."""
        config: dict[str, Any] = {
            "apiVersion": f"config.{MANAGERS[name].config}",
            "kind": "Configuration",
            "webhook": {"port": self.ports[name], "host": HOST},
            "health": {"healthProbeBindAddress": f"{HOST}:{self.ports[f'{name}-health']}"},
            "metrics": {"bindAddress": "0"},
            "leaderElection": {"leaderElect": False},
        }
        if name == "trainer":
            return config | {"certManagement": {"enable": False}}
        config["webhook"]["certDir"] = str(self.folder)
        if name == "kueue":
            config |= {
                "integrations": {"frameworks": FRAMEWORKS},
                "featureGates": {"VisibilityOnDemand": False},
            }
        return config | {"internalCertManagement": {"enable": False}}

    def kubectl(self, *words: str, given: str = "") -> str:
        return run_kubectl(self.kubeconfig, *words, given=given)

    def apply(self, paths: Iterable[Path]) -> None:
        files = [word for path in paths for word in ("-f", str(path))]
        self.kubectl("apply", "--server-side", "--validate=strict", *files)

    def _etc_of_its_own(self) -> list[str]:
        """Kueue reads the certificate of its metrics, which nobody asks for, from a folder below /etc."""
        certs = self.folder / "etc" / "kueue" / "metrics" / "certs"
        certs.mkdir(parents=True)
        for name in ("tls.key", "tls.crt"):
            shutil.copy(self.folder / name, certs)
        return self._overlaid("etc")

    def _start(self, name: str, *words: Any, first: Sequence[str] = ()) -> None:
        tied = TIED if self.is_tied else ()
        with open(self.folder / f"{name}.log", "ab") as log:
            process = subprocess.Popen(
                [*tied, *first, str(PROGRAMS / name), *map(str, words)],
                cwd=self.folder, env=self.env, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        (self.folder / "pids").mkdir(exist_ok=True)
        self._write(f"pids/{name}", str(process.pid))

    def _wait_until_ready(self, url: str) -> None:
        context = ssl.create_default_context(cafile=str(self.folder / "tls.crt"))
        token = (self.folder / "tokens.csv").read_text().partition(",")[0]
        request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
        end = time.monotonic() + READY_S
        while time.monotonic() < end:
            try:
                with urllib.request.urlopen(request, context=context, timeout=5):
                    return
            except OSError:
                time.sleep(0.1)
        raise Refused(f"{url} is not ready after {READY_S:g} s; see the logs in {self.folder}")

    def _make_keys(self) -> None:
        """One key and its self-signed certificate serve all: everything is on this machine, and gone with the folder."""
        subject = ["-subj", "/CN=testbed", "-addext", f"subjectAltName=IP:{HOST},DNS:localhost,DNS:{TRAINER}"]
        command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *subject]
        subprocess.run(
            [*command, "-keyout", "tls.key", "-out", "tls.crt"],
            cwd=self.folder,
            check=True,
            capture_output=True,
        )
        serving = (
            self.folder / "tmp" / "k8s-webhook-server" / "serving-certs"
        )  # where Trainer looks, with our TMPDIR
        serving.mkdir(parents=True)
        for name in ("tls.key", "tls.crt"):
            shutil.copy(self.folder / name, serving)

    def _write(self, name: str, text: str) -> Path:
        path = self.folder / name
        path.write_text(text)
        return path

    def down(self) -> None:
        """End what `up` started, by process id, the last one first, and remove the folder."""
        for name in reversed(SERVERS):
            if (self.folder / "pids" / name).exists():
                self.stop(name)
        shutil.rmtree(self.folder, ignore_errors=True)


def _is_served(webhook: dict[str, Any]) -> bool:
    """Kueue serves the webhooks of the frameworks that it manages, and no others."""
    own = {"kueue.x-k8s.io"} | {"" if name == "pod" else name.split("/")[0] for name in FRAMEWORKS}
    return webhook["rules"][0]["apiGroups"][0] in own


@cache
def _source(module: str) -> Path:
    command = ["go", "list", "-m", "-f", "{{.Dir}}", module]
    return Path(subprocess.run(command, cwd=HERE, check=True, capture_output=True, text=True).stdout.strip())


def _stop(pid: int, program: Path) -> None:
    """Only if the process still is the program: numbers are used again."""

    def is_there() -> bool:
        try:
            return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0] == str(program).encode()
        except OSError:
            return False

    for number in (signal.SIGTERM, signal.SIGKILL):
        if is_there():
            os.kill(pid, number)
        end = time.monotonic() + 10
        while is_there() and time.monotonic() < end:
            time.sleep(0.05)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind((HOST, 0))
    ports = [int(one.getsockname()[1]) for one in sockets]
    for one in sockets:
        one.close()
    return ports


def run_kubectl(config: Path, *words: str, given: str = "") -> str:
    """What kubectl says; CalledProcessError with what it says if it fails."""
    env = os.environ | {"KUBECONFIG": str(config)}
    done = subprocess.run([kubectl(), *words], env=env, input=given, capture_output=True, text=True)
    if done.returncode:
        raise subprocess.CalledProcessError(done.returncode, words, done.stdout, done.stderr)
    return done.stdout


def kubeconfig(url: str, ca: Path, token: str) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "testbed", "cluster": {"server": url, "certificate-authority": str(ca)}}],
        "users": [{"name": "admin", "user": {"token": token}}],
        "contexts": [{"name": "testbed", "context": {"cluster": "testbed", "user": "admin"}}],
        "current-context": "testbed",
    }


def up(folder: Path = FOLDER) -> None:
    """Start the servers, and print the path of the kubeconfig."""
    if names := missing():
        raise Refused(
            f"{', '.join(names)} are not built in {PROGRAMS}; run `python -m tests.cluster.bed build` first"
        )
    bed = Bed(folder)
    bed.up()
    print(bed.kubeconfig)


def down(folder: Path = FOLDER) -> None:
    """End the servers."""
    Bed(folder).down()


if __name__ == "__main__":
    with one_sentence():
        tyro.extras.subcommand_cli_from_dict(
            {"build": build, "up": up, "down": down}, prog="python -m tests.cluster.bed"
        )
