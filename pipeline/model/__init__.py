"""A model in memory and the log-probs it computes: the same code for scoring and for training.

In: a model folder (`identity.Reference`) and token sequences. Out: one log-prob per completion token, with gradients in training.
Start at forward.py: `Forward` chooses how sequences share a forward pass and computes it. weights.py loads frozen models,
trainable.py loads what is trained.
"""
