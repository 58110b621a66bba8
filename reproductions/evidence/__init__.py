"""What is said and drawn of records: statistics, claims with their verdicts, the look of the pictures."""
