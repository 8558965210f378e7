"""The Hugging Face Hub, as far as a repository is made, committed to, tagged and read: `huggingface_hub` talks to it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import yaml

from tests.bucket import QuietHandler, serve

TOKEN = "hf_of_the_tests"
REPOSITORY = r"(?P<repo>[\w.-]+/[\w.-]+)"


@dataclass
class Repository:
    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """Id -> the files; the last one is that of `main`."""
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes]) -> str:
        oid = hashlib.sha1(f"{len(self.commits)}".encode()).hexdigest()
        self.commits[oid] = files
        return oid

    @property
    def head(self) -> str:
        return list(self.commits)[-1]

    def find(self, revision: str) -> str | None:
        revision = self.head if revision == "main" else self.tags.get(revision, revision)
        return revision if revision in self.commits else None


class Hub(QuietHandler):
    """A subclass for each test has its own `repositories`, `objects` and `fail`."""

    repositories: dict[str, Repository]
    objects: dict[str, bytes]
    """Uploaded to the large file storage: sha256 -> content."""
    fail: set[str]
    """Routes that answer 403."""
    asked: list[str]
    role = "write"
    """Of the token."""

    def answer(self) -> None:
        body = self.body()
        path = unquote(urlsplit(self.path).path)
        if path.startswith("/storage/"):  # a signed address: no token
            oid = path.rpartition("/")[2]
            assert hashlib.sha256(body).hexdigest() == oid
            self.objects[oid] = body
            self.asked.append("upload")
            return self.send(200, b"")
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.send(401, b'{"error": "Invalid username or password."}')
        for route in (r for r in dir(self) if r.startswith("route_")):
            serve = getattr(self, route)
            wanted, pattern = serve.__doc__.split()
            if self.command in wanted.split("|") and (
                match := re.fullmatch(pattern.replace("REPO", REPOSITORY), path)
            ):
                self.asked.append(route.removeprefix("route_"))
                if self.asked[-1] in self.fail:
                    return self.send(
                        403, b'{"error": "You have read access but not the required permissions."}'
                    )
                return serve(body, **match.groupdict())
        raise AssertionError(f"{self.command} {path} is no route of the hub")

    do_GET = do_HEAD = do_POST = do_PUT = answer  # noqa: N815 - as the base class calls them

    def repository(self, repo: str) -> Repository | None:
        if repo not in self.repositories:
            self.send(404, b'{"error": "Repository not found"}', X_Error_Code="RepoNotFound")
        return self.repositories.get(repo)

    def route_account(self, body: bytes) -> None:
        r"GET /api/whoami-v2"
        self.send_json(
            {"name": "owner", "auth": {"type": "access_token", "accessToken": {"role": self.role}}}
        )

    def route_auth_check(self, body: bytes, repo: str) -> None:
        r"GET /api/models/REPO/auth-check/write"
        if self.repository(repo):
            self.send_json({})

    def route_create(self, body: bytes) -> None:
        r"POST /api/repos/create"
        asked = json.loads(body)
        name = f"{asked.get('organization') or 'owner'}/{asked['name']}"
        made = {"url": f"http://{self.headers['Host']}/{name}"}
        if name in self.repositories:
            return self.send_json({"error": "You already created this model repo"} | made, 409)
        private = asked.get("private") or asked.get("visibility") == "private"
        self.repositories[name] = Repository(bool(private))
        self.repositories[name].commit({".gitattributes": b"*.safetensors filter=lfs\n"})
        return self.send_json(made)

    def route_info(self, body: bytes, repo: str, revision: str = "main") -> None:
        r"GET /api/models/REPO(/revision/(?P<revision>[^/]+))?"
        if found := self.repository(repo):
            oid = found.find(revision or "main")
            assert oid
            files = [{"rfilename": name} for name in found.commits[oid]]
            self.send_json(
                {
                    "id": repo,
                    "modelId": repo,
                    "sha": oid,
                    "siblings": files,
                    "private": found.private,
                    "tags": [],
                }
            )

    def route_refs(self, body: bytes, repo: str) -> None:
        r"GET /api/models/REPO/refs"
        if found := self.repository(repo):
            tags = [
                {"name": t, "ref": f"refs/tags/{t}", "targetCommit": oid} for t, oid in found.tags.items()
            ]
            main = {"name": "main", "ref": "refs/heads/main", "targetCommit": found.head}
            self.send_json({"branches": [main], "converts": [], "tags": tags})

    def route_tree(self, body: bytes, repo: str, revision: str) -> None:
        r"GET /api/models/REPO/tree/(?P<revision>[^/]+)"
        if found := self.repository(repo):
            files = found.commits[found.find(revision) or ""]
            self.send_json(
                [{"type": "file", "path": n, "size": len(c), "oid": _git(c)} for n, c in files.items()]
            )

    def route_validate_yaml(self, body: bytes) -> None:
        r"POST /api/validate-yaml"
        header = re.match(r"---\n(.*?)\n---\n", json.loads(body)["content"], re.DOTALL)
        known = yaml.safe_load(header[1]) if header else {}
        errors = [] if isinstance(known.get("license"), str) else [{"message": '"license" must be a string'}]
        self.send_json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def route_preupload(self, body: bytes, repo: str) -> None:
        r"POST /api/models/REPO/preupload/main"
        found = self.repositories[repo]
        files, have = json.loads(body)["files"], found.commits[found.head]
        modes = []
        for file in files:
            assert len(base64.b64decode(file["sample"])) == min(512, file["size"])
            large = file["path"].endswith((".safetensors", ".png"))
            content = have.get(file["path"])
            oid = content and (hashlib.sha256(content).hexdigest() if large else _git(content))
            mode = "lfs" if large else "regular"
            modes.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.send_json({"files": modes})

    def route_batch(self, body: bytes, repo: str) -> None:
        r"POST /REPO\.git/info/lfs/objects/batch"
        asked, host = json.loads(body), self.headers["Host"]
        assert (asked["operation"], asked["hash_algo"]) == ("upload", "sha256")
        objects = []
        for each in asked["objects"]:
            upload = {"upload": {"href": f"http://{host}/storage/{each['oid']}"}}
            objects.append(each | ({} if each["oid"] in self.objects else {"actions": upload}))
        self.send_json({"transfer": "basic", "objects": objects})

    def route_commit(self, body: bytes, repo: str) -> None:
        r"POST /api/models/REPO/commit/main"
        found = self.repositories[repo]
        header, *operations = (json.loads(line) for line in body.splitlines() if line)
        assert header["key"] == "header"
        assert header["value"]["summary"]
        if header["value"]["parentCommit"] != found.head:
            return self.send_json({"error": "A commit has happened since"}, 412)
        files = dict(found.commits[found.head])
        for operation in operations:
            value, path = operation["value"], operation["value"]["path"]
            if operation["key"] == "file":
                files[path] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[path] = self.objects[value["oid"]]
                assert len(files[path]) == value["size"]
            else:
                assert operation["key"] == "deletedFile"
                del files[path]
        assert operations, "an empty commit"
        oid = found.commit(files)
        url = f"http://{self.headers['Host']}/{repo}/commit/{oid}"
        return self.send_json(
            {"commitOid": oid, "commitUrl": url, "commitMessage": header["value"]["summary"]}
        )

    def route_tag(self, body: bytes, repo: str, revision: str) -> None:
        r"POST /api/models/REPO/tag/(?P<revision>[^/]+)"
        found, tag = self.repositories[repo], json.loads(body)["tag"]
        if tag in found.tags:
            return self.send_json({"error": "Tag reference exists already"}, 409)
        found.tags[tag] = found.find(revision) or ""
        assert found.tags[tag]
        return self.send_json({})

    def route_file(self, body: bytes, repo: str, revision: str, file: str) -> None:
        r"GET|HEAD /REPO/resolve/(?P<revision>[^/]+)/(?P<file>.+)"
        found = self.repository(repo)
        oid = found and found.find(revision)
        if found and not oid:
            self.send(404, b"", X_Error_Code="RevisionNotFound")
        elif found and oid and (content := found.commits[oid].get(file)) is not None:
            self.send(200, content, ETag=f'"{_git(content)}"', X_Repo_Commit=oid)
        elif found:
            self.send(404, b"", X_Error_Code="EntryNotFound")


def _git(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@pytest.fixture
def hub() -> Iterator[tuple[Any, str]]:
    """(the hub, its address)."""

    class ThisHub(Hub):
        repositories, objects, fail, asked = {}, {}, set(), []

    with serve(ThisHub) as address:
        yield ThisHub, address


def with_hub(words: list[str], address: str, home: Path, token: str = TOKEN) -> tuple[int, str]:
    """(status, output) of Python with the account and the address of the hub in its environment: its client reads both when it is
    imported."""
    environment = {"HF_ENDPOINT": address, "HF_TOKEN": token, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, check=False, env={"PATH": "/usr/bin:/bin", "PYTHONPATH": ".", **environment}
    )  # fmt: skip
    said = done.stdout + done.stderr
    assert TOKEN not in said
    return done.returncode, said
