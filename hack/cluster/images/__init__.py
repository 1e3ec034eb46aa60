"""Container images without a registry: built from the project's Dockerfiles, imported once, cloned to every node."""
