"""The papers' tables and figures from folders of runs: collected, put together, drawn."""
