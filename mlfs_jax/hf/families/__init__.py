"""The families, one table each. To add one: write its table, add it to this line."""

from mlfs_jax.hf.families import bert, distilbert, electra, llama, roberta

FAMILIES = {module.FAMILY.name: module.FAMILY for module in (bert, roberta, distilbert, electra, llama)}

NOT_NATIVE = {
    "qwen": ("Qwen 1", "qwen2"),
    "internlm": ("InternLM 1", "internlm3"),
    "internlm2": ("InternLM 2", "internlm3"),
    "openelm": ("OpenELM", "llama"),
    "chatglm": ("ChatGLM and GLM-4 with their own code", "glm"),
    "GLMModel": ("the first GLM (GLM-2B)", "glm"),
    "GLMForConditionalGeneration": ("the first GLM (GLM-2B)", "glm"),
    "mobilellm": ("MobileLLM's own class", "llama (its shapes load as one)"),
}
"""``model_type`` or class in config.json that transformers 5 has no class for -> what it is, and the nearest family."""
