"""Shard sets as wholes: checked, split, merged, described, looked at."""
