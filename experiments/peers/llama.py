"""transformers' Llama in a benchmark's shape, for the workers that have transformers."""

from transformers import LlamaConfig


def config(shape: dict, **rest) -> LlamaConfig:
    """``shape`` in our names of sizes; "kv_heads" are as many as heads where it does not say."""
    return LlamaConfig(
        vocab_size=shape["vocab_size"],
        hidden_size=shape["embed"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape.get("kv_heads", shape["heads"]),
        intermediate_size=shape["mlp"],
        tie_word_embeddings=True,
        **rest,
    )
