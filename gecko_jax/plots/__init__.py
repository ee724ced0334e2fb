"""Plots of text lengths, training and quality."""
