"""The data worker, without torch: builds versions and renders them. Run `python -m luthier.data.worker`."""
