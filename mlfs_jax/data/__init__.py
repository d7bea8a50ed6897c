"""Data: tasks (what is read, which metric), encoding (text to tokens), batches (order and padding)."""

from mlfs_jax.data.batches import BUCKETS, Batches, eval_batches
from mlfs_jax.data.encode import Encoded, encode, load_task, load_tokenizer
from mlfs_jax.data.tasks import Examples, Task, get_task, task_names

__all__ = [
    "BUCKETS",
    "Batches",
    "Encoded",
    "Examples",
    "Task",
    "encode",
    "eval_batches",
    "get_task",
    "load_task",
    "load_tokenizer",
    "task_names",
]
