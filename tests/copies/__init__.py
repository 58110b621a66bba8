"""Copies of patched models."""
