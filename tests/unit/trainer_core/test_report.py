"""History, picture, card, checkpoints of a single process, and what makes an adapter bad."""

import hashlib
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from qlora_api.layout import MANIFEST, RunLayout, checkpoint_key
from qlora_trainer import adapter, checkpoint
from qlora_trainer.errors import BadAdapter, Fenced, StorageError
from qlora_trainer.report import ADAPTER_KEY, MAX_POINTS, History, loss_picture, model_card
from qlora_trainer.storage import FileStore, read_bytes

A, B = "base_model.model.l.lora_A.weight", "base_model.model.l.lora_B.weight"


def test_history_stays_small_and_travels() -> None:
    history = History()
    for step in range(1, 5 * MAX_POINTS):
        history.add(step, 1 / step, 1e-4, 0.5)
    assert MAX_POINTS // 2 <= len(history.points) <= MAX_POINTS
    steps = [point[0] for point in history.points]
    assert steps == list(range(history.every, 5 * MAX_POINTS, history.every))
    history.add_evaluation(0, 3.0)
    history.add_evaluation(10, 2.0)
    history.add_evaluation(10, 1.0)
    assert (history.eval_loss_before, history.eval_loss) == (3.0, 1.0)
    history.add_evaluation(20, 1.5, {16: 1.0, 32: 2.0})
    told = json.loads(json.dumps(history.to_json()))
    assert History.of_json(told) == history
    assert history.losses_by_length(20) == {"eval_loss_to_16_tokens": 1.0, "eval_loss_to_32_tokens": 2.0}
    assert history.losses_by_length(10) == history.losses_by_length(15) == {}
    del told["by_length"]  # a checkpoint of an older trainer
    assert History.of_json(told).evaluations == history.evaluations


@pytest.mark.parametrize(
    ("losses", "patience", "stops"),
    [
        ([3, 2, 1], 1, False),
        ([3, 2, 2], 1, True),
        ([3, 2, 2.5, 1.9], 2, False),
        ([3, 2, 2.1, 2.2], 2, True),
        ([3], 1, False),
    ],
)
def test_early_stopping(losses: list[float], patience: int, stops: bool) -> None:
    history = History(evaluations=[(i, loss) for i, loss in enumerate(losses)])
    assert history.stopped_improving(patience) is stops
    assert not history.stopped_improving(None)


@pytest.mark.parametrize(
    ("losses", "best"),
    [([3, 2, 1, 2], (2, 1)), ([1, 3, 2, 2], (2, 2)), ([1, math.nan, 5], (2, 5)), ([1], None), ([1, math.inf], None)],
)
def test_the_best_evaluation_is_the_first_lowest_of_a_trained_adapter(
    losses: list[float], best: tuple[int, float] | None
) -> None:
    assert History(evaluations=list(enumerate(losses))).best_evaluation == best


def test_picture_and_card(make_config: Any) -> None:
    history = History(points=[(1, 2.0, 1e-4, 1.0), (2, 1.0, 1e-4, 1.0)], evaluations=[(0, 2.0)])
    history.add_evaluation(2, 1.5, {32: 1.25})
    assert loss_picture(history, "run").startswith(b"\x89PNG")
    config = make_config(model={"uri": "hf://org/base"})
    metrics = adapter.metrics_of(history, 2, (2, 1.5), {"tokens_per_second": 12.34567})
    card = model_card(config, metrics, adapter.provenance_of(config, {"model_digest": "m", "dataset_digest": "d"}))
    assert (
        "base_model: org/base" in card
        and "| eval loss after | 1.5 |" in card
        and "| eval loss to 32 tokens | 1.25 |" in card
        and "torch" in card
    )
    assert "`s3://bucket/runs/run-01234567/manifest.json`, two folders up" in card


