"""What a worker tells its agent after every step and in between, and when a checkpoint is due.

Rules: a step is told after its snapshot was started, signs of life in between; times are monotonic; rank 0 alone
decides about the time-based checkpoint and tells the others with the flags of a step.
"""

import json
import math
import os
import resource
import sys
import time
from collections import deque
from datetime import UTC, datetime

from qlora_api.run import METRIC_STEP_WORK
from qlora_api.status import Artifacts, CheckpointStatus, Progress
from qlora_trainer.control import Phase, WorkerEnv, WorkerState, read_control, write_worker_state
from qlora_trainer.data import MicroBatch, Sequences
from qlora_trainer.errors import StorageError
from qlora_trainer.measures import GpuMemory, Utilization, base_bytes, planned
from qlora_trainer.restore import Position
from qlora_trainer.session import Session
from qlora_trainer.workclock import Laps, WorkClock

_WINDOW = 20  # steps that speed and ETA look back on
_ALIVE_SECONDS = 1.0  # between two signs of life at least: the operator counts in minutes


class Reporter:
    """Writes worker-LOCALRANK.json; keeps the clock and the measures."""

    def __init__(self, env: WorkerEnv) -> None:
        self.loss = self.rate = self.norm = 0.0
        self.work = WorkClock(env.device_type)
        self._memory = GpuMemory(env.device_type == "cuda")
        self._utilization: Utilization | None = None
        self._env = env
        self._born = time.monotonic()
        self._steps: deque[tuple[float, int]] = deque(maxlen=_WINDOW + 1)  # (time, tokens) after each step
        self._saved_at = self._wrote_at = time.monotonic()
        self._saving: int | None = None  # step of the checkpoint under way
        self._save_step = 0  # of the last checkpoint that this process began
        self._measured: dict[str, float] = {}
        self._state = WorkerState(generation=env.generation, pid=os.getpid())
        self._trace_path = env.run_dir / f"trace-{env.rank}.jsonl" if env.trace else None
        env.run_dir.mkdir(parents=True, exist_ok=True)
        self._write()

    @property
    def has_trained(self) -> bool:
        """Whether this generation got through its start."""
        return self._state.phase != Phase.STARTING

    @property
    def step(self) -> int:
        """The last one that was told."""
        return self._state.progress.step

    def start(self, session: Session, position: Position, laps: Laps) -> None:
        """Set up and restored; rank 0 says into the pod's log what took how long."""
        if session.is_first:
            env, plan = session.env, session.model.plan
            print(f"memory plan: {plan.summary()} {plan.advice()}".rstrip(), file=sys.stderr)
            who = f"generation {env.generation} with {env.world_size} ranks"
            print(f"{who} goes on after step {position.step}: {laps}", file=sys.stderr, flush=True)
        self._saved_at -= _age(session.checkpoints.found, position)
        self._measured["start_seconds"] = time.monotonic() - self._born
        self._note_constants(session)
        self._steps.append((time.monotonic(), position.history.num_tokens))
        self._update(session, position, phase=Phase.TRAINING)

    def stepped(self, session: Session, position: Position) -> None:
        """A step is done and its snapshot under way."""
        error = session.checkpoints.collect()
        self._note_save(session, error)
        self._steps.append((time.monotonic(), position.history.num_tokens))
        if len(self._steps) > 1:
            self._measured["step_seconds"] = self._steps[-1][0] - self._steps[-2][0]
        if (seconds := self.work.median_seconds) is not None:
            self._measured[METRIC_STEP_WORK] = seconds
        self._measured |= {**self.work.waits, **self._memory.measures(session.model)}
        self._measured["host_memory_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
        self._update(session, position)

    def evaluated(self, session: Session, position: Position) -> None:
        """An evaluation is done; its time does not count as a step's."""
        self._steps.clear()
        self._steps.append((time.monotonic(), position.history.num_tokens))
        self._update(session, position)

    def parked(self) -> None:
        """Out of the group at a step boundary, to take another place or to be ended."""
        self._state = self._state.model_copy(update={"phase": Phase.PARKED})
        self._write()

    def stopped(self, session: Session, position: Position) -> None:
        """At a step boundary with a checkpoint of it: this worker ends."""
        self._update(session, position, phase=Phase.PARKED)

    def finished(self, artifacts: Artifacts) -> Artifacts:
        """The manifest is in the bucket."""
        progress = self._state.progress.model_copy(
            update={"eval_loss": artifacts.eval_loss_after or self._state.progress.eval_loss, "eta_seconds": 0}
        )
        self._state = self._state.model_copy(
            update={"phase": Phase.FINISHED, "artifacts": artifacts, "progress": progress}
        )
        self._write()
        return artifacts

    def alive(self) -> None:
        """Something moves although no step is done."""
        if time.monotonic() - self._wrote_at >= _ALIVE_SECONDS:
            self._write()

    def publishing(self) -> None:
        """No step follows, also where the run stops early: what comes now takes its time."""
        last = {"total_steps": self._state.progress.step, "eta_seconds": 0}
        self._state = self._state.model_copy(update={"progress": self._state.progress.model_copy(update=last)})
        self._write()

    def save_due(self, session: Session, position: Position) -> bool:
        """Rank 0: whether the step under way ends with a durable checkpoint.

        Counted from the newest complete one, whoever wrote it: faults that come faster than checkpoints delay none.
        """
        spec, checkpoints = session.config.spec.checkpoint, session.checkpoints
        if session.env.rank != 0:
            return False
        if spec.interval_steps is None:
            return not checkpoints.busy and time.monotonic() - self._saved_at >= spec.interval_seconds
        step = position.step + 1
        since = step - max(checkpoints.found.step if checkpoints.found else 0, self._save_step)
        return step % spec.interval_steps == 0 or (since >= spec.interval_steps and not checkpoints.busy)

    def save_started(self, step: int, stall: float) -> None:
        """A durable checkpoint is under way; the loop stood still for `stall` seconds."""
        self._saved_at = time.monotonic()
        self._saving = self._save_step = step
        self._memory.save_started()
        self._measured["checkpoint_stall_seconds"] = stall

    def saved(self, session: Session, error: StorageError | None) -> None:
        """A durable checkpoint ended."""
        self._note_save(session, error)

    def measured(self) -> dict[str, float]:
        """Measures of the run so far, by the names of docs/metrics.md."""
        speed = self._state.progress.tokens_per_second
        of_agent = read_control(self._env.run_dir).metrics
        return {**of_agent, **self._measured, **({"tokens_per_second": speed} if speed else {})}

    def trace(self, micro: MicroBatch, sequences: Sequences) -> None:
        """When asked for: which samples a step consumed."""
        if self._trace_path is None or micro.dummy:
            return
        samples = [int(s) for sequence in micro.sequences for s in sequences.samples_of(sequence)]
        line = {"generation": self._env.generation, "step": micro.step, "micro": micro.index, "samples": samples}
        with self._trace_path.open("a") as out:
            out.write(json.dumps(line) + "\n")

    def _note_constants(self, session: Session) -> None:
        """What does not change while this generation trains."""
        spec, model, samples = session.config.spec, session.model, session.data.samples
        cut, held = samples.meta.num_tokens_cut, samples.meta.num_tokens
        self._measured |= {"base_bytes": float(base_bytes(model)), "tokens_cut_share": cut / max(1, held + cut)}
        self._measured |= planned(model.plan)
        world = session.env.world_size
        self._utilization = Utilization(spec, model.hf_config, samples.lengths, world, session.device)
        self._state = self._state.model_copy(update={"plan": model.plan})

    def _note_save(self, session: Session, error: StorageError | None) -> None:
        if not session.checkpoints.busy:
            self._memory.save_ended()
        if error is not None:
            self._measured["checkpoint_failures"] = session.checkpoints.num_failures
            print(f"checkpoint failed, training goes on: {error}", flush=True)
        newest = session.checkpoints.newest
        if newest and newest.step == self._saving:
            self._measured["checkpoint_seconds"] = session.checkpoints.seconds
            self._measured["checkpoint_failures"] = 0.0
            self._saving = None

    def _update(self, session: Session, position: Position, phase: Phase | None = None) -> None:
        checkpoint: CheckpointStatus | None = session.checkpoints.newest or session.checkpoints.found
        progress = self._progress(session, position)
        if self._utilization is not None:
            self._measured |= self._utilization.measures(progress.tokens_per_second)
        evaluated = position.history.evaluations[-1][0] if position.history.evaluations else -1
        self._state = self._state.model_copy(
            update={
                "phase": phase or self._state.phase,
                "progress": progress,
                "snapshot_step": position.step if session.snapshots else None,
                "checkpoint": checkpoint or self._state.checkpoint,
                "metrics": {**self._measured, **position.history.losses_by_length(evaluated)},
            }
        )
        self._write()

    def _progress(self, session: Session, position: Position) -> Progress:
        history, total = position.history, session.data.plan.num_steps
        (first, tokens_before), (last, tokens) = self._steps[0], self._steps[-1]
        seconds, steps = last - first, len(self._steps) - 1
        return Progress(
            step=position.step,
            total_steps=total,
            loss=self.loss if position.step and self.loss else (history.points[-1][1] if history.points else None),
            eval_loss=history.eval_loss,
            learning_rate=self.rate or None,
            grad_norm=self.norm or None,
            tokens=history.num_tokens,
            tokens_per_second=(tokens - tokens_before) / seconds if steps else self._state.progress.tokens_per_second,
            eta_seconds=round((total - position.step) * seconds / steps) if steps else self._state.progress.eta_seconds,
        )

    def _write(self) -> None:
        self._wrote_at = time.monotonic()
        self._state = self._state.model_copy(update={"activity": self._state.activity + 1})
        write_worker_state(self._env.run_dir, self._env.local_rank, self._state)


def _age(found: CheckpointStatus | None, position: Position) -> float:
    """Seconds since the newest durable checkpoint was made; infinite for a run that has steps but no checkpoint."""
    if found is None:
        return math.inf if position.step else 0.0
    return max(0.0, (datetime.now(UTC) - found.time).total_seconds())
