"""What the stages meet on: how a file gets to disk and is believed, the prepared folder, the cache."""
