"""hf:// sources against a server that speaks the hub's protocol: what is fetched, what is refused, what is kept."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

COMMIT, NEXT = "0123456789abcdef0123456789abcdef01234567", "76543210fedcba9876543210fedcba9876543210"
FILES = {
    "models/org/base": {
        "config.json": b"{}",
        "tokenizer.json": b"{}",
        "model.safetensors": b"weights" * 1000,
        "pytorch_model.bin": b"pickle",
        "modeling_custom.py": b"raise SystemExit",
        "onnx/model.safetensors": b"another copy",
    },
    "models/org/pickled": {"config.json": b"{}", "pytorch_model.bin": b"pickle"},
    "datasets/org/data": {
        "data/train-00000.jsonl": b'{"text": "a"}\n',
        "data/test-00000.jsonl": b'{"text": "b"}\n',
        "README.md": b"read me",
    },
}


class Hub(http.server.BaseHTTPRequestHandler):
    """The two requests of the hub that a download needs; remembers what was fetched.

    `main`: the commits that the branch is at, the newest last; of NEXT the weights differ.
    """

    fetched: list[str]
    main: list[str]
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = self.path.partition("?")[0].strip("/")
        if path.startswith("api/") and "/revision/" in path:
            repo, _, revision = path[4:].partition("/revision/")
            return self.send_info(repo, revision)
        if path.startswith("api/") and "/tree/" in path:
            return self.send_tree(path[4:].partition("/tree/")[0])
        repo, _, rest = path.partition("/resolve/")
        repo = repo if repo.startswith("datasets/") else f"models/{repo}"
        commit, _, name = rest.partition("/")
        if name not in FILES.get(repo, {}):
            return self.send(404, b"", {"X-Error-Code": "EntryNotFound"})
        if body:
            self.fetched.append(name)
        content = FILES[repo][name]
        if commit == NEXT and name.endswith(".safetensors"):
            content = content[::-1]
        tag = hashlib.sha256(content).hexdigest()
        return self.send(200, content, {"X-Repo-Commit": commit, "ETag": f'"{tag}"'}, body)

    def send_info(self, repo: str, revision: str) -> None:
        if repo not in FILES:
            return self.send(401, b"{}", {"X-Error-Code": "RepoNotFound"})
        if revision not in ("main", COMMIT, NEXT, "v1"):
            return self.send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        sha = {"main": self.main[-1], "v1": COMMIT}.get(revision, revision)
        siblings = [{"rfilename": name} for name in FILES[repo]]
        info = {"id": repo.partition("/")[2], "sha": sha, "siblings": siblings, "private": False, "tags": []}
        return self.send(200, json.dumps(info).encode(), {"Content-Type": "application/json"})

    def send_tree(self, repo: str) -> None:
        files = [
            {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for name, content in FILES[repo].items()
        ]
        return self.send(200, json.dumps(files).encode(), {"Content-Type": "application/json"})

    def send(self, code: int, content: bytes, headers: dict[str, str], body: bool = True) -> None:
        self.send_response(code)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def main() -> list[str]:
    """Commits of the branch main; append one to move it."""
    return [COMMIT]


@pytest.fixture
def hub(main: list[str]) -> Iterator[tuple[str, list[str]]]:
    """(endpoint, names of the files fetched from it)."""
    fetched: list[str] = []
    handler = type("Handler", (Hub,), {"fetched": fetched, "main": main})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", fetched
    server.shutdown()
    server.server_close()


SCRIPT = """
import json, sys
from pathlib import Path
from qlora_api.run import RunIdentity, TrainConfig
from qlora_api.types import QLoRAFinetuneSpec
from qlora_trainer.control import WorkerEnv
from qlora_trainer.errors import TrainerError
from qlora_trainer.sources import ensure_dataset, ensure_model

