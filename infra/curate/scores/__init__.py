"""What is measured of a segment: a class a score."""
