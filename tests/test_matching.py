"""Losses on the forward process against closed forms and identities, for flows and for variance-preserving models."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from visalign.losses import bradley_terry
from visalign.matching import Space, error, likelihood, negative_aware, optimality, preference_margin
from visalign.paths import Flow, Path, VariancePreserving, endpoints, mix, prediction_from

TABLE = torch.linspace(0.999, 0.01, 50, dtype=torch.float64)
PATHS = {
    "flow": (Flow(), torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)),
    "epsilon": (VariancePreserving(TABLE, "epsilon"), torch.tensor([5.0, 20.0, 40.0], dtype=torch.float64)),
    "v": (VariancePreserving(TABLE, "v"), torch.tensor([5.0, 20.0, 40.0], dtype=torch.float64)),
}


def drawn(path: Path, t: Tensor) -> dict[str, Tensor]:
    """Clean samples (3, 2, 4), their mixture with noise, and two predictions."""
    torch.manual_seed(0)
    clean, noise, prediction, old = torch.randn(4, 3, 2, 4, dtype=torch.float64)
    x, target = mix(path, clean, noise, t), prediction_from(path, clean, noise, t)
    return {"x": x, "clean": clean, "target": target, "t": t, "prediction": prediction.requires_grad_(), "old": old}


def nft(path: Path, rows: dict[str, Tensor], share: Tensor, beta: float, space: Space) -> Tensor:
    return negative_aware(path, **rows, share=share, beta=beta, space=space)


@pytest.mark.parametrize("name", PATHS)
def test_nft_is_linear_matching_with_a_proximal_term(name: str) -> None:
    path, t = PATHS[name]
    rows, share, beta = drawn(path, t), torch.tensor([0.1, 0.5, 0.8], dtype=torch.float64), 0.7
    delta = rows["prediction"] - rows["old"]
    constant = error(rows["old"], rows["target"]) / beta
    linear = 2 * (2 * share - 1) * (delta * (rows["old"] - rows["target"])).flatten(1).mean(1)
    expected = constant + linear + beta * delta.square().flatten(1).mean(1)
    assert torch.allclose(nft(path, rows, share, beta, "prediction"), expected, rtol=1e-12)


@pytest.mark.parametrize("name", PATHS)
def test_nft_of_clean_samples_against_the_authors_formula(name: str) -> None:
    path, t = PATHS[name]
    rows, share, beta = drawn(path, t), torch.tensor([0.1, 0.5, 0.8], dtype=torch.float64), 0.7
    found = nft(path, rows, share, beta, "clean")
    sides = beta * rows["prediction"] + (1 - beta) * rows["old"], (1 + beta) * rows["old"] - beta * rows["prediction"]
    errors = [endpoints(path, rows["x"], said, t)[0] - rows["clean"] for said in sides]
    by_hand = [e.square().flatten(1).mean(1) / e.abs().flatten(1).mean(1) for e in errors]
    assert torch.allclose(found, (share * by_hand[0] + (1 - share) * by_hand[1]) / beta)
    gradient = torch.autograd.grad(found.sum(), rows["prediction"])[0]
    wanted = torch.autograd.grad(
        sum(
            (w * e.square().flatten(1).mean(1) / e.detach().abs().flatten(1).mean(1)).sum()
            for w, e in zip((share, 1 - share), errors, strict=True)
        )
        / beta,
        rows["prediction"],
    )[0]
    assert torch.allclose(gradient, wanted), "the size of the error is a constant"


def test_nft_at_the_old_policy_points_where_awm_does() -> None:
    path, t = PATHS["flow"]
    rows, advantage, most = drawn(path, t), torch.tensor([-3.0, 0.5, 5.0], dtype=torch.float64), 5.0
    rows["old"] = rows["prediction"].detach()
    loss = most * nft(path, rows, optimality(advantage, most), 1.0, "prediction").mean()
    surrogate = likelihood(error(rows["prediction"], rows["target"]), t, "uniform")
    awm = -(advantage * (surrogate - surrogate.detach()).exp()).mean()
    a, b = (torch.autograd.grad(value, rows["prediction"])[0] for value in (loss, awm))
    assert torch.allclose(a, b, rtol=1e-12)


def test_optimality_in_every_mode() -> None:
    advantage = torch.tensor([-10.0, -2.5, 0.0, 2.5, 10.0])
    expected = {
        "all": [0.0, 0.25, 0.5, 0.75, 1.0],
        "positive": [0.5, 0.5, 0.5, 0.75, 1.0],
        "negative": [0.0, 0.25, 0.5, 0.5, 0.5],
        "one": [0.5, 0.5, 0.5, 0.6, 0.6],
        "binary": [0.4, 0.4, 0.5, 0.6, 0.6],
    }
    for mode, values in expected.items():
        torch.testing.assert_close(optimality(advantage, 5.0, mode), torch.tensor(values))  # pyright: ignore[reportArgumentType]


def test_awm_weightings_by_hand() -> None:
    errors, t = torch.tensor([0.0, 0.16]), torch.tensor([0.3, 0.5])
    for weighting, value in {"uniform": 0.16, "t": 0.08, "t2": 0.04, "huber": 0.2, "ghuber": 0.5 / 0.25 * 0.16**0.25}.items():
        found = likelihood(errors, t, weighting)  # pyright: ignore[reportArgumentType]
        assert found[0] == 0
        assert found[1].item() == pytest.approx(-value, rel=0.01)
    assert torch.allclose(likelihood(errors, t, "ghuber", 0.5), 2 * likelihood(errors, t, "huber"), atol=1e-6)


def test_the_preference_margin_has_the_sign_of_who_is_explained_better() -> None:
    reference = torch.tensor([1.0, 1.0, 1.0, 1.0])  # two pairs: firsts, then seconds
    errors = torch.tensor([0.9, 1.1, 1.0, 0.8])
    margin = preference_margin(errors, reference, 10.0)
    torch.testing.assert_close(margin, torch.tensor([0.5, -1.5]))
    assert bradley_terry(preference_margin(reference, reference, 10.0)).tolist() == pytest.approx([math.log(2)] * 2)
