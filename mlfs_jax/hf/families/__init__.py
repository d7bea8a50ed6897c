"""The families, one table each. To add one: write its table, add it to this line."""

from mlfs_jax.hf.families import bert, distilbert, electra, roberta

FAMILIES = {module.FAMILY.name: module.FAMILY for module in (bert, roberta, distilbert, electra)}
