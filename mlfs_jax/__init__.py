"""MLFS in JAX: one frozen pretrained model, many subnets for many devices."""

import importlib
import sys
import types

__version__ = "0.1.0"

# name -> where it lives; imported when it is first used (PEP 562), so that `mlfs --help` does not wait for jax
_HOME = {
    "backbone.cache": ("Cache", "init_cache"),
    "backbone.tree": ("Mask", "Output", "flatten"),
    "config": ("DecoderConfig", "EncoderConfig", "Latent", "Rope"),
    "distill": ("DistillConfig",),
    "evaluate": ("evaluate",),
    "export": ("export_adapter", "export_subnet"),
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
    "sharding": ("make_mesh", "shard_base", "shard_batch"),
    "slicing": ("slice_subnet",),
    "stages": ("Stage", "paper_stages"),
    "subnet": ("Subnet", "SubnetSpace", "make_mask"),
    "train": ("FitConfig", "Fitted", "fit", "load_run"),
}
_MODULE = {name: module for module, names in _HOME.items() for name in names}

__all__ = sorted(_MODULE)


def __getattr__(name: str):
    if name not in _MODULE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULE[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]


class _FrontDoor(types.ModuleType):
    """Importing ``mlfs_jax.generate`` would put the module in the place of the function of that name."""

    def __setattr__(self, name: str, value):
        if not (name in _MODULE and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _FrontDoor
