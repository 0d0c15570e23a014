"""Who says what a segment shows."""
