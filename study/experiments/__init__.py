"""Accuracy: one command a table, and the tables."""
