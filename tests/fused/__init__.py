"""What stands around an addition, computed with it in one kernel."""
