"""The data engine measured: the cut stage beside PySceneDetect's own command, and what 90 million clips would take."""
