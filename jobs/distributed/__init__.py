"""What every rank has: its place, its process group, collectives, heartbeat, and the request to stop."""
