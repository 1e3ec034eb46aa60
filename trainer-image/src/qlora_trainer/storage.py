"""Object stores: four methods over s3:// and file://. The only module that knows boto3.

Rules: timeouts and retries are bounded; credentials are read from files of a mounted Secret, never from the spec;
every failure becomes a `StorageError` that names bucket and endpoint, except a missing key: FileNotFoundError.
"""

import io
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast
from urllib.parse import unquote, urlsplit

from qlora_api.types import S3Access
from qlora_trainer.errors import BadConfig, StorageError

CONNECT_SECONDS = 5
READ_SECONDS = 30
ATTEMPTS = 4
MULTIPART_BYTES = 64 << 20
_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")


@dataclass(frozen=True)
class Entry:
    """One object: key relative to the store's root, size in bytes and a tag that changes with its content."""

    key: str
    size: int
    tag: str


Entries = list[Entry]
Items = list[dict[str, Any]]


class ObjectStore(Protocol):
    """A flat store of objects below one URI. Keys are relative to it and never start with a slash."""

    @property
    def uri(self) -> str: ...

    def get(self, key: str, start: int = 0) -> BinaryIO:
        """The object's bytes from `start` as a stream to close; FileNotFoundError when there is none."""

    def put(self, key: str, data: bytes | Path, if_none_match: bool = False) -> bool:
        """Write an object whole. With `if_none_match` an existing one is kept and the answer is False."""

    def list(self, prefix: str = "") -> Entries:
        """All objects whose key starts with `prefix`, by key."""

    def delete(self, keys: Iterable[str]) -> None:
        """Delete objects; missing ones are fine."""


def read_bytes(store: ObjectStore, key: str) -> bytes:
    """A whole small object."""
    with store.get(key) as stream:
        return stream.read()


def open_store(uri: str, access: S3Access, secret_dir: Path) -> ObjectStore:
    """The store behind an s3:// or file:// URI; credentials from the files in `secret_dir`."""
    parts = urlsplit(uri)
    if parts.scheme == "file":
        return FileStore(Path(unquote(parts.path)))
    if parts.scheme == "s3":
        return S3Store(parts.netloc, parts.path.strip("/"), access, secret_dir)
    raise BadConfig(f"{uri}: only s3:// and file:// are object stores; change the URI")


