"""The toybox's vision-language models: two sizes of a `LlavaForConditionalGeneration`, for judges that answer, describe and compare.

Trained on scenes with the questions of `visalign.judges`: does the picture show this text, what is wrong, how well from 1 to 5, describe
it, which of two fits better. Three things differ from the textbook (Liu et al. 2023, arXiv 2304.08485). The vision tower first learns to
say at every patch which object has its centre there: a few thousand sentences teach no small network to see. All questions about one
picture share its tokens in one sequence, blind to each other. And one picture in eight has an object half-way between two shapes, of
which no text is true: a judge that has seen only clean scenes finds melted ones perfect.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from visalign.questions import CAPTION, PAIR, POINT, RATE, REASON, TASKS, fill
from visalign.toybox import scenes
from visalign.toybox.build_clip import augment, waves
from visalign.toybox.build_sd3 import words
from visalign.toybox.measure_vlm import measure
from visalign.toybox.pretrain import Progress, warm_then_fall
from visalign.toybox.vlm_lessons import PATCH, REASONS, RIGHT, SIDE, Pictures, asked, draw, rival

PICTURES, BATCH, MEAN, STD = 30000, 32, 0.5, 0.5
IGNORED = -100
SPECIAL = ["<pad>", "<unk>", "<end>", "<user>", "<assistant>", "<image>"]
CHAT = (
    "{% for m in messages %}{{ '<' + m.role + '>' }}{% for c in m.content %}{{ '<image>' if c.type == 'image' else c.text }}{% endfor %}"
    "{% if m.role == 'assistant' %}<end>{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@dataclass(frozen=True)
class Size:
    """Widths and depths of the two networks; steps in which the first learns to see, and then the second to speak."""

    vision: int
    vision_layers: int
    vision_heads: int
    text: int
    text_layers: int
    seeing: int
    speaking: int


SIZES = {"vlm": Size(128, 4, 2, 128, 3, 700, 4800), "vlm_small": Size(64, 2, 2, 48, 2, 700, 2400)}


def build(out: Path, work: Path, device: torch.device) -> None:
    """Train what isn't trained yet, save each size to `out` with its measured quality."""
    pictures = draw(PICTURES, seed=11)
    for name, size in SIZES.items():
        model = train(name, size, pictures, work, device, out / "clip").cpu().eval()
        folder = out / name
        model.save_pretrained(folder, safe_serialization=True)
        processor().save_pretrained(folder)
        quality = measure(folder)
        (folder / "quality.json").write_text(json.dumps(quality, indent=2) + "\n")
        print(f"{name}:", ", ".join(f"{key} {value:.3f}" for key, value in quality.items()))


# --- the model -----------------------------------------------------------------------------------------------------------


def tokenizer() -> PreTrainedTokenizerFast:
    """Word-level and lower case: every word of the prompts, of the judges' questions and of the answers is one token."""
    said = [POINT, PAIR, REASON, RATE, CAPTION, RIGHT, *TASKS.values(), *REASONS.values(), "yes no so answer 1 2 3 4 5 . , :"]
    splitter = pre_tokenizers.Whitespace()
    more = {word for text in said for word, _ in splitter.pre_tokenize_str(text.lower())} - {"{", "}", "task", "prompt"}
    vocabulary = {token: n for n, token in enumerate([*SPECIAL, *sorted(more | set(words()))])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.normalizer, core.pre_tokenizer = normalizers.Lowercase(), splitter
    named = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "<end>", "additional_special_tokens": SPECIAL[3:]}
    return PreTrainedTokenizerFast(tokenizer_object=core, padding_side="left", **named)


