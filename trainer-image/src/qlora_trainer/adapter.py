"""The adapter as PEFT reads it: written, read back, compared, uploaded; the manifest comes last.

Rules: nothing counts before it was reopened, compared tensor by tensor and loaded by peft; an adapter that is empty,
not finite or unchanged fails the run; manifest.json is written last and never overwritten: it makes the adapter real.
"""

import json
import warnings
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from qlora_api.layout import ADAPTERS, MANIFEST, MERGED, RunLayout, adapter_key, merged_key
from qlora_api.run import TrainConfig
from qlora_api.status import Artifacts
from qlora_trainer import faults
from qlora_trainer.checkpoint import FileRecord
from qlora_trainer.errors import BadAdapter
from qlora_trainer.lora import PEFT_PREFIX
from qlora_trainer.report import ADAPTER_KEY, History, loss_picture, model_card
from qlora_trainer.skeleton import build_skeleton
from qlora_trainer.sources import sha256_of
from qlora_trainer.storage import ObjectStore, read_bytes

WEIGHTS = "adapter_model.safetensors"
_VERSIONS = ("qlora-trainer", "torch", "transformers", "peft", "bitsandbytes", "trl")


def write_adapter(config: TrainConfig, tensors: Mapping[str, Tensor], hf_config: Any, folder: Path) -> None:
    """adapter_config.json and adapter_model.safetensors (float32) in `folder`; verified before it returns.

    `tensors` maps PEFT's names to the trained values. Raises BadAdapter.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().to("cpu", torch.float32).contiguous() for name, tensor in tensors.items()}
    require_trained(state)
    skeleton = build_skeleton(hf_config, torch.float32, config.spec.model.trust_remote_code)
    linears = [name for name, module in skeleton.named_modules() if isinstance(module, torch.nn.Linear)]
    lora_config(config, state, linears).save_pretrained(str(folder))
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    require_same(state, folder)
    require_loadable(state, skeleton, folder)


def lora_config(config: TrainConfig, state: Mapping[str, Tensor], linears: list[str]) -> Any:
    """PEFT's configuration; targets are leaf names where those name just the trained modules, else whole paths."""
    from peft import LoraConfig

    lora, model = config.spec.lora, config.spec.model
    trained = {name.removeprefix(PEFT_PREFIX).rsplit(".lora_", 1)[0] for name in state}
    leaves = {path.rsplit(".", 1)[-1] for path in trained}
    exact = {path for path in linears if path.rsplit(".", 1)[-1] in leaves} == trained
    return LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha if lora.alpha % 1 else int(lora.alpha),
        lora_dropout=lora.dropout,
        target_modules=sorted(leaves if exact else trained),
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        task_type="CAUSAL_LM",
        base_model_name_or_path=model.uri.removeprefix("hf://"),
        revision=model.revision,
        inference_mode=True,
    )


def require_trained(state: Mapping[str, Tensor]) -> None:
    """Raises BadAdapter when there is nothing in it: empty, not finite, or B still zero."""
    if not state:
        raise BadAdapter("the adapter is empty: lora.targetModules matches no linear layer of the model")
    if broken := [name for name, tensor in state.items() if not torch.isfinite(tensor).all()]:
        raise BadAdapter(f"{len(broken)} tensors of the adapter are not finite ({broken[0]}): lower learningRate")
    if not any(tensor.any() for name, tensor in state.items() if ".lora_B." in name):
        raise BadAdapter(
            "the adapter is unchanged (B is zero): no step had a gradient; check the data's trained tokens"
        )


def require_same(state: Mapping[str, Tensor], folder: Path) -> None:
    """Raises BadAdapter unless the file holds exactly these tensors."""
    with safe_open(folder / WEIGHTS, "pt") as file:
        if set(file.keys()) != set(state):
            raise BadAdapter(
                f"{WEIGHTS} holds {len(list(file.keys()))} tensors instead of {len(state)}: write it again"
            )
        for name, tensor in state.items():
            if not torch.equal(file.get_tensor(name), tensor):
                raise BadAdapter(f"{WEIGHTS}: {name} is not what was trained: check the disk")


def require_loadable(state: Mapping[str, Tensor], skeleton: torch.nn.Module, folder: Path) -> None:
    """Raises BadAdapter unless peft, given the folder and the (weightless) base, puts every tensor where it belongs."""
    from peft import PeftConfig, get_peft_model
    from peft.utils import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(skeleton, PeftConfig.from_pretrained(str(folder)), low_cpu_mem_usage=True)
        _materialize(model)
        result = set_peft_model_state_dict(model, load_peft_weights(str(folder), device="cpu"))
        loaded = get_peft_model_state_dict(model)
    wrong = [name for name, tensor in state.items() if name not in loaded or not torch.equal(loaded[name], tensor)]
    if wrong or result.unexpected_keys or len(loaded) != len(state):
        raise BadAdapter(f"peft loads {len(loaded)} tensors where {len(state)} were trained (first: {wrong[:1]})")