root, answers = Path(sys.argv[1]), []
for number, (uri, revision) in enumerate(json.loads(sys.argv[2])):
    env = WorkerEnv(0, 0, 1, 1, root / f"run-{number}", root / "cache", root, "cpu")
    model = {"uri": uri, **({"revision": revision} if revision else {})}
    spec = {"model": model, "dataset": {"uri": "hf://org/data"}, "output": {"uri": "s3://bucket/x"}}
    run = RunIdentity(namespace="n", name=f"{uri[9:]}-{revision}".lower(), uid="u")
    spec = QLoRAFinetuneSpec.model_validate(spec)
    spec = spec.model_copy(update={"output": spec.output.model_copy(update={"uri": f"file://{sys.argv[3]}"})})
    config = TrainConfig.model_construct(run=run, spec=spec)
    try:
        source = ensure_dataset(uri, config, env, "dataset") if "data" in uri else ensure_model(config, env)
        answers.append([source.files, source.digest])
    except TrainerError as error:
        answers.append([type(error).__name__, str(error)])
print(json.dumps(answers))
"""


def ensure(endpoint: str, root: Path, *uris: tuple[str, str | None], pod: str = "pod") -> list[Any]:
    """What a fresh process on the pod's own disk makes of these sources, each the source of a run."""
    env = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DOWNLOAD_TIMEOUT": "2"}
    command = [sys.executable, "-c", SCRIPT, str(root / pod), json.dumps(uris), str(root / "output")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    answers: list[Any] = json.loads(done.stdout.splitlines()[-1])
    return answers


def test_only_safetensors_and_what_belongs_to_them(hub: tuple[str, list[str]], tmp_path: Path) -> None:
    endpoint, fetched = hub
    model, tagged, pickled, data, missing, revision = ensure(
        endpoint,
        tmp_path,
        ("hf://org/base", None),
        ("hf://org/base", "v1"),
        ("hf://org/pickled", None),
        ("hf://org/data", None),
        ("hf://org/nothing", None),
        ("hf://org/base", "v9"),
    )
    assert model[0] == ["config.json", "model.safetensors", "tokenizer.json"]
    assert tagged == model and fetched.count("model.safetensors") == 1, "the same commit is not fetched twice"
    assert not {"pytorch_model.bin", "modeling_custom.py", "onnx/model.safetensors"} & set(fetched)
    assert pickled[0] == "BadModel" and "never read" in pickled[1]
    assert data[0] == ["data/train-00000.jsonl"]
    assert missing[0] == "BadModel" and "HF_TOKEN" in missing[1]
    assert revision[0] == "BadModel" and "revision" in revision[1]


def test_an_unreachable_hub(tmp_path: Path) -> None:
    [(kind, message)] = ensure("http://127.0.0.1:9", tmp_path, ("hf://org/base", None))
    assert kind == "StorageError" and "cannot fetch hf://org/base from the hub" in message


@pytest.mark.parametrize(("uri", "name"), [("hf://org/base", "model"), ("hf://org/data", "dataset")])
def test_all_pods_of_a_run_read_the_commit_that_its_first_one_found(
    hub: tuple[str, list[str]], main: list[str], tmp_path: Path, uri: str, name: str
) -> None:
    endpoint, _ = hub
    first = ensure(endpoint, tmp_path, (uri, None))
    main.append(NEXT)
    assert ensure(endpoint, tmp_path, (uri, None), pod="replacement") == first
    (pin,) = (tmp_path / "output").glob(f"*/sources/{name}.json")
    assert json.loads(pin.read_bytes()) == {"uri": uri, "revision": None, "commit": COMMIT}
    pin.unlink()
    ensure(endpoint, tmp_path, (uri, None), pod="of another run")
    assert json.loads(pin.read_bytes())["commit"] == NEXT


def test_of_two_first_pods_one_decides(hub: tuple[str, list[str]], main: list[str], tmp_path: Path) -> None:
    """The other has fetched a newer commit by then."""
    endpoint, fetched = hub
    [first] = ensure(endpoint, tmp_path, ("hf://org/base", None))
    (pin,) = (tmp_path / "output").glob("*/sources/model.json")
    main.append(NEXT)
    env = {"PIN": str(pin), "CONTENT": pin.read_text()}
    pin.unlink()
    late = "import os; from pathlib import Path; from qlora_trainer.storage import FileStore; put = FileStore.put\n"
    late += (
        "FileStore.put = lambda *a, **k: (Path(os.environ['PIN']).write_text(os.environ['CONTENT']), put(*a, **k))[1]\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "SCRIPT", late + SCRIPT)
        for key, value in env.items():
            patch.setenv(key, value)
        assert ensure(endpoint, tmp_path, ("hf://org/base", None), pod="other") == [first]
    assert fetched.count("model.safetensors") == 3
