"""`python -m tests.cluster.kubelet`: plays the nodes of the test bed. Pods that are bound to them really run, without a container engine.

A container becomes a process on this machine, in namespaces of its own: an overlay of this machine's root as its file system
(read-only if the pod says so), the pod's volumes, host name, /etc/hosts, user, environment and service account token.
It sees its own processes only. Each pod has an address and ports of its own (`network.py`). Needs root.

* Logs are served to the API server, which serves them to kubectl and the clients.
* An image that nobody described is one that cannot be pulled.
* `kubectl delete node NAME`: the machine is gone, with all its processes; it comes back as a new one after some seconds.
* Evicting a pod, draining or tainting a node, deleting a pod: as on a real node, SIGTERM, the grace period, SIGKILL.

Not played: limits of memory and CPU, probes, restarts within a pod, lifecycle hooks, GPUs (they are only counted).
"""

from __future__ import annotations

import base64
import fnmatch
import json
import os
import re
import shlex
import shutil
import signal
import ssl
import subprocess
import threading
import time
import traceback
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlparse

import tyro

from dmd2.errors import one_sentence
from tests.cluster.network import Bridge, PodNetwork

Json = dict[str, Any]
BACK_S = 90.0
"""After which a lost node is there again: later than the controller that removes the pods of nodes that are gone, which looks every
20 s and wants to have missed a node for 40."""
DEVICES = ("null", "zero", "full", "random", "urandom", "tty")


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


class Api:
    """The API server, by the kubeconfig of the test bed. Plain HTTP requests: a kubelet is all watches and status patches."""

    def __init__(self, kubeconfig: Path) -> None:
        config = json.loads(kubeconfig.read_text())
        cluster = config["clusters"][0]["cluster"]
        self.url, self.ca = cluster["server"], Path(cluster["certificate-authority"])
        self.token = config["users"][0]["user"]["token"]
        self.tls = ssl.create_default_context(cafile=str(self.ca))

    def __call__(
        self, method: str, path: str, body: Any = None, kind: str = "application/json", timeout: float = 30
    ) -> Json:
        with self.open(method, path, body, kind, timeout) as answer:
            return json.load(answer)

    def open(
        self, method: str, path: str, body: Any = None, kind: str = "application/json", timeout: float = 30
    ) -> Any:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Authorization": f"Bearer {self.token}", "Content-Type": kind}
        request = urllib.request.Request(self.url + path, data, headers, method=method)
        return urllib.request.urlopen(request, context=self.tls, timeout=timeout)

    def try_to(self, method: str, path: str, body: Any = None, kind: str = "application/json") -> Json | None:
        """None where there is no such object (any more), or another one in its place. A server that is away is waited for."""
        while True:
            try:
                return self(method, path, body, kind)
            except urllib.error.HTTPError as error:
                if error.code in (404, 409):
                    return None
                told = f"{method} {path}: {error.code} {error.read().decode()[:500]}"
                if error.code < 500 and error.code != 429:
                    raise RuntimeError(told) from None
                print(told, flush=True)
            except OSError as error:
                print(f"{method} {path}: {error}", flush=True)
            time.sleep(1)

    def watched(self, path: str) -> Iterator[tuple[str, Json]]:
        """What is there, then what happens; from the start again whenever the server is away or has forgotten."""
        while True:
            try:
                found = self("GET", path)
                yield "LISTED", found
                version = found["metadata"]["resourceVersion"]
                with self.open(
                    "GET",
                    f"{path}{'&' if '?' in path else '?'}watch=1&resourceVersion={version}",
                    timeout=3600,
                ) as answer:
                    for line in answer:
                        event = json.loads(line)
                        if event["type"] == "ERROR":
                            break
                        yield event["type"], event["object"]
            except (OSError, ValueError):
                time.sleep(0.5)