@pytest.mark.parametrize(
    ("model", "fetched", "call"),
    [
        ({"uri": "hf://org/base"}, None, 'from_pretrained("org/base")'),
        ({"uri": "hf://org/base", "revision": "v1"}, None, 'from_pretrained("org/base", revision="v1")'),
        (
            {"uri": "s3://models/tiny", "endpoint": "http://s3:8333", "trustRemoteCode": True},
            "aws s3 cp --recursive s3://models/tiny/ base/ --endpoint-url http://s3:8333",
            'from_pretrained("base", trust_remote_code=True)',
        ),
        (
            {"uri": "s3://models/tiny/Q8.gguf"},
            "aws s3 cp s3://models/tiny/Q8.gguf base/",
            'from_pretrained("base", gguf_file="Q8.gguf")',
        ),
        (
            {"uri": "pvc://claim/tiny"},
            "kubectl cp POD:MOUNT_PATH/tiny base  # a POD with the volume claim claim",
            'from_pretrained("base")',
        ),
        ({"uri": "file:///models/tiny"}, "mkdir -p base && cp -r /models/tiny/. base", 'from_pretrained("base")'),
        (
            {"uri": "file:///my%20models/tiny"},
            "mkdir -p base && cp -r '/my models/tiny/.' base",
            'from_pretrained("base")',
        ),
        (
            {"uri": "file:///models/$(id).gguf"},
            "mkdir -p base && cp -r '/models/$(id).gguf' 'base/$(id).gguf'",
            'from_pretrained("base", gguf_file="$(id).gguf")',
        ),
        (
            {"uri": "s3://models/a;b"},
            "aws s3 cp --recursive 's3://models/a;b/' base/",
            'from_pretrained("base")',
        ),
        (
            {"uri": "pvc://claim/a&b"},
            "kubectl cp 'POD:MOUNT_PATH/a&b' base  # a POD with the volume claim claim",
            'from_pretrained("base")',
        ),
    ],
)
def test_the_card_loads_the_base_from_where_transformers_can(
    make_config: Any, model: dict[str, Any], fetched: str | None, call: str
) -> None:
    config = make_config(model=model)
    digests = {"model_digest": "m", "dataset_digest": "d"}
    metrics = adapter.metrics_of(History(), 2, (2, None), {})
    card = model_card(config, metrics, adapter.provenance_of(config, digests))
    assert f"AutoTokenizer.{call}\n" in card and f"AutoModelForCausalLM.{call}\n" in card
    assert "aws s3 cp --recursive s3://bucket/runs/run-01234567/adapter/GENERATION/ adapter/\n" in card
    assert fetched in card if fetched else " base/" not in card
    assert ("base_model:" in card) == model["uri"].startswith("hf://"), "the hub knows no other address"


def test_bad_adapters() -> None:
    good = {A: torch.ones(2, 3), B: torch.ones(3, 2)}
    adapter.require_trained(good)
    for state, says in (
        ({}, "empty"),
        ({**good, A: torch.full((2, 3), torch.nan)}, "not finite"),
        ({**good, B: torch.zeros(3, 2)}, "unchanged"),
    ):
        with pytest.raises(BadAdapter, match=says):
            adapter.require_trained(state)


def test_what_was_written_is_compared(tmp_path: Path) -> None:
    state = {A: torch.ones(2, 3), B: torch.ones(3, 2)}
    save_file({**state, B: torch.zeros(3, 2)}, tmp_path / adapter.WEIGHTS)
    with pytest.raises(BadAdapter, match="not what was trained"):
        adapter.require_same(state, tmp_path)
    save_file({A: state[A]}, tmp_path / adapter.WEIGHTS)
    with pytest.raises(BadAdapter, match="1 tensors instead of 2"):
        adapter.require_same(state, tmp_path)


@pytest.fixture
def saved(tmp_path: Path) -> tuple[FileStore, dict[str, torch.Tensor]]:
    """Checkpoints of steps 1 to 4 under generation 2, two of them kept."""
    store = FileStore(tmp_path / "bucket")
    writer = checkpoint.CheckpointWriter(store, keep=2, mesh=None)
    state = {"adapter.master": torch.randn(5000), "adapter.absmax1": torch.rand(20)}
    for step in range(1, 5):
        state["adapter.master"] += 1
        writer.save(step, 2, state, {"step": step})
    writer.finish()
    assert writer.newest is not None and writer.newest.step == 4
    return store, state


def test_checkpoints_come_back_and_old_ones_go(saved: tuple[FileStore, dict[str, torch.Tensor]]) -> None:
    store, state = saved
    complete = list(checkpoint.find_complete(store))
    assert [manifest.step for manifest in complete] == [4, 3]
    loaded = checkpoint.load(store, complete[0])
    assert complete[0].extra == {"step": 4}
    assert all(torch.equal(loaded[name], state[name]) for name in state) and loaded.keys() == state.keys()
    assert not any(read_bytes(store, e.key)[:1] == b"\x80" for e in store.list()), "no pickle anywhere"


def test_incomplete_and_damaged_checkpoints_do_not_count(saved: tuple[FileStore, dict[str, torch.Tensor]]) -> None:
    store, _ = saved
    folder = checkpoint_key(4, 2)
    name = next(checkpoint.find_complete(store)).files[0].name
    content = bytearray(read_bytes(store, f"{folder}/{name}"))
    content[-1] ^= 1
    store.put(f"{folder}/{name}", bytes(content))
    with pytest.raises(StorageError, match="differs from its manifest"):
        checkpoint.load(store, next(checkpoint.find_complete(store)))
    store.put(f"{folder}/{name}", b"short")
    assert [manifest.step for manifest in checkpoint.find_complete(store)] == [3]
    store.delete([f"{checkpoint_key(3, 2)}/manifest.json"])
    assert list(checkpoint.find_complete(store)) == []


