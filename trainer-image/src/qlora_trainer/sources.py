"""Model and data on this node's disk: fetched once per node, resumable, digested.

Rules: what the cache holds is keyed by its URI, revision and endpoint and completed by `complete.json`, written last; a
file lock lets one process of the node fetch while the others wait; what a pod has resolved once is pinned in RUN_DIR,
so that a restart asks no server. Weights are safetensors (a GGUF file is converted once); pickles are never read.
"""

import hashlib
import json
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path
from urllib.parse import unquote, urlsplit

from filelock import FileLock
from pydantic import BaseModel

from qlora_api.run import PVC_DIR, TrainConfig
from qlora_api.types import S3Access
from qlora_trainer import hub
from qlora_trainer.control import WorkerEnv, write_atomically
from qlora_trainer.errors import BadConfig, BadData, BadModel, StorageError
from qlora_trainer.storage import Entry, ObjectStore, open_store

MODEL_PATTERNS = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.gguf")
CODE_PATTERNS = ("*.py",)
DATA_PATTERNS = ("*.jsonl", "*.json", "*.parquet", "*.csv")
COMPLETE = "complete.json"
_THREADS = 8
_ATTEMPTS = 5
_CHUNK = 4 << 20
Located = tuple[Path, list[str]]  # a folder on this node and files in it


class Source(BaseModel, frozen=True):
    """A folder on this node, its files (relative, sorted) and the sha256 over their names and contents."""

    path: Path
    files: list[str]
    digest: str


def ensure_model(config: TrainConfig, env: WorkerEnv) -> Source:
    """The base model's folder, with config.json, tokenizer and safetensors. Raises BadModel, StorageError."""
    model = config.spec.model
    patterns = MODEL_PATTERNS + (CODE_PATTERNS if model.trust_remote_code else ())

    def resolve() -> Source:
        def locate(revision: str | None) -> Located:
            return _locate(model.uri, revision, model, "model", patterns, env, top_only=True)

        folder, names = hub.locate_for_run(config, env, "model", model.uri, model.revision, locate)
        names = [name for name in names if not name.startswith("consolidated")]  # Mistral's second copy
        if any(name.endswith(".safetensors") for name in names):
            names = [name for name in names if not name.endswith(".gguf")]
        elif gguf := [name for name in names if name.endswith(".gguf")]:
            folder, names = _converted_gguf(folder / gguf[0], env)
        else:
            raise BadModel(
                f"{model.uri} has no *.safetensors: name the folder that holds them, or convert the weights (pickled"
                " *.bin are never read)"
            )
        return _digested(folder, names, env)

    return _pinned(env.run_dir / "model.json", resolve)


def ensure_dataset(uri: str, config: TrainConfig, env: WorkerEnv, pin: str) -> Source:
    """The data files of `uri`; `pin` names the pin file ("dataset", "eval"). Raises BadData, StorageError."""
    dataset = config.spec.dataset

    def resolve() -> Source:
        def locate(revision: str | None) -> Located:
            return _locate(uri, revision, dataset, "dataset", DATA_PATTERNS, env, top_only=False)

        folder, names = hub.locate_for_run(config, env, pin, uri, dataset.revision, locate)
        if uri.startswith("hf://"):
            split = "train" if pin == "dataset" else "test"
            names = [name for name in names if split in name.lower()] or names
        names = [name for name in names if Path(name).name not in ("dataset_infos.json", "dataset_dict.json")]
        if not names:
            raise BadData(f"{uri} has no data files: put *.jsonl, *.parquet or *.csv there or correct the URI")
        return _digested(folder, names, env)

    return _pinned(env.run_dir / f"{pin}.json", resolve)


def _pinned(pin: Path, resolve: Callable[[], Source]) -> Source:
    if pin.is_file():
        source = Source.model_validate_json(pin.read_bytes())
        if all((source.path / name).is_file() for name in source.files):
            return source
    source = resolve()
    write_atomically(pin, source.model_dump_json())
    return source


