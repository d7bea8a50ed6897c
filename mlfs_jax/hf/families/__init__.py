"""The families, one table each. To add one: write its table, add its name to the list."""

from importlib import import_module

_NAMES = """
    bert roberta distilbert electra
    llama mistral qwen2 qwen3 gemma gemma2 gemma3_text phi phi3 stablelm olmo olmo2 gpt_neox opt bloom gpt2 gpt_bigcode
    glm internlm3 minicpm3
"""

FAMILIES = {name: import_module(f"{__name__}.{name}").FAMILY for name in _NAMES.split()}
"""``model_type`` -> table."""

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
