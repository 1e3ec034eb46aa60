"""What the adapter's model card tells a user to do works: its commands fetch, its Python loads what was published."""

import contextlib
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict


def assert_card_works(world: Any, folder: Path) -> None:
    """Run the published card's commands in an empty folder, then its Python there; compare what it loaded."""
    published = world.adapter_folder()
    card = (published / "README.md").read_text()
    assert f"`file://{published.parent.parent}/manifest.json`, two folders up" in card
    commands, code = (re.findall(rf"```{kind}\n(.*?)```", card, re.DOTALL)[0] for kind in ("bash", "python"))
    folder.mkdir()
    subprocess.run(["bash", "-ec", commands], cwd=folder, check=True)
    names: dict[str, Any] = {}
    with contextlib.chdir(folder):
        exec(code, names)
    loaded, trained = get_peft_model_state_dict(names["model"]), world.adapter()
    assert loaded.keys() == trained.keys() and all(torch.equal(loaded[name], trained[name]) for name in trained)
    ids = names["tokenizer"]("the quick brown fox", return_tensors="pt")
    with torch.no_grad():
        adapted = names["model"](**ids).logits
        with names["model"].disable_adapter():
            plain = names["model"](**ids).logits
    assert adapted.isfinite().all() and not torch.equal(adapted, plain)


def test_the_card_of_a_run(make_world: Callable[..., Any], tmp_path: Path) -> None:
    world = make_world("card", training={"maxSteps": 2})
    assert world.run([0]) == [0]
    assert_card_works(world, tmp_path / "user")
