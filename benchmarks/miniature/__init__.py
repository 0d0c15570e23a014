"""The paper in miniature: its ablations on moving shapes with tiny models, each finding a claim with a verdict."""
