"""AuraFlow with 2 × 2 pixels a latent: the model of the written example in docs/families.md."""

from __future__ import annotations

from pathlib import Path

from tests.tiny import text


def aura_flow(folder: Path) -> None:
    import diffusers

    tokenizer, encoder = text.t5(32, "UMT5EncoderModel", "UMT5Config")
    size = {"num_mmdit_layers": 1, "num_single_dit_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2, "pos_embed_max_size": 256}
    transformer = diffusers.AuraFlowTransformer2DModel(**size, sample_size=16, joint_attention_dim=32, caption_projection_dim=16)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.73)
    vae = text.vae(scaling_factor=0.13)
    diffusers.AuraFlowPipeline(tokenizer, encoder, vae, transformer, scheduler).save_pretrained(folder)