def processor() -> LlavaProcessor:
    side = {"height": scenes.SIZE, "width": scenes.SIZE}
    pixels = CLIPImageProcessor(size={"shortest_edge": scenes.SIZE}, crop_size=side, image_mean=[MEAN] * 3, image_std=[STD] * 3)
    more = {"patch_size": PATCH, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return LlavaProcessor(pixels, tokenizer(), chat_template=CHAT, image_token="<image>", **more)


def small_vlm(size: Size) -> LlavaForConditionalGeneration:
    """Untrained model."""
    words_of: Any = tokenizer()
    vision = CLIPVisionConfig(
        hidden_size=size.vision,
        intermediate_size=4 * size.vision,
        num_hidden_layers=size.vision_layers,
        num_attention_heads=size.vision_heads,
        image_size=scenes.SIZE,
        patch_size=PATCH,
        hidden_act="gelu",
    )
    text = LlamaConfig(
        vocab_size=len(words_of),
        hidden_size=size.text,
        intermediate_size=3 * size.text,
        num_hidden_layers=size.text_layers,
        num_attention_heads=max(2, size.text // 32),
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=words_of.eos_token_id,
        pad_token_id=words_of.pad_token_id,
    )
    image = {"image_token_index": words_of.convert_tokens_to_ids("<image>"), "image_seq_length": SIDE**2, "vision_feature_layer": -1}
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, tie_word_embeddings=True, **image))
    table = model.model.vision_tower.embeddings.position_embedding.weight
    table.data[1:] = 0.1 * waves(SIDE, size.vision)
    return model


# --- training --------------------------------------------------------------------------------------------------------------


class Seer(nn.Module):
    """Two heads on the patches' features, for training alone: which object's shape and colour has its centre here, if any."""

    def __init__(self, width: int):
        super().__init__()
        self.shape, self.colour = nn.Linear(width, len(scenes.SHAPES) + 1), nn.Linear(width, len(scenes.COLOURS))

    def loss(self, features: Tensor, centres: Sequence[Sequence[tuple[int, int, int]]]) -> Tensor:
        """features: (B, P, D). The few centres weigh as much as all other patches together."""
        shape = torch.full(features.shape[:2], len(scenes.SHAPES), device=features.device)
        at = torch.tensor([(n, *centre) for n, found in enumerate(centres) for centre in found], device=features.device)
        shape[at[:, 0], at[:, 1]] = at[:, 2]
        weight = torch.ones(len(scenes.SHAPES) + 1, device=features.device)
        weight[-1] = len(at) / shape.numel()
        colour = F.cross_entropy(self.colour(features[at[:, 0], at[:, 1]]).float(), at[:, 3])
        return F.cross_entropy(self.shape(features).float().flatten(0, 1), shape.flatten(), weight) + colour


def train(name: str, size: Size, pictures: Pictures, work: Path, device: torch.device, clip: Path) -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    model, seer = small_vlm(size), Seer(size.vision)
    tower = model.model.vision_tower
    if CLIPVisionConfig.from_pretrained(clip).hidden_size == size.vision:
        tower.load_state_dict(CLIPVisionModel.from_pretrained(clip).state_dict())
    nn.Module.to(model, device)
    seer.to(device)
    parameters = [*model.parameters(), *seer.parameters()]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": 0.05},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, 1e-3, (0.9, 0.98))
    progress = Progress(work / f"{name}.pt", {"model": model, "seer": seer, "optimizer": optimizer})
    writer = tokenizer()
    for step in progress.steps(size.seeing + size.speaking):
        speaks = step >= size.seeing
        tower.requires_grad_(not speaks)
        stage, done = (size.speaking, step - size.seeing) if speaks else (size.seeing, step)
        for group in optimizer.param_groups:
            group["lr"] = 1.5e-3 * warm_then_fall(done, stage, hold=0.4)
        rng = random.Random(step)
        with torch.autocast(device.type, torch.bfloat16):
            if not speaks:
                loss = sight_loss(model, seer, pictures, device)
            else:
                loss = (pair_loss if step % 4 == 0 else speech_loss)(model, writer, pictures, rng, device)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if not speaks or step % 4:
            progress.note = {"loss": 0.95 * progress.note.get("loss", loss.item()) + 0.05 * loss.item()}
    return model


def look(model: Any, images: Tensor, device: torch.device) -> Tensor:
    """(B, P, D) features of augmented pictures, before the projector."""
    pixels = (augment(images.float() / 255) - MEAN) / STD
    return model.model.vision_tower(pixels.to(device), output_hidden_states=True).hidden_states[-1][:, 1:]


def sight_loss(model: Any, seer: Seer, pictures: Pictures, device: torch.device) -> Tensor:
    index = torch.randint(len(pictures.images), (2 * BATCH,))
    return seer.loss(look(model, pictures.images[index], device), [pictures.centres(n) for n in index.tolist()])


def speech_loss(model: Any, writer: Any, pictures: Pictures, rng: random.Random, device: torch.device) -> Tensor:
    """Every answer about a batch of pictures."""
    index = torch.randint(len(pictures.images), (BATCH,))
    questions = [asked(pictures.layouts[n], pictures.records[n], rng) for n in index.tolist()]
    return answer_loss(model, writer, project(model, pictures.images[index], device), questions)


