"""What a started run is doing: the state of its jobs, shown as tables."""
