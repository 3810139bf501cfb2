"""Overrides that make runs small."""

TINY = (
    "dataset.n_train=512",
    "dataset.n_val=64",
    "dataset.n_val_users=20",
    "dataset.n_test_users=20",
    "trainer.max_steps=8",
    "validations=2",
    "trainer.enable_progress_bar=false",
)
"""Overrides that make a run on an embedded dataset take a second."""

SMALL_MAMBA = ("backbone=mamba", "backbone.d_model=16", "backbone.n_layers=1")
