"""A real Kubernetes on one machine, without systemd, Docker or a registry. See README.md beside this file."""
