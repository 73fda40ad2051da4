"""The process group of a job, and per rank: rank variables, collectives, heartbeat, stop flag, logging. May import `conf`."""