def pair_loss(model: Any, writer: Any, pictures: Pictures, rng: random.Random, device: torch.device) -> Tensor:
    """Which of two pictures fits: one was drawn for the text, the other for one with an attribute changed."""
    index = [n for n in rng.sample(range(len(pictures.images)), BATCH) if all(o.shape != "unknown" for o in pictures.layouts[n])]
    second = [rng.random() < 0.5 for _ in index]
    wrong = torch.stack([rival(pictures.records[n], rng) for n in index])
    right, swap = pictures.images[torch.tensor(index)], torch.tensor(second)[:, None, None, None]
    shown = torch.stack([torch.where(swap, wrong, right), torch.where(swap, right, wrong)], 1).flatten(0, 1)
    questions = [[(fill(PAIR, scenes.describe(pictures.records[n])), "yes" if s else "no")] for n, s in zip(index, second, strict=True)]
    return answer_loss(model, writer, project(model, shown, device).unflatten(0, (-1, 2)).flatten(1, 2), questions)


def project(model: Any, images: Tensor, device: torch.device) -> Tensor:
    """(B, P, D) tokens of augmented pictures, from the frozen tower."""
    with torch.no_grad():
        features = look(model, images, device)
    return model.model.multi_modal_projector(features)


def answer_loss(model: Any, writer: Any, shown: Tensor, questions: Sequence[Sequence[tuple[str, str]]]) -> Tensor:
    """Cross entropy of the answers: one-word answers (with the end) weigh as much as all longer ones.

    Each row is <user>, the pictures' tokens and then all questions, of which each sees itself and what precedes the first.
    """
    device, start = shown.device, 1 + shown.shape[1]
    rows = [[_tokens(writer, q, a) for q, a in some] for some in questions]
    length = max(sum(len(ids) for ids, _ in row) for row in rows)
    ids = torch.full((len(rows), length), writer.pad_token_id)
    labels, place = torch.full_like(ids, IGNORED), torch.zeros_like(ids)
    block = torch.full_like(ids, -1)
    short = torch.zeros_like(ids, dtype=torch.bool)
    for n, row in enumerate(rows):
        at = 0
        for k, (tokens, answer) in enumerate(row):
            span = slice(at, at + len(tokens))
            ids[n, span], place[n, span], block[n, span] = torch.tensor(tokens), torch.arange(len(tokens)) + start, k
            labels[n, at + len(tokens) - answer : at + len(tokens)] = torch.tensor(tokens[-answer:])
            short[n, span] = answer == 2
            at += len(tokens)
    own = (block[:, :, None] == block[:, None, :]) & torch.ones(length, length, dtype=torch.bool).tril()
    mask = torch.zeros(len(rows), start + length, start + length, dtype=torch.bool)
    mask[:, :start, :start] = torch.ones(start, start, dtype=torch.bool).tril()
    mask[:, start:, :start], mask[:, start:, start:] = True, own
    embed = model.get_input_embeddings()
    user = embed(torch.full((len(rows), 1), writer.convert_tokens_to_ids("<user>"), device=device))
    hidden = torch.cat([user, shown.to(user.dtype), embed(ids.to(device))], 1)
    places = torch.cat([torch.arange(start).expand(len(rows), -1), place], 1).to(device)
    out = model.model.language_model(inputs_embeds=hidden, attention_mask=mask[:, None].to(device), position_ids=places).last_hidden_state
    wanted = torch.nonzero(labels[:, 1:] != IGNORED)
    logits = model.lm_head(out[wanted[:, 0], start + wanted[:, 1]]).float()
    loss = F.cross_entropy(logits, labels[wanted[:, 0], wanted[:, 1] + 1].to(device), reduction="none")
    brief = short[wanted[:, 0], wanted[:, 1] + 1].to(device)
    return loss[brief].mean() + (loss[~brief].mean() if bool((~brief).any()) else 0.0)


def _tokens(writer: Any, question: str, answer: str) -> tuple[list[int], int]:
    """Tokens of a question after the pictures and of its answer, and how many of them are the answer's, its end included."""
    said = writer(answer + "<end>").input_ids
    return writer(question + "<assistant>").input_ids + said, len(said)
