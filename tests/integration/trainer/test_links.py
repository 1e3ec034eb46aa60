"""The check of the links at every start of the workers, over gloo: what one rank reads is damaged."""

import json
import os
from collections.abc import Callable
from typing import Any

from qlora_api.run import Command, ExitCode, TrainConfig
from qlora_trainer import faults
from qlora_trainer.control import WorkerEnv
from qlora_trainer.train import work


def work_with_faults(config: TrainConfig, env: WorkerEnv) -> None:
    """A worker in the environment that scripted faults read."""
    os.environ |= {faults.ENV_FAULTS: str(env.cache_dir.parent / "faults"), "RANK": str(env.rank)}
    os.environ["QLORA_NODE_NAME"] = f"node-{env.rank}"
    work(config, env)


def test_a_rank_whose_links_damage_what_it_reads_is_told_from_the_others(make_world: Callable[..., Any]) -> None:
    world = make_world("links", dataset={"evalFraction": 0.0})
    world.entry = work_with_faults
    fault = {"id": "l", "point": "preflight-links", "ranks": [1], "action": "damage"}
    (world.root / "faults").write_text(json.dumps(fault))
    assert world.run([0, 1, 2]) == [ExitCode.LOST_PEER, ExitCode.FAULTY_NODE, ExitCode.LOST_PEER]
    told = world.termination(1)
    assert told.reason == "FaultyNode" and "on node node-1: the check of the links" in told.message
    assert "found 3 wrong words" in told.message and "most at rank 1" in told.message
    assert world.termination(0).reason == "LostPeer" and "most at rank 1" in world.termination(0).message
    assert world.state(1).progress.step == 0, "nothing was trained"
    assert world.run([0, 1, 2], Command.STOP) == [ExitCode.STOPPED] * 3, "a fault happens once"
