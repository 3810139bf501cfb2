"""Sweeps that resume: each job is a process, found again by a hash of its options."""