def _materialize(model: torch.nn.Module) -> None:
    """Give the adapter's parameters, and only them, memory: NaN until they are loaded."""
    for path, parameter in list(model.named_parameters()):
        if ".lora_" in path:
            parent, _, leaf = path.rpartition(".")
            empty = torch.full(parameter.shape, torch.nan, dtype=torch.float32)
            model.get_submodule(parent)._parameters[leaf] = torch.nn.Parameter(empty, requires_grad=False)


def metrics_of(
    history: History, steps: int, published: tuple[int, float | None], measured: Mapping[str, float]
) -> dict[str, Any]:
    """metrics.json: what the run reached; `published`: (step, evaluation loss) of the adapter."""
    return {
        "steps": steps,
        "published_step": published[0],
        "tokens": history.num_tokens,
        "train_loss": history.points[-1][1] if history.points else None,
        "eval_loss_before": history.eval_loss_before,
        "eval_loss_after": published[1],
        **{name: round(value, 4) for name, value in measured.items()},
        **history.losses_by_length(published[0]),
    }


def provenance_of(config: TrainConfig, digests: Mapping[str, str]) -> dict[str, Any]:
    """Where the adapter comes from: spec, digests of model and data, versions."""
    return {
        "run": config.run.to_wire(),
        "spec": config.spec.to_wire(),
        **digests,
        "versions": {name: version(name) for name in _VERSIONS},
    }


def write_report(
    config: TrainConfig, history: History, metrics: dict[str, Any], provenance: dict[str, Any], folder: Path
) -> None:
    """Model card, picture and numbers beside the weights."""
    (folder / "README.md").write_text(model_card(config, metrics, provenance))
    (folder / "loss.png").write_bytes(loss_picture(history, config.run.name))
    (folder / "metrics.json").write_text(json.dumps({**metrics, "history": history.to_json()}, indent=1))


def publish(
    store: ObjectStore,
    layout: RunLayout,
    folder: Path,
    generation: int,
    metrics: dict[str, Any],
    provenance: dict[str, Any],
    fence: Callable[[], None],
) -> Artifacts:
    """Upload `folder`, then the manifest, each after `fence` let it pass. What an earlier one published stands; what
    others uploaded and did not publish goes.

    A merged model that lies in the store already is named by the manifest, too.
    """
    key, records = adapter_key(generation), []
    card = folder / "README.md"
    card.write_text(card.read_text().replace(ADAPTER_KEY, key))
    for path in sorted(folder.iterdir()):
        fence()
        store.put(f"{key}/{path.name}", path)
        records.append(FileRecord(name=f"{key}/{path.name}", size=path.stat().st_size, sha256=sha256_of(path)))
    weights = next(record for record in records if record.name.endswith(WEIGHTS))
    artifacts = Artifacts(
        adapter_uri=layout.uri(key),
        manifest_uri=layout.uri(MANIFEST),
        adapter_bytes=sum(record.size for record in records),
        adapter_sha256=weights.sha256,
        merged_uri=layout.uri(merged_key(generation)) if provenance["spec"]["output"].get("merge") else None,
        eval_loss_before=metrics["eval_loss_before"],
        eval_loss_after=metrics["eval_loss_after"],
    )
    manifest = {
        "format": 1,
        "time": datetime.now(UTC).isoformat(),
        "generation": generation,
        "artifacts": artifacts.to_wire(),
        "files": [record.model_dump() for record in records],
        "metrics": metrics,
        "provenance": provenance,
    }
    faults.reach("manifest")
    fence()
    store.put(MANIFEST, json.dumps(manifest, indent=1).encode(), if_none_match=True)
    published = find_published(store)
    assert published is not None
    _drop_unpublished(store, layout, published)
    return published


def _drop_unpublished(store: ObjectStore, layout: RunLayout, published: Artifacts) -> None:
    """Delete what other generations uploaded."""
    kept = tuple(layout.key(uri) + "/" for uri in (published.adapter_uri, published.merged_uri) if uri)
    found = (entry.key for folder in (ADAPTERS, MERGED) for entry in store.list(f"{folder}/"))
    store.delete([key for key in found if not key.startswith(kept)])


def find_published(store: ObjectStore) -> Artifacts | None:
    """What the run has already published, or None: a finished run is never trained again."""
    try:
        manifest = json.loads(read_bytes(store, MANIFEST))
    except FileNotFoundError:
        return None
    return Artifacts.model_validate(manifest["artifacts"])
