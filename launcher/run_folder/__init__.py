"""What a run's folder records: launches, attempts, statuses. Standard library only."""
