"""Plots: how long texts are, how training went, how good the model is."""
