"""Models of pictures and text: masks of image tokens that see each other, windows of patches, packed pictures."""

from __future__ import annotations

import pytest
import torch
import transformers
from flash_attn.integrations import transformers as plus
from integrations import test_transformers as quick

IMAGE, START, END = 119, 117, 118
TEXT = dict(
    vocab_size=120, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, pad_token_id=0,
)  # fmt: skip
VISION = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=4
)
TOLERANCE = 4 * quick.TOLERANCE  # two models in a row


def ids_with_image(seqlen: int, first: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids, mask = torch.randint(1, 100, (2, seqlen)), torch.ones(2, seqlen, dtype=torch.int64)
    ids[:, first : first + tokens] = IMAGE
    mask[0, seqlen - 3 :] = 0
    return ids, mask


def gemma3():
    config = transformers.Gemma3Config(
        text_config=dict(TEXT, sliding_window=5, layer_types=["sliding_attention", "full_attention"]),
        vision_config=VISION, mm_tokens_per_image=4, image_token_index=IMAGE, boi_token_index=START,
        eoi_token_index=END,
    )  # fmt: skip
    ids, mask = ids_with_image(14, 3, 4)
    inputs = dict(token_type_ids=(ids == IMAGE).long(), pixel_values=torch.randn(2, 3, 16, 16))
    return transformers.Gemma3ForConditionalGeneration(config), dict(inputs, input_ids=ids, attention_mask=mask)


def llava():
    config = transformers.LlavaConfig(
        text_config=dict(TEXT, model_type="llama"), image_token_id=IMAGE, image_token_index=IMAGE,
        vision_config=dict(VISION, model_type="clip_vision_model", projection_dim=32), vision_feature_layer=-1,
    )  # fmt: skip
    ids, mask = ids_with_image(24, 0, 16)
    inputs = dict(pixel_values=torch.randn(2, 3, 16, 16), input_ids=ids, attention_mask=mask)
    return transformers.LlavaForConditionalGeneration(config), inputs


def qwen(version: str):
    """Two pictures of 4 x 4 and 4 x 8 patches, in one row of the vision model."""
    rope = dict(type="mrope", rope_type="default", mrope_section=[2, 3, 3], mrope_interleaved=True)
    config = getattr(transformers, f"Qwen{version}Config")(
        text_config=dict(TEXT, rope_scaling=rope), image_token_id=IMAGE, vision_start_token_id=START,
        vision_config=dict(
            depth=2, num_heads=2, patch_size=4, spatial_merge_size=2, temporal_patch_size=2, in_channels=3,
            window_size=16, fullatt_block_indexes=[1], intermediate_size=64, deepstack_visual_indexes=[0],
            num_position_embeddings=16, hidden_size=32, out_hidden_size=64,
        ),
    )  # fmt: skip
    ids, mask = torch.randint(1, 100, (2, 16)), torch.ones(2, 16, dtype=torch.int64)
    ids[:, 1] = START
    ids[0, 2:6] = ids[1, 2:10] = IMAGE
    mask[0, 12:] = 0
    inputs = dict(
        input_ids=ids, attention_mask=mask, mm_token_type_ids=(ids == IMAGE).int(),
        pixel_values=torch.randn(16 + 32, 3 * 2 * 4 * 4), image_grid_thw=torch.tensor([[1, 4, 4], [1, 4, 8]]),
    )  # fmt: skip
    return getattr(transformers, f"Qwen{version}ForConditionalGeneration")(config), inputs


MODELS = {"gemma3": gemma3, "llava": llava, "qwen2.5-vl": lambda: qwen("2_5_VL"), "qwen3-vl": lambda: qwen("3VL")}


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients(name):
    plus.enable()
    transformers.logging.set_verbosity_error()
    model, inputs = MODELS[name]()
    with torch.no_grad():  # as initialised, attention is nearly uniform
        for part, x in model.named_parameters():
            if x.dim() > 1 and any(word in part for word in ("q_proj", "k_proj", "qkv")):
                x.mul_(4)
    rows = inputs["attention_mask"].bool()
    eager, ours = (
        quick.results(model.eval(), attention, lambda m: m(**inputs).logits, rows) for attention in ("eager", plus.NAME)
    )
    scale = max(x.abs().max() for x in eager[1:])
    assert len(eager) == len(ours) > 50
    for i, (x, y) in enumerate(zip(eager, ours, strict=True)):
        assert (x - y).abs().max() <= TOLERANCE * (scale if i else x.abs().max())
