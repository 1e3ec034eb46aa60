"""A tiny real model, tokenizer and data set, and worlds of real worker processes, for several folders of tests."""

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from tests.ports import free_port

from qlora_api.run import Command, RunIdentity, Termination, TrainConfig
from qlora_api.types import QLoRAFinetuneSpec
from qlora_trainer import control
from qlora_trainer.control import Assignment, Control, Phase, WorkerEnv, WorkerState
from qlora_trainer.train import work

os.environ.setdefault("OMP_NUM_THREADS", "1")

PRELOAD = ["qlora_trainer.preload"]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
WORDS = ("the quick brown fox jumps over a lazy dog while seven wise owls watch from old oak trees near rivers").split()  # noqa: SIM905


def make_tokenizer(folder: Path, chat_template: str | None = CHAT_TEMPLATE) -> None:
    """A byte-level BPE trained on the tests' own words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=["<eos>", "<pad>", "<|user|>", "<|assistant|>", "<|system|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 20, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")
    fast.chat_template = chat_template
    fast.save_pretrained(folder)


def make_base(folder: Path, family: str = "llama", seed: int = 0, **changes: Any) -> None:
    """Random weights in the shape of a small causal LM of this family, safetensors, with a tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokens = {"vocab_size": 384, "eos_token_id": 0, "bos_token_id": None, "pad_token_id": 1}
    config = AutoConfig.for_model(
        family, **{**shape, **tokens, "num_key_value_heads": 2, "max_position_embeddings": 512, **changes}
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    make_tokenizer(folder)


def sentence(number: int) -> str:
    """A sentence of 4 to 15 words that follows from its number."""
    return " ".join(WORDS[(number * 7 + k * (1 + number % 5)) % len(WORDS)] for k in range(4 + number % 12))


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_base(folder)
    return folder


@pytest.fixture(scope="session")
def make_model() -> Callable[..., None]:
    """`make_base`, for tests that want another model."""
    return make_base


@pytest.fixture(scope="session")
def data_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    path.write_text("".join(json.dumps({"text": sentence(i)}) + "\n" for i in range(48)))
    return path


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts and completions."""
    path = tmp_path_factory.mktemp("pairs") / "train.jsonl"
    rows = [{"prompt": sentence(i), "completion": f" {sentence(i + 1)}"} for i in range(48)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_config(base: Path, train_file: Path, output_uri: str, **spec: dict[str, Any]) -> TrainConfig:
    """A small float32 run; `spec` holds camelCase sections to merge in. `output_uri` may be a file:// URI."""
    sections: dict[str, dict[str, Any]] = {
        "model": {"uri": f"file://{base}"},
        "dataset": {"uri": f"file://{train_file}", "evalFraction": 0.1},
        "quantization": {"computeDtype": "float32", "storageDtype": "float32"},
        "lora": {"r": 4, "alpha": 8},
        "training": {
            "shardingStrategy": "FULL_SHARD",  # auto would keep so small a base whole on every rank
            "maxSteps": 6,
            "globalBatchSize": 6,
            "microBatchSize": 1,
            "maxLength": 32,
            "learningRate": 1e-2,
            "warmupRatio": 0.0,
        },
        "checkpoint": {"intervalSteps": 2},
        "output": {"uri": "s3://replaced/below"},
    }
    for name, values in spec.items():
        sections[name] = {**sections.get(name, {}), **values}
    parsed = QLoRAFinetuneSpec.model_validate(sections)
    parsed = parsed.model_copy(update={"output": parsed.output.model_copy(update={"uri": output_uri})})
    return TrainConfig(run=RunIdentity(namespace="default", name="run", uid="0123456789"), spec=parsed)


@dataclass
class World:
    """Pods of one run, one worker each, that can be started in any number again and again, or stand and be placed."""

    root: Path
    config: TrainConfig
    generation: int = 0
    device_type: str = "cpu"
    one_pod: bool = False  # all workers in one pod, each with a GPU of its own
    entry: Callable[[TrainConfig, WorkerEnv], None] = work  # of a worker's process
    context: Any = field(default_factory=lambda: multiprocessing.get_context("forkserver"))
    processes: list[Any] = field(default_factory=list)

    def env(self, pod: int) -> WorkerEnv:
        return WorkerEnv(
            rank=pod,
            local_rank=pod if self.one_pod else 0,
            world_size=1,
            generation=self.generation,
            run_dir=self.root / f"pod-{0 if self.one_pod else pod}",
            cache_dir=self.root / "cache",
            secrets_dir=self.root / "secrets",
            device_type=self.device_type,
            trace=True,
        )

    def start(self, pods: list[int], command: Command = Command.RUN) -> None:
        """Start one worker in each pod, in a new generation; told to STOP, they stop at the first step boundary."""
        self.generation += 1
        meeting = self.root / f"meeting-{self.generation}"
        self.processes = []
        for rank, pod in enumerate(pods):
            env = replace(self.env(pod), rank=rank, world_size=len(pods), init_method=f"file://{meeting}")
            control.clear_worker_files(env.run_dir)
            control.write_control(env.run_dir, Control(generation=self.generation, command=command))
            process = self.context.Process(target=self.entry, args=(self.config, env), daemon=True)
            process.start()
            self.processes.append(process)

    def wait(self, seconds: float = 300) -> list[int]:
        """Exit codes, once all have ended."""
        for process in self.processes:
            process.join(seconds)
            assert process.exitcode is not None, "a worker hangs"
        return [process.exitcode for process in self.processes]

    def run(self, pods: list[int], command: Command = Command.RUN) -> list[int]:
        """Start and wait; what failed is printed."""
        self.start(pods, command)
        codes = self.wait()
        for pod in pods:
            if termination := self.termination(pod):
                print(termination.log_tail)
        return codes

    def until(self, condition: Callable[[], Any], what: str, seconds: float = 100) -> None:
        """Wait for it; where it doesn't come, the workers' stacks tell where each of them stands."""
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                for process in self.processes:
                    if process.is_alive():
                        os.kill(process.pid, signal.SIGUSR1)
                time.sleep(1)
                raise AssertionError(f"{what} did not happen within {seconds} s")
            time.sleep(0.005)

    def tell(self, pod: int, **told: Any) -> None:
        """Fields of Control, as the pod's agent writes them where it gives out places."""
        control.write_control(self.env(pod).run_dir, Control(assigns=True, **told))

    def place(self, pods: list[int], **told: Any) -> None:
        """These workers, who stand, are the next generation; `told`: as in `tell`."""
        self.generation += 1
        port = free_port()
        for rank, pod in enumerate(pods):
            env = self.env(pod)
            self.tell(pod, generation=self.generation, **told)
            where = Assignment(
                generation=env.generation, rank=rank, world_size=len(pods), master_addr="127.0.0.1", master_port=port
            )
            control.write_assignment(env.run_dir, env.local_rank, where)

    def rehearse(self, pod: int) -> None:
        """Start a newcomer, which sets everything up alone, and wait until it stands."""
        self.tell(pod)
        env = replace(self.env(pod), generation=0)
        process = self.context.Process(target=self.entry, args=(self.config, env), daemon=True)
        process.start()
        self.processes.append(process)
        self.until(lambda: self.has_parked(pod), "the newcomer's rehearsal")

    def has_parked(self, pod: int) -> bool:
        state = self.state(pod)
        return state is not None and state.phase == Phase.PARKED

    def kill(self) -> None:
        for process in self.processes:
            if process.is_alive():
                process.kill()
            process.join()

    def state(self, pod: int) -> WorkerState | None:
        return control.read_worker_state(self.env(pod).run_dir, self.env(pod).local_rank)

    def termination(self, pod: int) -> Termination | None:
        return control.read_termination(self.env(pod).run_dir, self.env(pod).local_rank)

    def adapter(self) -> dict[str, Any]:
        """The published tensors."""
        from safetensors.torch import load_file

        return load_file(self.adapter_folder() / "adapter_model.safetensors")

    def adapter_folder(self) -> Path:
        """Where it was published."""
        root = self.root / "bucket" / "run-01234567"
        artifacts = json.loads((root / "manifest.json").read_text())["artifacts"]
        return Path(artifacts["adapterUri"].removeprefix("file://"))

    def traces(self) -> list[dict[str, Any]]:
        """What every rank of every generation consumed."""
        files = self.root.glob("pod-*/trace-*.jsonl")
        return [json.loads(line) for path in files for line in path.read_text().splitlines()]


@pytest.fixture
def make_world(tmp_path: Path, model_dir: Path, data_file: Path) -> Iterator[Callable[..., World]]:
    """name and sections of the spec -> a world over the tiny Llama, with a file:// output of its own."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOAD)
    worlds: list[World] = []

    def make(name: str = "world", base: Path = model_dir, data: Path = data_file, **spec: dict[str, Any]) -> World:
        root = tmp_path / name
        root.mkdir()
        worlds.append(World(root, make_config(base, data, f"file://{root}/bucket", **spec)))
        return worlds[-1]

    yield make
    for made in worlds:
        made.kill()
