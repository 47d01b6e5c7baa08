"""The sizes of the tiny models of ``zoo.py``, by the names that configs of transformers use.

``TEXT``, ``VISION`` and ``TOP`` replace sizes in the LLM, the vision encoder and the config itself. ``CHANGES`` names
what a type needs besides.
"""

from __future__ import annotations

from typing import Any

PAD, BOS, START, END, VIDEO, IMAGE, VOCABULARY = 0, 1, 196, 197, 198, 199, 200
WORDS = range(5, 180)
LAYERS = 4

SHARED = {
    "num_channels": 3,
    "in_channels": 3,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": LAYERS,
    "depth": LAYERS,
}
TEXT = SHARED | {
    "vocab_size": VOCABULARY,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": 2,
    "sliding_window": 512,
    "sliding_window_size": 512,
    "attention_chunk_size": 512,
    "moe_intermediate_size": 32,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "moe_topk": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "shared_expert_intermediate_size": 32,
    "shared_experts_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "dense_intermediate_size": 96,
    "intermediate_size_mlp": 96,
    "share_expert_dim": 32,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCABULARY,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "index_topk": 512,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "laurel_rank": 8,
    "num_kv_shared_layers": 0,
    "rotary_dim": 8,
    "global_head_dim": 16,
    "unpadded_vocab_size": VOCABULARY,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 16,
    "num_sliding_attention_heads": 4,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "ssm_state_size": 8,
    "n_groups": 2,
    "max_window_layers": LAYERS,
    "moe_shared_expert_intermediate_size": 32,
    "moe_hidden_size": 64,
    "additional_vocab_size": 8,
    "chunk_size": 16,
    "linear_head_dim": 8,
    "linear_num_heads": 4,
    "hc_lowrank": 8,
    "ple_embed_dim": 16,
    "ngram_vocab_size_base": 64,
    "make_ngram_vocab_size_divisible_by": 8,
    "split_ngram_parts": 1,
    "block_multiple_of": 8,
    "merger_hidden_size": 64,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
}
VISION = SHARED | {
    "hidden_size": 32,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "out_hidden_size": 64,
    "text_hidden_size": 64,
    "embed_dim": 32,
    "projection_dim": 64,
    "projection_hidden_dim": 64,
    "num_position_embeddings": 64,
    "deepstack_visual_indexes": [0, 1, 2],
    "fullatt_block_indexes": [1, 2, 3],
    "window_size": 56,
    "max_position_embeddings": 64,
    "pos_emb_height": 8,
    "pos_emb_width": 8,
    "mlp_dim": 64,
    "output_channels": 32,
    "global_attn_indexes": [1, 3],
    "num_patches": 64,
    "projector_hidden_size": 64,
    "vision_output_dim": 64,
    "projector_input_dim": 64,
    "projector_output_dim": 64,
    "position_embedding_size": 64,
    "vocab_size": 32,
    "projection_intermediate_size": 64,
    "drop_path_rate": 0.0,
    "posemb_grid_size": 8,
    "max_img_size": 128,
    "pad_token_id": 0,
}
TOP = {
    "image_token_id": IMAGE,
    "image_token_index": IMAGE,
    "video_token_id": VIDEO,
    "video_token_index": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
    "image_start_token_id": START,
    "image_end_token_id": END,
    "video_start_token_id": 194,
    "video_end_token_id": 195,
    "boi_token_id": START,
    "boi_token_index": START,
    "eoi_token_id": END,
    "eoi_token_index": END,
    "audio_token_id": 193,
    "audio_token_index": 193,
    "boa_token_id": 192,
    "eoa_token_id": 191,
    "eoa_token_index": 191,
    "audio_start_token_id": 190,
    "audio_end_token_id": 189,
    "projector_hidden_size": 64,
    "projection_hidden_size": 64,
    "merged_hidden_size": 64,
    "out_hidden_size": 64,
    "tie_word_embeddings": False,
    "image_bos_token_id": START,
    "audio_bos_token_id": 188,
    "im_start_id": START,
    "im_end_id": END,
    "im_newline_id": 187,
    "image_patch_id": IMAGE,
    "low_res_image_start_token_id": START,
    "frame_start_token_id": 186,
    "frame_end_token_id": 185,
    "vision_hidden_size": 32,
}

