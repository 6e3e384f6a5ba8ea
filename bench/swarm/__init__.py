"""This client and other systems side by side: the same model, data, steps and shaped links, in one run."""
