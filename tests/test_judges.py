"""Judges in this process: what they say is the model's own, whatever the batch, and carries gradients to the pictures."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from visalign.errors import UserError
from visalign.judges import LocalJudge, Question, load_judge
from visalign.questions import CAPTION, PAIR, POINT, REASON, before_verdict, fill


@pytest.fixture(scope="module")
def judge(tiny_vlm: str) -> LocalJudge:
    found = load_judge(tiny_vlm, batch=2)
    assert isinstance(found, LocalJudge)
    return found


def pictures(count: int, side: int = 64) -> Tensor:
    return (torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0)) * 255).round() / 255


def test_choice_is_the_models(judge: LocalJudge) -> None:
    """Against transformers' own processor and forward."""
    image, text = pictures(1)[0], fill(POINT, "two red stars.")
    assert text.endswith("Text: two red stars. Does the picture show exactly this? Answer yes or no.")
    turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
    written = judge.processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    inputs = judge.processor(text=[written], images=[(image * 255).byte().permute(1, 2, 0).numpy()], return_tensors="pt")
    with torch.no_grad():
        spoken = judge.model(**inputs).logits[0, -1].log_softmax(-1)
    words = ("yes", "no", "star")
    expected = torch.stack([spoken[judge.tokenizer.convert_tokens_to_ids(word)] for word in words])
    torch.testing.assert_close(judge.choose([Question((image,), text)], words)[0], expected, rtol=1e-4, atol=1e-4)


def test_echo_is_the_models_loss(judge: LocalJudge) -> None:
    image = pictures(1)[0]
    (echo,) = judge.echo([Question((image,), CAPTION, "two red stars")])
    assert echo is not None
    assert echo.tokens == ["two", "red", "stars"]
    inputs = judge._inputs([Question((image,), CAPTION, "two red stars")])
    labels = inputs["input_ids"].clone()
    labels[:, :-3] = -100
    with torch.no_grad():
        loss = judge.model(**inputs, labels=labels).loss
    torch.testing.assert_close(-echo.log_probs.mean(), loss, rtol=1e-4, atol=1e-4)


def test_answers_do_not_depend_on_the_batch(judge: LocalJudge) -> None:
    """Texts of different lengths share batches of two; pictures come in two sizes, and twice in one question."""
    one, two, three = pictures(3)
    large = pictures(1, 96)[0]
    questions = [
        Question((one,), fill(POINT, "a star")),
        Question((two, three), fill(PAIR, "two red circles and a blue ring")),
        Question((large,), fill(REASON, "a cross"), "the colour is wrong. Answer:"),
    ]
    together = judge.choose(questions, ("yes", "no"))
    alone = torch.cat([judge.choose([question], ("yes", "no")) for question in questions])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    texts = judge.write(questions, 5)
    assert texts == [judge.write([question], 5)[0] for question in questions]


def test_gradients_reach_the_picture(judge: LocalJudge) -> None:
    assert judge.differentiable
    image = pictures(1)[0].clamp(0.1, 0.9).requires_grad_()
    ask = lambda at: judge.choose([Question((at,), fill(POINT, "a star"))], ("yes", "no"))[0]  # noqa: E731
    odds = ask(image) @ torch.tensor([1.0, -1.0])
    (gradient,) = torch.autograd.grad(odds, image)
    step = 0.05 * gradient / gradient.norm()
    with torch.no_grad():
        measured = (ask(image + step) - ask(image - step)) @ torch.tensor([1.0, -1.0]) / 0.1
    torch.testing.assert_close(measured, gradient.norm(), rtol=5e-2, atol=1e-5)
    assert not any(p.requires_grad for p in judge.parameters())


def test_a_word_without_a_token_is_refused(judge: LocalJudge) -> None:
    with pytest.raises(UserError, match="no token 'maybe'"):
        judge.choose([Question((pictures(1)[0],), "?")], ("yes", "maybe"))


def test_what_is_no_judge_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be loaded as a vision-language model"):
        load_judge(str(tmp_path))
    with pytest.raises(UserError, match="cannot be loaded as a vision-language model"):
        load_judge("toybox/clip")


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ("the colour is wrong. answer: no", "the colour is wrong. answer:"),
        ("All is right. Answer: Yes.", "All is right. Answer:"),
        ("I cannot tell", "I cannot tell. Answer:"),
        ("", "Answer:"),
    ],
)
def test_before_verdict(said: str, kept: str) -> None:
    assert before_verdict(said) == kept


def test_wrong_options_of_a_server() -> None:
    with pytest.raises(UserError, match="unexpected keyword argument 'tiemout'"):
        load_judge("auto", {"url": "http://localhost:1/v1", "tiemout": 3})
