"""Checkpoint files: found, read without pickle, renamed, collapsed, and refused when they don't fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from visalign.errors import UserError
from visalign.weights import collapsed, fetch, load_weights, read_weights, renamed


def test_fetch_takes_files_and_folders(tmp_path: Path) -> None:
    (tmp_path / "b.pt").touch()
    assert fetch(str(tmp_path / "b.pt"), "a.pt") == tmp_path / "b.pt"
    assert fetch(str(tmp_path), "a.pt", "b.pt") == tmp_path / "b.pt"
    for wrong in (str(tmp_path), "/nowhere/at/all", "./nowhere"):
        with pytest.raises(UserError, match=r"a\.pt"):
            fetch(wrong, "a.pt")


@pytest.mark.parametrize("nested", ["", "state_dict", "model"])
def test_read_weights(tmp_path: Path, nested: str) -> None:
    state = {"a": torch.ones(2)}
    torch.save({nested: state, "epoch": 3} if nested else state, tmp_path / "a.pt")
    save_file(state, tmp_path / "a.safetensors")
    for name in ("a.pt", "a.safetensors"):
        assert torch.equal(read_weights(tmp_path / name)["a"], state["a"])


class Harmful:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("executed",)


def test_what_is_no_state_dict_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"a": Harmful()}, tmp_path / "code.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "text.safetensors").write_text("hello")
    for path in sorted(tmp_path.iterdir()):
        with pytest.raises(UserError, match=path.name) as caught:
            read_weights(path)
        assert "\n" not in str(caught.value)
    assert capsys.readouterr().out == ""


def test_weights_that_do_not_fit_are_named() -> None:
    layer = nn.Linear(2, 3)
    with pytest.raises(UserError, match=r"weights of it do not fit: without bias; with a foreign b; weight is \(2, 2\), expected \(3, 2\)"):
        load_weights(layer, {"weight": torch.zeros(2, 2), "b": torch.zeros(1)}, "it")
    load_weights(layer, {"weight": torch.ones(3, 2), "bias": torch.zeros(3)}, "it")
    assert layer.weight.sum() == 6


def test_rules_apply_in_turn_and_drop() -> None:
    state = {"old.1.x": torch.zeros(1), "gone.y": torch.ones(1)}
    assert list(renamed(state, [(r"^old\.", "mid."), (r"^mid\.(\d)", r"new.\1"), (r"^gone\..*", "")])) == ["new.1.x"]


def test_collapsed_is_the_chain() -> None:
    layers = nn.Sequential(nn.Linear(5, 7), nn.Dropout(0.5), nn.Linear(7, 3), *(nn.Linear(3, 3) for _ in range(9)), nn.Linear(3, 1)).eval()
    weight, bias = collapsed({f"mlp.{name}": value for name, value in layers.state_dict().items()})  # number 10 comes after 9
    x = torch.randn(4, 5)
    torch.testing.assert_close(x @ weight.T + bias, layers(x))
    assert torch.equal(collapsed(layers[0].state_dict())[0], layers[0].weight)
