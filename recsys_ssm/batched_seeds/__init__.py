"""Train several seeds of a two-tower model as one computation."""
