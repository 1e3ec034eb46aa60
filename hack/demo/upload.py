"""Fill the examples' bucket: the model, the samples; and the Secret by which the trainer's pods reach it.

The store is the local cluster's own or, with CLUSTER=current, the one of the environment: AWS_ACCESS_KEY_ID,
AWS_SECRET_ACCESS_KEY, and where they apply AWS_SESSION_TOKEN, AWS_REGION, AWS_ENDPOINT_URL (a store that is not AWS),
AWS_ENDPOINT_URL_IN_PODS (when pods reach it by another address) and QLORA_BUCKET. A large file that is there already
with the right size is not sent again.

    python -m hack.demo.upload                      fills the bucket; prints what it sent
    python -m hack.demo.upload --namespace NAME     also makes the namespace and the Secret in it (`make sample-data`)
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import boto3
from botocore.exceptions import BotoCoreError, ClientError
from hack.demo.kubectl import ROOT, Kubectl, Manifest, cluster, is_local
from hack.demo.prepare_model import prepare_model

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

EXAMPLES_BUCKET = "qlora-demo"  # as the examples name it
BUCKET = os.environ.get("QLORA_BUCKET") or EXAMPLES_BUCKET
MODEL_PREFIX = "models/smollm2-135m-instruct"
SECRET = "qlora-s3"
NUM_SMALL = 60
LARGE = 1 << 20
DATA = ROOT / "examples" / "data"
CREDENTIALS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION")
SESSION = "AWS_SESSION_TOKEN"


@dataclass(frozen=True)
class Store:
    """An S3 store as this machine and as the pods reach it."""

    credentials: Mapping[str, str]
    endpoint: str
    endpoint_in_pods: str

    @classmethod
    def find(cls) -> "Store":
        """The local cluster's store, or with CLUSTER=current the one of the AWS_* variables.

        Raises:
            ValueError: the cluster doesn't run, or a variable is missing.
        """
        if is_local():
            status = json.loads(cluster("status"))
            if not status["running"]:
                raise ValueError(
                    "the local cluster, which has the S3 store, doesn't run; start it with: make cluster-up"
                )
            lines = Path(status["s3_credentials"]).read_text().splitlines()
            values = dict(line.split("=", 1) for line in lines if "=" in line)
            return cls(_credentials(values), status["s3"], status["s3_in_pods"])
        endpoint = os.environ.get("AWS_ENDPOINT_URL", "")
        return cls(_credentials(os.environ), endpoint, os.environ.get("AWS_ENDPOINT_URL_IN_PODS", endpoint))

    def client(self) -> "S3Client":
        """A boto3 client for this machine."""
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint or None,
            aws_access_key_id=self.credentials["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=self.credentials["AWS_SECRET_ACCESS_KEY"],
            aws_session_token=self.credentials.get(SESSION),
            region_name=self.credentials["AWS_REGION"],
        )

    def secret(self, name: str = SECRET) -> Manifest:
        """The Secret for the pods."""
        data: dict[str, Any] = dict(self.credentials)
        if self.endpoint_in_pods:
            data["AWS_ENDPOINT_URL"] = self.endpoint_in_pods
        return {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}, "stringData": data}


def _credentials(values: Mapping[str, str]) -> dict[str, str]:
    given = {"AWS_REGION": "us-east-1", **values}
    if missing := [name for name in CREDENTIALS if not given.get(name)]:
        raise ValueError(
            f"set {', '.join(missing)}: the examples need an S3 store, and AWS_ENDPOINT_URL when it is not AWS's own"
        )
    return {name: given[name] for name in (*CREDENTIALS, SESSION) if given.get(name)}


def example(path: Path) -> str:
    """An example's manifest, in the bucket that is used."""
    return path.read_text().replace(f"s3://{EXAMPLES_BUCKET}/", f"s3://{BUCKET}/")


