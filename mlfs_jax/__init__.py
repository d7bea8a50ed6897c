"""MLFS in JAX: one frozen pretrained model, many subnets for many devices."""

from mlfs_jax.front_door import open_front_door

__version__ = "0.1.0"

__all__ = open_front_door(
    __name__,
    {
        "allocator": ("keep_freed_memory",),
        "backbone.cache": ("Cache", "init_cache"),
        "backbone.tree": ("Mask", "Output", "flatten"),
        "config": ("DecoderConfig", "EncoderConfig", "Latent", "Rope"),
        "distill": ("DistillConfig",),
        "evaluate": ("evaluate",),
        "export": ("export_adapter", "export_subnet"),
        "fit_config": ("FitConfig",),
        "generate": ("GenerateConfig", "Generated", "Session", "generate", "generate_text", "stream", "stream_text"),
        "hf.export": ("ExportReport", "export_hf"),
        "hf.gguf_write": ("GGUFReport", "export_gguf"),
        "hf.load": ("from_pretrained",),
        "hf.peft": ("export_peft",),
        "importance": ("importance_order", "measure_importance", "reorder", "reorder_lora"),
        "load": ("load_subnet",),
        "lora": ("init_lora", "lora_sites", "merge_lora", "stack_stages", "unmerge_lora"),
        "model": ("Model", "build", "forward", "init_model"),
        "palette": ("Palette", "measure"),
        "plan": ("Plan", "plan"),
        "sharding": ("make_mesh", "shard_base", "shard_batch"),
        "slicing": ("slice_subnet",),
        "stages": ("Stage", "paper_stages"),
        "subnet": ("Subnet", "SubnetSpace", "make_mask"),
        "train": ("Fitted", "fit", "load_run"),
    },
)
