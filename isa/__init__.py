"""Typebar."""
