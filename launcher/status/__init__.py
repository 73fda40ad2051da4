"""Shows what a started run is doing: the state of its jobs and its result, as data (state) and as tables (tables).

May import `conf`, `launcher.run_folder`, `launcher.supervise` and `launcher.slurm`.
"""
