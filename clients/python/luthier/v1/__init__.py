"""Generated messages and stubs of the public API, package luthier.v1."""
