"""
Every name of TRL's and transformers' that this package relies on, and that they do not promise to keep: what another
version has to keep. A training does not read it; the contract test holds TRL, and this package's code, to it.
"""

# Methods that are overridden or called, with their parameters. Those of `GRPOTrainer` may be transformers' own.
METHODS = {
    "trl.GRPOTrainer": {
        "_calculate_rewards": ("inputs", "prompts", "completions", "completion_ids_list"),
        "_compute_loss": ("model", "inputs"),
        "_generate": ("prompts",),
        "_generate_and_score_completions": ("inputs",),
        "_generate_single_turn": (
            "prompt_ids", "images", "multimodal_fields", "num_generations", "has_tool_images",
        ),
        "_get_dataloader": (
            "dataset", "description", "batch_size", "sampler_fn", "is_training", "dataloader_key",
        ),
        "_get_output_dir": ("trial",),
        "_get_per_token_logps_and_entropies": (
            "model", "input_ids", "attention_mask", "logits_to_keep", "batch_size", "compute_entropy",
            "compute_aux_loss", "pixel_values", "image_grid_thw", "num_images", "pixel_attention_mask",
            "spatial_shapes", "num_tiles", "image_sizes", "token_type_ids", "mm_token_type_ids", "image_position_ids",
        ),
        "_get_train_sampler": ("dataset",),
        "_load_from_checkpoint": ("resume_from_checkpoint", "model"),
        "_load_optimizer_and_scheduler": ("checkpoint",),
        "_prepare_inputs": ("generation_batch",),
        "_push_from_checkpoint": ("checkpoint_folder",),
        "_save_checkpoint": ("model", "trial"),
        "_set_signature_columns_if_needed": (),
        "_tokenize_prompts": ("prompts",),
        "create_model_card": ("model_name", "dataset_name", "tags"),
        "evaluation_loop": (
            "dataloader", "description", "prediction_loss_only", "ignore_keys", "metric_key_prefix",
        ),
        "get_batch_samples": ("epoch_iterator", "num_batches", "device"),
        "push_to_hub": ("commit_message", "blocking", "token", "revision", "kwargs"),
        "save_model": ("output_dir", "_internal_call"),
        "train": ("resume_from_checkpoint", "trial", "ignore_keys_for_eval"),
    },
    "trl.generation.vllm_generation.VLLMGeneration": {
        "_iter_named_params": (),
        "generate": ("prompts", "images", "num_generations", "profiler"),
        "sync_weights": (),
    },
    "trl.trainer.utils.RepeatSampler": {
        "__init__": ("data_source", "mini_repeat_count", "batch_size", "repeat_count", "shuffle", "seed"),
    },
}  # fmt: skip

FUNCTIONS = {
    "trl.trainer.utils.add_fused_lm_head": ("model", "temperature", "cast_lm_head_to_fp32", "outputs"),
    "trl.trainer.utils.nanstd": ("tensor", "dim", "keepdim"),
    "trl.trainer.utils.use_adapter": ("model", "adapter_name"),
    "trl.models.utils.disable_gradient_checkpointing": ("model", "gradient_checkpointing_kwargs"),
}

# Attributes of a trainer, and what is relied on.
ATTRIBUTES = {
    "_buffered_inputs": "TRL sets it once per generation batch, to its micro-batches, and reads them from it",
    "_entropy_bonus_enabled": "the loss then is a mean over the tokens of a micro-batch",
    "_is_vlm": "rows have images",
    "_last_loaded_step": "the step whose weights the engine has, -1 = none",
    "_logs": "completions of the last batch with their advantages",
    "_metrics": "by mode and name a list, to which the newest numbers are appended",
    "_pending_extra_logs": "what reward functions logged of each row, until the batch is logged",
    "_signature_columns": "columns that are let through from the dataset",
    "_step": "micro-steps so far; a multiple of those of a generation batch generates",
    "_tokenizer": "the text part of the processing class",
    "aux_loss_enabled": "a router's loss is asked of the forward pass",
    "beta": "weight of the KL term, 0 = no reference model",
    "callback_handler": "its list of callbacks",
    "data_collator": "makes the rows of a batch",
    "environment_factories": "environments make prompts, or `None`",
    "eos_token_ids": "tokens that end a completion",
    "gather_function": "gathers the losses of an evaluation",
    "generation_config": "what transformers' generate is told",
    "generation_kwargs": "and what it is told beside it",
    "importance_sampling_level": "of tokens or sequences",
    "is_deepspeed_enabled": "weights are saved in DeepSpeed's format",
    "is_fsdp_enabled": "weights are saved in FSDP's format",
    "is_in_train": "an evaluation belongs to a training",
    "loss_type": "which normaliser the loss has",
    "multi_objective_aggregation": "how several rewards become one advantage",
    "num_generations": "completions of a prompt",
    "num_generations_eval": "and in an evaluation",
    "num_iterations": "how often a generation batch is trained on",
    "pad_to_multiple_of": "of which width batches are",
    "ref_model": "the reference model, `None` = the policy with another adapter",
    "reward_func_names": "one for each column of the rewards",
    "reward_funcs": "called by the name of the attribute, in each batch anew",
    "reward_weights": "one for each column of the rewards",
    "rollout_func": "samples in TRL's place, or `None`",
    "scale_rewards": "what advantages are divided by",
    "tools": "completions may call them",
    "top_entropy_quantile": "the loss then has a quantile of the micro-batch",
    "use_vllm": "vLLM samples",
    "vllm_importance_sampling_clip_max": "bound of the correction",
    "vllm_importance_sampling_clip_min": "bound of the correction",
    "vllm_importance_sampling_correction": "read when a batch is scored, and when the loss is computed",
    "vllm_importance_sampling_mode": "how the correction is made",
}
# Of a model's configuration.
MODEL_ATTRIBUTES = {"_name_or_path"}
# Of TRL's object around vLLM: `gather_params`, a context in which sharded parameters are whole.
GENERATION_ATTRIBUTES = {"_dist"}
