"""The data engine: raw videos in, captioned and audited shards out."""
