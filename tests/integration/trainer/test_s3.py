"""A real S3 server (SeaweedFS): the store's contract, sources from it, checkpoints and adapter into it."""

import json
import os
import secrets
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hack.cluster.s3 import binary

from qlora_api.run import ExitCode
from qlora_api.types import S3Access
from qlora_trainer.checkpoint import find_complete
from qlora_trainer.errors import BadData, BadModel, StorageError
from qlora_trainer.sources import ensure_dataset, ensure_model
from qlora_trainer.storage import MULTIPART_BYTES, S3Store, open_store, read_bytes


@dataclass(frozen=True)
class Server:
    """Where it answers and the folder with the keys of a Secret."""

    endpoint: str
    secret: Path


def free_ports(count: int) -> list[int]:
    """Ports whose neighbour 10000 above (weed's gRPC) is valid, too."""
    sockets = [socket.socket() for _ in range(count)]
    ports = []
    for number, one in enumerate(sockets):
        for port in range(20_000 + 1000 * number + os.getpid() % 900, 50_000):
            try:
                one.bind(("127.0.0.1", port))
            except OSError:
                continue
            ports.append(port)
            break
    for one in sockets:
        one.close()
    return ports


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """SeaweedFS on loopback with credentials of its own and a bucket `runs`."""
    folder = tmp_path_factory.mktemp("s3")
    keys = {"AWS_ACCESS_KEY_ID": secrets.token_hex(8), "AWS_SECRET_ACCESS_KEY": secrets.token_hex(16)}
    identity = {
        "name": "test",
        "credentials": [{"accessKey": keys["AWS_ACCESS_KEY_ID"], "secretKey": keys["AWS_SECRET_ACCESS_KEY"]}],
        "actions": ["Admin", "Read", "Write", "List"],
    }
    (folder / "identities.json").write_text(json.dumps({"identities": [identity]}))
    (folder / "data").mkdir()
    master, volume, filer, s3 = free_ports(4)
    command = [
        *(str(binary()), "server", f"-dir={folder / 'data'}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-filer", "-s3"),
        *(f"-master.port={master}", f"-volume.port={volume}", f"-filer.port={filer}", f"-s3.port={s3}"),
        *(f"-s3.config={folder / 'identities.json'}", "-volume.max=0", "-master.volumeSizeLimitMB=256"),
        *(f"-filer.localSocket={folder / 'filer.sock'}", f"-s3.localSocket={folder / 's3.sock'}"),
        *("-master.telemetry=false", "-s3.port.iceberg=0", "-s3.port.lance=0"),  # ports of their own: taken
    ]
    secret = folder / "secret"
    secret.mkdir()
    for name, value in {**keys, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{s3}", "AWS_REGION": "us-east-1"}.items():
        (secret / name).write_text(value + "\n")
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, start_new_session=True)
    try:
        wait_until_it_answers(f"http://127.0.0.1:{s3}", process, folder / "log")
        store = S3Store("runs", "", S3Access(), secret)
        store._client.create_bucket(Bucket="runs")
        yield Server(f"http://127.0.0.1:{s3}", secret)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_until_it_answers(url: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    """It asks who we are (403) once it is up."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=2)
        except urllib.error.HTTPError as error:
            if error.code == 403:
                return
        except OSError:
            pass
        time.sleep(0.2)
    raise AssertionError(f"SeaweedFS does not answer: {log.read_text()[-2000:]}")


def test_contract_of_the_store(server: Server, tmp_path: Path) -> None:
    store = open_store("s3://runs/contract", S3Access(), server.secret)
    big = os.urandom(MULTIPART_BYTES + 12345)
    (tmp_path / "big").write_bytes(big)
    assert store.put("a/big", tmp_path / "big") and store.put("a/small", b"0123456789")
    assert read_bytes(store, "a/big") == big
    with store.get("a/small", 4) as stream:
        assert stream.read() == b"456789"
    assert [(entry.key, entry.size) for entry in store.list("a/")] == [("a/big", len(big)), ("a/small", 10)]
    assert store.put("manifest", b"first", if_none_match=True)
    assert not store.put("manifest", b"second", if_none_match=True)
    assert read_bytes(store, "manifest") == b"first"
    tags = {entry.key: entry.tag for entry in store.list()}
    store.put("a/small", b"abcdefghij")
    assert {entry.key: entry.tag for entry in store.list()}["a/small"] != tags["a/small"]
    with pytest.raises(FileNotFoundError):
        store.get("missing")
    store.delete(["a/small", "a/big", "never there"])
    assert [entry.key for entry in store.list()] == ["manifest"]
    one = open_store("s3://runs/contract/manifest", S3Access(), server.secret)
    assert [(entry.key, entry.size) for entry in one.list()] == [("", 5)] and read_bytes(one, "") == b"first"


def test_errors_name_bucket_and_endpoint_and_what_to_do(server: Server, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=rf"bucket nowhere at {server.endpoint}: NoSuchBucket; create the bucket"):
        open_store("s3://nowhere/x", S3Access(), server.secret).list()
    wrong = tmp_path / "wrong"
    wrong.mkdir()
    for path in server.secret.iterdir():
        (wrong / path.name).write_text("nonsense" if "ACCESS_KEY" in path.name else path.read_text())
    with pytest.raises(StorageError, match="check the keys in the Secret"):
        open_store("s3://runs/x", S3Access(), wrong).put("key", b"")
    silent = S3Access.model_validate({"endpoint": "http://127.0.0.1:9"})
    with pytest.raises(StorageError, match=r"bucket runs at http://127.0.0.1:9: .*check the endpoint"):
        open_store("s3://runs/x", silent, server.secret).list()
    (wrong / "AWS_SECRET_ACCESS_KEY").unlink()
    with pytest.raises(StorageError, match="Secret mine has no AWS_SECRET_ACCESS_KEY"):
        open_store("s3://runs/x", S3Access.model_validate({"secretRef": {"name": "mine"}}), wrong)


@pytest.fixture
def s3_world(make_world: Callable[..., Any], server: Server, model_dir: Path, data_file: Path) -> Any:
    """Model, data and output all in the bucket, each with its Secret."""
    store = open_store("s3://runs/sources", S3Access(), server.secret)
    for path in model_dir.iterdir():
        store.put(f"model/{path.name}", path)
    store.put("data/train.jsonl", data_file)
    ref = {"secretRef": {"name": "s3"}}
    world = make_world(
        "s3", model={"uri": "s3://runs/sources/model", **ref}, dataset={"uri": "s3://runs/sources/data", **ref}
    )
    for kind in ("model", "dataset", "output"):
        folder = world.root / "secrets" / kind
        folder.parent.mkdir(exist_ok=True)
        folder.symlink_to(server.secret)
    output = world.config.spec.output.model_copy(update={"uri": f"s3://runs/{world.root.parent.name}"})
    spec = world.config.spec.model_copy(update={"output": output})
    world.config = world.config.model_copy(update={"spec": spec})
    return world


def test_a_run_from_s3_to_s3(s3_world: Any, server: Server) -> None:
    """Three ranks save and are killed; two pods without memory of it go on from the bucket and publish."""
    output = f"{s3_world.config.spec.output.uri}/run-01234567"
    store = open_store(output, S3Access(), server.secret)
    s3_world.start([0, 1, 2])
    while not ((state := s3_world.state(0)) and state.checkpoint):
        assert all(process.is_alive() for process in s3_world.processes)
        time.sleep(0.02)
    s3_world.kill()
    complete = list(find_complete(store))
    assert complete and len(complete[0].files) == 3, "each rank wrote its slice"
    assert s3_world.run([5, 6]) == [0, 0]
    resumed = min(line["step"] for line in s3_world.traces() if line["generation"] == 2)
    assert resumed >= complete[0].step
    state = s3_world.state(5)
    assert state.artifacts.adapter_uri == f"{output}/adapter/gen-00002"
    manifest = json.loads(read_bytes(store, "manifest.json"))
    sizes = {entry.key: entry.size for entry in store.list("adapter/")}
    assert {record["name"]: record["size"] for record in manifest["files"]} == sizes


@pytest.mark.parametrize(("section", "error"), [("model", BadModel), ("dataset", BadData)])
def test_a_path_with_nothing_below_it_is_told_as_such(s3_world: Any, section: str, error: type[Exception]) -> None:
    source = getattr(s3_world.config.spec, section).model_copy(update={"uri": "s3://runs/sources/nope"})
    config = s3_world.config.model_copy(update={"spec": s3_world.config.spec.model_copy(update={section: source})})
    says = r"s3://runs/sources/nope: nothing lies below this URI; check the bucket and the path"
    with pytest.raises(error, match=says):
        if section == "model":
            ensure_model(config, s3_world.env(0))
        else:
            ensure_dataset(source.uri, config, s3_world.env(0), "dataset")


def test_an_unreachable_output_ends_with_storage(s3_world: Any, server: Server) -> None:
    output = s3_world.config.spec.output.model_copy(update={"endpoint": "http://127.0.0.1:9"})
    spec = s3_world.config.spec.model_copy(update={"output": output})
    s3_world.config = s3_world.config.model_copy(update={"spec": spec})
    assert s3_world.run([0]) == [ExitCode.STORAGE]
    assert "http://127.0.0.1:9" in s3_world.termination(0).message
