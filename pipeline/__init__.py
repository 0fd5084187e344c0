"""What the stages share: data formats, the model's forward, the cache, the losses. The stages are in stages/."""
