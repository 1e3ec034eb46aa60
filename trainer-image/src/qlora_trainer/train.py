"""The worker, to be read top to bottom: set up, restore, evaluate, train step by step, publish.

Rules: all ranks do the same collectives in the same order; what one rank wants (park, stop, save) travels with the
gradients, so that all ranks act on it at the same step boundary; a state is never changed while a snapshot reads it.
"""

import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from qlora_api.run import CONFIG_PATH, Command, ExitCode, TrainConfig, parse_config
from qlora_api.status import Artifacts
from qlora_trainer import faults
from qlora_trainer.control import WorkerEnv, read_control, read_worker_state, write_termination
from qlora_trainer.data import MicroBatch, Sequences, collate, cut, num_targets, num_tokens, share
from qlora_trainer.errors import BadConfig, MembersChange, Stopped, TrainerError, classify
from qlora_trainer.group import process_group
from qlora_trainer.lengths import NUM_LENGTHS, losses_by_length, means_by_length
from qlora_trainer.progress import Reporter
from qlora_trainer.publish import find_published, publish
from qlora_trainer.restore import Position, restore
from qlora_trainer.samples import SampleSet
from qlora_trainer.session import Session, fits_alone, make_ready, prepare, set_up
from qlora_trainer.standing import Kept, next_place, stand
from qlora_trainer.workclock import Laps, WorkClock

ENV_CONFIG = "QLORA_CONFIG"
_POLL_SECONDS = 0.05  # between looks at an upload under way


def main() -> None:
    """Entry of a worker process: torch elastic's environment, the mounted configuration, an exit code that says why."""
    work(config_path(), WorkerEnv.of_environment())


def run() -> ExitCode:
    """Entry under torch elastic's agent, which ends the process by this code."""
    path = config_path()
    return guarded(lambda config, env: run_worker(config, env, path), path, WorkerEnv.of_environment())


def warm() -> None:
    """Entry of the process that makes this node ready before the pod is let in."""
    end_process(guarded(make_ready, config_path(), WorkerEnv.of_environment()))


def work(config: TrainConfig | Path, env: WorkerEnv) -> None:
    """`run_worker` as a process: ends it with the exit code."""
    end_process(guarded(run_worker, config, env))


def end_process(code: ExitCode) -> None:
    """Leave at once: a thread of a broken collective must not keep the process."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def guarded(job: Callable[[TrainConfig, WorkerEnv], object], config: TrainConfig | Path, env: WorkerEnv) -> ExitCode:
    """Run the job; an error becomes a termination file and an exit code."""
    try:
        job(read_config(config) if isinstance(config, Path) else config, env)
        return ExitCode.OK
    except Exception as error:
        state = read_worker_state(env.run_dir, env.local_rank)
        rank = int(os.environ.get("RANK", env.rank))  # the place that it took last, not the one that it was started for
        termination = classify(error, rank, state.progress.step if state else 0)
        write_termination(env.run_dir, env.local_rank, termination)
        print(termination.log_tail or termination.message, file=sys.stderr)
        return ExitCode(termination.exit_code)


def config_path() -> Path:
    """Where the configuration is mounted."""
    return Path(os.environ.get(ENV_CONFIG, CONFIG_PATH))


def read_config(path: Path) -> TrainConfig:
    """The mounted configuration. Raises BadConfig."""
    try:
        return parse_config(path.read_text())
    except (OSError, ValueError) as error:
        raise BadConfig(f"{path} cannot be read: {error}") from error


def run_worker(config: TrainConfig, env: WorkerEnv, path: Path | None = None) -> Artifacts:
    """Train on this rank, from generation to generation, until the adapter is published (or was).

    `path`: where the configuration is read again. Ends with an error where this worker can't go on.
    """
    kept = Kept()
    while True:
        reporter = Reporter(env)
        try:
            if env.generation or not read_control(env.run_dir).assigns:
                return _run_generation(config, env, reporter, kept)
            _rehearse(config, env, kept)
        except Exception as error:  # the worker's outermost loop
            stand(error, env, kept, reporter.has_trained, reporter.step)
        reporter.parked()
        env = next_place(env)
        config = read_config(path) if path else config


def _rehearse(config: TrainConfig, env: WorkerEnv, kept: Kept) -> None:
    """Generation 0, before the pod is let in, while nobody waits for it: all that the first step needs, tried once.

    Where the base does not fit on one device it is left to the first generation.
    """
    alone = replace(env, rank=0, world_size=1)
    prepared = prepare(config, alone)
    if not fits_alone(config, alone, prepared.packed.hf_config):
        return
    with process_group(alone) as group:
        session = set_up(config, alone, group, kept, prepared)
    first = session.data.plan.global_batch(0)[0]
    session.model.losses(*_tensors(session, first, session.data.samples, session.data.sequences)).sum().backward()


def _run_generation(config: TrainConfig, env: WorkerEnv, reporter: Reporter, kept: Kept) -> Artifacts:
    laps = Laps()
    with process_group(env) as group:
        laps.note("joined")
        if published := find_published(config, env, kept):
            return reporter.finished(published)
        laps.note("asked the bucket")
        session = set_up(config, env, group, kept)
        laps.note("set up")
        position = restore(session)
        laps.note("restored")
        reporter.start(session, position, laps)
        _snapshot(session, position)
        _train(session, position, reporter)
        artifacts = publish(session, position, reporter)
    return reporter.finished(artifacts)


def _train(session: Session, position: Position, reporter: Reporter) -> None:
    """Evaluate and step until the run's end; returns with the final evaluation done."""
    training, num_steps = session.config.spec.training, session.data.plan.num_steps
    while True:
        if _evaluation_due(session, position):
            _evaluate(session, position, reporter)
        if position.step >= num_steps or position.history.stopped_improving(training.early_stopping_patience):
            break
        park, stop, save = _step(session, position, reporter)
        _snapshot(session, position)
        leave = park or stop
        if save and not leave:  # the next generation finds it due; it could have to wait for the one before
            _save(session, position, reporter)
        reporter.stepped(session, position)
        if leave:
            _park(session, position, reporter, stop)


