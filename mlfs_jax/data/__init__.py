"""Data: tasks (what is read, which metric), encoding (text to tokens), batches (order and padding)."""

from mlfs_jax.data.batches import BUCKETS, Batches, eval_batches, prompt_batches
from mlfs_jax.data.encode import Encoded, encode, load_task
from mlfs_jax.data.encode_language import encode_lm, encode_seq2seq
from mlfs_jax.data.encoded import fingerprint
from mlfs_jax.data.tasks import Examples, Task, get_task, task_names
from mlfs_jax.data.tokenizer import load_tokenizer, specials

__all__ = [
    "BUCKETS",
    "Batches",
    "Encoded",
    "Examples",
    "Task",
    "encode",
    "encode_lm",
    "encode_seq2seq",
    "eval_batches",
    "fingerprint",
    "get_task",
    "load_task",
    "load_tokenizer",
    "prompt_batches",
    "specials",
    "task_names",
]
