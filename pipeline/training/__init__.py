"""Training: the policy alone, against cached columns. Nothing here can load a reference.

In go a prepared folder, the cache's log-probs and a config; out comes a run: checkpoints, the model with its card, and tables of
metrics, alerts and every example's log-probs.

Start with stages/commands/train.py, which reads as the order of events: run_inputs.py collects and identifies what a run is made from,
cache_join.py joins data and cache, start_check.py holds the policy's start against the cache, train_loop.py takes the steps, and
finalize_run.py writes what is left. run_estimate.py says beforehand whether a run fits and how long it
takes at least. losses/ has one pure function per loss, objective.py sums them up, policy.py is the model.
"""