def test_a_checkpoint_that_is_pruned_meanwhile_is_passed_over(
    saved: tuple[FileStore, dict[str, torch.Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, _ = saved
    seen = store.list()
    store.delete([f"{checkpoint_key(4, 2)}/manifest.json"])
    monkeypatch.setattr(store, "list", lambda prefix="": iter(seen))
    assert [manifest.step for manifest in checkpoint.find_complete(store)] == [3]


@pytest.mark.parametrize("cause", [RuntimeError("connection closed by peer"), Fenced("a newer generation")])
def test_a_save_fails_in_the_words_of_the_rank_that_failed(
    cause: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise cause

    monkeypatch.setattr(checkpoint._StoreWriter, "write_data", fail)
    writer = checkpoint.CheckpointWriter(FileStore(tmp_path), keep=1, mesh=None)
    writer.save(1, 1, {"adapter.master": torch.zeros(8)}, {})
    with pytest.raises(type(cause), match=str(cause)):
        writer.finish()


def test_what_is_complete_is_never_overwritten(saved: tuple[FileStore, dict[str, torch.Tensor]]) -> None:
    store, state = saved
    before = read_bytes(store, f"{checkpoint_key(4, 2)}/manifest.json")
    writer = checkpoint.CheckpointWriter(store, keep=2, mesh=None)
    writer.save(4, 2, state, {"step": "other"})
    writer.finish()
    assert read_bytes(store, f"{checkpoint_key(4, 2)}/manifest.json") == before


def test_a_save_and_a_flush_of_one_step_do_not_meet(tmp_path: Path) -> None:
    """Two ranks save slices; one pod, told to go meanwhile, saves the whole state under the same generation."""
    store, whole = FileStore(tmp_path), {"adapter.master": torch.arange(8.0)}
    first_of_two: Any = SimpleNamespace(size=lambda: 2, get_local_rank=lambda: 0)
    slices = checkpoint.CheckpointWriter(store, keep=2, mesh=first_of_two)
    slices.save(4, 2, {"adapter.master": torch.arange(4.0)}, {})
    slices.finish()
    flush = checkpoint.CheckpointWriter(store, keep=2, mesh=None)
    flush.save(4, 2, whole, {})
    flush.finish()
    (complete,) = checkpoint.find_complete(store)
    assert torch.equal(checkpoint.load(store, complete)["adapter.master"], torch.arange(4.0))
    store.delete([f"{checkpoint_key(4, 2)}/manifest.json"])
    flush.save(4, 2, whole, {})
    slices.save(4, 2, {"adapter.master": torch.arange(4.0)}, {})
    flush.finish()
    slices.finish()
    (complete,) = checkpoint.find_complete(store)
    checkpoint.load(store, complete)


def test_a_failed_save_is_told_and_the_next_one_works(tmp_path: Path) -> None:
    class Full(FileStore):
        broken = True

        def put(self, key: str, data: bytes | Path, if_none_match: bool = False) -> bool:
            if self.broken:
                raise StorageError("bucket is full")
            return super().put(key, data, if_none_match)

    store = Full(tmp_path / "bucket")
    writer = checkpoint.CheckpointWriter(store, keep=1, mesh=None)
    state = {"adapter.master": torch.ones(10)}
    writer.save(1, 1, state, {})
    error = writer.collect(wait=True)
    assert isinstance(error, StorageError) and "full" in str(error) and writer.num_failures == 1
    store.broken = False
    writer.save(2, 1, state, {})
    writer.finish()
    assert writer.num_failures == 0 and [m.step for m in checkpoint.find_complete(store)] == [2]


def test_who_was_left_behind_spoils_nothing(tmp_path: Path) -> None:
    """A member of generation 2 goes on uploading after generation 3 has published: 3's files stay as they are."""
    store, layout = FileStore(tmp_path / "bucket"), RunLayout(f"file://{tmp_path}/bucket")

    def publish(generation: int) -> str:
        folder = tmp_path / f"of-{generation}"
        folder.mkdir()
        save_file({A: torch.full((2, 2), float(generation))}, folder / adapter.WEIGHTS)
        (folder / "README.md").write_text(f"fetch {ADAPTER_KEY}/ from the bucket")
        measured = {"eval_loss_before": 2.0, "eval_loss_after": 1.0}
        provenance = {"spec": {"output": {"merge": False}}}
        return adapter.publish(store, layout, folder, generation, measured, provenance, lambda: None).adapter_sha256

    store.put("adapter/gen-00001/leftover", b"of one who died before the manifest")
    published = publish(3)
    assert publish(2) == published, "what was published first stands"
    manifest = json.loads(read_bytes(store, MANIFEST))
    assert manifest["generation"] == 3
    assert read_bytes(store, "adapter/gen-00003/README.md") == b"fetch adapter/gen-00003/ from the bucket"
    for record in manifest["files"]:
        assert hashlib.sha256(read_bytes(store, record["name"])).hexdigest() == record["sha256"]
    assert {entry.key for entry in store.list("adapter/")} == {record["name"] for record in manifest["files"]}
