"""plan.py - the published shapes of Qwen3-VL, for when the hub cannot be asked."""
from __future__ import annotations

# hidden, layers, heads, ff, tied head | vision: depth, hidden, ff, DeepStack after these layers
PUBLISHED = {
    "Qwen/Qwen3-VL-2B": ((2048, 28, 16, 6144, True), (24, 1024, 4096, [5, 11, 17])),
    "Qwen/Qwen3-VL-4B": ((2560, 36, 32, 9728, True), (24, 1024, 4096, [5, 11, 17])),
    "Qwen/Qwen3-VL-8B": ((4096, 36, 32, 12288, False), (27, 1152, 4304, [8, 16, 24])),
    "Qwen/Qwen3-VL-32B": ((5120, 64, 64, 25600, False), (27, 1152, 4304, [8, 16, 24])),
}


def published(name: str) -> dict | None:
    """What config.json of a published model says of its shape; None for another name."""
    name = name.removesuffix("-Instruct").removesuffix("-Thinking")
    if name not in PUBLISHED:
        return None
    (hidden, layers, heads, ff, tied), (depth, width, vision_ff, deepstack) = PUBLISHED[name]
    return {
        "model_type": "qwen3_vl", "tie_word_embeddings": tied,
        "image_token_id": 151655, "video_token_id": 151656,
        "text_config": {
            "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
            "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": ff,
            "vocab_size": 151936, "tie_word_embeddings": tied, "rope_theta": 5_000_000,
            "max_position_embeddings": 262144, "rms_norm_eps": 1e-6,
            "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20],
                             "rope_type": "default"}},
        "vision_config": {
            "depth": depth, "hidden_size": width, "intermediate_size": vision_ff, "num_heads": 16,
            "out_hidden_size": hidden, "deepstack_visual_indexes": deepstack, "patch_size": 16,
            "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3,
            "num_position_embeddings": 2304}}
