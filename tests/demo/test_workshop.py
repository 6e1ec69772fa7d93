"""What visitors may choose from is named, and nothing that they say becomes a path or a module."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.demo.conftest import CLOSE
from visalign.demo.workshop import Workshop
from visalign.errors import UserError

FORGED = [
    "../outside/secret",
    "/etc/passwd",
    "first/../../outside",
    "os:system",
    "tests.toy_rewards:Slope",
    "<script>",
    "",
    None,
    ["first"],
    7,
]


def test_runs_are_those_below_the_root(workshop: Workshop, root: Path) -> None:
    assert workshop.runs() == {"first": root / "first", "group/second <b>": root / "group" / "second <b>"}
    assert not Workshop(["toy:gaussian"], [CLOSE], runs=root / "nowhere", device="cpu").runs()


@pytest.mark.parametrize("name", FORGED)
def test_whatever_is_not_offered_is_refused_in_one_line(workshop: Workshop, name: object) -> None:
    for choose in (workshop.run, workshop.policy, workshop.method):
        with pytest.raises(UserError, match="is named") as error:
            choose(name)
        assert len(str(error.value).splitlines()) == 1
    if isinstance(name, str):
        with pytest.raises(UserError, match="no reward is named"):
            workshop.sections({name: 1.0})


def test_rewards_and_models_are_loaded_once(workshop: Workshop) -> None:
    sections = workshop.sections({CLOSE: 2.0, "jpeg": -1.0})
    panel, again = (workshop.panel(sections, "toy:gaussian") for _ in range(2))
    assert panel is not None
    assert again is not None
    assert panel.weights == {CLOSE: 2.0, "jpeg": -1.0}
    assert all(panel.rewards[name] is again.rewards[name] for name in sections)
    assert workshop.policy("toy:gaussian") is workshop.policy("toy:gaussian")
    assert workshop.models() == ["toy:gaussian"], "the runs have no checkpoint"


def test_searches_take_turns_on_one_thread(workshop: Workshop) -> None:
    seen: list[tuple[str, int]] = []

    def count(name: str) -> Iterator[int]:
        for number in range(5):
            seen.append((name, threading.get_ident()))
            time.sleep(0.005)
            yield number

    def visit(name: str) -> None:
        assert list(workshop.turns(lambda: count(name))) == [0, 1, 2, 3, 4]

    visitors = [threading.Thread(target=visit, args=(name,)) for name in "abc"]
    for visitor in visitors:
        visitor.start()
    for visitor in visitors:
        visitor.join()
    assert len({thread for _, thread in seen}) == 1
    assert len({name for name, _ in seen[:6]}) == 3, "nobody waits for another's end"