class Container:
    """One container of a pod, as a process."""

    def __init__(self, pod: Pod, spec: Json, image: Json) -> None:
        self.pod, self.spec, self.image, self.name = pod, spec, image, spec["name"]
        self.process: subprocess.Popen[bytes] | None = None
        self.log = pod.folder / f"{self.name}.log"
        self.message = pod.folder / f"{self.name}.termination"
        self.begun = pod.folder / f"{self.name}.begun"
        """There once the program takes the place of the shell that makes its file system, which takes no signal."""
        self.started = self.finished = ""
        self.killed = False
        """By us: unshare ends with 1 when its child was killed."""

    def start(self) -> None:
        root, self.started = self.pod.folder / f"{self.name}.root", now()
        self.message.touch()
        self.message.chmod(0o666)
        assert self.pod.network
        words = [
            "setpriv",
            "--pdeathsig",
            "KILL",
            "nsenter",
            f"--net={self.pod.network.path}",
            "unshare",
            "--mount",
            "--uts",
            "--ipc",
            "--pid",
            "--fork",
            "--kill-child",
            "sh",
            "-ec",
            self._script(root),
        ]
        self.process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        threading.Thread(target=self._write_log, daemon=True).start()
        while not self.begun.exists() and self.process.poll() is None:
            time.sleep(0.01)

    def _write_log(self) -> None:
        """Each line with its time, as a runtime writes it."""
        assert self.process
        assert self.process.stdout
        with open(self.log, "ab", buffering=0) as log:
            for line in self.process.stdout:
                log.write(f"{now()} ".encode() + line.rstrip(b"\n") + b"\n")

    def _script(self, root: Path) -> str:
        """Makes the file system, then becomes the program, which is process 1 of its namespace."""
        lines, quoted = [], shlex.quote
        upper, work = self.pod.folder / f"{self.name}.upper", self.pod.folder / f"{self.name}.work"
        for folder in (root, upper, work):
            folder.mkdir(exist_ok=True)

        def bind(source: Path, target: str, read_only: bool = False) -> None:
            at = quoted(
                f"{root}{os.path.realpath(target)}"
            )  # links lead out of the root while we are not in it
            if source.is_dir():
                lines.append(f"mkdir -p {at}")
            else:
                lines.append(f"mkdir -p $(dirname {at}); [ -e {at} ] || : > {at}")
            lines.append(f"mount --bind {quoted(str(source))} {at}")
            if read_only:
                lines.append(f"mount -o remount,bind,ro {at}")

        lines += [
            f"mount -t overlay overlay -o lowerdir=/,upperdir={upper},workdir={work} {root}",
            f"mount -t proc proc {root}/proc; mount --rbind /sys {root}/sys; mkdir -p {root}/dev/shm; chmod 1777 {root}/dev/shm",
            f"hostname {quoted(self.pod.hostname)}",
        ]
        for name in DEVICES:
            bind(Path("/dev") / name, f"/dev/{name}")
        bind(self.pod.hosts, "/etc/hosts")
        bind(self.message, self.spec.get("terminationMessagePath", "/dev/termination-log"))
        for mount in sorted(self.spec.get("volumeMounts", []), key=lambda mount: mount["mountPath"]):
            source = self.pod.volumes[mount["name"]]
            if mount.get("subPath"):
                source = source / mount["subPath"]
                if not source.exists():
                    source.mkdir(parents=True)
            bind(source, mount["mountPath"], bool(mount.get("readOnly")))
        for kept in self.image.get("keep", []):
            bind(Path(kept), kept, read_only=True)
            for parent in [*Path(kept).parents][:-1]:
                lines.append(f"chmod a+x {quoted(f'{root}{parent}')}")
        security = (self.pod.spec.get("securityContext") or {}) | (self.spec.get("securityContext") or {})
        if security.get("readOnlyRootFilesystem"):
            lines.append(f"mount -o remount,ro {root}")
        env = self.environment()
        given = self.spec.get("command") or self.image.get("entrypoint", [])
        words = given + (
            self.spec.get("args") or ([] if self.spec.get("command") else self.image.get("cmd", []))
        )
        words = [expanded(word, env) for word in words]
        user = security.get("runAsUser", self.image.get("user", 0))
        group = security.get("runAsGroup", self.image.get("group", user))
        who = [
            f"--reuid={user}",
            f"--regid={group}",
            "--pdeathsig=KILL",
        ]  # which is lost with the old user id
        groups = [str(security["fsGroup"])] if "fsGroup" in security else []
        who += [f"--groups={','.join(groups)}"] if groups else ["--clear-groups"]
        if security.get("allowPrivilegeEscalation") is False:
            who += ["--no-new-privs"]
        if "ALL" in (security.get("capabilities") or {}).get("drop", []):
            who += ["--bounding-set=-all", "--inh-caps=-all"]
        at = self.spec.get("workingDir") or self.image.get("workdir", "/")
        command = [
            "chroot",
            str(root),
            "setpriv",
            *who,
            "env",
            "-i",
            "-C",
            at,
            *(f"{k}={v}" for k, v in env.items()),
            *words,
        ]
        lines.append(f": > {quoted(str(self.begun))}; exec {shlex.join(command)}")
        return "\n".join(lines)

    def environment(self) -> dict[str, str]:
        host, port = urlparse(self.pod.kubelet.api.url).netloc.split(":")
        env = {
            "PATH": os.defpath,
            "HOSTNAME": self.pod.hostname,
            "KUBERNETES_SERVICE_HOST": host,
            "KUBERNETES_SERVICE_PORT": port,
        }
        env |= self.image.get("env", {})
        for source in self.spec.get("envFrom", []):
            for kind, ref in (
                ("configmaps", source.get("configMapRef")),
                ("secrets", source.get("secretRef")),
            ):
                env |= self.pod.data(kind, ref["name"], ref.get("optional", False)) if ref else {}
        for one in self.spec.get("env", []):
            value = expanded(one.get("value", ""), env)
            if ref := one.get("valueFrom"):
                found = self.pod.value(ref, self.spec)
                if found is None:
                    continue
                value = found
            env[one["name"]] = value
        return env

    def send_signal(self, number: int) -> None:
        """Send a signal to process 1."""
        self.killed = self.killed or number == signal.SIGKILL
        if self.process and self.process.poll() is None:
            try:
                children = (
                    Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
                )
                os.kill(int(children[0]) if children else self.process.pid, number)
            except (OSError, IndexError):
                pass

    def status(self) -> Json:
        found: Json = {
            "name": self.name,
            "image": self.spec["image"],
            "imageID": self.spec["image"],
            "restartCount": 0,
        }
        code = self.process.poll() if self.process else None
        if not self.process:
            return found | {"ready": False, "state": {"waiting": {"reason": "PodInitializing"}}}
        found["containerID"] = f"process://{self.process.pid}"
        if code is None:
            return found | {
                "ready": True,
                "started": True,
                "state": {"running": {"startedAt": self.started[:19] + "Z"}},
            }
        self.finished = self.finished or now()
        code = 128 + signal.SIGKILL if self.killed else code if code >= 0 else 128 - code
        message = self.message.read_text(errors="replace")[-4096:]
        if (
            not message
            and code
            and self.spec.get("terminationMessagePolicy") == "FallbackToLogsOnError"
            and self.log.exists()
        ):
            lines = self.log.read_text(errors="replace").splitlines(keepends=True)
            message = "".join(line.partition(" ")[2] for line in lines)[-2048:]
        ended = {"exitCode": code, "reason": "Error" if code else "Completed", "containerID": found["containerID"],
                 "startedAt": self.started[:19] + "Z", "finishedAt": self.finished[:19] + "Z"}  # fmt: skip
        return found | {
            "ready": False,
            "started": False,
            "state": {"terminated": ended | ({"message": message} if message else {})},
        }


