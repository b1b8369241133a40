"""Measuring reward models and policies."""
