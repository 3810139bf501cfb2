"""The command layer: Hydra composition, errors as one line, interpolations."""
