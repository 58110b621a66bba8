"""What `diagnose` measures and says."""
