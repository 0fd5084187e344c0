"""Verdicts about references."""
