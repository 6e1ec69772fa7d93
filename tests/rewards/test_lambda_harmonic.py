"""λ-Harmonic: the formula, its ends, and ALIGN as the authors' encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from visalign.features import load_dual_encoder
from visalign.rewards.lambda_harmonic import LambdaHarmonic, harmonic
from visalign.scoring import RewardInput
from visalign.toybox import styles
from visalign.vision import load_vision_encoder

PROMPTS = ["a red star", "two blue circles"]


def test_score_is_the_harmonic_mean_of_both_similarities() -> None:
    images = torch.cat([styles.drawn(prompt, {}, 1, seed=5) for prompt in PROMPTS])
    reward = LambdaHarmonic("toybox", "toybox", count=3, image_weight=0.3)
    output = reward.score(RewardInput(images, PROMPTS))
    image, text = reward.encoder.encode_images(images), reward.encoder.encode_texts(PROMPTS)
    for n, prompt in enumerate(PROMPTS):
        own = reward.encoder.encode_images(styles.drawn(prompt, {}, 3))
        subject, words = (1 + (own @ image[n]).mean()) / 2, (1 + text[n] @ image[n]) / 2
        torch.testing.assert_close(output.scores[n], 1 / (0.3 / subject + 0.7 / words))
        torch.testing.assert_close(output.components["image"][n], subject)


def test_likeness_may_be_seen_by_another_encoder() -> None:
    images = torch.cat([styles.drawn(prompt, {}, 1, seed=5) for prompt in PROMPTS])
    options: dict[str, Any] = {"references": "toybox:sparkle", "count": 3}
    own = LambdaHarmonic("toybox", **options).score(RewardInput(images, PROMPTS))
    found = LambdaHarmonic("toybox", image_checkpoint="toybox", **options).score(RewardInput(images, PROMPTS))
    seen = load_vision_encoder("toybox").encode(images).image
    known = load_vision_encoder("toybox").encode(styles.drawn(PROMPTS[0], {}, 3, style="sparkle")).image
    torch.testing.assert_close(found.components["image"][0], (1 + (known @ seen[0]).mean()) / 2)
    torch.testing.assert_close(found.components["text"], own.components["text"])
    assert (found.components["image"] != own.components["image"]).all()


def test_the_lower_of_two_decides() -> None:
    high, low = torch.tensor([0.9]), torch.tensor([0.1])
    assert harmonic(high, low, 0.5).item() == pytest.approx(0.18)
    assert harmonic(high, low, 0.0).item() == pytest.approx(0.1)
    assert harmonic(high, low, 1.0).item() == pytest.approx(0.9)
    assert harmonic(high, torch.zeros(1), 0.5).item() == pytest.approx(0, abs=1e-5)


def test_align(tmp_path: Path) -> None:
    """A text tower that sees padding unless it is masked, a temperature for a scale, and a crop out of a stretched picture."""
    from transformers import AlignConfig, AlignModel, BertTokenizerFast, EfficientNetImageProcessor

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "star", "two", "blue", "circles"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tokenizer = BertTokenizerFast(str(tmp_path / "vocab.txt"), model_max_length=12)
    text = {"vocab_size": len(words), "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    blocks = {
        "kernel_sizes": [3],
        "in_channels": [32],
        "out_channels": [64],
        "strides": [1],
        "num_block_repeats": [1],
        "expand_ratios": [1],
    }
    vision = {"image_size": 32, "hidden_dim": 16, "width_coefficient": 0.25, "depth_coefficient": 1.0, "depthwise_padding": [], **blocks}
    torch.manual_seed(0)
    model = AlignModel(AlignConfig(text_config=text, vision_config=vision, projection_dim=16, temperature_init_value=0.5)).eval()
    folder = tmp_path / "align"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    sizes = {"size": {"height": 40, "width": 40}, "crop_size": {"height": 32, "width": 32}, "do_center_crop": True, "resample": 2}
    EfficientNetImageProcessor(**sizes, rescale_factor=1 / 127.5, rescale_offset=True, do_normalize=False).save_pretrained(folder)
    encoder = load_dual_encoder(str(folder))
    assert encoder.context == 12
    assert encoder.logit_scale.exp().item() == pytest.approx(2)
    inputs = tokenizer(PROMPTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = model.get_text_features(**inputs)
    features = getattr(expected, "pooler_output", expected)
    torch.testing.assert_close(encoder.encode_texts(PROMPTS), torch.nn.functional.normalize(features, dim=-1), rtol=1e-4, atol=1e-5)
    output = LambdaHarmonic(str(folder), "toybox").score(RewardInput(torch.rand(2, 3, 64, 64), PROMPTS))
    assert output.valid.all()
