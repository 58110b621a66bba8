"""Errors say what is wrong and what to call, and change nothing."""
