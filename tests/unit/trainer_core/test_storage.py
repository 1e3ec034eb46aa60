"""The object store over file://, and sources fetched from one."""

import io
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from qlora_api.run import ExitCode
from qlora_api.types import S3Access
from qlora_trainer import sources
from qlora_trainer.control import WorkerEnv
from qlora_trainer.errors import BadConfig, BadData, BadModel, StorageError, classify
from qlora_trainer.storage import Entry, FileStore, open_store, read_bytes

ACCESS = S3Access()


@pytest.fixture
def store(tmp_path: Path) -> FileStore:
    return FileStore(tmp_path / "store")


def test_put_get_list_delete(store: FileStore, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"from a file")
    assert store.put("a/b", b"one") and store.put("a/c", tmp_path / "file")
    assert read_bytes(store, "a/b") == b"one" and read_bytes(store, "a/c") == b"from a file"
    assert store.get("a/c", 5).read() == b"a file"
    assert [(entry.key, entry.size) for entry in store.list("a/")] == [("a/b", 3), ("a/c", 11)]
    store.delete(["a/b", "a/missing"])
    assert [entry.key for entry in store.list()] == ["a/c"]
    with pytest.raises(FileNotFoundError):
        store.get("a/b")


def test_conditional_put_keeps_what_is_there(store: FileStore) -> None:
    assert store.put("manifest", b"first", if_none_match=True)
    assert not store.put("manifest", b"second", if_none_match=True)
    assert read_bytes(store, "manifest") == b"first"
    assert [entry.key for entry in store.list()] == ["manifest"]


def test_keys_stay_inside(store: FileStore) -> None:
    with pytest.raises(StorageError, match="leaves"):
        store.put("../outside", b"")


def test_other_schemes_are_bad_config(tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match="only s3:// and file://"):
        open_store("http://x/y", ACCESS, tmp_path)


def test_a_secret_without_keys_is_tried_again_and_heals(tmp_path: Path) -> None:
    access = S3Access.model_validate({"secretRef": {"name": "s3"}})
    with pytest.raises(StorageError, match="Secret s3 has no AWS_ACCESS_KEY_ID and no AWS_SECRET_ACCESS_KEY") as caught:
        open_store("s3://bucket/x", access, tmp_path)
    assert classify(caught.value).exit_code == ExitCode.STORAGE
    (tmp_path / "AWS_ACCESS_KEY_ID").write_text("id")
    with pytest.raises(StorageError, match="Secret s3 has no AWS_SECRET_ACCESS_KEY: add"):
        open_store("s3://bucket/x", access, tmp_path)
    (tmp_path / "AWS_SECRET_ACCESS_KEY").write_text("key")
    assert open_store("s3://bucket/x", access, tmp_path).uri == "s3://bucket/x"


class Flaky:
    """A store whose streams break after some bytes; remembers from where it was read."""

    uri = "flaky://bucket/model"

    def __init__(self, objects: dict[str, bytes], breaks_after: int) -> None:
        self.objects, self.breaks_after, self.starts = objects, breaks_after, list[int]()
        self.reachable = True

    def list(self, prefix: str = "") -> list[Entry]:
        if not self.reachable:
            raise StorageError("unreachable")
        return [Entry(key, len(data), f"tag-{len(data)}") for key, data in self.objects.items()]

    def get(self, key: str, start: int = 0) -> BinaryIO:
        self.starts.append(start)
        flaky = self

        class Stream(io.BytesIO):
            def read(self, size: int | None = -1) -> bytes:
                if self.tell() >= flaky.breaks_after:
                    raise StorageError("connection lost")
                return super().read(flaky.breaks_after)

        return Stream(self.objects[key][start:])

    def put(self, key: str, data: bytes | Path, if_none_match: bool = False) -> bool:
        raise NotImplementedError

    def delete(self, keys: Any) -> None:
        raise NotImplementedError


def test_fetch_resumes_and_survives_the_store(env: WorkerEnv) -> None:
    store = Flaky({"model.safetensors": bytes(range(100)), "notes.pdf": b"x"}, breaks_after=30)
    folder = env.cache_dir / "models" / "key"
    got, names = sources._fetch(store, folder, sources.MODEL_PATTERNS, True, env)
    assert names == ["model.safetensors"] and (got / names[0]).read_bytes() == bytes(range(100))
    assert store.starts == [0, 30, 60, 90], "each attempt goes on where the last one broke"
    store.starts.clear()
    store.reachable = False
    assert sources._fetch(store, folder, sources.MODEL_PATTERNS, True, env) == (got, names)
    assert store.starts == []


def test_an_empty_store_is_told_apart_from_one_without_the_right_files(env: WorkerEnv) -> None:
    folder = env.cache_dir / "models" / "key"
    with pytest.raises(FileNotFoundError, match="nothing lies below this URI"):
        sources._fetch(Flaky({}, 99), folder, sources.MODEL_PATTERNS, True, env)
    assert not (folder / sources.COMPLETE).exists()
    assert sources._fetch(Flaky({"notes.pdf": b"x"}, 99), folder, sources.MODEL_PATTERNS, True, env) == (folder, [])


def test_what_changed_is_fetched_again(env: WorkerEnv) -> None:
    folder = env.cache_dir / "models" / "key"
    sources._fetch(Flaky({"a.json": b"old", "b.json": b"same"}, 99), folder, sources.MODEL_PATTERNS, True, env)
    newer = Flaky({"a.json": b"newer", "b.json": b"same"}, 99)
    sources._fetch(newer, folder, sources.MODEL_PATTERNS, True, env)
    assert (folder / "a.json").read_bytes() == b"newer" and len(newer.starts) == 1


def test_model_sources(env: WorkerEnv, make_config: Any, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    config = make_config(model={"uri": f"file://{folder}"})
    with pytest.raises(BadModel, match="model holds no file in the trainer pod; correct the URI"):
        sources.ensure_model(config, env)
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(BadModel, match=r"no \*.safetensors.*never read"):
        sources.ensure_model(config, env)
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "config.json").write_text("{}")
    first = sources.ensure_model(config, env)
    assert first.files == ["config.json", "model.safetensors"]
    (folder / "model.safetensors").write_bytes(b"other weights")
    assert sources.ensure_model(config, env) == first, "a run keeps what it resolved"
    other = replace(env, run_dir=tmp_path / "another pod")
    assert sources.ensure_model(config, other).digest != first.digest


def test_data_sources(env: WorkerEnv, make_config: Any, tmp_path: Path) -> None:
    with pytest.raises(BadData, match="does not exist in the trainer pod"):
        sources.ensure_dataset(f"file://{tmp_path}/nowhere", make_config(), env, "dataset")
    (tmp_path / "data" / "deep").mkdir(parents=True)
    with pytest.raises(BadData, match="data holds no file in the trainer pod; correct the URI"):
        sources.ensure_dataset(f"file://{tmp_path}/data", make_config(), env, "dataset")
    (tmp_path / "data" / "notes.txt").write_text("x")
    with pytest.raises(BadData, match="no data files: put"):
        sources.ensure_dataset(f"file://{tmp_path}/data", make_config(), env, "dataset")
    (tmp_path / "data" / "deep" / "x.jsonl").write_text("{}")
    (tmp_path / "data" / "dataset_infos.json").write_text("{}")
    assert sources.ensure_dataset(f"file://{tmp_path}/data", make_config(), env, "dataset").files == ["deep/x.jsonl"]