def _locate(
    uri: str,
    revision: str | None,
    access: S3Access,
    secret: str,
    patterns: tuple[str, ...],
    env: WorkerEnv,
    top_only: bool,
) -> Located:
    """Folder on this node and the matching files in it."""
    parts = urlsplit(uri)
    bad = BadModel if secret == "model" else BadData
    if parts.scheme in ("file", "pvc"):
        path = Path(unquote(parts.path)) if parts.scheme == "file" else Path(PVC_DIR, parts.netloc, parts.path[1:])
        if not path.exists():
            raise bad(f"{uri}: {path} does not exist in the trainer pod; correct the URI or mount the volume")
        if path.is_file():
            if path.suffix != ".safetensors":
                return path.parent, [path.name]
            path = path.parent  # what belongs to it lies beside it
        found = [p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()]
        if not found:
            raise bad(f"{uri}: {path} holds no file in the trainer pod; correct the URI or fill the volume")
        return path, _matching(found, patterns, top_only)
    if parts.scheme == "hf":
        folder = hub.fetch(uri, revision, secret, patterns, env, top_only)
        names = (p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
        return folder, _matching(names, patterns, top_only)
    store = open_store(uri, access, env.secrets_dir / secret)
    try:
        return _fetch(store, _cache_folder(env, secret, uri, access.endpoint), patterns, top_only, env)
    except FileNotFoundError as error:
        raise bad(f"{uri}: {error}; check the bucket and the path") from error


def _matching(names: Iterable[str], patterns: tuple[str, ...], top_only: bool) -> list[str]:
    return sorted(
        name
        for name in names
        if any(fnmatch(name.lower(), pattern) for pattern in patterns) and not (top_only and "/" in name)
    )


def _cache_folder(env: WorkerEnv, kind: str, *identity: str | None) -> Path:
    key = hashlib.sha256(json.dumps([kind, *identity]).encode()).hexdigest()[:20]
    return env.cache_dir / f"{kind}s" / key


def _lock(env: WorkerEnv, folder: Path) -> FileLock:
    locks = env.cache_dir / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    return FileLock(locks / f"{folder.name}.lock")


def _fetch(store: ObjectStore, folder: Path, patterns: tuple[str, ...], top_only: bool, env: WorkerEnv) -> Located:
    """Bring the store's matching objects into `folder`; what is there with the same tag stays.

    Raises FileNotFoundError when the store holds nothing at all.
    """
    with _lock(env, folder):
        complete = folder / COMPLETE
        known = json.loads(complete.read_text()) if complete.is_file() else {}
        try:
            entries = {_file_name(store, entry): entry for entry in store.list()}
        except StorageError:
            if not known:
                raise
            return folder, sorted(known)  # complete on this disk: an unreachable store stops nothing
        if not entries:
            raise FileNotFoundError("nothing lies below this URI")
        names = _matching(entries, patterns, top_only)
        stale = [name for name in names if known.get(name) != entries[name].tag or not (folder / name).is_file()]
        with ThreadPoolExecutor(_THREADS) as pool:
            list(pool.map(lambda name: _download(store, entries[name], folder / name), stale))
        write_atomically(complete, json.dumps({name: entries[name].tag for name in names}))
    return folder, names


def _file_name(store: ObjectStore, entry: Entry) -> str:
    return entry.key or store.uri.rsplit("/", 1)[1]


def _download(store: ObjectStore, entry: Entry, path: Path) -> None:
    """One object, resumed where an earlier attempt or process stopped."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{entry.tag[:32]}.part")
    for attempt in range(_ATTEMPTS):
        try:
            start = part.stat().st_size if part.is_file() else 0
            if start < entry.size:
                with store.get(entry.key, start) as stream, part.open("ab") as out:
                    while chunk := stream.read(_CHUNK):
                        out.write(chunk)
            elif entry.size == 0:
                part.touch()
            break
        except StorageError:
            if attempt == _ATTEMPTS - 1:
                raise
    if part.stat().st_size != entry.size:
        part.unlink()
        raise StorageError(f"{store.uri}/{entry.key} changed while it was read: leave the source alone during a run")
    part.replace(path)


def _converted_gguf(path: Path, env: WorkerEnv) -> Located:
    """A GGUF file read by transformers and written once as safetensors into the cache."""
    status = path.stat()
    folder = _cache_folder(env, "model", "gguf", str(path), str(status.st_size), str(status.st_mtime_ns))
    with _lock(env, folder):
        if not (folder / COMPLETE).is_file():
            _convert_gguf(path, folder)
            write_atomically(folder / COMPLETE, "{}")
    return folder, sorted(p.name for p in folder.iterdir() if p.name != COMPLETE)


def _convert_gguf(path: Path, folder: Path) -> None:
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.bfloat16)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except (ValueError, OSError, KeyError, NotImplementedError) as error:
        raise BadModel(f"{path.name}: transformers cannot read this GGUF file ({error}): use safetensors") from error
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _digested(folder: Path, names: list[str], env: WorkerEnv) -> Source:
    """Source with its digest; hashed once per content (size, mtime) and node."""
    if not names:
        raise BadConfig(f"{folder} has no usable files")
    stats = {name: (folder / name).stat() for name in names}
    identity = json.dumps([str(folder), {name: [s.st_size, s.st_mtime_ns] for name, s in stats.items()}])
    known = env.cache_dir / "digests" / hashlib.sha256(identity.encode()).hexdigest()[:20]
    if known.is_file():
        return Source(path=folder, files=names, digest=known.read_text())
    with ThreadPoolExecutor(_THREADS) as pool:
        hashes = list(pool.map(lambda name: sha256_of(folder / name), names))
    lines = "".join(f"{name} {digest}\n" for name, digest in zip(names, hashes, strict=True))
    digest = hashlib.sha256(lines.encode()).hexdigest()
    write_atomically(known, digest)
    return Source(path=folder, files=names, digest=digest)


def sha256_of(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
