"""The frozen reference, run once: engines, and who fills the cache with what they give."""
