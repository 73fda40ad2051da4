"""Looks at this machine, the Python of the jobs, Slurm and the Hub: `muster doctor`. May import all but `launcher.commands`."""
