"""The toybox's CLIP: one folder that `open_clip` (`local-dir:`) and transformers' `CLIPModel` both load, with equal embeddings.

Trained contrastively on scenes and their prompts. Two things differ from the textbook (Radford et al. 2021, arXiv 2103.00020):
a prompt that a picture might meet although it was drawn for another is no negative (batches are full of "a star" and "a red star"), and
every picture also sees prompts that differ from its own in one attribute, because random negatives teach neither counts nor relations.
"""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from visalign.toybox import scenes
from visalign.toybox.build_sd3 import clip_tokenizer
from visalign.toybox.pretrain import Pictures, Progress, draw, warm_then_fall

STEPS, BATCH, PICTURES, NEAR_MISSES = 3000, 64, 60000, 4
EMBED, PATCH, CONTEXT = 96, 8, 14
VISION = {"width": 128, "layers": 4, "heads": 2}
TEXT = {"width": 96, "layers": 2, "heads": 2}
MEAN = STD = 0.5


def build(out: Path, work: Path, device: torch.device) -> None:
    """Train what isn't trained yet, save it to `out`/clip with its measured quality."""
    tokenizer = clip_tokenizer()
    model = train(tokenizer, work, device).cpu().eval()
    save(model, tokenizer, out / "clip")
    quality = measure(model, tokenizer, draw(960, seed=7, test=True))
    (out / "clip" / "quality.json").write_text(json.dumps(quality, indent=2) + "\n")
    print("clip:", ", ".join(f"{name} {value:.3f}" for name, value in quality.items()))