class FileStore:
    """A folder (or one file) as an object store."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @property
    def uri(self) -> str:
        return f"file://{self.root}"

    def get(self, key: str, start: int = 0) -> BinaryIO:
        stream = self._path(key).open("rb")
        stream.seek(start)
        return stream

    def put(self, key: str, data: bytes | Path, if_none_match: bool = False) -> bool:
        path = self._path(key)
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")  # pids are alike in all pods
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(data, Path):
                shutil.copyfile(data, temporary)
            else:
                temporary.write_bytes(data)
            if not if_none_match:
                temporary.replace(path)
                return True
            try:
                path.hardlink_to(temporary)
            except FileExistsError:
                return False
            finally:
                temporary.unlink()
            return True
        except OSError as error:
            raise StorageError(f"cannot write {path}: {error.strerror}; check the path and its permissions") from error

    def list(self, prefix: str = "") -> Entries:
        if self.root.is_file():
            return [self._entry("", self.root)]
        paths = [path for path in self.root.rglob("*") if path.is_file() and not path.name.endswith(".tmp")]
        entries = [self._entry(path.relative_to(self.root).as_posix(), path) for path in sorted(paths)]
        return [entry for entry in entries if entry.key.startswith(prefix)]

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            path = self._path(key)
            path.unlink(missing_ok=True)
            for parent in path.parents:
                if parent == self.root or any(parent.iterdir()):
                    break
                parent.rmdir()

    def _path(self, key: str) -> Path:
        path = (self.root / key).resolve() if key else self.root
        if key and not path.is_relative_to(self.root.resolve()):
            raise StorageError(f"key {key!r} leaves {self.root}")
        return path

    @staticmethod
    def _entry(key: str, path: Path) -> Entry:
        status = path.stat()
        return Entry(key, status.st_size, f"{status.st_mtime_ns:x}")


class S3Store:
    """A prefix of a bucket."""

    def __init__(self, bucket: str, prefix: str, access: S3Access, secret_dir: Path) -> None:
        self.bucket = bucket
        self.prefix = f"{prefix}/" if prefix else ""
        self.endpoint = access.endpoint or _secret(secret_dir, "AWS_ENDPOINT_URL") or os.environ.get("AWS_ENDPOINT_URL")
        self._client = _s3_client(self.endpoint, access, secret_dir)

    @property
    def uri(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")

    def get(self, key: str, start: int = 0) -> BinaryIO:
        extra = {"Range": f"bytes={start}-"} if start else {}
        with self.errors(f"read {key!r} of"):
            body = self._client.get_object(Bucket=self.bucket, Key=self._key(key), **extra)["Body"]
        return cast(BinaryIO, io.BufferedReader(_Body(self, body), 1 << 20))

    def put(self, key: str, data: bytes | Path, if_none_match: bool = False) -> bool:
        from botocore.exceptions import ClientError

        target = {"Bucket": self.bucket, "Key": self._key(key)}
        with self.errors(f"write {key!r} to"):
            if isinstance(data, Path) and not if_none_match and data.stat().st_size > MULTIPART_BYTES:
                self._client.upload_file(str(data), **target)
                return True
            condition = {"IfNoneMatch": "*"} if if_none_match else {}
            try:
                if isinstance(data, Path):
                    with data.open("rb") as body:
                        self._client.put_object(Body=body, **target, **condition)
                else:
                    self._client.put_object(Body=data, **target, **condition)
            except ClientError as error:
                if if_none_match and _status(error) in (409, 412):
                    return False
                raise
        return True

    def list(self, prefix: str = "") -> Entries:
        with self.errors("list"):
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self.bucket, Prefix=self.prefix + prefix
            )
            found = [item for page in pages for item in page.get("Contents", [])]
            if not found and not prefix and self.prefix:
                found = self._single_object()
        return [
            Entry(item["Key"][len(self.prefix) :], item["Size"], item["ETag"].strip('"'))
            for item in found
            if not item["Key"].endswith("/")
        ]

    def delete(self, keys: Iterable[str]) -> None:
        with self.errors("delete from"):
            for key in keys:
                self._client.delete_object(Bucket=self.bucket, Key=self._key(key))

    def _single_object(self) -> Items:
        """The URI may name one object instead of a prefix; its key is then empty."""
        name = self.prefix.rstrip("/")
        page = self._client.list_objects_v2(Bucket=self.bucket, Prefix=name, MaxKeys=1)
        found = [item for item in page.get("Contents", []) if item["Key"] == name]
        return [{**item, "Key": self.prefix.rstrip("/")} for item in found]

    def _key(self, key: str) -> str:
        return self.prefix + key if key else self.prefix.rstrip("/")

    @contextmanager
    def errors(self, doing: str) -> Iterator[None]:
        """Whatever boto3 raises inside becomes FileNotFoundError or StorageError."""
        from boto3.exceptions import S3UploadFailedError
        from botocore.exceptions import BotoCoreError, ClientError

        where = f"bucket {self.bucket} at {self.endpoint or 'AWS'}"
        try:
            yield
        except ClientError as error:
            code = error.response.get("Error", {}).get("Code", "")
            if code in ("NoSuchKey", "404"):
                raise FileNotFoundError(f"{where}: no such object ({doing})") from error
            raise StorageError(f"cannot {doing} {where}: {code}; {_advice(code)}") from error
        except (BotoCoreError, S3UploadFailedError, OSError) as error:
            text = str(error).splitlines()[0]
            raise StorageError(
                f"cannot {doing} {where}: {text}; check the endpoint and that the pods' network reaches it"
            ) from error


class _Body(io.RawIOBase):
    """A response's body whose read errors are StorageErrors, too."""

    def __init__(self, store: S3Store, body: Any) -> None:
        self._store, self._body = store, body

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        with self._store.errors("read from"):
            data = self._body.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._body.close()
        super().close()


def _advice(code: str) -> str:
    if code == "NoSuchBucket":
        return "create the bucket or correct the URI"
    if code in ("AccessDenied", "403", "InvalidAccessKeyId", "SignatureDoesNotMatch", "Forbidden"):
        return "check the keys in the Secret of secretRef and the bucket's policy"
    return "check the object store"


def _status(error: Any) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _secret(secret_dir: Path, key: str) -> str | None:
    path = secret_dir / key
    return path.read_text().strip() if path.is_file() else None


def _s3_client(endpoint: str | None, access: S3Access, secret_dir: Path) -> Any:
    import boto3
    from botocore.config import Config

    credentials = {key: _secret(secret_dir, key) for key in _KEYS}
    if access.secret_ref and (missing := [key for key, value in credentials.items() if not value]):
        raise StorageError(  # not BadConfig: the spec is right, and a corrected Secret reaches the pod by itself
            f"Secret {access.secret_ref.name} has no {' and no '.join(missing)}: add what is missing to the Secret."
        )
    config = Config(
        connect_timeout=CONNECT_SECONDS,
        read_timeout=READ_SECONDS,
        retries={"mode": "standard", "total_max_attempts": ATTEMPTS},
        s3={"addressing_style": "path"} if endpoint else {},
        max_pool_connections=32,
        request_checksum_calculation="when_required",  # other stores than AWS refuse the newer trailing checksums
        response_checksum_validation="when_required",
    )
    return boto3.session.Session().client(
        "s3",
        endpoint_url=endpoint,
        region_name=_secret(secret_dir, "AWS_REGION") or os.environ.get("AWS_REGION") or "us-east-1",
        aws_access_key_id=credentials["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=credentials["AWS_SECRET_ACCESS_KEY"],
        aws_session_token=_secret(secret_dir, "AWS_SESSION_TOKEN"),
        config=config,
    )
