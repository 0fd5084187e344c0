"""Verdicts about runs."""
