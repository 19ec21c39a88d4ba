"""Checks of measured data, one module a subject; ``replay.quality.examine`` runs them all."""
