"""What several tests share: models to try, how to run and compare them, and the programs that they start."""
