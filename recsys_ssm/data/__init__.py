"""Files and generators to batches: one file a dataset on a few shared parts."""
