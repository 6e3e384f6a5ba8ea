"""This client and hivemind's Optimizer side by side: the same model, data, steps and shaped links, in one run."""
