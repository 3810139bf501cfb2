"""Turn trained models into files that run without this package."""