class Pod:
    """A pod that is bound to one of our nodes, from its start to its end, in a thread of its own."""

    def __init__(self, kubelet: Kubelet, pod: Json, number: int) -> None:
        self.kubelet, self.object, self.spec, self.number = kubelet, pod, pod["spec"], number
        self.address = f"10.244.{number // 250}.{number % 250 + 1}"
        meta = pod["metadata"]
        self.name, self.namespace, self.uid = meta["name"], meta["namespace"], meta["uid"]
        self.path = f"/api/v1/namespaces/{self.namespace}/pods/{self.name}"
        self.hostname = self.spec.get("hostname") or self.name[:63]
        self.folder = kubelet.folder / "pods" / self.uid
        self.volumes: dict[str, Path] = {}
        self.hosts = self.folder / "hosts"
        self.init: list[Container] = []
        self.containers: list[Container] = []
        self.network: PodNetwork | None = None
        self.lost = False
        self.ending = threading.Event()
        self.grace: float = 30
        threading.Thread(target=self._live, daemon=True, name=self.name).start()

    def _live(self) -> None:
        try:
            self.folder.mkdir(parents=True)
            self.hosts.touch()
            self.kubelet.introduce()
            if not self._pulled():
                self._gone()
                return
            self._fill()
            self.network = PodNetwork(
                self.kubelet.bridge, self.address, f"pod{self.number}", self.kubelet.ports
            )
            self.init = [
                Container(self, spec, self._image(spec)) for spec in self.spec.get("initContainers", [])
            ]
            self.containers = [Container(self, spec, self._image(spec)) for spec in self.spec["containers"]]
            self._report("Pending")
            ok = True
            for one in self.init:
                if ok and not self.ending.is_set():
                    one.start()
                    self._report("Pending")
                    if one.spec.get("restartPolicy") != "Always":
                        ok = self._wait([one])
            if ok and not self.ending.is_set():
                for one in self.containers:
                    one.start()
                self._report("Running")
                ok = self._wait(self.containers)
            for one in self.init:  # sidecars
                one.send_signal(signal.SIGTERM)
            self._wait(self.init)
            failed = not ok or any(c.process is None or c.process.poll() for c in self.containers)
            self._report("Failed" if failed else "Succeeded")
        except Exception:
            traceback.print_exc()
            if not self.lost:
                self._report("Failed", message=traceback.format_exc()[-1000:])
        self._gone()

    def _wait(self, containers: list[Container]) -> bool:
        """For their end; told to end, they have the grace period -> whether all have succeeded."""
        until: float | None = None
        reported: set[str] = set()
        while running := [c for c in containers if c.process and c.process.poll() is None]:
            if self.lost:
                for one in running:
                    one.send_signal(signal.SIGKILL)
            elif self.ending.is_set():
                if until is None:
                    until = time.monotonic() + self.grace
                    for one in running:
                        one.send_signal(signal.SIGTERM)
                elif time.monotonic() > until:
                    for one in running:
                        one.send_signal(signal.SIGKILL)
            ended = {c.name for c in containers} - {c.name for c in running}
            if ended - reported and not self.lost:  # one of several has ended
                reported |= ended
                self._report("Running")
            time.sleep(0.05)
        return all(c.process is not None and c.process.returncode == 0 for c in containers)

    def _gone(self) -> None:
        """Remove what it has made, but for its logs; and, if it is being deleted, the pod itself."""
        if self.network:
            self.network.close()
        self.kubelet.introduce()
        if self.lost:
            return
        while not self.ending.wait(1):
            if self.kubelet.pods.get(self.uid) is not self:
                break
        if self.ending.is_set():
            options = {"gracePeriodSeconds": 0, "preconditions": {"uid": self.uid}}
            self.kubelet.api.try_to("DELETE", self.path, options)

    def _pulled(self) -> bool:
        for spec in [*self.spec.get("initContainers", []), *self.spec["containers"]]:
            if self._image(spec) is None:
                message = f'Back-off pulling image "{spec["image"]}"'
                waiting = {"name": spec["name"], "image": spec["image"], "imageID": "", "restartCount": 0, "ready": False,
                           "state": {"waiting": {"reason": "ImagePullBackOff", "message": message}}}  # fmt: skip
                self._patch({"phase": "Pending", "containerStatuses": [waiting]})
                return False
        return True

    def _image(self, spec: Json) -> Any:
        return next(
            (
                image
                for pattern, image in self.kubelet.images.items()
                if fnmatch.fnmatch(spec["image"], pattern)
            ),
            None,
        )

    def _report(self, phase: str, message: str = "") -> None:
        if self.lost:
            return
        containers = [c.status() for c in self.containers]
        ready = str(bool(containers) and all(c["ready"] for c in containers))
        initialized = str(
            all(
                c.process and (c.process.poll() == 0 or c.spec.get("restartPolicy") == "Always")
                for c in self.init
            )
        )
        reason = {} if phase not in ("Succeeded", "Failed") else {"reason": "PodCompleted"}
        truths = {
            "PodReadyToStartContainers": "True",
            "Initialized": initialized,
            "ContainersReady": ready,
            "Ready": ready,
        }
        conditions = [
            {"type": t, "status": s, "lastTransitionTime": now()[:19] + "Z"}
            | (reason if t.endswith("Ready") else {})
            for t, s in truths.items()
        ]
        self._patch({
            "phase": phase, "hostIP": "127.0.0.1", "podIP": self.address, "podIPs": [{"ip": self.address}], "conditions": conditions,
            "initContainerStatuses": [c.status() for c in self.init], "containerStatuses": containers,
            **({"message": message} if message else {}),
        })  # fmt: skip

    def _patch(self, status: Json) -> None:
        status |= {"startTime": self.object["status"].get("startTime") or now()[:19] + "Z"}
        self.object["status"]["startTime"] = status["startTime"]
        self.kubelet.api.try_to(
            "PATCH",
            self.path + "/status",
            {"metadata": {"uid": self.uid}, "status": status},
            "application/strategic-merge-patch+json",
        )

    def _fill(self) -> None:
        """Its volumes, as folders."""
        group = (self.spec.get("securityContext") or {}).get("fsGroup", 0)
        for volume in self.spec.get("volumes", []):
            path = self.volumes[volume["name"]] = self.folder / "volumes" / volume["name"]
            path.mkdir(parents=True)
            if "emptyDir" in volume:
                os.chown(path, 0, group)
                path.chmod(0o2777)
            elif "hostPath" in volume:
                self.volumes[volume["name"]] = Path(volume["hostPath"]["path"])
            else:
                for source in volume["projected"]["sources"] if "projected" in volume else [volume]:
                    for name, content in self._files(source).items():
                        (path / name).parent.mkdir(parents=True, exist_ok=True)
                        (path / name).write_bytes(content)

    def _files(self, source: Json) -> dict[str, bytes]:
        for kind, key in (("configMap", "configmaps"), ("secret", "secrets")):
            if ref := source.get(kind):
                data = self.data(key, ref.get("name") or ref.get("secretName"), ref.get("optional", False))
                wanted = {item["key"]: item["path"] for item in ref.get("items", [])} or {k: k for k in data}
                return {path: data[k].encode() for k, path in wanted.items() if k in data}
        if items := (source.get("downwardAPI") or {}).get("items"):
            return {item["path"]: (self.value(item, {}) or "").encode() for item in items}
        if ref := source.get("serviceAccountToken"):
            bound = {"kind": "Pod", "apiVersion": "v1", "name": self.name, "uid": self.uid}
            spec = {
                "audiences": [ref["audience"]] if ref.get("audience") else [],
                "expirationSeconds": ref.get("expirationSeconds", 3607),
                "boundObjectRef": bound,
            }
            path = (
                f"/api/v1/namespaces/{self.namespace}/serviceaccounts/{self.spec['serviceAccountName']}/token"
            )
            asked = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": spec}
            made = self.kubelet.api.try_to("POST", path, asked)
            if made is None:
                raise ValueError(f"{self.spec['serviceAccountName']} gets no token")
            return {ref["path"]: made["status"]["token"].encode()}
        raise ValueError(f"a volume of this kind is not played: {', '.join(source)}")

    def data(self, kind: str, name: str, optional: bool) -> dict[str, str]:
        found = self.kubelet.api.try_to("GET", f"/api/v1/namespaces/{self.namespace}/{kind}/{name}")
        if found is None and not optional:
            raise ValueError(f"there is no {name} among the {kind} of {self.namespace}")
        data = (found or {}).get("data") or {}
        return {k: base64.b64decode(v).decode() for k, v in data.items()} if kind == "secrets" else data

    def value(self, ref: Json, container: Json) -> str | None:
        """What `valueFrom` leads to."""
        if field := ref.get("fieldRef"):
            path = field["fieldPath"]
            if keyed := re.fullmatch(r"metadata\.(labels|annotations)\['(.+)'\]", path):
                return (self.object["metadata"].get(keyed[1]) or {}).get(keyed[2], "")
            known = {
                "status.podIP": self.address,
                "status.hostIP": "127.0.0.1",
                "status.podIPs": self.address,
            }
            if path in known:
                return known[path]
            found: Any = self.object
            for part in path.split("."):
                found = found.get(part) or ""
            return str(found)
        if field := ref.get("resourceFieldRef"):
            kind, name = field["resource"].split(".", 1)
            return str(((container.get("resources") or {}).get(kind) or {}).get(name, "0"))
        for kind, key in (("configMapKeyRef", "configmaps"), ("secretKeyRef", "secrets")):
            if field := ref.get(kind):
                return self.data(key, field["name"], field.get("optional", False)).get(field["key"])
        raise ValueError(f"not played: {', '.join(ref)}")


