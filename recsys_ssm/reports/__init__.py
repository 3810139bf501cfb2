"""Make tables and figures from folders of runs."""
