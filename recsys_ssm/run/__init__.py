"""Assemble one run's objects and write the files of its folder."""
