"""The Data service: datasets, uploads, versions and renderings."""