def files() -> Iterator[tuple[str, bytes | Path]]:
    """(key, content) of everything that the examples read."""
    for path in sorted(prepare_model().iterdir()):
        yield f"{MODEL_PREFIX}/{path.name}", path
    for name in ("train", "eval"):
        yield f"data/{name}.jsonl", DATA / f"{name}.jsonl"
    lines = (DATA / "train.jsonl").read_bytes().splitlines(keepends=True)
    yield "data/small.jsonl", b"".join(lines[:NUM_SMALL])


def upload(client: "S3Client", bucket: str = BUCKET) -> list[str]:
    """Create the bucket if need be and send what it lacks; the keys sent.

    Raises:
        ValueError: the store is not there, or the bucket is not to be had.
    """
    try:
        _ensure_bucket(client, bucket)
    except (BotoCoreError, ClientError) as error:
        raise ValueError(
            f"bucket {bucket} at {client.meta.endpoint_url}: {error}. Check AWS_ENDPOINT_URL, AWS_REGION and the keys; "
            "QLORA_BUCKET names another bucket"
        ) from error
    sent = []
    for key, content in files():
        size = content.stat().st_size if isinstance(content, Path) else len(content)
        if size >= LARGE and _size(client, bucket, key) == size:
            continue
        if isinstance(content, Path):
            client.upload_file(str(content), bucket, key)
        else:
            client.put_object(Bucket=bucket, Key=key, Body=content)
        sent.append(key)
    return sent


def _ensure_bucket(client: "S3Client", bucket: str) -> None:
    try:
        client.head_bucket(Bucket=bucket)
    except ClientError as error:
        if error.response["Error"]["Code"] not in ("404", "NoSuchBucket"):
            raise
        region = client.meta.region_name
        if region == "us-east-1":  # the one that must not be named
            client.create_bucket(Bucket=bucket)
        else:
            client.create_bucket(Bucket=bucket, CreateBucketConfiguration={"LocationConstraint": region})  # type: ignore[typeddict-item]


def _size(client: "S3Client", bucket: str, key: str) -> int | None:
    try:
        return client.head_object(Bucket=bucket, Key=key)["ContentLength"]
    except ClientError:
        return None


def give_access(kubectl: Kubectl, store: Store) -> None:
    """Write the Secret into the namespace, server-side, so that its values are in no annotation."""
    kubectl.must("apply", "--server-side", "--force-conflicts", "-f", "-", stdin=json.dumps(store.secret()))


def open_namespace(kubectl: Kubectl, store: Store) -> None:
    """The namespace, made when there is none, with the Secret."""
    if not kubectl.get("namespace", kubectl.namespace):
        kubectl.must("create", "namespace", kubectl.namespace)
    give_access(kubectl, store)


def next_steps(kubectl: Kubectl) -> str:
    """What to type now."""
    export = f"export KUBECONFIG={kubectl.kubeconfig}\n" if kubectl.kubeconfig else ""
    manifest = "examples/minimal.yaml"
    if BUCKET != EXAMPLES_BUCKET:
        manifest = f"<(sed 's,s3://{EXAMPLES_BUCKET}/,s3://{BUCKET}/,' {manifest})"
    return f"{export}kubectl -n {kubectl.namespace} apply -f {manifest}"


def main() -> int:
    """Fill the bucket and, when asked to, open a namespace to it."""
    parser = argparse.ArgumentParser(description="The examples' model and data into their bucket.")
    parser.add_argument("--namespace", help="make this namespace, too, and the Secret in it")
    namespace = parser.parse_args().namespace
    try:
        store = Store.find()
        sent = upload(store.client())
        print("\n".join(f"s3://{BUCKET}/{key}" for key in sent))
        if namespace:
            kubectl = Kubectl.find(namespace)
            open_namespace(kubectl, store)
            print(f"Secret {SECRET} in namespace {namespace}. Now:\n{next_steps(kubectl)}")
    except (RuntimeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
