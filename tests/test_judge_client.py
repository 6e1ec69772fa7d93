"""Judges behind a server: equal to the ones in this process, and never a wrong score when the server misbehaves.

An untrained model may rank yes and no anywhere: the tests ask for all tokens.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.judge_server import JudgeServer, serving
from visalign.errors import UserError
from visalign.judge_client import ServerJudge
from visalign.judges import LocalJudge, Question, load_judge
from visalign.questions import CAPTION, POINT, fill


@pytest.fixture(scope="module")
def local(tiny_vlm: str) -> LocalJudge:
    found = load_judge(tiny_vlm)
    assert isinstance(found, LocalJudge)
    return found


@pytest.fixture
def server(local: LocalJudge) -> Iterator[JudgeServer]:
    with serving(local) as state:
        yield state


def asked(count: int = 3) -> list[Question]:
    images = (torch.rand(count, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 255).round() / 255
    return [Question((image,), fill(POINT, "a star")) for image in images]


def test_server_and_process_agree(local: LocalJudge, server: JudgeServer) -> None:
    remote = ServerJudge(server.url, top=100)
    assert remote.name == "tiny"
    both = [judge.choose(asked(), ("yes", "no")) for judge in (local, remote)]
    torch.testing.assert_close(*both, rtol=0, atol=1e-4)
    told = [Question(question.images, CAPTION, "two red stars") for question in asked()]
    for mine, theirs in zip(local.echo(told), remote.echo(told), strict=True):
        assert mine is not None
        assert theirs is not None
        assert mine.tokens == theirs.tokens
        torch.testing.assert_close(mine.log_probs, theirs.log_probs, rtol=0, atol=1e-4)
    assert local.write(told, 4) == remote.write(told, 4)


def test_a_busy_server_is_asked_again(local: LocalJudge, server: JudgeServer) -> None:
    server.manners = [429, 503]
    found = ServerJudge(server.url, top=100).choose(asked(1), ("yes", "no"))
    torch.testing.assert_close(found, local.choose(asked(1), ("yes", "no")), rtol=0, atol=1e-4)
    assert server.requests == 3


def test_garbage_is_no_score(server: JudgeServer) -> None:
    server.manners = ["garbage"]
    judge = ServerJudge(server.url, top=100, concurrency=1)
    with pytest.warns(UserWarning, match="can't be read"):
        found = judge.choose(asked(2), ("yes", "no"))
    assert found[0].isnan().all()
    assert found[1].isfinite().all()


def test_a_refusal_is_not_repeated(server: JudgeServer) -> None:
    server.manners = [400]
    judge = ServerJudge(server.url, top=100)
    with pytest.warns(UserWarning, match="status 400"):
        assert judge.choose(asked(1), ("yes", "no")).isnan().all()
    assert server.requests == 1


def test_a_slow_server_times_out(server: JudgeServer) -> None:
    server.manners = ["slow", "slow"]
    with pytest.warns(UserWarning, match="Timeout"):
        assert ServerJudge(server.url, top=100, timeout=0.3, retries=1).choose(asked(1), ("yes", "no")).isnan().all()


def test_a_dead_server_is_left_alone(local: LocalJudge) -> None:
    with serving(local) as state:
        judge = ServerJudge(state.url, concurrency=1, retries=0, breaker=2)
    with pytest.warns(UserWarning, match="invalid until it answers again") as said:
        scores = judge.choose(asked(3), ("yes", "no"))
    assert scores.isnan().all()
    assert judge.write(asked(3)) == [None] * 3
    assert len(said) == 1
    assert judge.failed == 2, "the breaker opens after two failures"
    with pytest.raises(UserError, match="no judge answers at"):
        ServerJudge(state.url)


def test_a_model_that_is_not_served(server: JudgeServer) -> None:
    with pytest.raises(UserError, match="doesn't serve 'huge'; it serves tiny"):
        ServerJudge(server.url, "huge")


def test_words_outside_the_listed_tokens(server: JudgeServer) -> None:
    judge = ServerJudge(server.url, top=100)
    with pytest.warns(UserWarning, match="none of maybe"):
        assert judge.choose(asked(1), ("maybe",)).isnan().all()
