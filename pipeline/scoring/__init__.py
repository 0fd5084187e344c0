"""Scoring: missing sequences come in, log-probs of the frozen reference go into the cache.

Start with scorer.py, which turns one chunk of a plan into one shard. engines/ has a file for each way to compute;
baseline.py has the plain float32 forward that they are all checked against; actors.py spreads the chunks over a Ray
cluster. vllm_worker.py runs in vLLM's own environment.
"""
