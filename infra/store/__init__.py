"""Artifact stores: what each promises, a folder, S3, and which one a URL means."""