def expanded(text: str, env: dict[str, str]) -> str:
    """$(NAME) is replaced, $$ is a dollar, and what is not known stays."""
    return re.sub(
        r"\$\$|\$\(([-._a-zA-Z0-9]+)\)", lambda m: "$" if m[0] == "$$" else env.get(m[1], m[0]), text
    )


class Kubelet:
    """All nodes of the test bed."""

    def __init__(
        self,
        api: Api,
        folder: Path,
        nodes: list[Json],
        images: Json,
        ports: Sequence[int],
        services: Sequence[str],
    ) -> None:
        self.api, self.folder, self.images = api, folder.resolve(), images
        self.bridge, self.ports = Bridge(), [int(urlparse(api.url).port or 443), *ports]
        self.services = services
        self.pods: dict[str, Pod] = {}
        self.lost: set[str] = set()
        """Pods whose node is gone; they are never started again."""
        self.count = 0
        self.lock = threading.RLock()
        self.nodes = {node["name"]: node for node in nodes}
        self.port = self._serve()
        for node in nodes:
            threading.Thread(target=self._beat, args=(node,), daemon=True).start()

    def run(self) -> None:
        for kind, found in self.api.watched("/api/v1/pods"):
            there = found["items"] if kind == "LISTED" else [found]
            with self.lock:
                if kind == "LISTED":
                    for uid in set(self.pods) - {pod["metadata"]["uid"] for pod in there}:
                        self._forget(uid)
                for pod in there:
                    self._see(pod, deleted=kind == "DELETED")

    def _see(self, pod: Json, deleted: bool) -> None:
        uid, meta = pod["metadata"]["uid"], pod["metadata"]
        mine = self.pods.get(uid)
        if deleted:
            return self._forget(uid)
        if not mine and pod["spec"].get("nodeName") in self.nodes:
            if pod["status"].get("phase") in ("Succeeded", "Failed") or uid in self.lost:
                if meta.get("deletionTimestamp") and uid not in self.lost:
                    path = f"/api/v1/namespaces/{meta['namespace']}/pods/{meta['name']}"
                    self.api.try_to("DELETE", path, {"gracePeriodSeconds": 0})
                return None
            self.count += 1
            mine = self.pods[uid] = Pod(self, pod, self.count)
        if mine and meta.get("deletionTimestamp"):
            mine.grace = min(
                mine.grace if mine.ending.is_set() else 1e9, meta.get("deletionGracePeriodSeconds") or 0
            )
            mine.ending.set()
        return None

    def _forget(self, uid: str) -> None:
        """It was deleted without us: by force, or with its node."""
        if pod := self.pods.pop(uid, None):
            pod.lost = True
            pod.ending.set()
            self.introduce()

    def introduce(self) -> None:
        """Everybody's /etc/hosts, as a cluster's DNS would answer now."""
        with self.lock:
            pods = list(self.pods.values())
        names: dict[str, str] = {}
        for pod in pods:
            if domain := pod.spec.get("subdomain"):
                names |= {
                    f"{pod.hostname}.{domain}{end}": pod.address
                    for end in (f".{pod.namespace}.svc.cluster.local", f".{pod.namespace}.svc", "")
                }
        common = f"127.0.0.1 {' '.join(('localhost', *self.services))}\n" + "".join(
            f"{address} {host}\n" for host, address in names.items()
        )
        for pod in pods:
            if pod.hosts.exists():
                with open(pod.hosts, "r+") as file:
                    file.write(f"{common}{pod.address} {pod.hostname}\n")
                    file.truncate()

    def _beat(self, node: Json) -> None:
        """Register it, and say every few seconds that it is alive."""
        name = node["name"]
        path, lease = (
            f"/api/v1/nodes/{name}",
            "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases",
        )
        while True:
            try:
                labels = {
                    "kubernetes.io/hostname": name,
                    "kubernetes.io/os": "linux",
                    "kubernetes.io/arch": "amd64",
                }
                meta = {"name": name, "labels": labels | node.get("labels", {})}
                self.api.try_to(
                    "POST", "/api/v1/nodes", {"metadata": meta, "spec": {"taints": node.get("taints", [])}}
                )
                condition = {
                    "type": "Ready",
                    "status": "True",
                    "reason": "KubeletReady",
                    "lastHeartbeatTime": now()[:19] + "Z",
                }
                status = {
                    "capacity": node["capacity"], "allocatable": node["capacity"], "conditions": [condition],
                    "addresses": [{"type": "InternalIP", "address": "127.0.0.1"}, {"type": "Hostname", "address": name}],
                    "daemonEndpoints": {"kubeletEndpoint": {"Port": self.port}}, "nodeInfo": INFO,
                }  # fmt: skip
                self.api(
                    "PATCH", path + "/status", {"status": status}, "application/strategic-merge-patch+json"
                )
                while self.api.try_to("GET", path):
                    spec = {"holderIdentity": name, "leaseDurationSeconds": 40, "renewTime": now()}
                    one = {"metadata": {"name": name, "namespace": "kube-node-lease"}, "spec": spec}
                    if (
                        self.api.try_to("PATCH", f"{lease}/{name}", one, "application/merge-patch+json")
                        is None
                    ):
                        self.api.try_to("POST", lease, one)
                    time.sleep(2)
                print(f"{name} is gone", flush=True)
                with self.lock:
                    for uid in [uid for uid, pod in self.pods.items() if pod.spec.get("nodeName") == name]:
                        self.lost.add(uid)
                        self._forget(uid)
                time.sleep(BACK_S)
            except (OSError, RuntimeError):
                time.sleep(1)

    def _serve(self) -> int:
        kubelet = self

        class Logs(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked = urlparse(self.path)
                match asked.path.split("/")[1:]:
                    case ["containerLogs", namespace, pod, container]:
                        kubelet.send_log(
                            self,
                            namespace,
                            pod,
                            container,
                            {k: v[0] for k, v in parse_qs(asked.query).items()},
                        )
                    case _:
                        self.send_error(404)

            def log_message(self, *words: Any) -> None: ...

        server = ThreadingHTTPServer(("127.0.0.1", 0), Logs)
        server.daemon_threads = True
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(self.api.ca, self.api.ca.with_suffix(".key"))
        server.socket = tls.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return server.server_address[1]

    def send_log(
        self, to: BaseHTTPRequestHandler, namespace: str, name: str, container: str, asked: dict[str, str]
    ) -> None:
        """The log of a container, followed to its end if that is asked."""
        pod = next((p for p in self.pods.values() if (p.namespace, p.name) == (namespace, name)), None)
        one = next((c for c in [*pod.init, *pod.containers] if c.name == container), None) if pod else None
        if not one or not one.log.exists():
            return to.send_error(
                404 if not pod else 400, f"container {container} of pod {name} has not started"
            )
        since = asked.get("sinceTime", "")
        if seconds := asked.get("sinceSeconds"):
            since = (datetime.now(UTC) - timedelta(seconds=int(seconds))).strftime("%Y-%m-%dT%H:%M:%S")
        to.send_response(200)
        to.send_header("Content-Type", "text/plain")
        to.end_headers()
        with open(one.log, "rb") as log:
            tail = int(asked["tailLines"]) if "tailLines" in asked else None
            lines = log.readlines()
            lines = lines[max(0, len(lines) - tail) :] if tail is not None else lines
            while True:
                ended = one.process is None or one.process.poll() is not None
                for line in lines:
                    at, _, text = line.partition(b" ")
                    if at.decode() >= since.rstrip("Z"):
                        to.wfile.write(line if asked.get("timestamps") == "true" else text)
                to.wfile.flush()
                if asked.get("follow") != "true" or (ended and not lines):
                    return None
                lines = log.readlines()
                if not lines:
                    time.sleep(0.1)


INFO = {"kubeletVersion": "v1.36.3", "osImage": "process kubelet", "containerRuntimeVersion": "process://1", "architecture": "amd64",
        "operatingSystem": "linux", "kernelVersion": os.uname().release, "machineID": "", "systemUUID": "", "bootID": "",
        "kubeProxyVersion": ""}  # fmt: skip
CPU = {"cpu": "64", "memory": "256Gi", "ephemeral-storage": "1Ti", "pods": "110"}
NODES = [{"name": f"node-{i}", "labels": {"dmd2/pool": "cpu"}, "capacity": CPU} for i in range(2)]


def main(
    kubeconfig: Path,
    images: Path,
    nodes: Path | None = None,
    ports: tuple[int, ...] = (),
    services: tuple[str, ...] = (),
) -> None:
    """Play nodes until killed; the processes of the pods end with this one.

    Args:
        images: JSON: pattern of an image -> env, user, group, workdir, entrypoint, cmd, keep (folders of this machine that it shows).
        nodes: JSON: list of name, labels, taints, capacity. Two with CPUs if not given.
        ports: Of this machine, beside the API server's, that the pods reach at 127.0.0.1.
        services: Names by which the pods reach them.
    """
    folder = kubeconfig.parent / "kubelet"
    shutil.rmtree(folder, ignore_errors=True)
    known = json.loads(nodes.read_text()) if nodes else NODES
    kubelet = Kubelet(Api(kubeconfig), folder, known, json.loads(images.read_text()), ports, services)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    kubelet.run()


if __name__ == "__main__":
    with one_sentence():
        tyro.cli(main)
