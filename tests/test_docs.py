"""What docs/ shows is true: the family that is written there in one file passes the kit that every family passes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from tests.families.conformance import Conformance
from tests.tiny.aura_flow import aura_flow
from visalign.rollout import Prompts

TEXT = (Path(__file__).parents[1] / "docs" / "families.md").read_text(encoding="utf-8")
FAMILY, TEST = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


class TestAuraFlow(Conformance):
    build = staticmethod(aura_flow)
    part = "single_transformer_blocks"
    family = "aura_flow:AuraFlow"
    options: ClassVar[dict[str, Any]] = {"max_sequence_length": 12}

    def arguments(self, prompts: Prompts, guidance: float) -> dict[str, Any]:
        return {"guidance_scale": guidance, "max_sequence_length": 12}

    @pytest.fixture(scope="class", autouse=True)
    def example(self, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
        """The example as the file that a user would write, where Python finds it."""
        folder = tmp_path_factory.mktemp("mine")
        (folder / "aura_flow.py").write_text(FAMILY, encoding="utf-8")
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(folder)
            yield


def test_the_written_test_is_the_one_that_runs_here() -> None:
    lines = {line.partition("  #")[0].strip() for line in TEST.splitlines() if "=" in line or "return" in line}
    source = Path(__file__).read_text(encoding="utf-8").replace(": ClassVar[dict[str, Any]]", "")
    assert lines <= {line.strip() for line in source.splitlines()}


@pytest.mark.parametrize("file", re.findall(r"`(\w+\.py)`", TEXT))
def test_files_that_it_names_exist(file: str) -> None:
    assert (Path(__file__).parents[1] / "visalign" / "families" / file).is_file() or file == "aura_flow.py"
