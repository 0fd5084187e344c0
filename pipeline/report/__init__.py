"""The report: what an experiment's tables say, as one HTML page that needs nothing beside it."""