def _step(session: Session, position: Position, reporter: Reporter) -> list[bool]:
    """One optimizer step over the whole world; the flags that any rank raised: prepare, stop, save."""
    step, data, optimizer, env = position.step, session.data, session.optimizer, session.env
    reporter.work.start()
    batch = data.plan.global_batch(step)
    targets = num_targets(batch, data.sequences)
    # float16 has no room for gradients of a mean over thousands of tokens: there they stay sums until all are added up
    divisor = targets if session.config.spec.quantization.compute_dtype == "float16" else 1
    optimizer.zero_grad()
    for micro in share(batch, env.rank, env.world_size):
        loss = _losses(session, reporter.work, micro, data.samples, data.sequences).sum() / (targets // divisor)
        faults.reach("backward", step)
        loss.backward()
        optimizer.add_loss(loss)
        reporter.trace(micro, data.sequences)
        reporter.alive()
    reporter.work.stop()
    optimizer.set_flags(*_wishes(session), reporter.save_due(session, position))
    faults.reach("all-reduce", step)
    loss_value, flags = optimizer.all_reduce(divisor)
    session.group.require_whole()
    reporter.work.take()
    if session.snapshots:
        session.snapshots.wait()  # the state of the step before is safe before it changes
    faults.reach("optimizer", step)
    norm, rate = optimizer.step(step, data.plan.num_steps)
    if not (math.isfinite(loss_value) and math.isfinite(norm)):
        raise TrainerError(f"step {step + 1}: loss {loss_value}, gradient norm {norm}: lower training.learningRate")
    position.step += 1
    position.history.num_tokens += num_tokens(batch, data.sequences, data.samples)
    position.history.add(position.step, loss_value, rate, norm)
    reporter.loss, reporter.rate, reporter.norm = loss_value, rate, norm
    return flags


def _losses(session: Session, clock: WorkClock, micro: MicroBatch, samples: SampleSet, sequences: Sequences) -> Tensor:
    """The micro batch's losses by token: TrainableModel.losses."""
    faults.reach("data", micro.step)
    with clock.loading():
        tensors = _tensors(session, micro, samples, sequences)
    session.model.set_step_seed(session.config.spec.training.seed, micro.step, micro.index)
    faults.reach("forward", micro.step)
    return session.model.losses(*tensors)


def _tensors(session: Session, micro: MicroBatch, samples: SampleSet, sequences: Sequences) -> list[Tensor]:
    """Input ids, labels and position ids of a micro batch, on the host."""
    arrays = collate(micro, sequences, samples, session.data.pad_id, session.config.spec.training.max_length)
    return [torch.from_numpy(array) for array in (arrays.input_ids, arrays.labels, arrays.position_ids)]


def _wishes(session: Session) -> tuple[bool, bool]:
    """What this pod's agent wants: (prepare a change of members, stop)."""
    control = read_control(session.env.run_dir)
    newest = max(control.prepare, control.generation)
    return newest > session.env.generation, control.command == Command.STOP


def _evaluation_due(session: Session, position: Position) -> bool:
    if not len(session.data.eval_sequences) or position.history.has_evaluation(position.step):
        return False
    interval = session.config.spec.training.eval_interval_steps
    ends = position.step in (0, session.data.plan.num_steps)
    return ends or (interval is not None and position.step % interval == 0)


@torch.no_grad()
def _evaluate(session: Session, position: Position, reporter: Reporter) -> None:
    """Mean loss over the evaluation tokens, by length, too; given up for a wish of an agent and then done after it."""
    data, env = session.data, session.env
    samples, sequences = data.eval_samples, data.eval_sequences
    batch = cut(range(len(sequences)), data.plan.micro_batch_size, position.step)
    total = torch.zeros(2 + NUM_LENGTHS, dtype=torch.float64)
    session.model.eval()
    for micro in share(batch, env.rank, env.world_size):
        losses = _losses(session, reporter.work, micro, samples, sequences).cpu().numpy()
        sums = losses_by_length(micro, sequences, samples, losses)
        part = torch.tensor([*_wishes(session), *sums], dtype=total.dtype)
        if env.world_size > 1:
            torch.distributed.all_reduce(part)
        session.group.require_whole()  # the loss came through collectives, too
        total += part
        reporter.alive()
        if part[:2].any():
            _park(session, position, reporter, bool(part[1]))
    session.model.train()
    loss = float(total[2:].sum()) / num_targets(batch, sequences)
    position.history.add_evaluation(position.step, loss, means_by_length(total[2:].numpy(), sequences, samples))
    if (best := position.history.best_evaluation) and best[0] == position.step:
        if session.snapshots:
            session.snapshots.wait()
        session.optimizer.keep_best()
    _snapshot(session, position)
    reporter.evaluated(session, position)


def _snapshot(session: Session, position: Position) -> None:
    """Start copying the state into this pod's memory tier."""
    if session.snapshots:
        state, extra = session.optimizer.state(), position.to_extra(session)
        session.snapshots.write(position.step, session.env.generation, state, extra)


def _save(session: Session, position: Position, reporter: Reporter) -> None:
    """Start a durable checkpoint; one that failed is told and tried again at the next interval."""
    started = time.monotonic()
    _await_save(session, reporter)
    state, extra = session.optimizer.state(), position.to_extra(session)
    session.checkpoints.save(position.step, session.env.generation, state, extra)
    reporter.save_started(position.step, time.monotonic() - started)


def _await_save(session: Session, reporter: Reporter) -> None:
    """Let a save under way end: only then all ranks know the same newest checkpoint."""
    while session.checkpoints.busy:
        reporter.alive()
        time.sleep(_POLL_SECONDS)
    reporter.saved(session, session.checkpoints.collect(wait=True))


def _park(session: Session, position: Position, reporter: Reporter, stop: bool) -> NoReturn:
    """Leave at a step boundary with everything saved: raises MembersChange or, told to stop, Stopped."""
    if session.snapshots:
        session.snapshots.wait()
    if stop:
        _await_save(session, reporter)
        newest = session.checkpoints.newest
        if position.step and (newest is None or newest.step != position.step):
            _save(session, position, reporter)
            session.checkpoints.finish()
            reporter.saved(session, None)
        reporter.stopped(session, position)
        raise Stopped(f"stopped after step {position.step}; a checkpoint of it is in the bucket")
    raise MembersChange(f"the members change after step {position.step}")


if __name__ == "__main__":
    main()