def small_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    """Untrained model. Both towers use the exact GELU, open_clip's default (transformers' is the quick one)."""
    end = len(tokenizer) - 1
    if tokenizer.eos_token_id != end or end == 2:  # open_clip pools at the highest id, transformers at eos_token_id (2: legacy meaning)
        raise ValueError(f"the end token must have the highest id {end} and not 2, got {tokenizer.eos_token_id}")
    towers = [
        {
            "hidden_size": tower["width"],
            "intermediate_size": 4 * tower["width"],
            "num_hidden_layers": tower["layers"],
            "num_attention_heads": tower["heads"],
            "hidden_act": "gelu",
            "projection_dim": EMBED,
        }
        for tower in (TEXT, VISION)
    ]
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": end, "pad_token_id": tokenizer.pad_token_id}
    model = CLIPModel(
        CLIPConfig(
            text_config=towers[0] | special | {"vocab_size": len(tokenizer), "max_position_embeddings": CONTEXT},
            vision_config=towers[1] | {"image_size": scenes.SIZE, "patch_size": PATCH},
            projection_dim=EMBED,
        )
    )
    nn.init.zeros_(model.vision_model.embeddings.class_embedding)
    model.vision_model.embeddings.position_embedding.weight.data[1:] = 0.1 * waves(scenes.SIZE // PATCH, VISION["width"])
    return model


def waves(side: int, width: int) -> Tensor:
    """(side², width) sines and cosines of both coordinates, a quarter period to four across the picture: a head start for relations."""
    place = torch.arange(side) / side
    angle = 2 * math.pi * place[:, None] * 2 ** torch.linspace(-2, 2, width // 4)
    axis = torch.cat([angle.sin(), angle.cos()], 1)
    return torch.cat([axis.repeat_interleave(side, 0), axis.repeat(side, 1)], 1)


# --- prompts that a picture does, may and does not meet ----------------------------------------------------------------


def code(record: scenes.Metadata) -> list[int]:
    """Shapes and counts (4 numbers), then colours and relation (3 numbers, -1 where the record leaves them open), however it is worded."""
    clauses = [(scenes.SHAPES.index(c["class"]), c["count"], _place(scenes.COLOURS, c.get("color"))) for c in record["include"]]
    relation = _place(scenes.RELATIONS, record["include"][0].get("position", (None,))[0])
    if clauses != sorted(clauses):
        clauses.sort()
        relation = relation if relation < 0 else relation ^ 1  # relations come in opposite pairs
    (shape, count, colour), (shape_2, count_2, colour_2) = [*clauses, (-1, 0, -1)][:2]
    return [shape, count, shape_2, count_2, colour, colour_2, relation]


def _place(names: dict[str, tuple[int, ...]], name: str | None) -> int:
    return -1 if name is None else list(names).index(name)


def compatible(a: Tensor, b: Tensor) -> Tensor:
    """Whether one scene may meet both of two codes (..., 7); what a record leaves open may be anything."""
    free = torch.tensor([False] * 4 + [True] * 3)
    return ((a == b) | (free & ((a < 0) | (b < 0)))).all(-1)


def near_misses(record: scenes.Metadata, rng: random.Random) -> list[str]:
    """Prompts that a scene of the record doesn't meet: one attribute changed in each, or the two colours swapped."""
    found: list[str] = []
    clauses = record["include"]
    colours = [clause.get("color") for clause in clauses]
    if len(colours) == 2 and None not in colours:
        swapped = [clause | {"color": colour} for clause, colour in zip(clauses, reversed(colours), strict=True)]
        found += [scenes.describe(m) for m in [record | {"include": swapped}] if not scenes.is_test(m)]
    while len(found) < NEAR_MISSES:
        _, changed = scenes.alter(record, rng)
        if not scenes.is_test(changed):  # a held-out prompt must not be learnt as a wrong one either
            found.append(scenes.describe(changed))
    return found


# --- training ----------------------------------------------------------------------------------------------------------


def train(tokenizer: CLIPTokenizer, work: Path, device: torch.device) -> CLIPModel:
    torch.manual_seed(0)
    model = small_clip(tokenizer)
    nn.Module.to(model, device)
    model.set_attn_implementation("eager")  # on a CPU and at this size, a third faster than the fused kernel
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}], 1e-3, (0.9, 0.98))
    progress = Progress(work / "clip.pt", {"model": model, "optimizer": optimizer})
    pictures = draw(PICTURES, seed=5)
    codes = torch.tensor([code(record) for record in pictures.records])
    for step in progress.steps(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * warm_then_fall(step, STEPS, hold=0.2)
        index = torch.randint(len(codes), (BATCH,))
        rng = random.Random(step)
        wrong = [miss for n in index.tolist() for miss in near_misses(pictures.records[n], rng)]
        ids = tokenizer([pictures.prompts[n] for n in index.tolist()] + wrong, padding=True, return_tensors="pt").input_ids
        pixels = (augment(pictures.batch(index)) - MEAN) / STD
        with torch.autocast(device.type, torch.bfloat16):
            image, text = features(model, pixels.to(device), ids.to(device))
        allowed = ~compatible(codes[index, None], codes[None, index]) | torch.eye(BATCH, dtype=torch.bool)
        loss = contrastive(image, text, model.logit_scale.exp(), allowed.to(device))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        model.logit_scale.data.clamp_(max=4.6052)  # exp = 100, as in the paper
        progress.note = {"loss": 0.95 * progress.note.get("loss", loss.item()) + 0.05 * loss.item()}
    return model


def features(model: CLIPModel, pixels: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Unit embeddings (B, D) and (L, D) in float32."""
    image = model.visual_projection(model.vision_model(pixels).pooler_output)
    text = model.text_projection(model.text_model(ids).pooler_output)
    return F.normalize(image.float(), dim=-1), F.normalize(text.float(), dim=-1)


def contrastive(image: Tensor, text: Tensor, scale: Tensor, allowed: Tensor) -> Tensor:
    """InfoNCE in both directions. `text` holds the B prompts, then each picture's near misses; `allowed` (B, B) the pairs that count."""
    count = len(image)
    logits = (scale * image @ text[:count].T).masked_fill(~allowed, -torch.inf)
    wrong = scale * torch.einsum("bd,bkd->bk", image, text[count:].view(count, -1, image.shape[-1]))
    target = torch.arange(count, device=image.device)
    return (F.cross_entropy(torch.cat([logits, wrong], 1), target) + F.cross_entropy(logits.T, target)) / 2


def augment(images: Tensor) -> Tensor:
    """Brightness, contrast, colour cast, softness and noise, so that a generator's imperfect pictures are read like clean ones."""
    count = len(images)
    gain, cast = 1 + 0.15 * (2 * torch.rand(count, 1, 1, 1) - 1), 0.04 * torch.randn(count, 3, 1, 1)
    images = (images - 0.5) * gain + 0.5 + cast + 0.04 * torch.randn(count, 1, 1, 1)
    soft = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)
    images = torch.lerp(images, soft, (1.5 * torch.rand(count, 1, 1, 1) - 0.5).clamp(min=0))
    return (images + 0.06 * torch.rand(count, 1, 1, 1) * torch.randn_like(images)).clamp(0, 1)


# --- saving and measuring ----------------------------------------------------------------------------------------------


def save(model: CLIPModel, tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Both formats in one folder, float32 safetensors."""
    side = {"height": scenes.SIZE, "width": scenes.SIZE}
    processor = CLIPImageProcessor(size={"shortest_edge": scenes.SIZE}, crop_size=side, image_mean=[MEAN] * 3, image_std=[STD] * 3)
    model.save_pretrained(folder, safe_serialization=True)
    CLIPProcessor(processor, tokenizer).save_pretrained(folder)
    model_cfg = {
        "embed_dim": EMBED,
        "quick_gelu": False,
        "vision_cfg": {
            "image_size": scenes.SIZE,
            "patch_size": PATCH,
            "width": VISION["width"],
            "layers": VISION["layers"],
            "head_width": VISION["width"] // VISION["heads"],
        },
        "text_cfg": {
            **TEXT,
            "context_length": CONTEXT,
            "vocab_size": len(tokenizer),
            "hf_tokenizer_name": "toybox/clip",  # any name: without one, open_clip takes its own tokenizer instead of the folder's
        },
    }
    preprocess = {"mean": [MEAN] * 3, "std": [STD] * 3, "interpolation": "bicubic", "resize_mode": "shortest"}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model_cfg, "preprocess_cfg": preprocess}, indent=2) + "\n")
    save_file(open_clip_state(model.state_dict()), folder / "open_clip_model.safetensors")


def open_clip_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a `CLIPModel` under open_clip's names."""
    found = {
        "logit_scale": state["logit_scale"],
        "token_embedding.weight": state["text_model.embeddings.token_embedding.weight"],
        "positional_embedding": state["text_model.embeddings.position_embedding.weight"],
        "text_projection": state["text_projection.weight"].T,
        "visual.class_embedding": state["vision_model.embeddings.class_embedding"],
        "visual.positional_embedding": state["vision_model.embeddings.position_embedding.weight"],
        "visual.conv1.weight": state["vision_model.embeddings.patch_embedding.weight"],
        "visual.proj": state["visual_projection.weight"].T,
    }
    norms = {
        "ln_final": "text_model.final_layer_norm",
        "visual.ln_pre": "vision_model.pre_layrnorm",
        "visual.ln_post": "vision_model.post_layernorm",
    }
    for tower, theirs, ours in ((TEXT, "", "text_model"), (VISION, "visual.", "vision_model")):
        for layer in range(tower["layers"]):
            a, b = f"{theirs}transformer.resblocks.{layer}", f"{ours}.encoder.layers.{layer}"
            norms |= {f"{a}.ln_1": f"{b}.layer_norm1", f"{a}.ln_2": f"{b}.layer_norm2", f"{a}.attn.out_proj": f"{b}.self_attn.out_proj"}
            norms |= {f"{a}.mlp.c_fc": f"{b}.mlp.fc1", f"{a}.mlp.c_proj": f"{b}.mlp.fc2"}
            for part in ("weight", "bias"):
                found[f"{a}.attn.in_proj_{part}"] = torch.cat([state[f"{b}.self_attn.{x}_proj.{part}"] for x in "qkv"])
    for a, b in norms.items():
        found |= {f"{a}.{part}": state[f"{b}.{part}"] for part in ("weight", "bias")}
    return {name: value.contiguous() for name, value in found.items()}


@torch.no_grad()
def measure(model: CLIPModel, tokenizer: CLIPTokenizer, pictures: Pictures) -> dict[str, float]:
    """Retrieval of the true prompt among 64; true against changed prompts: AUC over all pairs, accuracy within a picture by attribute."""
    rng = random.Random(0)
    everything = [record for records in scenes.prompts(test=True).values() for record in records]
    codes = torch.tensor([code(record) for record in everything])
    attributes: list[str] = []
    scores: list[Tensor] = []
    for n, record in enumerate(tqdm(pictures.records, "measure", leave=False)):
        others = torch.nonzero(~compatible(torch.tensor(code(record)), codes)).flatten().tolist()
        attribute, changed = scenes.alter(record, rng)
        texts = [scenes.describe(r) for r in (record, changed, *(everything[k] for k in rng.sample(others, 63)))]
        ids = tokenizer(texts, padding=True, return_tensors="pt").input_ids
        image, text = features(model, (pictures.batch(torch.tensor([n])) - MEAN) / STD, ids)
        attributes.append(attribute)
        scores.append(text @ image[0])
    table = torch.stack(scores)
    right, wrong = table[:, 0], table[:, 1]
    report = {
        "retrieval_1_of_64": (right > table[:, 2:].amax(1)).float().mean().item(),
        "auc_one_attribute": (right[:, None] > wrong[None]).float().mean().item(),
        "accuracy_one_attribute": (right > wrong).float().mean().item(),
    }
    for name in sorted(set(attributes)):
        rows = torch.tensor([attribute == name for attribute in attributes])
        report[f"accuracy_{name}"] = (right > wrong)[rows].float().mean().item()
    return report | {"cosine_true": right.mean().item(), "cosine_changed": wrong.mean().item()}
