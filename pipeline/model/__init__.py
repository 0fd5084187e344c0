"""A model in memory and its log-probs, the same for the scorer and the trainer."""