# What a type needs besides, at the path of its config: {type: {path: value}}. "" is the config itself.
PIXTRAL = "pixtral"
WINDOWED = {"layer_types": ["window_attention", "full_attention"] * 2}
SAM = {"num_pos_feats": 16, "downsample_channels": [32, 32]}
VQ = {"base_channels": 32, "channel_multiplier": [1, 1], "num_embeddings": 32, "latent_channels": 8, "embed_dim": 8}
OMNI_AUDIO = {
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "d_model": 16,
    "output_dim": 64,
    "max_source_positions": 32,
    "downsample_hidden_size": 8,
    "num_mel_bins": 16,
}
ROPE = {"rope_type": "default", "rope_theta": 1e4}
MLA = {
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "head_dim": 16,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
}
MROPE = ("glm4v_text", "qwen3_vl_text", "qwen2_vl_text", "qwen3_5_text")
CHANGES: dict[str, dict[str, dict[str, Any]]] = {
    "aria": {"": {"projector_patch_to_query_dict": {64: 9}, "max_value_projector_patch_to_query_dict": 9}},
    "cohere_compass": {
        "text_config": {
            "rope_parameters": {
                "full_attention": ROPE | {"mrope_section": [2, 3, 3]},
                "sliding_attention": ROPE | {"mrope_section": [2, 3, 3]},
            }
        }
    },
    "deepseek_ocr2": {
        "text_config": {"mlp_layer_types": ["dense", "sparse"] * 2},
        "vision_config.sam_config": SAM | {"output_channels": 32},
    },
    "deepseek_vl_hybrid": {"high_res_vision_config": {"num_pos_feats": 16, "scale": 1.0}},
    "dots3_note": {
        "text_config": {"num_key_value_heads": 4} | {f"swa_{name}": size for name, size in MLA.items()},
        "vision_config": {
            "num_local_experts": 4,
            "adapter_in_dim": 32,
            "adapter_out_dim": 64,
            "mlp_layer_types": ["dense", "sparse"] * 2,
        },
        "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 64},
    },
    "ernie4_5_vl_moe": {"text_config": {"rope_parameters": ROPE | {"mrope_section": [3, 3, 2]}}},
    "gemma4": {"vision_config": {"model_type": "gemma4_vision", "pooling_kernel_size": 2}},
    "gemma4_unified": {
        "vision_config": {
            "model_type": "gemma4_unified_vision",
            "mm_embed_dim": 32,
            "output_proj_dims": 32,
            "mm_posemb_size": 64,
            "pooling_kernel_size": 1,
        }
    },
    "glm5_next": {"text_config": {"num_key_value_heads": 4, "qk_rope_head_dim": 0, "head_dim": 0}},
    "granite4_vision": {
        "": {
            "downsample_rate": "2/4",
            "deepstack_layer_map": [[-2, 0], [-3, 1]],
            "spatial_target_layers": [0, 1, 2, 3],
            "image_grid_pinpoints": [[256, 512], [512, 256]],
        },
        "vision_config": {"hidden_size": 64},  # its Q-Former takes one head for each 64
        "qformer_config": {"intermediate_size": 32},
    },
    "janus": {
        "vision_config": {"mlp_ratio": 2.0, "num_image_tokens": 64, "depth": 2},
        "vq_config": VQ | {"projection_dim": 64, "image_token_embed_dim": 64, "num_patches": 8},
    },
    "lighton_ocr": {"vision_config": {"model_type": PIXTRAL, "image_size": 224}},
    "llama4": {"vision_config": {"intermediate_size": 128, "projector_input_dim": 64}},
    "inkling_mm_model": {"vision_config": {"n_layers": LAYERS, "patch_size": 8}},
    "inkling2": {"vision_config": {"temporal_patch_size": 1}},
    "minicpmv4_6": {"": {"insert_layer_id": 1}, "vision_config": {"insert_layer_id": 1}},
    "minicpmv4_7": {"": {"insert_layer_id": 1}, "vision_config": {"insert_layer_id": 1}},
    "minicpm_ocr": {"": {"insert_layer_id": 1}, "vision_config": {"insert_layer_id": 1}},
    "mistral_large4": {"vision_config": {"image_size": 224}, "text_config": {"num_key_value_heads": 4}},
    "kimi_k25": {"": {"projection_hidden_size": 32}, "text_config": {"num_key_value_heads": 4, "head_dim": 8}},
    "got_ocr2": {"": {"image_seq_length": 4}, "vision_config": SAM | {"output_channels": 32}},
    "pp_chart2table": {"": {"image_seq_length": 4}, "vision_config": SAM | {"output_channels": 32}},
    "molmo2": {
        "adapter_config": {
            "vision_feature_layer": [3, 1],
            "hidden_size": 32,
            "head_dim": 8,
            "intermediate_size": 64,
            "text_hidden_size": 64,
        }
    },
    "qwen2_5_omni_thinker": {"": {"vision_start_token_id": START}, "audio_config": OMNI_AUDIO},
    "qwen3_omni_moe_thinker": {"": {"vision_start_token_id": START}, "audio_config": OMNI_AUDIO},
    "muse_spark": {
        "": {"out_hidden_size": 128},  # of its 2 x 2 patches
        "vision_config": WINDOWED,
        "audio_config": {"hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1], "out_hidden_size": 64},
    },
    "muse_glimmer": {"": {"out_hidden_size": 128}, "vision_config": WINDOWED},
    "qwen4_exp": {
        "text_config": {
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 16,
            "indexer_budget": 512,
            "indexer_compress_ratio": 4,
        }
    },
    "unlimited_ocr": {"vision_config.sam_config": SAM},
}
