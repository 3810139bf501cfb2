"""Load datasets from files, data frames and generators, and make batches of them."""
